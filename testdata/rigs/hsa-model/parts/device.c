/* Devices, and the table that the thunk asks for. */
#include <dlfcn.h>
#include <link.h>
#include <sys/resource.h>

/* In model mode the thunk of 7.2.4 forgets to read the number of nodes before it makes two tables of that many entries
 * (hsaKmtOpenKFD): the number is what lies on the stack, and the tables take up to 36 GiB, of which 4 are written to.
 * It does without them where there is no memory. So the memory that may be added is limited to 256 MiB between the two
 * calls of the model that lie around that place. */
static struct rlimit data_limit;

static void limit_data(void) {
	unsigned long data = 0;
	FILE *f = fopen("/proc/self/statm", "r");
	if (!f || fscanf(f, "%*u %*u %*u %*u %*u %lu", &data) != 1) die("cannot read /proc/self/statm");
	fclose(f);
	if (getrlimit(RLIMIT_DATA, &data_limit)) die("getrlimit: %s", strerror(errno));
	struct rlimit less = {data * sysconf(_SC_PAGESIZE) + (256ul << 20), data_limit.rlim_max};
	if (less.rlim_cur < data_limit.rlim_cur && setrlimit(RLIMIT_DATA, &less)) die("setrlimit: %s", strerror(errno));
}

static void unlimit_data(void) {
	if (setrlimit(RLIMIT_DATA, &data_limit)) die("setrlimit: %s", strerror(errno));
}

enum { MAX_DEVICES = 8 };
static struct device *devices[MAX_DEVICES];
static int device_count;

static struct device *create(void) {
	unlimit_data();
	struct device *d = calloc(1, sizeof *d);
	if (!d) die("no memory for a device");
	if (device_count == MAX_DEVICES) die("more than %d devices", MAX_DEVICES);
	d->number = device_count;
	devices[device_count++] = d;
	return d;
}

static void destroy(struct device *d) { free(d); }

static void set_global_aperture(struct device *d, void *base, uint64_t size) {
	d->aperture = base, d->aperture_size = size;
	TRACE("device %d: aperture of %llu bytes at %p", d->number, (unsigned long long)size, base);
}

/* The thunk of 7.2.4 keeps one page of registers in a variable that it asserts to be empty, for every device
 * (model_set_mmio_page): with two devices the second ends the process. Nothing reads the variable. So it is emptied
 * before the second device's page comes: it is the one word of the runtime's own data that has the first page's
 * address. */
static uint64_t mmio_page;

static int forget_mmio_page(struct dl_phdr_info *object, size_t size, void *found) {
	(void)size;
	if (!strstr(object->dlpi_name, "libhsa-runtime64")) return 0;
	for (int i = 0; i < object->dlpi_phnum; i++) {
		const ElfW(Phdr) *part = object->dlpi_phdr + i;
		if (part->p_type != PT_LOAD || !(part->p_flags & PF_W)) continue;
		uintptr_t from = (object->dlpi_addr + part->p_vaddr + 7) & ~(uintptr_t)7;
		uintptr_t end = object->dlpi_addr + part->p_vaddr + part->p_memsz;
		for (; from + 8 <= end; from += 8) {
			uint64_t word;
			if (!copied(&word, (void *)from, 8) || word != mmio_page) continue;
			*(uint64_t *)from = 0;
			++*(int *)found;
		}
	}
	return 1;
}

static void alloced_memory(struct device *d, void *base, uint64_t size, uint32_t flags) {
	if (flags & MEM_MMIO_REMAP) {
		int found = 0;
		if (mmio_page && (!dl_iterate_phdr(forget_mmio_page, &found) || found != 1))
			die("the runtime has %d words with the address of the first page of registers, not 1: %s", found,
			    "is it another version than 7.2.4?");
		mmio_page = (uintptr_t)base;
	}
	TRACE("device %d: %llu bytes allocated at %p, flags %08x", d->number, (unsigned long long)size, base, flags);
}

static void freed_memory(struct device *d, void *base, uint64_t size) {
	TRACE("device %d: %llu bytes freed at %p", d->number, (unsigned long long)size, base);
}

/* Two callbacks that the thunk of 7.2.4 never sets. */
static void set_notify_event(struct device *d, void (*callback)(void *), void *data) {
	(void)callback, (void)data;
	die("set_notify_event on device %d: not part of this model", d->number);
}

static void set_wait_event(struct device *d, void (*callback)(void *, uint64_t, uint64_t), void *data) {
	(void)callback, (void)data;
	die("set_wait_event on device %d: not part of this model", d->number);
}

static struct queue *register_queue(struct device *d, struct queue_info *info) { return start_queue(d, info); }

static void set_set_event(struct device *d, set_event_fn fn, void *data) { d->set_event = fn, d->set_event_data = data; }

static void destroy_queue(struct device *d, struct queue *q) {
	TRACE("device %d: queue of type %u destroyed", d->number, q->info.type);
	end_queue(q);
}

const struct functions *get_hsakmt_model_functions(void) {
	static const struct functions table = {
		.version_major = VERSION_MAJOR,
		.version_minor = VERSION_MINOR,
		.create = create,
		.destroy = destroy,
		.set_global_aperture = set_global_aperture,
		.alloced_memory = alloced_memory,
		.freed_memory = freed_memory,
		.set_notify_event = set_notify_event,
		.set_wait_event = set_wait_event,
		.register_queue = register_queue,
		.set_set_event = set_set_event,
		.destroy_queue = destroy_queue,
	};
	read_settings();
	limit_data();
	return &table;
}
