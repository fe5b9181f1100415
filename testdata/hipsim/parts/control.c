/* Texts of errors, settings, and what tests ask for. */

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
	{ILLEGAL_STATE, "hipErrorIllegalState", "the operation cannot be performed in the present state"},
	{NOT_SUPPORTED, "hipErrorNotSupported", "operation not supported"},
	{CAPTURE_UNSUPPORTED, "hipErrorStreamCaptureUnsupported", "operation not permitted when stream is capturing"},
	{CAPTURE_INVALIDATED, "hipErrorStreamCaptureInvalidated", "operation failed due to a previous error during capture"},
	{CONTEXT_DESTROYED, "hipErrorContextIsDestroyed", "context is destroyed"},
};

static const char *text(int code, int want_name) {
	for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
		if (texts[i].code == code) return want_name || cfg.version < HIP_5_7 ? texts[i].name : texts[i].text;
	return want_name || cfg.version < HIP_5_7 ? "hipErrorUnknown" : "unknown error";
}

const char *hipGetErrorName(int code) { return text(code, 1); }

#ifndef HIPSIM_NO_ERROR_STRING /* a library that lacks a required function */
const char *hipGetErrorString(int code) { return text(code, 0); }
#endif

/* ---- for tests ---- */

/* parse_version reads 5.2, 5.7, 6.4 or 7.2; 5, 6 and 7 are the oldest of each. */
static int parse_version(const char *value) {
	static const int all[] = { HIP_5_2, HIP_5_7, HIP_6_4, HIP_7_2 };
	int major = 0, minor = -1, n = sscanf(value, "%d.%d", &major, &minor);
	for (size_t i = 0; i < sizeof all / sizeof *all; i++)
		if (n >= 1 && major == all[i] / 10 && (n == 1 || minor == all[i] % 10)) {
			cfg.version = all[i];
			return 0;
		}
	return -1;
}

/* hipsim_version is for hiprtc.c, where that is part of this library. */
int hipsim_version(void) { return cfg.version; }

/* hipsim_configure sets what the environment variable HIPSIM_<name> sets; -1: no such name or bad value. */
int hipsim_configure(const char *name, const char *value) {
	int rc = 0;
	pthread_mutex_lock(&lock);
	if (!strcmp(name, "DEVICES")) cfg.devices = atoi(value) > MAX_DEVICES ? MAX_DEVICES : atoi(value);
	else if (!strcmp(name, "MEMORY")) cfg.memory = strtoull(value, NULL, 0);
	else if (!strcmp(name, "INTEGRATED")) cfg.integrated = atoi(value);
	else if (!strcmp(name, "VERSION")) rc = parse_version(value);
	else if (!strcmp(name, "DELAY_US")) cfg.delay_us = atol(value);
	else if (!strcmp(name, "SEED")) cfg.seed = atoi(value);
	else if (!strcmp(name, "POISON")) cfg.poison = atoi(value);
	else if (!strcmp(name, "VERBOSE")) cfg.verbose = atoi(value);
	else if (!strcmp(name, "FAIL")) rc = parse_faults(value);
	else if (!strcmp(name, "FLIP")) rc = parse_flips(value);
	else if (!strcmp(name, "HOLD")) cfg.hold = atoi(value); /* 1: nothing executes until it is 0 again */
	else if (!strcmp(name, "WAITS")) cfg.waits = atoi(value);
	else if (!strcmp(name, "NETWORK")) cfg.network = strtoul(value, NULL, 0);
	else if (!strcmp(name, "VMM")) cfg.virtual_memory = atoi(value) != 0;
	else if (!strcmp(name, "GRANULARITY")) {
		size_t g = strtoull(value, NULL, 0);
		if (g < PAGE || (g & (g - 1))) rc = -1;
		else cfg.granularity = g;
	} else if (!strcmp(name, "IMPORT")) {
		cfg.import_pointer = !strcmp(value, "pointer");
		if (!cfg.import_pointer && strcmp(value, "value")) rc = -1;
	} else if (!strcmp(name, "DEFECTS")) rc = parse_defects(value);
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
		"VERBOSE", "FAIL", "FLIP", "REPORT", "WAITS", "NETWORK",
		"VMM", "GRANULARITY", "IMPORT", "DEFECTS" };
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

/* hipsim_stat returns a number of the report, or how often a HIP function was called; -1: no such name. */
long long hipsim_stat(const char *name) {
	long long v = -1;
	pthread_mutex_lock(&lock);
	settle();
	for (int i = 0; i < S_COUNT; i++)
		if (!strcmp(stats[i].name, name)) v = stats[i].v;
	if (!strncmp(name, "hip", 3)) v = 0;
	for (struct func *f = funcs; f; f = f->next)
		if (!strcmp(f->name, name)) v = f->calls;
	pthread_mutex_unlock(&lock);
	return v;
}

/* hipsim_live returns what is not released: allocations, registrations, opened IPC memory, streams, events, modules,
 * graphs, and what belongs to virtual memory: handles, reservations, mappings, and memory that descriptors hold. */
long long hipsim_live(void) {
	pthread_mutex_lock(&lock);
	settle();
	static const int alive[] = { S_DEV, S_HOST, S_REG, S_IPC, S_STREAMS, S_EVENTS, S_MODULES, S_GRAPHS, S_EXECS,
		S_VIRTUAL, S_VHANDLES, S_RESERVED, S_MAPPED };
	long long v = 0;
	for (size_t i = 0; i < sizeof alive / sizeof *alive; i++) v += stats[alive[i]].v;
	pthread_mutex_unlock(&lock);
	return v;
}
