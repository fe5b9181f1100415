/* A test of a HIP library: virtual memory, also in another process, graphs, launches. It runs on any HIP library, for
 * example the one over NVIDIA's driver. On the simulator it also checks what that refuses, its defects and its faults.
 *
 *     cc -Wall -o selftest selftest.c -ldl -lpthread && ./selftest LIBRARY [LIBRARY OF HIPRTC]
 *
 * It ends with 0 if all is well, and names each line that is not. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct prop { int type, handles, location, id; void *win32; unsigned char compression, rdma; unsigned short usage; };
struct access { int location, id, flags; };

#define FUNCTIONS(X) \
	X(hipSetDevice, (int)) X(hipDeviceGetAttribute, (int *, int, int)) X(hipMemGetInfo, (size_t *, size_t *)) \
	X(hipGetDevicePropertiesR0600, (char *, int)) X(hipMalloc, (void **, size_t)) X(hipFree, (void *)) \
	X(hipHostMalloc, (void **, size_t, unsigned)) X(hipHostFree, (void *)) \
	X(hipHostGetDevicePointer, (void **, void *, unsigned)) \
	X(hipStreamCreateWithFlags, (void **, unsigned)) X(hipStreamDestroy, (void *)) X(hipStreamSynchronize, (void *)) \
	X(hipStreamQuery, (void *)) X(hipStreamWaitEvent, (void *, void *, unsigned)) X(hipStreamGetDevice, (void *, int *)) \
	X(hipStreamGetFlags, (void *, unsigned *)) X(hipEventCreateWithFlags, (void **, unsigned)) \
	X(hipEventDestroy, (void *)) \
	X(hipEventRecord, (void *, void *)) X(hipEventQuery, (void *)) X(hipEventSynchronize, (void *)) \
	X(hipMemcpyAsync, (void *, const void *, size_t, int, void *)) X(hipMemsetAsync, (void *, int, size_t, void *)) \
	X(hipMemcpyDtoDAsync, (void *, void *, size_t, void *)) X(hipMemGetAddressRange, (void **, size_t *, void *)) \
	X(hipModuleLoadData, (void **, const void *)) X(hipModuleUnload, (void *)) \
	X(hipModuleGetFunction, (void **, void *, const char *)) \
	X(hipModuleLaunchKernel, (void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, \
		void **, void **)) \
	X(hipMemGetAllocationGranularity, (size_t *, const struct prop *, int)) \
	X(hipMemCreate, (void **, size_t, const struct prop *, unsigned long long)) X(hipMemRelease, (void *)) \
	X(hipMemAddressReserve, (void **, size_t, size_t, void *, unsigned long long)) X(hipMemAddressFree, (void *, size_t)) \
	X(hipMemMap, (void *, size_t, size_t, void *, unsigned long long)) X(hipMemUnmap, (void *, size_t)) \
	X(hipMemSetAccess, (void *, size_t, const struct access *, size_t)) \
	X(hipMemExportToShareableHandle, (void *, void *, int, unsigned long long)) \
	X(hipMemImportFromShareableHandle, (void **, void *, int)) \
	X(hipStreamBeginCapture, (void *, int)) X(hipStreamEndCapture, (void *, void **)) \
	X(hipStreamIsCapturing, (void *, int *)) X(hipGraphInstantiate, (void **, void *, void **, char *, size_t)) \
	X(hipGraphLaunch, (void *, void *)) X(hipGraphExecDestroy, (void *)) X(hipGraphDestroy, (void *))
#define RTC(X) \
	X(hiprtcCreateProgram, (void **, const char *, const char *, int, const char *const *, const char *const *)) \
	X(hiprtcCompileProgram, (void *, int, const char *const *)) X(hiprtcGetCodeSize, (void *, size_t *)) \
	X(hiprtcGetCode, (void *, char *)) X(hiprtcGetProgramLogSize, (void *, size_t *)) \
	X(hiprtcGetProgramLog, (void *, char *)) X(hiprtcDestroyProgram, (void **))
#define DECLARE(name, params) static int (*name) params;
FUNCTIONS(DECLARE)
RTC(DECLARE)
/* Only the simulator has these. */
static int (*hipsim_configure)(const char *, const char *);
static long long (*hipsim_stat)(const char *), (*hipsim_live)(void);
static int (*hipIpcGetMemHandle)(void *, void *);

static int failures;

static void expect(long long got, long long want, const char *what, int line) {
	if (got == want) return;
	failures++;
	fprintf(stderr, "selftest.c:%d: %s is %lld, want %lld\n", line, what, got, want);
}
#define IS(got, want) expect((long long)(got), (long long)(want), #got, __LINE__)
#define OK(call) IS(call, 0)

static void bind_library(const char *hip, const char *rtc) {
	setenv("HIPSIM_IMPORT", "value", 1); /* as the library over NVIDIA's driver takes descriptors */
	void *h = dlopen(hip, RTLD_NOW | RTLD_LOCAL), *r = dlopen(rtc, RTLD_NOW | RTLD_LOCAL);
	if (!h || !r) { fprintf(stderr, "selftest: %s\n", dlerror()); exit(2); }
#define GET(from, name) do { \
	*(void **)&name = dlsym(from, #name); \
	if (!name) { fprintf(stderr, "selftest: no %s\n", #name); exit(2); } \
} while (0)
#define FROM_HIP(name, params) GET(h, name);
#define FROM_RTC(name, params) GET(r, name);
	FUNCTIONS(FROM_HIP)
	RTC(FROM_RTC)
	if (!dlsym(h, "hipsim_stat")) return;
	GET(h, hipsim_configure);
	GET(h, hipsim_stat);
	GET(h, hipsim_live);
	GET(h, hipIpcGetMemHandle);
}

static const struct prop prop = { .type = 1, .handles = 1, .location = 1 };
static const struct access both = { .location = 1, .flags = 3 };
static size_t granularity;
static void *stream;
static unsigned char *host; /* page-locked, granularity bytes */

static void set_up(void) {
	int v = 0;
	OK(hipSetDevice(0));
	OK(hipDeviceGetAttribute(&v, 89, 0));
	IS(v, 1);
	OK(hipMemGetAllocationGranularity(&granularity, &prop, 1));
	OK(hipStreamCreateWithFlags(&stream, 1));
	OK(hipHostMalloc((void **)&host, granularity, 0));
	if (failures) exit(1);
}

static void tear_down(void) {
	OK(hipHostFree(host));
	OK(hipStreamDestroy(stream));
	if (hipsim_live) IS(hipsim_live(), hipsim_stat("ipc_leaks"));
}

/* fill writes a pattern of its own for each seed to a device address, through page-locked memory. */
static void fill(void *to, int seed) {
	for (size_t i = 0; i < granularity; i++) host[i] = (unsigned char)(i * 7 + i / 251 + seed);
	OK(hipMemcpyAsync(to, host, granularity, 1, stream));
	OK(hipStreamSynchronize(stream));
}

/* wrong counts the bytes that are not of the pattern. */
static size_t wrong(void *from, int seed) {
	size_t n = 0;
	memset(host, 0, granularity);
	OK(hipMemcpyAsync(host, from, granularity, 2, stream));
	OK(hipStreamSynchronize(stream));
	for (size_t i = 0; i < granularity; i++) n += host[i] != (unsigned char)(i * 7 + i / 251 + seed);
	return n;
}

/* ---- another process ---- */

static void send_descriptor(int socket, int fd, void *address) {
	struct iovec data = { &address, sizeof address };
	char space[CMSG_SPACE(sizeof fd)] = {0};
	struct msghdr m = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof space };
	struct cmsghdr *c = CMSG_FIRSTHDR(&m);
	c->cmsg_level = SOL_SOCKET;
	c->cmsg_type = SCM_RIGHTS;
	c->cmsg_len = CMSG_LEN(sizeof fd);
	memcpy(CMSG_DATA(c), &fd, sizeof fd);
	IS(sendmsg(socket, &m, 0), sizeof address);
}

static int receive_descriptor(int socket, void **address) {
	int fd = -1;
	struct iovec data = { address, sizeof *address };
	char space[CMSG_SPACE(sizeof fd)];
	struct msghdr m = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof space };
	IS(recvmsg(socket, &m, 0), sizeof *address);
	struct cmsghdr *c = CMSG_FIRSTHDR(&m);
	if (c) memcpy(&fd, CMSG_DATA(c), sizeof fd);
	return fd;
}

/* child gets memory and an address from its parent, maps it there, finds the parent's bytes and leaves its own. It
 * was forked before the parent used HIP, which does not survive a fork. */
static int child(int socket) {
	void *want = NULL, *at = NULL, *h = NULL;
	int fd = receive_descriptor(socket, &want);
	set_up();
	OK(hipMemImportFromShareableHandle(&h, (void *)(intptr_t)fd, 1));
	OK(close(fd));
	OK(hipMemAddressReserve(&at, granularity, 0, want, 0));
	IS(at, want);
	OK(hipMemMap(at, granularity, 0, h, 0));
	OK(hipMemSetAccess(at, granularity, &both, 1));
	IS(wrong(at, 1), 0);
	fill(at, 2);
	OK(hipMemUnmap(at, granularity));
	OK(hipMemRelease(h));
	OK(hipMemAddressFree(at, granularity));
	tear_down();
	return failures;
}

static void test_virtual(int socket, pid_t pid) {
	void *h = NULL, *at = NULL, *base = NULL, *other = NULL;
	size_t size = 0, before = 0, now = 0;
	int fd = -1, status = -1;
	void *hint = NULL; // an address that the library likes: it gives it again when it is asked for it
	OK(hipMemAddressReserve(&hint, 2 * granularity, 0, NULL, 0));
	OK(hipMemAddressFree(hint, 2 * granularity));
	OK(hipMemGetInfo(&before, NULL));
	OK(hipMemCreate(&h, granularity, &prop, 0));
	OK(hipMemAddressReserve(&at, 2 * granularity, 0, hint, 0));
	IS(at, hint);
	OK(hipMemMap(at, granularity, 0, h, 0));
	OK(hipMemSetAccess(at, granularity, &both, 1));
	fill(at, 1);
	OK(hipMemGetAddressRange(&base, &size, (char *)at + 100));
	IS(base, at);
	IS(size, granularity);

	/* The other process changes it. */
	OK(hipMemExportToShareableHandle(&fd, h, 1, 0));
	send_descriptor(socket, fd, at);
	OK(close(fd));
	IS(waitpid(pid, &status, 0), pid);
	IS(status, 0);
	IS(wrong(at, 2), 0);

	/* Imported in this process it is the same memory, at a second address. */
	OK(hipMemExportToShareableHandle(&fd, h, 1, 0));
	OK(hipMemImportFromShareableHandle(&other, (void *)(intptr_t)fd, 1));
	OK(close(fd));
	OK(hipMemMap((char *)at + granularity, granularity, 0, other, 0));
	OK(hipMemSetAccess((char *)at + granularity, granularity, &both, 1));
	fill((char *)at + granularity, 3);
	IS(wrong(at, 3), 0);

	/* The memory stays until handles, mappings and descriptors are gone. */
	OK(hipMemRelease(h));
	OK(hipMemRelease(other));
	OK(hipMemUnmap(at, granularity));
	IS(wrong((char *)at + granularity, 3), 0);
	OK(hipMemUnmap((char *)at + granularity, granularity));
	OK(hipMemAddressFree(at, 2 * granularity));
	OK(hipMemGetInfo(&now, NULL));
	if (hipsim_stat) IS(now, before);
}

/* ---- launches and graphs ---- */

static const char source[] =
	"struct options { float scale; short add; char tag; unsigned *out; };\n"
	"extern \"C\" __global__ void mix(unsigned char a, struct options o, double d, unsigned long long n) {\n"
	"	extern __shared__ unsigned tile[];\n"
	"	__shared__ unsigned sum;\n"
	"	unsigned threads = blockDim.x * blockDim.y * blockDim.z;\n"
	"	unsigned t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);\n"
	"	unsigned b = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);\n"
	"	tile[t] = t;\n"
	"	__syncthreads();\n"
	"	if (t == 0) { sum = 0; for (unsigned i = 0; i < threads; i++) sum += tile[i]; }\n"
	"	__syncthreads();\n"
	"	unsigned i = b * threads + t;\n"
	"	unsigned all = a + o.add + o.tag + (unsigned)(o.scale * 2) + (unsigned)d;\n"
	"	if (i < n) o.out[i] = tile[threads - 1 - t] + sum * 1000 + all;\n"
	"}\n"
	"extern \"C\" __global__ void twice(unsigned *p) { p[blockIdx.x * blockDim.x + threadIdx.x] *= 2; }\n"
	"extern \"C\" __global__ void nothing() {}\n";

static void *load(const char *source) {
	static char properties[4096], option[300];
	void *program = NULL, *module = NULL;
	size_t n = 0;
	OK(hipGetDevicePropertiesR0600(properties, 0));
	snprintf(option, sizeof option, "--gpu-architecture=%.255s", properties + 1160);
	const char *options[] = { option };
	OK(hiprtcCreateProgram(&program, source, "selftest.hip", 0, NULL, NULL));
	if (hiprtcCompileProgram(program, 1, options)) {
		OK(hiprtcGetProgramLogSize(program, &n));
		char *log = calloc(1, n + 1);
		OK(hiprtcGetProgramLog(program, log));
		fprintf(stderr, "selftest: %s\n", log);
		exit(1);
	}
	OK(hiprtcGetCodeSize(program, &n));
	char *code = malloc(n);
	OK(hiprtcGetCode(program, code));
	OK(hiprtcDestroyProgram(&program));
	OK(hipModuleLoadData(&module, code));
	free(code);
	return module;
}

enum { GX = 3, GY = 2, GZ = 2, BX = 8, BY = 4, BZ = 2, THREADS = BX * BY * BZ, COUNT = GX * GY * GZ * THREADS };
struct options { float scale; short add; char tag; unsigned *out; };
struct arguments { unsigned char a; struct options o; double d; unsigned long long n; };

static size_t wrong_mix(const unsigned *out) {
	size_t n = 0;
	for (unsigned i = 0; i < COUNT; i++)
		n += out[i] != THREADS - 1 - i % THREADS + THREADS * (THREADS - 1) / 2 * 1000 + 200 + 300 + 'x' + 5 + 7;
	return n;
}

static void launch_mix(void *f, struct arguments *a, int pack) {
	size_t size = sizeof *a;
	void *params[] = { &a->a, &a->o, &a->d, &a->n };
	void *extra[] = { (void *)1, a, (void *)2, &size, (void *)3 };
	OK(hipModuleLaunchKernel(f, GX, GY, GZ, BX, BY, BZ, THREADS * sizeof(unsigned), stream, pack ? NULL : params,
		pack ? extra : NULL));
}

static void test_launch(void *module) {
	void *mix = NULL, *nothing = NULL, *seen = NULL;
	unsigned *device = NULL, *second = NULL, *out = (unsigned *)host;
	size_t n = COUNT * sizeof *device;
	OK(hipModuleGetFunction(&mix, module, "mix"));
	OK(hipModuleGetFunction(&nothing, module, "nothing"));
	OK(hipMalloc((void **)&device, n));
	OK(hipMalloc((void **)&second, n));
	for (int pack = 0; pack < 2; pack++) {
		struct arguments a = { 200, { 2.5f, 300, 'x', device }, 7.9, COUNT };
		OK(hipMemsetAsync(device, 0, n, stream));
		launch_mix(mix, &a, pack);
		memset(&a, 0, sizeof a); /* arguments are taken when the kernel is launched */
		OK(pack ? hipMemcpyDtoDAsync(second, device, n, stream) : hipMemcpyAsync(second, device, n, 3, stream));
		OK(hipMemcpyAsync(out, second, n, 2, stream));
		OK(hipStreamSynchronize(stream));
		IS(wrong_mix(out), 0);
	}
	/* Page-locked memory of the host, at the address that the device has for it. */
	memset(out, 0, n);
	OK(hipHostGetDevicePointer(&seen, out, 0));
	struct arguments a = { 200, { 2.5f, 300, 'x', seen }, 7.9, COUNT };
	launch_mix(mix, &a, 0);
	OK(hipModuleLaunchKernel(nothing, 1, 1, 1, 1, 1, 1, 0, stream, NULL, NULL));
	OK(hipStreamSynchronize(stream));
	IS(wrong_mix(out), 0);
	OK(hipFree(device));
	OK(hipFree(second));
}

/* test_graph captures a fill, a kernel on a second stream and a copy back, and launches the graph often. */
static void test_graph(void *module) {
	void *twice = NULL, *graph = NULL, *exec = NULL, *side = NULL, *fork = NULL, *join = NULL;
	unsigned *device = NULL, *out = (unsigned *)host, flags = 9;
	int status = -1, dev = -1;
	OK(hipModuleGetFunction(&twice, module, "twice"));
	OK(hipMalloc((void **)&device, 256 * sizeof *device));
	OK(hipStreamCreateWithFlags(&side, 1));
	OK(hipEventCreateWithFlags(&fork, 2));
	OK(hipEventCreateWithFlags(&join, 2));
	OK(hipStreamGetDevice(side, &dev));
	IS(dev, 0);
	OK(hipStreamGetFlags(side, &flags));
	IS(flags, 1);
	OK(hipStreamIsCapturing(stream, &status));
	IS(status, 0);
	void *params[] = { &device };
	OK(hipStreamBeginCapture(stream, 1));
	OK(hipStreamIsCapturing(stream, &status));
	IS(status, 1);
	OK(hipMemsetAsync(device, 1, 256 * sizeof *device, stream));
	OK(hipEventRecord(fork, stream));
	OK(hipStreamWaitEvent(side, fork, 0));
	OK(hipModuleLaunchKernel(twice, 4, 1, 1, 64, 1, 1, 0, side, params, NULL));
	OK(hipEventRecord(join, side));
	OK(hipStreamWaitEvent(stream, join, 0));
	OK(hipMemcpyAsync(out, device, 256 * sizeof *device, 2, stream));
	OK(hipStreamEndCapture(stream, &graph));
	out[0] = out[255] = 0;
	OK(hipStreamSynchronize(stream));
	IS(out[255], 0); /* nothing has been executed */
	OK(hipGraphInstantiate(&exec, graph, NULL, NULL, 0));
	OK(hipGraphDestroy(graph));
	for (int i = 0; i < 5; i++) {
		OK(hipGraphLaunch(exec, i % 2 ? side : stream));
		OK(hipStreamSynchronize(i % 2 ? side : stream));
		IS(out[0], 0x02020202);
		IS(out[255], 0x02020202);
		out[0] = out[255] = 0;
	}
	/* Two launches on two streams, one after the other. */
	OK(hipGraphLaunch(exec, stream));
	OK(hipGraphLaunch(exec, side));
	OK(hipStreamSynchronize(side));
	OK(hipStreamSynchronize(stream));
	IS(out[255], 0x02020202);
	OK(hipGraphExecDestroy(exec));
	OK(hipEventDestroy(fork));
	OK(hipEventDestroy(join));
	OK(hipStreamDestroy(side));
	OK(hipFree(device));
}

#include "selftest_strict.c"

int main(int argc, char **argv) {
	int sockets[2];
	if (argc < 2) { fprintf(stderr, "usage: selftest LIBRARY [LIBRARY OF HIPRTC]\n"); return 2; }
	bind_library(argv[1], argc > 2 ? argv[2] : argv[1]);
	if (socketpair(AF_UNIX, SOCK_STREAM, 0, sockets)) return 2;
	pid_t pid = fork(); /* before HIP is used */
	if (pid == 0) { close(sockets[0]); _exit(child(sockets[1]) ? 1 : 0); }
	close(sockets[1]);
	if (hipsim_stat) test_abort();
	set_up();
	test_virtual(sockets[0], pid);
	void *module = load(source), *f = NULL;
	/* What is loaded after another code object is gone is not taken for that. */
	OK(hipModuleGetFunction(&f, module, "mix"));
	OK(hipModuleUnload(module));
	module = load("extern \"C\" __global__ void other(unsigned a, unsigned *b) {}\n");
	OK(hipModuleGetFunction(&f, module, "other"));
	OK(hipModuleUnload(module));
	module = load(source);
	test_launch(module);
	test_graph(module);
	if (hipsim_stat) {
		IS(hipsim_stat("misuses"), 0);
		test_refused();
		test_refused_in_capture(module);
		test_defects();
		test_faults();
		test_blocked();
		test_flips();
	}
	OK(hipModuleUnload(module));
	tear_down();
	if (hipsim_stat) test_forked();
	if (!failures) puts(hipsim_stat ? "selftest: all is well, on the simulator" : "selftest: all is well");
	return failures != 0;
}
