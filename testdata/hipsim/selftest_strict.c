/* Part of selftest.c: what only the simulator refuses, its defects and its faults. */

/* MISUSE expects a code, and that the call was counted as a misuse. */
#define MISUSE(call, code) do { \
	long long before_ = hipsim_stat("misuses"); \
	IS(call, code); \
	expect(hipsim_stat("misuses") - before_, 1, "misuses by " #call, __LINE__); \
} while (0)
/* UNCOUNTED expects a code that is no misuse: a defect or a fault. */
#define UNCOUNTED(call, code) do { \
	long long before_ = hipsim_stat("misuses"); \
	IS(call, code); \
	expect(hipsim_stat("misuses") - before_, 0, "misuses by " #call, __LINE__); \
} while (0)

static void test_refused(void) {
	void *h = NULL, *at = NULL, *far = (void *)0x7e1000000000, *x = NULL;
	size_t g = granularity, n = 0;
	int fd = -1;
	struct prop bad = prop;
	struct access desc = both;

	MISUSE(hipMemGetAllocationGranularity(&n, &prop, 2), 1);
	bad.type = 0;
	MISUSE(hipMemCreate(&h, g, &bad, 0), 1);
	bad = prop, bad.id = 99;
	MISUSE(hipMemCreate(&h, g, &bad, 0), 101);
	bad = prop, bad.handles = 2;
	MISUSE(hipMemCreate(&h, g, &bad, 0), 801);
	MISUSE(hipMemCreate(&h, g + 4096, &prop, 0), 1);
	MISUSE(hipMemCreate(&h, 0, &prop, 0), 1);
	MISUSE(hipMemCreate(&h, g, &prop, 1), 1);
	UNCOUNTED(hipMemCreate(&h, (size_t)1 << 40, &prop, 0), 2);

	MISUSE(hipMemAddressReserve(&at, g + 1, 0, NULL, 0), 1);
	MISUSE(hipMemAddressReserve(&at, g, 3, NULL, 0), 1);
	MISUSE(hipMemAddressReserve(&at, g, 0, (char *)far + 4096, 0), 1);
	OK(hipMemAddressReserve(&at, 4 * g, 16 * g, NULL, 0));
	IS((uintptr_t)at % (16 * g), 0);
	OK(hipMemAddressReserve(&x, g, 0, at, 0)); /* taken: the hint is ignored */
	IS(x != at, 1);
	MISUSE(hipMemAddressFree(x, 2 * g), 1);
	OK(hipMemAddressFree(x, g));
	MISUSE(hipMemAddressFree(x, g), 1);

	OK(hipMemCreate(&h, 2 * g, &prop, 0));
	MISUSE(hipMemMap(far, g, 0, h, 0), 1);                    /* outside of a reservation */
	MISUSE(hipMemMap((char *)at + 3 * g, 2 * g, 0, h, 0), 1); /* partly outside */
	MISUSE(hipMemMap(at, g / 2, 0, h, 0), 1);
	MISUSE(hipMemMap((char *)at + 4096, g, 0, h, 0), 1);
	MISUSE(hipMemMap(at, 4 * g, 0, h, 0), 1); /* more than there is */
	MISUSE(hipMemMap(at, g, g, h, 0), 1);
	MISUSE(hipMemMap(at, g, 0, at, 0), 1);
	OK(hipMemMap(at, 2 * g, 0, h, 0));
	MISUSE(hipMemMap(at, g, 0, h, 0), 1); /* mapped already */
	MISUSE(hipMemAddressFree(at, 4 * g), 1);

	MISUSE(hipMemcpyAsync(at, host, g, 1, stream), 1); /* before hipMemSetAccess */
	MISUSE(hipMemSetAccess(at, g, &both, 1), 1);       /* half a mapping */
	MISUSE(hipMemSetAccess(at, 4 * g, &both, 1), 1);   /* more than is mapped */
	desc.flags = 2;
	MISUSE(hipMemSetAccess(at, 2 * g, &desc, 1), 1);
	desc.flags = 3, desc.id = 7;
	MISUSE(hipMemSetAccess(at, 2 * g, &desc, 1), 101);
	desc.id = 0, desc.location = 2;
	MISUSE(hipMemSetAccess(at, 2 * g, &desc, 1), 1); /* the host: HIP 7 only */
	desc.location = 1, desc.flags = 1;
	OK(hipMemSetAccess(at, 2 * g, &desc, 1));
	MISUSE(hipMemcpyAsync(at, host, g, 1, stream), 1); /* may only be read */
	OK(hipMemcpyAsync(host, at, g, 2, stream));
	OK(hipMemSetAccess(at, 2 * g, &both, 1));
	MISUSE(hipMemcpyAsync((char *)at + g + 1, host, g, 1, stream), 1); /* beyond the mapping */
	MISUSE(hipMemcpyAsync(at, (char *)at + 1, g, 3, stream), 1);       /* overlapping */
	MISUSE(hipMemcpyAsync(host, (char *)at + 3 * g, g, 2, stream), 1); /* nothing is mapped there */
	MISUSE(hipFree(at), 1);

	bad = prop, bad.handles = 0;
	OK(hipMemCreate(&x, g, &bad, 0));
	MISUSE(hipMemExportToShareableHandle(&fd, x, 1, 0), 1);
	OK(hipMemRelease(x));
	MISUSE(hipMemRelease(x), 1);
	MISUSE(hipMemMap((char *)at + 2 * g, g, 0, x, 0), 1);
	MISUSE(hipMemExportToShareableHandle(&fd, h, 2, 0), 1);
	MISUSE(hipMemImportFromShareableHandle(&x, (void *)2, 1), 1);
	MISUSE(hipMemImportFromShareableHandle(&x, &fd, 1), 1);
	OK(hipsim_configure("IMPORT", "pointer"));
	OK(hipMemExportToShareableHandle(&fd, h, 1, 0));
	MISUSE(hipMemImportFromShareableHandle(&x, (void *)(intptr_t)fd, 1), 1);
	OK(hipMemImportFromShareableHandle(&x, &fd, 1));
	OK(hipMemRelease(x));
	OK(hipsim_configure("IMPORT", "value"));

	/* Unmapping under a copy that is still to run. */
	OK(hipsim_configure("FAIL", "hipMemsetAsync:1:0:stall=50"));
	OK(hipMemsetAsync(at, 1, g, stream));
	MISUSE(hipMemUnmap(at, 2 * g), 0);
	OK(hipsim_configure("FAIL", ""));
	OK(hipStreamSynchronize(stream));
	MISUSE(hipMemUnmap(at, 2 * g), 1); /* twice */

	/* A descriptor that is forgotten holds the memory. */
	OK(hipMemRelease(h));
	IS(hipsim_stat("virtual_allocations"), 1);
	IS(hipsim_stat("virtual_handles"), 0);
	OK(close(fd));
	IS(hipsim_stat("virtual_allocations"), 0);
	OK(hipMemAddressFree(at, 4 * g));

	OK(hipsim_configure("VMM", "0"));
	int v = -1;
	OK(hipDeviceGetAttribute(&v, 89, 0));
	IS(v, 0);
	UNCOUNTED(hipMemCreate(&h, g, &prop, 0), 801);
	OK(hipsim_configure("VMM", "1"));
}

static void *end_capture_elsewhere(void *graph) { return (void *)(intptr_t)hipStreamEndCapture(stream, graph); }

static void test_refused_in_capture(void *module) {
	void *graph = NULL, *exec = NULL, *p = NULL, *side = NULL, *event = NULL, *old = NULL, *twice = NULL, *x = NULL;
	void *result;
	int status = -1;
	pthread_t thread;
	OK(hipMalloc(&p, 4096));
	OK(hipStreamCreateWithFlags(&side, 1));
	OK(hipEventCreateWithFlags(&event, 2));
	OK(hipEventCreateWithFlags(&old, 2));
	OK(hipEventRecord(old, side));
	OK(hipModuleGetFunction(&twice, module, "twice"));

	MISUSE(hipStreamBeginCapture(NULL, 0), 900);
	MISUSE(hipStreamBeginCapture(stream, 3), 1);
	MISUSE(hipStreamEndCapture(stream, &graph), 401);
	OK(hipStreamBeginCapture(stream, 1));
	MISUSE(hipStreamBeginCapture(stream, 1), 401);
	pthread_create(&thread, NULL, end_capture_elsewhere, &graph);
	pthread_join(thread, &result);
	IS((intptr_t)result, 908);
	OK(hipStreamEndCapture(stream, &graph)); /* an empty graph */
	OK(hipGraphInstantiate(&exec, graph, NULL, NULL, 0));
	OK(hipGraphLaunch(exec, stream));
	OK(hipStreamSynchronize(stream));
	OK(hipGraphDestroy(graph));
	MISUSE(hipGraphDestroy(graph), 1);
	MISUSE(hipGraphInstantiate(&x, graph, NULL, NULL, 0), 1);

	/* What must not be called while a stream is captured, and makes the capture invalid. */
#define DURING(mode, call, code) do { \
	OK(hipStreamBeginCapture(stream, mode)); \
	MISUSE(call, code); \
	OK(hipStreamIsCapturing(stream, &status)); \
	IS(status, 2); \
	MISUSE(hipMemsetAsync(p, 0, 16, stream), 901); \
	IS(hipStreamEndCapture(stream, &graph), 901); \
	IS(graph == NULL, 1); \
} while (0)
	DURING(0, hipMalloc(&x, 16), 900);
	DURING(1, hipFree(p), 900);
	DURING(0, hipHostMalloc(&x, 16, 0), 900);
	DURING(0, hipMemCreate(&x, granularity, &prop, 0), 900);
	DURING(0, hipModuleUnload(module), 900);
	DURING(2, hipStreamSynchronize(stream), 900);
	DURING(2, hipStreamQuery(stream), 900);
	DURING(2, hipMemcpyAsync(p, &status, sizeof status, 1, stream), 900); /* not page-locked */
	DURING(2, hipGraphLaunch(exec, stream), 900);
	DURING(2, hipStreamWaitEvent(stream, old, 0), 905);
	DURING(2, (hipEventRecord(event, stream), hipEventQuery(event)), 907);
	DURING(2, (hipEventRecord(event, stream), hipStreamWaitEvent(side, event, 0), hipStreamEndCapture(side, &graph)), 903);
	OK(hipStreamBeginCapture(stream, 2));
	OK(hipMalloc(&x, 16)); /* relaxed: allowed */
	OK(hipFree(x));
	OK(hipEventRecord(event, stream));
	OK(hipStreamWaitEvent(side, event, 0)); /* side joins, and is not waited for */
	MISUSE(hipStreamEndCapture(stream, &graph), 904);
	OK(hipStreamIsCapturing(side, &status));
	IS(status, 0);
	MISUSE(hipStreamWaitEvent(side, event, 0), 907);

	/* Memory that is freed before the graph is launched. A kernel that is given such memory crashes. */
	OK(hipStreamBeginCapture(stream, 1));
	OK(hipMemcpyAsync(host, p, 256, 2, stream));
	OK(hipStreamEndCapture(stream, &graph));
	OK(hipGraphExecDestroy(exec));
	MISUSE(hipGraphLaunch(exec, stream), 1);
	OK(hipGraphInstantiate(&exec, graph, NULL, NULL, 0));
	OK(hipFree(p));
	OK(hipGraphLaunch(exec, side));
	IS(hipStreamSynchronize(side), 700);
	OK(hipGraphExecDestroy(exec));
	OK(hipGraphDestroy(graph));
	OK(hipEventDestroy(event));
	OK(hipEventDestroy(old));

	/* A stream that is destroyed ends its capture. */
	OK(hipStreamDestroy(side));
	OK(hipStreamCreateWithFlags(&side, 1));
	OK(hipStreamBeginCapture(side, 0));
	OK(hipStreamDestroy(side));

	/* Launches. */
	void *params[] = { &p };
	MISUSE(hipModuleLaunchKernel(twice, 1, 1, 0, 64, 1, 1, 0, stream, params, NULL), 1);
	MISUSE(hipModuleLaunchKernel(twice, 1, 1, 1, 64, 8, 4, 0, stream, params, NULL), 1);
	MISUSE(hipModuleLaunchKernel(twice, 1, 1, 1, 64, 1, 1, 1 << 20, stream, params, NULL), 1);
	MISUSE(hipModuleLaunchKernel(twice, 1, 1, 1, 64, 1, 1, 0, stream, NULL, NULL), 1);
	size_t size = 4;
	void *extra[] = { (void *)1, &p, (void *)2, &size, (void *)3 };
	MISUSE(hipModuleLaunchKernel(twice, 1, 1, 1, 64, 1, 1, 0, stream, params, extra), 1);
	MISUSE(hipModuleLaunchKernel(twice, 1, 1, 1, 64, 1, 1, 0, stream, NULL, extra), 1);
}

static void *map_forever(void *arg) {
	void **a = arg;
	return (void *)(intptr_t)hipMemMap(a[0], granularity, 0, a[1], 0);
}

/* readable reports whether the host can read at p. */
static int readable(const void *p) {
	int ends[2], yes;
	if (pipe(ends)) return -1;
	yes = write(ends[1], p, 1) == 1;
	close(ends[0]), close(ends[1]);
	return yes;
}

/* test_abort, in a process of its own: with the defect, asking for an IPC handle of virtual memory ends it. */
static void test_abort(void) {
	int status = -1;
	pid_t pid = fork(); /* before HIP is used */
	if (pid == 0) {
		void *h = NULL, *at = NULL;
		char ipc[64];
		set_up();
		if (hipMemCreate(&h, granularity, &prop, 0) || hipMemAddressReserve(&at, granularity, 0, NULL, 0) ||
			hipMemMap(at, granularity, 0, h, 0) || hipsim_configure("DEFECTS", "ipc-aborts") || !freopen("/dev/null", "w", stderr))
			_exit(1);
		hipIpcGetMemHandle(ipc, at);
		_exit(2);
	}
	IS(waitpid(pid, &status, 0), pid);
	IS(WIFSIGNALED(status) ? WTERMSIG(status) : -1, SIGABRT);
}

static void test_defects(void) {
	void *h = NULL, *at = NULL, *x = NULL, *result;
	size_t g = granularity;
	int fd = -1, fd2 = -1;
	struct access desc = { .location = 2, .flags = 3 };
	OK(hipMemCreate(&h, g, &prop, 0));
	OK(hipMemAddressReserve(&at, g, 0, NULL, 0));
	IS(hipsim_configure("DEFECTS", "no-such-defect"), -1);

	OK(hipsim_configure("DEFECTS", "second-export"));
	OK(hipMemExportToShareableHandle(&fd, h, 1, 0));
	OK(hipMemExportToShareableHandle(&fd2, h, 1, 0)); /* the first is open */
	close(fd), close(fd2);
	UNCOUNTED(hipMemExportToShareableHandle(&fd, h, 1, 0), 1);
	OK(hipMemMap(at, g, 0, h, 0));
	OK(hipMemUnmap(at, g));

	OK(hipsim_configure("DEFECTS", "early-close"));
	UNCOUNTED(hipMemMap(at, g, 0, h, 0), 1);
	OK(hipMemRelease(h));

	OK(hipsim_configure("DEFECTS", "map-lies,hint-ignored"));
	OK(hipMemCreate(&h, g, &prop, 0));
	OK(hipMemMap(at, g, 0, h, 0));
	UNCOUNTED(hipMemSetAccess(at, g, &both, 1), 1);
	OK(hipMemUnmap(at, g));
	OK(hipMemAddressReserve(&x, g, 0, (void *)0x7e2000000000, 0));
	IS(x != (void *)0x7e2000000000, 1);
	OK(hipMemAddressFree(x, g));

	OK(hipsim_configure("DEFECTS", "map-hangs"));
	pthread_t thread;
	void *args[] = { at, h };
	pthread_create(&thread, NULL, map_forever, args);
	while (hipsim_stat("hipMemMap") < 1) usleep(1000);
	usleep(20000);
	IS(hipsim_stat("mappings"), 0);
	OK(hipsim_configure("DEFECTS", ""));
	pthread_join(thread, &result);
	IS((intptr_t)result, 0);

	/* The host at virtual memory, as HIP 7 can; not at imported memory, with the defect. */
	OK(hipsim_configure("VERSION", "7"));
	OK(hipMemSetAccess(at, g, &both, 1));
	OK(hipMemSetAccess(at, g, &desc, 1));
	fill(at, 4);
	IS(((unsigned char *)at)[1], 11);
	OK(hipMemUnmap(at, g));
	OK(hipMemExportToShareableHandle(&fd, h, 1, 0));
	OK(hipMemImportFromShareableHandle(&x, (void *)(intptr_t)fd, 1));
	close(fd);
	OK(hipMemMap(at, g, 0, x, 0));
	OK(hipMemSetAccess(at, g, &both, 1));
	OK(hipsim_configure("DEFECTS", "host-access"));
	UNCOUNTED(hipMemSetAccess(at, g, &desc, 1), 1);
	OK(hipsim_configure("DEFECTS", "host-access-void"));
	OK(hipMemSetAccess(at, g, &desc, 1));
	IS(readable(at), 0);
	OK(hipsim_configure("DEFECTS", ""));
	OK(hipMemSetAccess(at, g, &desc, 1));
	IS(readable(at), 1);
	IS(((unsigned char *)at)[1], 11);
	OK(hipsim_configure("VERSION", "6"));
	OK(hipMemUnmap(at, g));
	OK(hipMemRelease(x));
	OK(hipMemRelease(h));
	OK(hipMemAddressFree(at, g));
	IS(hipsim_stat("virtual_allocations"), 0);
}

static void test_faults(void) {
	void *h = NULL, *at = NULL, *graph = NULL, *exec = NULL;
	size_t g = granularity;
	int status = -1, fd = -1;
	OK(hipMemCreate(&h, g, &prop, 0));
	OK(hipMemAddressReserve(&at, g, 0, NULL, 0));
#define FAULT(name, call) do { \
	OK(hipsim_configure("FAIL", name ":1:999")); \
	UNCOUNTED(call, 999); \
	OK(hipsim_configure("FAIL", "")); \
} while (0)
	FAULT("hipMemGetAllocationGranularity", hipMemGetAllocationGranularity(&g, &prop, 0));
	FAULT("hipMemCreate", hipMemCreate(&h, g, &prop, 0));
	FAULT("hipMemRelease", hipMemRelease(h));
	FAULT("hipMemAddressReserve", hipMemAddressReserve(&at, g, 0, NULL, 0));
	FAULT("hipMemAddressFree", hipMemAddressFree(at, g));
	FAULT("hipMemMap", hipMemMap(at, g, 0, h, 0));
	OK(hipsim_configure("FAIL", "hipMemMap:1:0:async"));
	OK(hipMemMap(at, g, 0, h, 0)); /* a lie */
	OK(hipsim_configure("FAIL", ""));
	UNCOUNTED(hipMemSetAccess(at, g, &both, 1), 1);
	OK(hipMemUnmap(at, g));
	OK(hipMemMap(at, g, 0, h, 0));
	FAULT("hipMemSetAccess", hipMemSetAccess(at, g, &both, 1));
	OK(hipMemSetAccess(at, g, &both, 1));
	FAULT("hipMemExportToShareableHandle", hipMemExportToShareableHandle(&fd, h, 1, 0));
	FAULT("hipMemImportFromShareableHandle", hipMemImportFromShareableHandle(&h, NULL, 1));
	FAULT("hipMemGetAddressRange", hipMemGetAddressRange(NULL, NULL, at));
	FAULT("hipMemcpyDtoDAsync", hipMemcpyDtoDAsync(at, at, 1, stream));
	FAULT("hipStreamGetDevice", hipStreamGetDevice(stream, &status));
	FAULT("hipStreamGetFlags", hipStreamGetFlags(stream, (unsigned *)&status));
	FAULT("hipStreamBeginCapture", hipStreamBeginCapture(stream, 0));
	OK(hipStreamBeginCapture(stream, 0));
	FAULT("hipStreamIsCapturing", hipStreamIsCapturing(stream, &status));
	FAULT("hipStreamEndCapture", hipStreamEndCapture(stream, &graph));
	OK(hipStreamSynchronize(stream)); /* the capture has ended all the same */
	OK(hipStreamBeginCapture(stream, 0));
	OK(hipMemsetAsync(at, 5, g, stream));
	OK(hipStreamEndCapture(stream, &graph));
	FAULT("hipGraphInstantiate", hipGraphInstantiate(&exec, graph, NULL, NULL, 0));
	OK(hipGraphInstantiate(&exec, graph, NULL, NULL, 0));
	FAULT("hipGraphLaunch", hipGraphLaunch(exec, stream));
	OK(hipsim_configure("FAIL", "hipGraphLaunch:1:719:async"));
	void *other = NULL;
	OK(hipStreamCreateWithFlags(&other, 1));
	OK(hipGraphLaunch(exec, other));
	IS(hipStreamSynchronize(other), 719);
	OK(hipStreamDestroy(other));
	FAULT("hipGraphExecDestroy", hipGraphExecDestroy(exec));
	FAULT("hipGraphDestroy", hipGraphDestroy(graph));
	OK(hipGraphExecDestroy(exec));
	OK(hipGraphDestroy(graph));
	FAULT("hipMemUnmap", hipMemUnmap(at, g));

	/* A handle for another process is never to be asked for: the memory is lost. */
	char ipc[64];
	MISUSE(hipIpcGetMemHandle(ipc, at), 1);
	IS(hipsim_stat("ipc_leaks"), 1);
	OK(hipMemUnmap(at, g));
	OK(hipMemRelease(h));
	OK(hipMemAddressFree(at, g));
	IS(hipsim_stat("virtual_allocations"), 1);
}

/* test_forked: a process that has used HIP has a child that cannot. */
static long long milliseconds(void) {
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000LL + t.tv_nsec / 1000000;
}

/* Calls that queue nothing are held up themselves by "stall", every call is by "block". */
static void test_blocked(void) {
	void *p = NULL;
	size_t n = 0;
#define HELD(spec, call, code) do { \
	OK(hipsim_configure("FAIL", spec)); \
	long long before_ = milliseconds(); \
	IS(call, code); \
	expect(milliseconds() - before_ >= 29, 1, "held up: " #call, __LINE__); \
	OK(hipsim_configure("FAIL", "")); \
} while (0)
	HELD("hipMalloc:1:0:stall=30", hipMalloc(&p, 64), 0);
	HELD("hipMemGetInfo:1:999:stall=30", hipMemGetInfo(&n, &n), 999);
	HELD("hipMemsetAsync:1:0:block=30", hipMemsetAsync(p, 1, 64, stream), 0);
	HELD("hipStreamQuery:0:999:block=30", hipStreamQuery(stream), 999);
	OK(hipStreamSynchronize(stream));
	HELD("hipFree:1:0:stall=30", hipFree(p), 0);
}

/* differs returns how many of the n bytes at from are not value, and the last of them in *at and *is. */
static int differs(void *from, size_t n, int value, size_t *at, int *is) {
	int count = 0;
	OK(hipMemcpyAsync(host, from, n, 2, stream));
	OK(hipStreamSynchronize(stream));
	for (size_t i = 0; i < n; i++)
		if (host[i] != value) { count++; *at = i; *is = host[i]; }
	return count;
}

/* Bits flip in what copies deliver, and in memory at rest. */
static void test_flips(void) {
	enum { N = 64 };
	void *small = NULL, *large = NULL;
	size_t at = 0;
	int is = 0;
	long long before = hipsim_stat("flips");
	OK(hipMalloc(&small, N));
	OK(hipMalloc(&large, 2 * N));
	OK(hipsim_configure("FLIP", "2:5:7,3:70:0")); /* 70 is 6, as the copy has 64 bytes */
	for (int copy = 1; copy <= 4; copy++) {
		memset(host, 0, N);
		OK(hipMemcpyAsync(small, host, N, 1, stream));
		OK(hipMemcpyAsync(large, small, N, 3, stream)); /* does not count */
		OK(hipStreamSynchronize(stream));
		for (size_t i = 0; i < N; i++) IS(host[i], 0);
		int damaged = copy == 2 || copy == 3;
		IS(differs(small, N, 0, &at, &is), damaged);
		if (!damaged) continue;
		IS(at, copy == 2 ? 5 : 6);
		IS(is, copy == 2 ? 0x80 : 1);
	}
	IS(hipsim_stat("flips") - before, 2);

	OK(hipsim_configure("FLIP", "50ms:100:3"));
	OK(hipMemsetAsync(large, 0, 2 * N, stream));
	OK(hipStreamSynchronize(stream));
	while (hipsim_stat("flips") - before < 3) usleep(1000);
	IS(differs(large, 2 * N, 0, &at, &is), 1);
	IS(at, 100);
	IS(is, 8);
	IS(differs(small, N, 0, &at, &is), 0);
	static const char *const bad[] = { "1", "0:1:1", "1:1", "1:1:8", "1:1:1:1", "1s:1:1", "1ms:1:1:99", "x" };
	for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) IS(hipsim_configure("FLIP", bad[i]), -1);
	OK(hipsim_configure("FLIP", ""));
	OK(hipFree(small));
	OK(hipFree(large));
}

static void test_forked(void) {
	int status = -1;
	pid_t pid = fork();
	if (pid == 0) _exit(hipSetDevice(0));
	IS(waitpid(pid, &status, 0), pid);
	IS(WEXITSTATUS(status), 3);
}
