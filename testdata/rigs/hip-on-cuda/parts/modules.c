/* Code objects, launches, and hipRTC over NVRTC. */

int hipModuleLoadData(void **m, const void *image) { FORWARD(cu.cuModuleLoadData(m, image)); }
int hipModuleUnload(void *m) { FORWARD(cu.cuModuleUnload(m)); }
int hipModuleGetFunction(void **f, void *m, const char *name) { FORWARD(cu.cuModuleGetFunction(f, m, name)); }

/* HIP ends the list in extra with 3, CUDA with 0; 1 is the buffer and 2 the address of its size in both. Above 48 KiB
 * CUDA wants to be told in advance how much shared memory a launch asks for (attribute 8 of the function). */
int hipModuleLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
	unsigned shared, void *stream, void **params, void **extra) {
	void *list[5] = {0};
	int code = ready();
	if (code) return result(code);
	for (int i = 0; extra && extra[i] != (void *)3; i += 2) {
		if (i == 4 || (extra[i] != (void *)1 && extra[i] != (void *)2)) return result(1);
		list[i] = extra[i];
		list[i + 1] = extra[i + 1];
	}
	if (shared > 48 << 10 && cu.cuFuncSetAttribute) code = cu.cuFuncSetAttribute(f, 8, (int)shared);
	if (code) return result(code);
	return result(cu.cuLaunchKernel(f, gx, gy, gz, bx, by, bz, shared, stream, params, extra ? list : NULL));
}

/* NVRTC has hipRTC's calls and codes. What is compiled is machine code for the architecture that the properties name,
 * sm_NN. NVRTC is opened at first use: HIPCUDA_NVRTC, or what the loader finds, or the one in CUDA's usual folder. */
#define NVRTC(X) \
	X(nvrtcCreateProgram, (void **, const char *, const char *, int, const char *const *, const char *const *)) \
	X(nvrtcDestroyProgram, (void **)) X(nvrtcCompileProgram, (void *, int, const char *const *)) \
	X(nvrtcGetProgramLogSize, (void *, size_t *)) X(nvrtcGetProgramLog, (void *, char *)) \
	X(nvrtcGetCUBINSize, (void *, size_t *)) X(nvrtcGetCUBIN, (void *, char *))
static struct { NVRTC(FIELD) const char *(*nvrtcGetErrorString)(int); } rtc;
static pthread_once_t rtc_once = PTHREAD_ONCE_INIT;
static int rtc_code = 11; /* HIPRTC_ERROR_INTERNAL_ERROR, until NVRTC is open */

static void open_nvrtc(void) {
	const char *names[] = { getenv("HIPCUDA_NVRTC"), "libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12",
		"/usr/local/cuda/lib64/libnvrtc.so" };
	void *h = NULL;
	for (size_t i = 0; !h && i < sizeof names / sizeof *names; i++)
		if (names[i] && *names[i]) h = dlopen(names[i], RTLD_NOW | RTLD_LOCAL);
	if (!h) { fprintf(stderr, "hip-on-cuda: no NVRTC: %s\n", dlerror()); return; }
#define BIND_RTC(name, params) \
	*(void **)&rtc.name = dlsym(h, #name); \
	if (!rtc.name) { fprintf(stderr, "hip-on-cuda: no %s\n", #name); return; }
	NVRTC(BIND_RTC)
	*(void **)&rtc.nvrtcGetErrorString = dlsym(h, "nvrtcGetErrorString");
	if (rtc.nvrtcGetErrorString) rtc_code = 0;
}

static int rtc_ready(void) {
	pthread_once(&rtc_once, open_nvrtc);
	return rtc_code;
}

#define FORWARD_RTC(call) do { int code_ = rtc_ready(); return code_ ? code_ : (call); } while (0)

int hiprtcCreateProgram(void **p, const char *source, const char *name, int n, const char *const *headers,
	const char *const *names) {
	FORWARD_RTC(rtc.nvrtcCreateProgram(p, source, name, n, headers, names));
}

int hiprtcDestroyProgram(void **p) { FORWARD_RTC(rtc.nvrtcDestroyProgram(p)); }
int hiprtcCompileProgram(void *p, int n, const char *const *o) { FORWARD_RTC(rtc.nvrtcCompileProgram(p, n, o)); }
int hiprtcGetProgramLogSize(void *p, size_t *n) { FORWARD_RTC(rtc.nvrtcGetProgramLogSize(p, n)); }
int hiprtcGetProgramLog(void *p, char *log) { FORWARD_RTC(rtc.nvrtcGetProgramLog(p, log)); }
int hiprtcGetCodeSize(void *p, size_t *n) { FORWARD_RTC(rtc.nvrtcGetCUBINSize(p, n)); }
int hiprtcGetCode(void *p, char *code) { FORWARD_RTC(rtc.nvrtcGetCUBIN(p, code)); }

const char *hiprtcGetErrorString(int code) {
	return rtc_ready() ? "HIPRTC_ERROR_INTERNAL_ERROR" : rtc.nvrtcGetErrorString(code);
}
