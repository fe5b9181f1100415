/* Device addresses. The thunk keeps all memory of the model in one file, and maps what a device may touch into that
 * device's aperture; so an address of the device is an offset into the aperture, and what is not mapped there faults.
 * Host memory that was registered (hipHostRegister) is the exception: the thunk passes it on as shared virtual memory,
 * at its address in this process, which lies above the aperture.
 *
 * Every access goes through the kernel (process_vm_writev on this process), which answers EFAULT where memory is missing
 * or must not be written. So a bad address is a message of the model, and not a crash of the process in some thread. */
#include <errno.h>
#include <sys/uio.h>

struct device {
	int number;
	char *aperture;
	uint64_t aperture_size;
	set_event_fn set_event;
	void *set_event_data;
};

static char *at(struct device *d, uint64_t address) {
	return address < d->aperture_size ? d->aperture + address : (char *)(uintptr_t)address;
}

/* A real GPU reports such a fault through the driver and the runtime ends the process; the model has no way to report
 * it, and ends the process itself. */
__attribute__((noreturn)) static void fault(struct device *d, const char *what, uint64_t to, uint64_t from, uint64_t n) {
	die("memory access fault on device %d: %s of %llu bytes to 0x%llx from 0x%llx", d->number, what,
	    (unsigned long long)n, (unsigned long long)to, (unsigned long long)from);
}

/* Copies within this process; 0 where some of it is not mapped, or must not be written. */
static int copied(void *to, const void *from, uint64_t n) {
	while (n) {
		struct iovec source = {(void *)(uintptr_t)from, n}, target = {to, n};
		ssize_t done = process_vm_writev(getpid(), &source, 1, &target, 1, 0);
		if (done < 0 && errno == EFAULT) return 0;
		if (done <= 0) die("process_vm_writev: %s", strerror(errno));
		to = (char *)to + done, from = (const char *)from + done, n -= done;
	}
	return 1;
}

/* The device copies; what names the packet. */
static void device_copy(struct device *d, const char *what, uint64_t to, uint64_t from, uint64_t n) {
	if (!copied(at(d, to), at(d, from), n)) fault(d, what, to, from, n);
}

/* The device reads into the model's own memory, and writes from it. */
static void device_read(struct device *d, const char *what, void *to, uint64_t from, uint64_t n) {
	if (!copied(to, at(d, from), n)) fault(d, what, 0, from, n);
}

static void device_write(struct device *d, const char *what, uint64_t to, const void *from, uint64_t n) {
	if (!copied(at(d, to), from, n)) fault(d, what, to, 0, n);
}

/* A word that others change at the same time: where it is in this process, after a check that it can be read. */
static void *shared_word(struct device *d, const char *what, uint64_t address, unsigned size) {
	uint64_t probe;
	if (address % size) die("%s on device %d: the address 0x%llx is not aligned", what, d->number,
	                        (unsigned long long)address);
	device_read(d, what, &probe, address, size);
	return at(d, address);
}
