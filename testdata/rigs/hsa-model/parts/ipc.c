/* Memory of other processes. In model mode ROCr's own way ends the process, as it needs a kernel driver, so these three
 * functions of ROCr are replaced: with LD_PRELOAD HIP finds the ones here. What HIP does around them stays AMD's. A handle
 * says where the memory is in the file that holds all memory of a model, and whose file it is. To attach it, memory of
 * the same size is allocated, and the pages at its addresses are replaced by those of the other process. */
#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <sys/mman.h>

enum { HSA_SUCCESS = 0, HSA_ERROR_INVALID_ARGUMENT = 0x1001, HSA_ERROR_OUT_OF_RESOURCES = 0x1008 };
enum { POOL_INFO_SEGMENT = 0, POOL_INFO_GLOBAL_FLAGS = 1, POOL_SEGMENT_GLOBAL = 0, POOL_COARSE_GRAINED = 4 };
#define MODEL_FILE "/memfd:hsakmt_model"

struct ipc_handle { /* of 32 bytes: hsa_amd_ipc_memory_t */
	uint32_t magic, pid, fd, unused;
	uint64_t offset, size;
};
enum { IPC_MAGIC = 0x4d434950 };

/* What was attached: where, and which part of this process's own file was there before. */
struct attached {
	char *at;
	uint64_t size, own;
	struct attached *next;
};
static struct attached *all_attached;
static pthread_mutex_t ipc_lock = PTHREAD_MUTEX_INITIALIZER;

/* Rounded up to whole pages. */
static uint64_t pages(uint64_t n) { return (n + 4095) & ~4095ull; }

/* Where in the model's file n bytes at an address of this process are; -1 if they are not in it. */
static int64_t file_offset(const char *address, uint64_t n) {
	FILE *maps = fopen("/proc/self/maps", "r");
	if (!maps) die("cannot read /proc/self/maps");
	char line[PATH_MAX + 100];
	int64_t found = -1;
	while (found < 0 && fgets(line, sizeof line, maps)) {
		uint64_t from, to, offset;
		if (!strstr(line, MODEL_FILE) || sscanf(line, "%lx-%lx %*s %lx", &from, &to, &offset) != 3) continue;
		if (from <= (uintptr_t)address && (uintptr_t)address + n <= to) found = offset + ((uintptr_t)address - from);
	}
	fclose(maps);
	return found;
}

/* The descriptor of this process's own file. */
static int own_file(void) {
	static int own = -1;
	char path[64], name[PATH_MAX];
	for (int fd = 0; own < 0 && fd < 4096; fd++) {
		snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
		ssize_t n = readlink(path, name, sizeof name - 1);
		if (n > 0 && !strncmp(name, MODEL_FILE, strlen(MODEL_FILE))) own = fd;
	}
	if (own < 0) die("the file with the model's memory is not open");
	return own;
}

/* Puts pages of a file at a device address: for each device that has memory there, and for the CPU. */
static void replace_pages(char *at_device, uint64_t size, int fd, uint64_t offset) {
	for (int i = -1; i < device_count; i++) {
		char *here = i < 0 ? at_device : at(devices[i], (uintptr_t)at_device);
		if (file_offset(here, size) < 0) continue;
		if (mmap(here, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, offset) == MAP_FAILED)
			die("cannot map memory of another process: %s", strerror(errno));
	}
}

/* Where memory of a device is in the file: the first device that has it says so. */
static int64_t device_offset(const void *p, uint64_t size) {
	int64_t offset = -1;
	for (int i = 0; offset < 0 && i < device_count; i++) offset = file_offset(at(devices[i], (uintptr_t)p), size);
	return offset;
}

uint32_t hsa_amd_ipc_memory_create(void *p, uint64_t size, struct ipc_handle *handle) {
	int64_t offset = device_offset(p, pages(size));
	if (offset < 0 || offset % 4096) return HSA_ERROR_INVALID_ARGUMENT;
	*handle = (struct ipc_handle){IPC_MAGIC, getpid(), own_file(), 0, offset, size};
	TRACE("%llu bytes at %p are shared", (unsigned long long)size, p);
	return HSA_SUCCESS;
}

/* Functions of ROCr that are called here; agents and pools are 64-bit handles. */
static void *rocr(const char *name) {
	void *library = dlopen("libhsa-runtime64.so.1", RTLD_NOW | RTLD_NOLOAD), *f = library ? dlsym(library, name) : NULL;
	if (!f) die("ROCr has no function %s", name);
	return f;
}

static uint32_t coarse_pool(uint64_t pool, void *found) {
	uint32_t (*info)(uint64_t, int, void *) = rocr("hsa_amd_memory_pool_get_info");
	uint32_t segment = 0, flags = 0;
	if (info(pool, POOL_INFO_SEGMENT, &segment) || info(pool, POOL_INFO_GLOBAL_FLAGS, &flags)) return 0;
	if (segment == POOL_SEGMENT_GLOBAL && flags & POOL_COARSE_GRAINED) *(uint64_t *)found = pool;
	return 0;
}

uint32_t hsa_amd_ipc_memory_attach(const struct ipc_handle *handle, uint64_t size, uint32_t agents,
				   const uint64_t *agent, void **mapped) {
	uint32_t (*pools)(uint64_t, uint32_t (*)(uint64_t, void *), void *) = rocr("hsa_amd_agent_iterate_memory_pools");
	uint32_t (*allocate)(uint64_t, uint64_t, uint32_t, void **) = rocr("hsa_amd_memory_pool_allocate");
	uint32_t (*allow)(uint32_t, const uint64_t *, const uint32_t *, const void *) = rocr("hsa_amd_agents_allow_access");
	if (handle->magic != IPC_MAGIC || size > handle->size || !agents) return HSA_ERROR_INVALID_ARGUMENT;
	char path[64], name[PATH_MAX];
	snprintf(path, sizeof path, "/proc/%u/fd/%u", handle->pid, handle->fd);
	ssize_t n = readlink(path, name, sizeof name - 1);
	int fd = n > 0 && !strncmp(name, MODEL_FILE, strlen(MODEL_FILE)) ? open(path, O_RDWR | O_CLOEXEC) : -1;
	if (fd < 0) {
		say("memory of process %u cannot be opened: %s", handle->pid, strerror(errno));
		return HSA_ERROR_INVALID_ARGUMENT;
	}
	uint64_t pool = 0;
	struct attached *a = calloc(1, sizeof *a);
	uint32_t code = HSA_ERROR_OUT_OF_RESOURCES;
	if (!a || pools(*agent, coarse_pool, &pool) || !pool || allocate(pool, pages(size), 0, mapped)) goto end;
	/* The first agent is the device, the others are those that may access it, too. */
	if (agents > 1 && allow(agents, agent, NULL, *mapped)) goto end;
	int64_t own = device_offset(*mapped, pages(size));
	if (own < 0) die("new memory at %p is not in the model's file", *mapped);
	pthread_mutex_lock(&ipc_lock);
	*a = (struct attached){*mapped, pages(size), own, all_attached};
	all_attached = a, a = NULL;
	replace_pages(*mapped, pages(size), fd, handle->offset);
	pthread_mutex_unlock(&ipc_lock);
	TRACE("%llu bytes of process %u are attached at %p", (unsigned long long)size, handle->pid, *mapped);
	code = HSA_SUCCESS;
end:
	free(a);
	close(fd);
	return code;
}

uint32_t hsa_amd_ipc_memory_detach(void *mapped) {
	uint32_t (*release)(void *) = rocr("hsa_amd_memory_pool_free");
	pthread_mutex_lock(&ipc_lock);
	struct attached **at = &all_attached;
	while (*at && (*at)->at != mapped) at = &(*at)->next;
	struct attached *a = *at;
	if (a) {
		*at = a->next;
		replace_pages(a->at, a->size, own_file(), a->own);
	}
	pthread_mutex_unlock(&ipc_lock);
	if (!a) return HSA_ERROR_INVALID_ARGUMENT;
	free(a);
	TRACE("memory at %p is detached", mapped);
	return release(mapped);
}
