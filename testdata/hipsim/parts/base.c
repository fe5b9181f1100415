/* Error codes, settings, statistics, injected faults, and the frame that each entry point has. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { /* hipError_t */
	SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_DEVICE_POINTER = 17, INVALID_KIND = 21,
	NO_DEVICE = 100, INVALID_DEVICE = 101, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, NO_BINARY_FOR_GPU = 209,
	INVALID_HANDLE = 400, ILLEGAL_STATE = 401, NOT_FOUND = 500, NOT_READY = 600, ILLEGAL_ADDRESS = 700,
	PEER_ALREADY_ENABLED = 704, PEER_NOT_ENABLED = 705, CONTEXT_DESTROYED = 709, ALREADY_REGISTERED = 712,
	NOT_REGISTERED = 713, NOT_SUPPORTED = 801, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901, CAPTURE_MERGE = 902,
	CAPTURE_UNMATCHED = 903, CAPTURE_UNJOINED = 904, CAPTURE_ISOLATION = 905, CAPTURED_EVENT = 907,
	CAPTURE_WRONG_THREAD = 908
};
enum { EVENT_BLOCKING = 1, EVENT_NO_TIMING = 2, EVENT_INTERPROCESS = 4, MAX_DEVICES = 16, MAX_FAULTS = 32,
	PAGE = 4096 };

/* What differs between AMD's runtimes differs from one of these on. They are those of Debian's suites. */
enum { HIP_5_2 = 52, HIP_5_7 = 57, HIP_6_4 = 64, HIP_7_2 = 72 };

#define ARCH "gfx90a:sramecc+:xnack-" /* of every device */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER; /* broadcast whenever work ends or a setting changes */
static __thread int current;                              /* the current device belongs to the OS thread */

static struct {
	int devices, integrated, version, poison, verbose, hold, waits; /* the version is 10 * major + minor */
	int virtual_memory, import_pointer, defects;                    /* import_pointer: -1 as the version has it */
	size_t memory, granularity;
	long delay_us;
	unsigned seed;
	unsigned long network;
	char *report;
} cfg = { .devices = 1, .version = HIP_6_4, .poison = 1, .memory = (size_t)1 << 30, .delay_us = 100, .seed = 1,
	.virtual_memory = 1, .import_pointer = -1, .granularity = 65536 };

/* ---- statistics ---- */

static struct stat_counter { const char *name; long long v; } stats[] = {
	{"calls", 0}, {"misuses", 0}, {"faults", 0}, {"device_allocations", 0}, {"device_bytes", 0}, {"peak_device_bytes", 0},
	{"host_allocations", 0}, {"host_bytes", 0}, {"registrations", 0}, {"ipc_opens", 0}, {"streams", 0}, {"events", 0},
	{"copies", 0}, {"copied_bytes", 0}, {"unpinned_copies", 0}, {"memsets", 0}, {"modules", 0}, {"launches", 0},
	{"virtual_allocations", 0}, {"virtual_handles", 0}, {"reservations", 0}, {"mappings", 0}, {"exports", 0},
	{"imports", 0}, {"ipc_leaks", 0}, {"graphs", 0}, {"graph_execs", 0}, {"graph_launches", 0},
	{"flips", 0},
};
enum { S_CALLS, S_MISUSES, S_FAULTS, S_DEV, S_DEVBYTES, S_PEAK, S_HOST, S_HOSTBYTES, S_REG, S_IPC, S_STREAMS, S_EVENTS,
	S_COPIES, S_COPIED, S_UNPINNED, S_MEMSETS, S_MODULES, S_LAUNCHES, S_VIRTUAL, S_VHANDLES, S_RESERVED, S_MAPPED,
	S_EXPORTS, S_IMPORTS, S_LEAKS, S_GRAPHS, S_EXECS, S_GRAPH_LAUNCHES, S_FLIPS, S_COUNT };

/* report rewrites the line in the file HIPSIM_REPORT. The file is mapped, so that the line survives an exit that runs
 * no destructors (as Go's) and even a crash. */
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

/* ---- injected faults ---- */

enum mode { NOW, ASYNC, STALL, BLOCK };
struct fault { char func[48]; long nth; int code; enum mode mode; long ms; long seen; };
static struct fault faults[MAX_FAULTS];
static int nfaults;
static __thread struct fault armed; /* for the operation that the current call enqueues; mode NOW: none */

/* queueing are the functions that put an operation on a stream: STALL is for that operation. Others block. */
static const char *const queueing[] = {
	"hipMemcpyAsync", "hipMemcpyDtoDAsync", "hipMemcpyPeerAsync", "hipMemsetAsync", "hipStreamWaitEvent",
	"hipEventRecord", "hipFreeAsync", "hipModuleLaunchKernel", "hipGraphLaunch",
};

static int queues(const char *name) {
	for (size_t i = 0; i < sizeof queueing / sizeof *queueing; i++)
		if (!strcmp(queueing[i], name)) return 1;
	return 0;
}

/* parse_faults reads "FUNC:N:CODE[:async|:stall[=MS]|:block[=MS]]", separated by commas. */
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
			else if (!strcmp(mode, "block")) f.mode = BLOCK;
			else if (sscanf(mode, "block=%ld", &f.ms) == 1) f.mode = BLOCK;
			else return -1;
			if (f.mode == STALL && !queues(f.func)) f.mode = BLOCK;
		}
		faults[nfaults++] = f;
		if (*spec == ',') spec++;
		else if (*spec) return -1;
	}
	return 0;
}

/* stall waits for ms milliseconds, for ever if that is 0. The lock is free meanwhile. */
static void stall(long ms) {
	struct timespec until;
	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_sec += ms / 1000;
	until.tv_nsec += ms % 1000 * 1000000;
	if (until.tv_nsec >= 1000000000) { until.tv_sec++; until.tv_nsec -= 1000000000; }
	if (ms == 0) for (;;) pthread_cond_wait(&changed, &lock);
	while (pthread_cond_timedwait(&changed, &lock, &until) == 0) {}
}

/* ---- entry points ---- */

struct func { const char *name; long calls; struct func *next; };
static struct func *funcs;
static pid_t owner; /* the process of the first call */

/* enter takes the lock, counts the call, waits if a fault says so, and returns the code of a fault that is due at once,
 * else 0. AMD's runtime
 * does not survive a fork, so that a child of the process that has used it is refused: without the lock, which a
 * thread that the child does not have may hold. */
static int enter(struct func *f) {
	if (owner && owner != getpid()) return NOT_INITIALIZED;
	pthread_mutex_lock(&lock);
	owner = getpid();
	if (!f->calls++) { f->next = funcs; funcs = f; }
	add(S_CALLS, 1);
	armed.mode = NOW;
	struct fault blocked = {0};
	int code = 0;
	for (int i = 0; i < nfaults; i++) {
		struct fault *x = &faults[i];
		if (strcmp(x->func, f->name)) continue;
		x->seen++;
		if (x->nth && x->seen != x->nth) continue;
		add(S_FAULTS, 1);
		if (x->mode == NOW) code = x->code;
		else if (x->mode == BLOCK) blocked = *x;
		else armed = *x;
	}
	if (blocked.mode == BLOCK) {
		stall(blocked.ms);
		if (!code) code = blocked.code;
	}
	return code;
}

static int leave(int code) {
	if (owner == getpid()) pthread_mutex_unlock(&lock);
	return code;
}

/* no_device is what calls answer that need a GPU where there is none. */
static int no_device(void) { return cfg.version < HIP_5_7 ? INVALID_DEVICE : NO_DEVICE; }

/* An entry point is its name, its parameters and a body that runs under the lock. DEVICE_API needs a GPU. SYNC_API is
 * for calls that queue nothing and can fail late all the same: an asynchronous fault fails the call itself. */
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
	API(name, params, args) { return cfg.devices ? dev_##name args : no_device(); } \
	static int dev_##name params
#define SYNC_API(name, params, args) \
	static int sync_##name params; \
	DEVICE_API(name, params, args) { int code = late_fault(); return code ? code : sync_##name args; } \
	static int sync_##name params

#ifndef HIPSIM_NO_OPTIONAL
/* late_fault is what an asynchronous fault does to a call that queues nothing. */
static int late_fault(void) {
	return armed.mode == ASYNC ? armed.code : SUCCESS;
}
#endif
