/* hipsim is a libamdhip64.so without a GPU: the HIP entry points that gguf2gpu uses, checked more strictly than AMD's
 * runtime does it. README.md says how to build and steer it. All state is behind one lock; each stream has a thread. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <fcntl.h>
#include <time.h>
#include <unistd.h>

enum {
	SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE_POINTER = 17, INVALID_KIND = 21, NO_DEVICE = 100,
	INVALID_DEVICE = 101, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, NO_BINARY_FOR_GPU = 209, INVALID_HANDLE = 400,
	NOT_FOUND = 500, NOT_READY = 600, ILLEGAL_ADDRESS = 700,
	PEER_ALREADY_ENABLED = 704, PEER_NOT_ENABLED = 705, CONTEXT_DESTROYED = 709, ALREADY_REGISTERED = 712,
	NOT_REGISTERED = 713, NOT_SUPPORTED = 801
};
enum { EVENT_BLOCKING = 1, EVENT_NO_TIMING = 2, EVENT_INTERPROCESS = 4, MAX_DEVICES = 16, MAX_FAULTS = 32, PAGE = 4096 };

#define ARCH "gfx90a:sramecc+:xnack-" /* of every device */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER; /* broadcast whenever work ends or the gate moves */
static __thread int current;                              /* device, per OS thread */

static struct {
	int devices, integrated, version, poison, verbose, hold;
	size_t memory;
	long delay_us;
	unsigned seed;
	char *report;
} cfg = { .devices = 1, .version = 6, .poison = 1, .memory = (size_t)1 << 30, .delay_us = 100, .seed = 1 };

static struct stat_counter { const char *name; long long v; } stats[] = {
	{"calls", 0}, {"misuses", 0}, {"faults", 0}, {"device_allocations", 0}, {"device_bytes", 0}, {"peak_device_bytes", 0},
	{"host_allocations", 0}, {"host_bytes", 0}, {"registrations", 0}, {"ipc_opens", 0}, {"streams", 0}, {"events", 0},
	{"copies", 0}, {"copied_bytes", 0}, {"unpinned_copies", 0}, {"memsets", 0}, {"modules", 0}, {"launches", 0},
};
enum { S_CALLS, S_MISUSES, S_FAULTS, S_DEV, S_DEVBYTES, S_PEAK, S_HOST, S_HOSTBYTES, S_REG, S_IPC, S_STREAMS, S_EVENTS,
	S_COPIES, S_COPIED, S_UNPINNED, S_MEMSETS, S_MODULES, S_LAUNCHES, S_COUNT };

/* ---- statistics ---- */

/* report rewrites the line in HIPSIM_REPORT. The file is mapped, so that the line survives an exit that runs no
 * destructors (as Go's) and even a crash. */
static void report(void) {
	if (!cfg.report) return;
	int n = 0;
	for (int i = 0; i < S_COUNT; i++)
		n += snprintf(cfg.report + n, PAGE - n, "%c\"%s\":%lld", i ? ',' : '{', stats[i].name, stats[i].v);
	snprintf(cfg.report + n, PAGE - n, "}");
	memset(cfg.report + n + 1, ' ', PAGE - n - 2);
	cfg.report[PAGE - 1] = '\n';
}

static void add(int which, long long v) {
	stats[which].v += v;
	if (stats[S_DEVBYTES].v > stats[S_PEAK].v) stats[S_PEAK].v = stats[S_DEVBYTES].v;
	report();
}

/* misuse counts a call that breaks HIP's rules and returns its code. */
static int misuse(int code, const char *why) {
	add(S_MISUSES, 1);
	if (cfg.verbose) fprintf(stderr, "hipsim: error %d: %s\n", code, why);
	return code;
}

/* ---- faults ---- */

enum mode { NOW, ASYNC, STALL };
struct fault { char func[48]; long nth; int code; enum mode mode; long ms; long seen; };
static struct fault faults[MAX_FAULTS];
static int nfaults;
static __thread struct fault armed; /* for the operation that the current call enqueues; mode NOW: none */

/* parse_faults reads "FUNC:N:CODE[:async|:stall[=MS]]", separated by commas. */
static int parse_faults(const char *spec) {
	nfaults = 0;
	while (*spec) {
		if (nfaults == MAX_FAULTS) return -1;
		struct fault f = {0};
		char mode[32] = "";
		int used = 0;
		if (sscanf(spec, "%47[^:,]:%ld:%d%n", f.func, &f.nth, &f.code, &used) != 3) return -1;
		spec += used;
		if (*spec == ':') {
			if (sscanf(spec, ":%31[^,]%n", mode, &used) != 1) return -1;
			spec += used;
			if (!strcmp(mode, "async")) f.mode = ASYNC;
			else if (!strcmp(mode, "stall")) f.mode = STALL;
			else if (sscanf(mode, "stall=%ld", &f.ms) == 1) f.mode = STALL;
			else return -1;
		}
		faults[nfaults++] = f;
		if (*spec == ',') spec++;
		else if (*spec) return -1;
	}
	return 0;
}

struct func { const char *name; long calls; struct func *next; };
static struct func *funcs;

/* enter takes the lock, counts the call and returns the code of a fault that is due at once, else 0. */
static int enter(struct func *f) {
	pthread_mutex_lock(&lock);
	if (!f->calls++) { f->next = funcs; funcs = f; }
	add(S_CALLS, 1);
	armed.mode = NOW;
	int code = 0;
	for (int i = 0; i < nfaults; i++) {
		struct fault *x = &faults[i];
		if (strcmp(x->func, f->name)) continue;
		x->seen++;
		if (x->nth && x->seen != x->nth) continue;
		add(S_FAULTS, 1);
		if (x->mode == NOW) code = x->code;
		else armed = *x;
	}
	return code;
}

static int leave(int code) { pthread_mutex_unlock(&lock); return code; }

/* An entry point is its name, its parameters and a body that runs under the lock. DEVICE_API needs a GPU. */
#define API(name, params, args) \
	static int sim_##name params; \
	int name params { \
		static struct func f = {#name, 0, 0}; \
		int code = enter(&f); \
		return leave(code ? code : sim_##name args); \
	} \
	static int sim_##name params
#define DEVICE_API(name, params, args) \
	static int dev_##name params; \
	API(name, params, args) { return cfg.devices ? dev_##name args : INVALID_DEVICE; } \
	static int dev_##name params

/* ---- memory ---- */

enum kind { DEVICE, HOST, REGISTERED };
struct range {
	enum kind kind;
	int dev, fd, ipc;
	uintptr_t addr;   /* what the caller knows; for device memory nobody may touch it */
	char *data;       /* where the bytes are */
	size_t size, map; /* as asked for, and as mapped */
	struct range *next;
};
static struct range *ranges;
static size_t used[MAX_DEVICES];
static char peers[MAX_DEVICES][MAX_DEVICES];

/* overlap returns a range that shares bytes with [p, p+n). */
static struct range *overlap(uintptr_t p, size_t n) {
	for (struct range *r = ranges; r; r = r->next)
		if (p < r->addr + r->size && r->addr < p + n) return r;
	return NULL;
}

static int inside(const struct range *r, uintptr_t p, size_t n) {
	return r && p >= r->addr && n <= r->size && p - r->addr <= r->size - n;
}

static struct range **find_start(uintptr_t p) {
	for (struct range **r = &ranges; *r; r = &(*r)->next)
		if ((*r)->addr == p) return r;
	return NULL;
}

static struct range *new_range(struct range init) {
	struct range *r = malloc(sizeof *r);
	*r = init;
	r->next = ranges;
	return ranges = r;
}

static size_t whole_pages(size_t n) { return (n + PAGE - 1) / PAGE * PAGE; }

/* reserve returns the middle of map + 2 pages that nobody may touch, NULL if there is no room. */
static char *reserve(size_t map) {
	char *p = mmap(NULL, map + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	return p == MAP_FAILED ? NULL : p + PAGE;
}

/* map_device gives device memory an address that faults when the host follows it, and its bytes, which kernels see, a forbidden
 * page at each end. */
static struct range *map_device(int fd, size_t n, int dev, int ipc) {
	size_t map = whole_pages(n);
	char *addr = reserve(map), *data = reserve(map);
	if (!addr || !data) return NULL;
	if (mmap(data, map, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) return NULL;
	return new_range((struct range){ .kind = DEVICE, .dev = dev, .fd = fd, .ipc = ipc, .addr = (uintptr_t)addr,
		.data = data, .size = n, .map = map });
}

static int device_malloc(void **p, size_t n, int dev) {
	if (!p) return misuse(INVALID_VALUE, "null pointer for the result");
	if (n == 0) { *p = NULL; return SUCCESS; }
	if (n > cfg.memory || used[dev] > cfg.memory - n) return OUT_OF_MEMORY;
	int fd = memfd_create("hipsim", MFD_CLOEXEC);
	if (fd < 0 || ftruncate(fd, whole_pages(n))) return OUT_OF_MEMORY;
	struct range *r = map_device(fd, n, dev, 0);
	if (!r) { close(fd); return OUT_OF_MEMORY; }
	if (cfg.poison) memset(r->data, 0xA5, n);
	used[dev] += n;
	add(S_DEV, 1);
	add(S_DEVBYTES, n);
	*p = (void *)r->addr;
	return SUCCESS;
}

static void remove_range(struct range **link) {
	struct range *r = *link;
	*link = r->next;
	switch (r->kind) {
	case DEVICE:
		munmap((void *)(r->addr - PAGE), r->map + 2 * PAGE);
		munmap(r->data - PAGE, r->map + 2 * PAGE);
		close(r->fd);
		if (r->ipc) { add(S_IPC, -1); break; }
		used[r->dev] -= r->size;
		add(S_DEV, -1);
		add(S_DEVBYTES, -(long long)r->size);
		break;
	case HOST:
		munmap(r->data, r->map);
		add(S_HOST, -1);
		add(S_HOSTBYTES, -(long long)r->size);
		break;
	case REGISTERED:
		add(S_REG, -1);
	}
	free(r);
}

/* writable reports whether all pages of [p, p+n) are mapped for reading and writing. */
static int writable(uintptr_t p, size_t n) {
	FILE *f = fopen("/proc/self/maps", "r");
	if (!f) return 0;
	char line[512], perm[8];
	unsigned long from, to;
	uintptr_t at = p;
	while (at < p + n && fgets(line, sizeof line, f))
		if (sscanf(line, "%lx-%lx %7s", &from, &to, perm) == 3 && from <= at && at < to && perm[0] == 'r' && perm[1] == 'w')
			at = to;
	fclose(f);
	return at >= p + n;
}

/* ---- streams and events ---- */

/* A mark is what one hipEventRecord leaves: events, waits and the queue share it. */
struct mark { int refs, done, code; struct timespec at; };
struct event { int dev, live; unsigned flags; struct mark *mark; struct event *next; };
enum what { COPY, SET, RECORD, WAIT, FREE, LAUNCH };
enum { MAX_PARAMS = 6 }; /* of a kernel; hiprtc.c sees to it */
struct op {
	enum what what;
	uintptr_t dst, src;
	size_t n;
	int value;
	struct function *function; /* of a launch, with its grid and its arguments */
	unsigned blocks, threads;
	unsigned long long args[MAX_PARAMS];
	struct mark *mark;
	struct fault fault;
	struct op *next;
};
struct stream {
	int dev, live, stop, code; /* code: of the first operation that failed; it stays */
	unsigned seed;
	pthread_t thread;
	struct op *head, **tail;
	struct stream *next;
};
/* A code object is a shared library that hiprtc.c has made: kernels by name, and what runs a grid of one. */
struct function { struct module *module; int params; void *kernel; struct function *next; };
struct module {
	int dev, live, fd; /* fd: of the file; open as long as it is loaded, as dlopen tells libraries apart by their names, too */
	void *lib;
	void (*run)(void *kernel, const unsigned long long *args, unsigned blocks, unsigned threads);
	struct function *functions;
	struct module *next;
};
static struct stream *streams; /* closed ones stay in the lists, so that no address is given out twice */
static struct event *events;

static void unref(struct mark *m) { if (m && --m->refs == 0) free(m); }

static struct stream *find_stream(void *h) {
	for (struct stream *s = streams; s; s = s->next)
		if (s == h && s->live) return s;
	if (cfg.version >= 7) {
		fprintf(stderr, "hipsim: invalid stream %p: HIP 7 crashes here\n", h);
		abort();
	}
	misuse(CONTEXT_DESTROYED, "invalid stream (the null stream is refused, too)");
	return NULL;
}

static struct event *find_event(void *h) {
	for (struct event *e = events; e; e = e->next)
		if (e == h && e->live) return e;
	misuse(INVALID_HANDLE, "invalid event");
	return NULL;
}

/* bytes returns where n bytes at p really are, NULL if they are in freed or foreign device memory. */
static char *bytes(uintptr_t p, size_t n) {
	struct range *r = overlap(p, n);
	if (!r) return (char *)p; /* memory of the host that HIP does not know */
	return inside(r, p, n) ? r->data + (p - r->addr) : NULL;
}

static int run_copy(uintptr_t dst, uintptr_t src, size_t n) {
	char *d = bytes(dst, n), *s = bytes(src, n);
	if (!d || !s) return ILLEGAL_ADDRESS;
	pthread_mutex_unlock(&lock);
	memcpy(d, s, n);
	pthread_mutex_lock(&lock);
	add(S_COPIES, 1);
	add(S_COPIED, n);
	return SUCCESS;
}

/* run_kernel runs a grid. An argument that is an address in device memory becomes that of the bytes behind it. */
static int run_kernel(struct op *op) {
	struct module *m = op->function->module;
	if (!m->live) return ILLEGAL_ADDRESS; /* unloaded meanwhile */
	unsigned long long args[MAX_PARAMS];
	for (int i = 0; i < MAX_PARAMS; i++) {
		struct range *r = i < op->function->params ? overlap(op->args[i], 1) : NULL;
		if (r && r->kind == DEVICE && r->dev != m->dev && !peers[m->dev][r->dev]) return ILLEGAL_ADDRESS;
		args[i] = r ? (uintptr_t)r->data + (op->args[i] - r->addr) : op->args[i];
	}
	pthread_mutex_unlock(&lock);
	m->run(op->function->kernel, args, op->blocks, op->threads);
	pthread_mutex_lock(&lock);
	add(S_LAUNCHES, 1);
	return SUCCESS;
}

/* run does one operation, under the lock, and returns its code. */
static int run(struct op *op) {
	char *d;
	struct range **link;
	switch (op->what) {
	case COPY:
		if (!overlap(op->dst, op->n) || !overlap(op->src, op->n)) return ILLEGAL_ADDRESS; /* freed meanwhile */
		return run_copy(op->dst, op->src, op->n);
	case SET:
		if (!overlap(op->dst, op->n) || !(d = bytes(op->dst, op->n))) return ILLEGAL_ADDRESS;
		memset(d, op->value, op->n);
		add(S_MEMSETS, 1);
		return SUCCESS;
	case WAIT:
		while (!op->mark->done) pthread_cond_wait(&changed, &lock);
		return op->mark->code;
	case FREE:
		if ((link = find_start(op->dst))) remove_range(link);
		return SUCCESS;
	case LAUNCH:
		return run_kernel(op);
	case RECORD:
		return SUCCESS;
	}
	return SUCCESS;
}

/* stall keeps the stream busy for ms milliseconds, forever if that is 0. */
static void stall(long ms) {
	struct timespec until;
	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_sec += ms / 1000;
	until.tv_nsec += ms % 1000 * 1000000;
	if (until.tv_nsec >= 1000000000) { until.tv_sec++; until.tv_nsec -= 1000000000; }
	if (ms == 0) for (;;) pthread_cond_wait(&changed, &lock);
	while (pthread_cond_timedwait(&changed, &lock, &until) == 0) {}
}

static void *work(void *arg) {
	struct stream *s = arg;
	pthread_mutex_lock(&lock);
	for (;;) {
		struct op *op = s->head;
		if ((!op && !s->stop) || (op && cfg.hold)) { pthread_cond_wait(&changed, &lock); continue; }
		if (!op) break;
		long delay = cfg.delay_us > 0 ? rand_r(&s->seed) % (cfg.delay_us + 1) : 0;
		if (delay) {
			pthread_mutex_unlock(&lock);
			usleep(delay);
			pthread_mutex_lock(&lock);
		}
		if (op->fault.mode == STALL) stall(op->fault.ms);
		if (!s->code) s->code = op->fault.mode == ASYNC ? op->fault.code : run(op);
		if (op->what == RECORD) {
			op->mark->done = 1;
			op->mark->code = s->code;
			clock_gettime(CLOCK_MONOTONIC, &op->mark->at);
		}
		unref(op->mark);
		s->head = op->next;
		if (!s->head) s->tail = &s->head;
		free(op);
		pthread_cond_broadcast(&changed);
	}
	pthread_mutex_unlock(&lock);
	return NULL;
}

static int enqueue(struct stream *s, struct op init) {
	struct op *op = malloc(sizeof *op);
	*op = init;
	op->fault = armed;
	op->next = NULL;
	*s->tail = op;
	s->tail = &op->next;
	pthread_cond_broadcast(&changed);
	return SUCCESS;
}

static int drain(struct stream *s) {
	while (s->head) pthread_cond_wait(&changed, &lock);
	return s->code;
}

static int drain_device(int dev) {
	int code = SUCCESS;
	for (struct stream *s = streams; s; s = s->next)
		if (!s->stop && s->dev == dev) { int c = drain(s); if (!code) code = c; }
	return code;
}

/* ---- versions, devices ---- */

static int version(int *v) {
	if (!v) return misuse(INVALID_VALUE, "null pointer for the version");
	*v = cfg.version == 5 ? 50221153 : cfg.version == 6 ? 60342134 : cfg.version * 10000000 + 51831;
	return SUCCESS;
}

API(hipRuntimeGetVersion, (int *v), (v)) { return version(v); }

API(hipDriverGetVersion, (int *v), (v)) { return version(v); }

API(hipGetDeviceCount, (int *n), (n)) {
	if (!n) return misuse(INVALID_VALUE, "null pointer for the count");
	*n = cfg.devices;
	return cfg.devices ? SUCCESS : NO_DEVICE;
}

static int no_such(int dev) { return dev < 0 || dev >= cfg.devices; }

DEVICE_API(hipSetDevice, (int dev), (dev)) {
	if (no_such(dev)) return misuse(INVALID_DEVICE, "hipSetDevice");
	current = dev;
	return SUCCESS;
}

DEVICE_API(hipGetDevice, (int *dev), (dev)) {
	if (!dev) return misuse(INVALID_VALUE, "hipGetDevice: null pointer");
	*dev = current;
	return SUCCESS;
}

DEVICE_API(hipDeviceGetName, (char *name, int len, int dev), (name, len, dev)) {
	if (no_such(dev)) return misuse(INVALID_DEVICE, "hipDeviceGetName");
	if (!name || len <= 0) return misuse(INVALID_VALUE, "hipDeviceGetName: no room");
	snprintf(name, len, "Simulated GPU %d", dev);
	return SUCCESS;
}

DEVICE_API(hipDeviceGetPCIBusId, (char *id, int len, int dev), (id, len, dev)) {
	if (no_such(dev)) return misuse(INVALID_DEVICE, "hipDeviceGetPCIBusId");
	if (!id || len <= 0) return misuse(INVALID_VALUE, "hipDeviceGetPCIBusId: no room");
	snprintf(id, len, "%04x:%02x:%02x.%x", 0, 0xc1 + dev, 0, 0);
	return len <= 12 ? misuse(INVALID_VALUE, "hipDeviceGetPCIBusId: truncated") : SUCCESS;
}

DEVICE_API(hipDeviceGetAttribute, (int *v, int attr, int dev), (v, attr, dev)) {
	if (no_such(dev)) return misuse(INVALID_DEVICE, "hipDeviceGetAttribute");
	if (!v) return misuse(INVALID_VALUE, "hipDeviceGetAttribute: null pointer");
	switch (attr) {
	case 2: *v = 8; return SUCCESS;               /* asynchronous engines: AMD's constant */
	case 3: *v = 1; return SUCCESS;               /* can map host memory */
	case 16: *v = cfg.integrated; return SUCCESS;
	case 63: *v = 104; return SUCCESS;            /* multiprocessors */
	case 67: *v = 0xc1 + dev; return SUCCESS;     /* PCI bus */
	case 68: case 69: *v = 0; return SUCCESS;     /* PCI device, domain */
	case 87: *v = 64; return SUCCESS;             /* warp size */
	case 88: *v = 1; return SUCCESS;              /* memory pools */
	}
	return misuse(INVALID_VALUE, "hipDeviceGetAttribute: unknown attribute");
}

DEVICE_API(hipDeviceTotalMem, (size_t *n, int dev), (n, dev)) {
	if (no_such(dev)) return misuse(INVALID_DEVICE, "hipDeviceTotalMem");
	if (!n) return misuse(INVALID_VALUE, "hipDeviceTotalMem: null pointer");
	*n = cfg.memory;
	return SUCCESS;
}

DEVICE_API(hipMemGetInfo, (size_t *free_bytes, size_t *total), (free_bytes, total)) {
	if (free_bytes) *free_bytes = cfg.memory - used[current];
	if (total) *total = cfg.memory;
	return SUCCESS;
}

DEVICE_API(hipDeviceSynchronize, (void), ()) { return drain_device(current); }

#ifndef HIPSIM_NO_OPTIONAL
/* properties fills a hipDeviceProp_t of the given layout; not one byte more than its size is touched. */
static int properties(char *p, int dev, size_t size, int memory, int integrated, int arch) {
	if (no_such(dev)) return misuse(INVALID_DEVICE, "hipGetDeviceProperties");
	if (!p) return misuse(INVALID_VALUE, "hipGetDeviceProperties: null pointer");
	memset(p, 0, size);
	snprintf(p, 256, "Simulated GPU %d", dev);
	memcpy(p + memory, &cfg.memory, sizeof cfg.memory);
	memcpy(p + integrated, &cfg.integrated, sizeof cfg.integrated);
	snprintf(p + arch, 256, ARCH);
	return SUCCESS;
}

DEVICE_API(hipGetDeviceProperties, (char *p, int dev), (p, dev)) { return properties(p, dev, 792, 256, 652, 396); }

#ifndef HIPSIM_NO_R0600
DEVICE_API(hipGetDevicePropertiesR0600, (char *p, int dev), (p, dev)) { return properties(p, dev, 1472, 288, 396, 1160); }
#endif

DEVICE_API(hipDeviceGetUuid, (char *uuid, int dev), (uuid, dev)) {
	if (no_such(dev)) return misuse(INVALID_DEVICE, "hipDeviceGetUuid");
	char text[17];
	snprintf(text, sizeof text, "%016x", 0xabc0 + dev);
	memcpy(uuid, text, 16);
	return SUCCESS;
}

DEVICE_API(hipDeviceCanAccessPeer, (int *can, int dev, int peer), (can, dev, peer)) {
	if (no_such(dev) || no_such(peer)) return misuse(INVALID_DEVICE, "hipDeviceCanAccessPeer");
	*can = dev != peer;
	return SUCCESS;
}

DEVICE_API(hipDeviceEnablePeerAccess, (int peer, unsigned flags), (peer, flags)) {
	if (flags) return misuse(INVALID_VALUE, "hipDeviceEnablePeerAccess: flags");
	if (no_such(peer) || peer == current) return misuse(INVALID_DEVICE, "hipDeviceEnablePeerAccess");
	if (peers[current][peer]) return PEER_ALREADY_ENABLED;
	peers[current][peer] = 1;
	return SUCCESS;
}

DEVICE_API(hipDeviceDisablePeerAccess, (int peer), (peer)) {
	if (no_such(peer) || peer == current) return misuse(INVALID_DEVICE, "hipDeviceDisablePeerAccess");
	if (!peers[current][peer]) return PEER_NOT_ENABLED;
	peers[current][peer] = 0;
	return SUCCESS;
}
#endif

/* ---- allocation ---- */

DEVICE_API(hipMalloc, (void **p, size_t n), (p, n)) { return device_malloc(p, n, current); }

DEVICE_API(hipFree, (void *p), (p)) {
	if (!p) return SUCCESS;
	struct range **link = find_start((uintptr_t)p);
	if (!link || (*link)->kind != DEVICE || (*link)->ipc) return misuse(INVALID_VALUE, "hipFree: unknown pointer");
	drain_device((*link)->dev);
	link = find_start((uintptr_t)p); /* the list may have changed while waiting */
	if (!link) return misuse(INVALID_VALUE, "hipFree: freed twice at once");
	remove_range(link);
	return SUCCESS;
}

DEVICE_API(hipHostMalloc, (void **p, size_t n, unsigned flags), (p, n, flags)) {
	if (!p) return misuse(INVALID_VALUE, "hipHostMalloc: null pointer");
	if ((flags & ~0xE0000007u) || (flags & 0xC0000000u) == 0xC0000000u) return misuse(INVALID_VALUE, "hipHostMalloc: flags");
	if (n == 0) { *p = NULL; return SUCCESS; }
	size_t map = whole_pages(n);
	char *data = mmap(NULL, map, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (data == MAP_FAILED) return OUT_OF_MEMORY;
	new_range((struct range){ .kind = HOST, .dev = current, .addr = (uintptr_t)data, .data = data, .size = n, .map = map });
	add(S_HOST, 1);
	add(S_HOSTBYTES, n);
	*p = data;
	return SUCCESS;
}

/* unpin is hipHostFree and hipHostUnregister. */
static int unpin(void *p, enum kind kind, int code) {
	struct range **link = find_start((uintptr_t)p);
	if (!link || (*link)->kind != kind) return misuse(code, "hipHostFree or hipHostUnregister: unknown pointer");
	for (int dev = 0; dev < cfg.devices; dev++) drain_device(dev);
	if (!(link = find_start((uintptr_t)p))) return misuse(code, "hipHostFree or hipHostUnregister: twice at once");
	remove_range(link);
	return SUCCESS;
}

DEVICE_API(hipHostFree, (void *p), (p)) { return p ? unpin(p, HOST, INVALID_VALUE) : SUCCESS; }

DEVICE_API(hipHostRegister, (void *p, size_t n, unsigned flags), (p, n, flags)) {
	uintptr_t a = (uintptr_t)p;
	if (!p || !n || flags > 15) return misuse(INVALID_VALUE, "hipHostRegister: arguments");
	if (overlap(a, n)) return misuse(ALREADY_REGISTERED, "hipHostRegister: overlap");
	if (!writable(a, n)) return misuse(INVALID_VALUE, "hipHostRegister: not writable memory");
	new_range((struct range){ .kind = REGISTERED, .dev = current, .addr = a, .data = p, .size = n });
	add(S_REG, 1);
	return SUCCESS;
}

DEVICE_API(hipHostUnregister, (void *p), (p)) { return unpin(p, REGISTERED, NOT_REGISTERED); }

DEVICE_API(hipHostGetDevicePointer, (void **d, void *h, unsigned flags), (d, h, flags)) {
	struct range *r = overlap((uintptr_t)h, 1);
	if (!d || flags || !r || r->kind == DEVICE) return misuse(INVALID_VALUE, "hipHostGetDevicePointer");
	*d = h;
	return SUCCESS;
}

/* ---- streams ---- */

DEVICE_API(hipStreamCreateWithFlags, (void **out, unsigned flags), (out, flags)) {
	if (!out || flags > 1) return misuse(INVALID_VALUE, "hipStreamCreateWithFlags");
	struct stream *s = calloc(1, sizeof *s);
	s->dev = current;
	s->live = 1;
	s->tail = &s->head;
	s->seed = cfg.seed++;
	if (pthread_create(&s->thread, NULL, work, s)) { free(s); return OUT_OF_MEMORY; }
	s->next = streams;
	streams = s;
	add(S_STREAMS, 1);
	*out = s;
	return SUCCESS;
}

DEVICE_API(hipStreamDestroy, (void *h), (h)) {
	struct stream *s = find_stream(h);
	if (!s) return CONTEXT_DESTROYED;
	s->live = 0;
	drain(s);
	s->stop = 1;
	pthread_cond_broadcast(&changed);
	pthread_mutex_unlock(&lock);
	pthread_join(s->thread, NULL);
	pthread_mutex_lock(&lock);
	add(S_STREAMS, -1);
	return SUCCESS;
}

DEVICE_API(hipStreamSynchronize, (void *h), (h)) {
	struct stream *s = find_stream(h);
	return s ? drain(s) : CONTEXT_DESTROYED;
}

DEVICE_API(hipStreamQuery, (void *h), (h)) {
	struct stream *s = find_stream(h);
	if (!s) return CONTEXT_DESTROYED;
	return s->code ? s->code : s->head ? NOT_READY : SUCCESS;
}

DEVICE_API(hipStreamWaitEvent, (void *h, void *ev, unsigned flags), (h, ev, flags)) {
	struct stream *s = find_stream(h);
	if (!s) return CONTEXT_DESTROYED;
	struct event *e = find_event(ev);
	if (!e) return INVALID_HANDLE;
	if (flags) return misuse(INVALID_VALUE, "hipStreamWaitEvent: flags");
	if (!e->mark) return SUCCESS;
	e->mark->refs++;
	return enqueue(s, (struct op){ .what = WAIT, .mark = e->mark });
}

/* device_side checks that [p, p+n) is memory that device dev may reach. */
static int device_side(uintptr_t p, size_t n, int dev) {
	struct range *r = overlap(p, n);
	if (!inside(r, p, n)) return misuse(INVALID_VALUE, "not inside one allocation of the device");
	if (r->kind == DEVICE && r->dev != dev && !peers[dev][r->dev])
		return misuse(INVALID_VALUE, "memory of another device than the stream's");
	return SUCCESS;
}

/* host_side checks that [p, p+n) is memory of the host and says whether it is page-locked. */
static int host_side(uintptr_t p, size_t n, int *pinned) {
	struct range *r = overlap(p, n);
	*pinned = r != NULL;
	if (r && (r->kind == DEVICE || !inside(r, p, n))) return misuse(INVALID_VALUE, "not wholly in one piece of host memory");
	return p ? SUCCESS : misuse(INVALID_VALUE, "null pointer");
}

DEVICE_API(hipMemcpyAsync, (void *dst, const void *src, size_t n, int kind, void *h), (dst, src, n, kind, h)) {
	uintptr_t d = (uintptr_t)dst, s = (uintptr_t)src;
	struct stream *st = find_stream(h);
	if (!st) return CONTEXT_DESTROYED;
	if (n == 0) return SUCCESS;
	struct range *dr = overlap(d, n), *sr = overlap(s, n);
	int to_device = dr && dr->kind == DEVICE, from_device = sr && sr->kind == DEVICE;
	if (kind == 4) kind = to_device ? (from_device ? 3 : 1) : from_device ? 2 : 0;
	int pinned = 1, code;
	switch (kind) {
	case 1: code = device_side(d, n, st->dev); if (!code) code = host_side(s, n, &pinned); break;
	case 2: code = device_side(s, n, st->dev); if (!code) code = host_side(d, n, &pinned); break;
	case 3: code = device_side(d, n, st->dev); if (!code) code = device_side(s, n, st->dev); break;
	default: return misuse(INVALID_KIND, "hipMemcpyAsync: kind");
	}
	if (code) return code;
	if (pinned) return enqueue(st, (struct op){ .what = COPY, .dst = d, .src = s, .n = n });
	/* Memory that is not page-locked: HIP finishes the stream, copies and returns. */
	add(S_UNPINNED, 1);
	if (drain(st)) return SUCCESS;
	if (armed.mode == STALL) stall(armed.ms);
	st->code = armed.mode == ASYNC ? armed.code : run_copy(d, s, n);
	return SUCCESS;
}

DEVICE_API(hipMemsetAsync, (void *dst, int value, size_t n, void *h), (dst, value, n, h)) {
	struct stream *s = find_stream(h);
	if (!s) return CONTEXT_DESTROYED;
	if (n == 0) return SUCCESS;
	int code = device_side((uintptr_t)dst, n, s->dev);
	return code ? code : enqueue(s, (struct op){ .what = SET, .dst = (uintptr_t)dst, .n = n, .value = value });
}

#ifndef HIPSIM_NO_OPTIONAL
DEVICE_API(hipMemcpyPeerAsync, (void *dst, int ddev, const void *src, int sdev, size_t n, void *h),
	(dst, ddev, src, sdev, n, h)) {
	struct stream *s = find_stream(h);
	if (!s) return CONTEXT_DESTROYED;
	if (no_such(ddev) || no_such(sdev)) return misuse(INVALID_DEVICE, "hipMemcpyPeerAsync");
	if (n == 0) return SUCCESS;
	struct range *d = overlap((uintptr_t)dst, n), *r = overlap((uintptr_t)src, n);
	if (!inside(d, (uintptr_t)dst, n) || !inside(r, (uintptr_t)src, n) || d->dev != ddev || r->dev != sdev)
		return misuse(INVALID_VALUE, "hipMemcpyPeerAsync: not memory of the devices named");
	return enqueue(s, (struct op){ .what = COPY, .dst = (uintptr_t)dst, .src = (uintptr_t)src, .n = n });
}

DEVICE_API(hipMallocAsync, (void **p, size_t n, void *h), (p, n, h)) {
	struct stream *s = find_stream(h);
	return s ? device_malloc(p, n, s->dev) : CONTEXT_DESTROYED;
}

DEVICE_API(hipFreeAsync, (void *p, void *h), (p, h)) {
	struct stream *s = find_stream(h);
	if (!s) return CONTEXT_DESTROYED;
	if (!p) return cfg.version < 7 ? misuse(INVALID_VALUE, "hipFreeAsync: null pointer") : SUCCESS;
	struct range **link = find_start((uintptr_t)p);
	if (!link || (*link)->kind != DEVICE || (*link)->ipc) return misuse(INVALID_VALUE, "hipFreeAsync: unknown pointer");
	return enqueue(s, (struct op){ .what = FREE, .dst = (uintptr_t)p });
}

/* ---- modules ---- */

static struct module *modules; /* as streams, closed ones stay, and functions as well */

/* code_size is what the ELF header says: HIP has nothing else to go by. */
static size_t code_size(const void *image) {
	const Elf64_Ehdr *e = image;
	return e->e_shoff + (size_t)e->e_shnum * e->e_shentsize;
}

/* same_arch compares what the code is for with what every device of this library is, features after a colon included if the
 * code names any. */
static int same_arch(const char *arch) {
	size_t n = strlen(arch);
	return !strncmp(ARCH, arch, n) && (ARCH[n] == ':' || !ARCH[n]);
}

DEVICE_API(hipModuleLoadData, (void **out, const void *image), (out, image)) {
	if (!out || !image) return misuse(INVALID_VALUE, "hipModuleLoadData: null pointer");
	if (memcmp(image, ELFMAG, SELFMAG)) return INVALID_IMAGE;
	int fd = memfd_create("code object", MFD_CLOEXEC);
	size_t n = code_size(image);
	char path[64];
	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	void *lib = fd >= 0 && write(fd, image, n) == (ssize_t)n ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL;
	if (!lib) { close(fd); return INVALID_IMAGE; }
	const char *arch = dlsym(lib, "hipsim_arch");
	if (!arch || !same_arch(arch)) { dlclose(lib); close(fd); return NO_BINARY_FOR_GPU; }
	struct module *m = calloc(1, sizeof *m);
	*m = (struct module){ .dev = current, .live = 1, .fd = fd, .lib = lib, .next = modules };
	*(void **)&m->run = dlsym(lib, "hipsim_run");
	modules = m;
	add(S_MODULES, 1);
	*out = m;
	return SUCCESS;
}

static struct module *find_module(void *h) {
	for (struct module *m = modules; m; m = m->next)
		if (m == h && m->live) return m;
	misuse(INVALID_HANDLE, "invalid module");
	return NULL;
}

/* Kernels that are running are not waited for, in HIP; here unloading under them is a misuse. */
DEVICE_API(hipModuleUnload, (void *h), (h)) {
	struct module *m = find_module(h);
	if (!m) return INVALID_HANDLE;
	for (struct stream *s = streams; s; s = s->next)
		for (struct op *op = s->stop ? NULL : s->head; op; op = op->next)
			if (op->what == LAUNCH && op->function->module == m && !s->code) {
				misuse(SUCCESS, "hipModuleUnload: a kernel of the module is still to run");
				drain(s);
				break;
			}
	m->live = 0;
	dlclose(m->lib);
	close(m->fd);
	add(S_MODULES, -1);
	return SUCCESS;
}

DEVICE_API(hipModuleGetFunction, (void **out, void *h, const char *name), (out, h, name)) {
	struct module *m = find_module(h);
	if (!m) return INVALID_HANDLE;
	if (!out || !name) return misuse(INVALID_VALUE, "hipModuleGetFunction: null pointer");
	if (m->dev != current) return misuse(INVALID_HANDLE, "hipModuleGetFunction: the module's device is not current");
	const struct { const char *name; int params; void *kernel; } *k = dlsym(m->lib, "hipsim_kernels");
	while (k->name && strcmp(k->name, name)) k++;
	if (!k->name) return NOT_FOUND;
	struct function *f = calloc(1, sizeof *f);
	*f = (struct function){ .module = m, .params = k->params, .kernel = k->kernel, .next = m->functions };
	m->functions = f;
	*out = f;
	return SUCCESS;
}

static struct function *find_function(void *h) {
	for (struct module *m = modules; m; m = m->next)
		for (struct function *f = m->live ? m->functions : NULL; f; f = f->next)
			if (f == h) return f;
	misuse(INVALID_HANDLE, "invalid function");
	return NULL;
}

DEVICE_API(hipModuleLaunchKernel, (void *fn, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
	unsigned shared, void *h, void **params, void **extra), (fn, gx, gy, gz, bx, by, bz, shared, h, params, extra)) {
	struct stream *s = find_stream(h);
	if (!s) return CONTEXT_DESTROYED;
	struct function *f = find_function(fn);
	if (!f) return INVALID_HANDLE;
	if (f->module->dev != current || s->dev != current)
		return misuse(INVALID_HANDLE, "hipModuleLaunchKernel: not the device of the module and the stream");
	if (gy != 1 || gz != 1 || by != 1 || bz != 1 || !gx || !bx || bx > 1024 || (unsigned long long)gx * bx > UINT32_MAX)
		return misuse(INVALID_VALUE, "hipModuleLaunchKernel: the grid");
	if (shared || extra || !params) return misuse(INVALID_VALUE, "hipModuleLaunchKernel: parameters");
	struct op op = { .what = LAUNCH, .function = f, .blocks = gx, .threads = bx };
	for (int i = 0; i < f->params; i++) {
		if (!params[i]) return misuse(INVALID_VALUE, "hipModuleLaunchKernel: fewer arguments than the kernel has parameters");
		memcpy(&op.args[i], params[i], 8);
	}
	return enqueue(s, op);
}

/* ---- other processes ---- */

struct ipc { char tag[8]; int pid, fd; size_t size; char filler[40]; }; /* 64 bytes, passed by value */
_Static_assert(sizeof(struct ipc) == 64, "hipIpcMemHandle_t");

DEVICE_API(hipIpcGetMemHandle, (struct ipc *h, void *p), (h, p)) {
	struct range **link = find_start((uintptr_t)p);
	if (!h || !link || (*link)->kind != DEVICE || (*link)->ipc) return misuse(INVALID_VALUE, "hipIpcGetMemHandle");
	*h = (struct ipc){ .tag = "hipsim1", .pid = getpid(), .fd = (*link)->fd, .size = (*link)->size };
	for (size_t i = 0; i < sizeof h->filler; i++) h->filler[i] = (char)(i + 1);
	return SUCCESS;
}

DEVICE_API(hipIpcOpenMemHandle, (void **p, struct ipc h, unsigned flags), (p, h, flags)) {
	/* The value of hipIpcMemLazyEnablePeerAccess changed in HIP 6. */
	if (!p || flags != (cfg.version >= 6)) return misuse(INVALID_VALUE, "hipIpcOpenMemHandle: arguments");
	for (size_t i = 0; i < sizeof h.filler; i++)
		if (h.filler[i] != (char)(i + 1)) return misuse(INVALID_VALUE, "hipIpcOpenMemHandle: mangled handle");
	if (memcmp(h.tag, "hipsim1", 8)) return misuse(INVALID_VALUE, "hipIpcOpenMemHandle: not a handle");
	if (h.pid == getpid()) return misuse(INVALID_CONTEXT, "hipIpcOpenMemHandle: own memory");
	char path[64];
	snprintf(path, sizeof path, "/proc/%d/fd/%d", h.pid, h.fd);
	int fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0) return misuse(INVALID_VALUE, "hipIpcOpenMemHandle: the exporting process is gone");
	struct range *r = map_device(fd, h.size, current, 1);
	if (!r) { close(fd); return OUT_OF_MEMORY; }
	add(S_IPC, 1);
	*p = (void *)r->addr;
	return SUCCESS;
}

DEVICE_API(hipIpcCloseMemHandle, (void *p), (p)) {
	struct range **link = find_start((uintptr_t)p);
	if (!link || !(*link)->ipc) return misuse(INVALID_VALUE, "hipIpcCloseMemHandle");
	drain_device((*link)->dev);
	if ((link = find_start((uintptr_t)p))) remove_range(link);
	return SUCCESS;
}
#endif

/* ---- events ---- */

DEVICE_API(hipEventCreateWithFlags, (void **out, unsigned flags), (out, flags)) {
	if (!out || (flags & ~(unsigned)(EVENT_BLOCKING | EVENT_NO_TIMING | EVENT_INTERPROCESS)))
		return misuse(INVALID_VALUE, "hipEventCreateWithFlags: flags");
	if ((flags & EVENT_INTERPROCESS) && !(flags & EVENT_NO_TIMING))
		return misuse(INVALID_VALUE, "hipEventCreateWithFlags: interprocess with timing");
	struct event *e = calloc(1, sizeof *e);
	e->dev = current;
	e->live = 1;
	e->flags = flags;
	e->next = events;
	events = e;
	add(S_EVENTS, 1);
	*out = e;
	return SUCCESS;
}

DEVICE_API(hipEventDestroy, (void *h), (h)) {
	struct event *e = find_event(h);
	if (!e) return INVALID_HANDLE;
	e->live = 0;
	unref(e->mark);
	e->mark = NULL;
	add(S_EVENTS, -1);
	return SUCCESS;
}

DEVICE_API(hipEventRecord, (void *h, void *stream), (h, stream)) {
	struct stream *s = find_stream(stream);
	if (!s) return CONTEXT_DESTROYED;
	struct event *e = find_event(h);
	if (!e) return INVALID_HANDLE;
	if (e->dev != s->dev) return misuse(INVALID_HANDLE, "hipEventRecord: event and stream of different devices");
	unref(e->mark);
	e->mark = calloc(1, sizeof *e->mark);
	e->mark->refs = 2; /* the event's and the queue's */
	return enqueue(s, (struct op){ .what = RECORD, .mark = e->mark });
}

DEVICE_API(hipEventQuery, (void *h), (h)) {
	struct event *e = find_event(h);
	if (!e) return INVALID_HANDLE;
	return !e->mark ? SUCCESS : e->mark->done ? e->mark->code : NOT_READY;
}

DEVICE_API(hipEventSynchronize, (void *h), (h)) {
	struct event *e = find_event(h);
	if (!e) return INVALID_HANDLE;
	struct mark *m = e->mark;
	if (!m) return SUCCESS;
	m->refs++;
	while (!m->done) pthread_cond_wait(&changed, &lock);
	int code = m->code;
	unref(m);
	return code;
}

DEVICE_API(hipEventElapsedTime, (float *ms, void *start, void *stop), (ms, start, stop)) {
	struct event *a = find_event(start), *b = find_event(stop);
	if (!a || !b) return INVALID_HANDLE;
	if (!ms) return misuse(INVALID_VALUE, "hipEventElapsedTime: null pointer");
	if (!a->mark || !b->mark || ((a->flags | b->flags) & EVENT_NO_TIMING) || a->dev != b->dev)
		return misuse(INVALID_HANDLE, "hipEventElapsedTime: not recorded, without timing, or of different devices");
	if (!a->mark->done || !b->mark->done) return NOT_READY;
	*ms = (b->mark->at.tv_sec - a->mark->at.tv_sec) * 1e3f + (b->mark->at.tv_nsec - a->mark->at.tv_nsec) / 1e6f;
	return SUCCESS;
}

/* ---- texts ---- */

static const struct { int code; const char *name, *text; } texts[] = {
	{SUCCESS, "hipSuccess", "no error"}, {INVALID_VALUE, "hipErrorInvalidValue", "invalid argument"},
	{OUT_OF_MEMORY, "hipErrorOutOfMemory", "out of memory"},
	{INVALID_KIND, "hipErrorInvalidMemcpyDirection", "invalid copy direction for memcpy"},
	{NO_DEVICE, "hipErrorNoDevice", "no ROCm-capable device is detected"},
	{INVALID_DEVICE, "hipErrorInvalidDevice", "invalid device ordinal"},
	{INVALID_HANDLE, "hipErrorInvalidHandle", "invalid resource handle"},
	{NOT_READY, "hipErrorNotReady", "device not ready"},
	{ILLEGAL_ADDRESS, "hipErrorIllegalAddress", "an illegal memory access was encountered"},
	{702, "hipErrorLaunchTimeOut", "the launch timed out and was terminated"},
	{CONTEXT_DESTROYED, "hipErrorContextIsDestroyed", "context is destroyed"},
};

static const char *text(int code, int want_name) {
	for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
		if (texts[i].code == code) return want_name || cfg.version < 6 ? texts[i].name : texts[i].text;
	return want_name || cfg.version < 6 ? "hipErrorUnknown" : "unknown error";
}

const char *hipGetErrorName(int code) { return text(code, 1); }

#ifndef HIPSIM_NO_ERROR_STRING /* a library that lacks a required function */
const char *hipGetErrorString(int code) { return text(code, 0); }
#endif

/* ---- for tests ---- */

/* hipsim_configure sets what the environment variable HIPSIM_<name> sets; -1: no such name or bad value. */
int hipsim_configure(const char *name, const char *value) {
	int rc = 0;
	pthread_mutex_lock(&lock);
	if (!strcmp(name, "DEVICES")) cfg.devices = atoi(value) > MAX_DEVICES ? MAX_DEVICES : atoi(value);
	else if (!strcmp(name, "MEMORY")) cfg.memory = strtoull(value, NULL, 0);
	else if (!strcmp(name, "INTEGRATED")) cfg.integrated = atoi(value);
	else if (!strcmp(name, "VERSION")) cfg.version = atoi(value);
	else if (!strcmp(name, "DELAY_US")) cfg.delay_us = atol(value);
	else if (!strcmp(name, "SEED")) cfg.seed = atoi(value);
	else if (!strcmp(name, "POISON")) cfg.poison = atoi(value);
	else if (!strcmp(name, "VERBOSE")) cfg.verbose = atoi(value);
	else if (!strcmp(name, "FAIL")) rc = parse_faults(value);
	else if (!strcmp(name, "HOLD")) cfg.hold = atoi(value); /* 1: nothing executes until it is 0 again */
	else if (!strcmp(name, "REPORT")) {
		int fd = open(value, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
		void *p = fd < 0 || ftruncate(fd, PAGE) ? MAP_FAILED : mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		if (fd >= 0) close(fd);
		if (p == MAP_FAILED) rc = -1;
		else cfg.report = p;
		report();
	} else rc = -1;
	pthread_cond_broadcast(&changed);
	pthread_mutex_unlock(&lock);
	return rc;
}

__attribute__((constructor)) static void configure_from_environment(void) {
	static const char *const names[] = { "DEVICES", "MEMORY", "INTEGRATED", "VERSION", "DELAY_US", "SEED", "POISON",
		"VERBOSE", "FAIL", "REPORT" };
	for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
		char key[32];
		snprintf(key, sizeof key, "HIPSIM_%s", names[i]);
		const char *value = getenv(key);
		if (value && hipsim_configure(names[i], value)) {
			fprintf(stderr, "hipsim: bad value of %s: %s\n", key, value);
			exit(2);
		}
	}
}

/* hipsim_stat returns a statistic by its name in the report, or the calls of a HIP function so far; -1: no such name. */
long long hipsim_stat(const char *name) {
	long long v = -1;
	pthread_mutex_lock(&lock);
	for (int i = 0; i < S_COUNT; i++)
		if (!strcmp(stats[i].name, name)) v = stats[i].v;
	if (!strncmp(name, "hip", 3)) v = 0;
	for (struct func *f = funcs; f; f = f->next)
		if (!strcmp(f->name, name)) v = f->calls;
	pthread_mutex_unlock(&lock);
	return v;
}

/* hipsim_live returns what is not released: allocations, registrations, opened IPC memory, streams, events and modules. */
long long hipsim_live(void) {
	pthread_mutex_lock(&lock);
	long long v = stats[S_DEV].v + stats[S_HOST].v + stats[S_REG].v + stats[S_IPC].v + stats[S_STREAMS].v + stats[S_EVENTS].v
		+ stats[S_MODULES].v;
	pthread_mutex_unlock(&lock);
	return v;
}
