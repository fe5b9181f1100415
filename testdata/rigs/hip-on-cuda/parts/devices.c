/* Versions, devices, access between devices, errors. */

int hipInit(unsigned flags) {
	(void)flags;
	return result(started());
}

int hipRuntimeGetVersion(int *v) { *v = 60300000; return 0; }
int hipDriverGetVersion(int *v) { FORWARD(cu.cuDriverGetVersion(v)); }

int hipGetDeviceCount(int *n) {
	int code = started();
	*n = code ? 0 : devices;
	return result(code ? code : devices ? 0 : NO_DEVICE);
}

int hipSetDevice(int d) {
	int code = started();
	if (code) return result(code);
	if (d < 0 || d >= devices) return result(INVALID_DEVICE);
	current = d;
	return result(ready());
}

int hipGetDevice(int *d) { *d = current; return 0; }
int hipDeviceSynchronize(void) { FORWARD(cu.cuCtxSynchronize()); }
int hipDeviceReset(void) { return 0; }
int hipDeviceGetName(char *s, int n, int d) { FORWARD(cu.cuDeviceGetName(s, n, d)); }
int hipDeviceTotalMem(size_t *n, int d) { FORWARD(cu.cuDeviceTotalMem_v2(n, d)); }
int hipDeviceGetPCIBusId(char *s, int n, int d) { FORWARD(cu.cuDeviceGetPCIBusId(s, n, d)); }
int hipDeviceGetUuid(void *u, int d) { FORWARD(cu.cuDeviceGetUuid(u, d)); }

/* Numbers of attributes differ: HIP's, which are the same from HIP 5 to 7, on the left, CUDA's on the right. */
static const struct { int hip, cuda; } attributes[] = {
	{2, 40}, {3, 19}, {5, 13}, {16, 18}, {19, 38}, {23, 75}, {24, 83}, {56, 1}, {59, 37}, {60, 36}, {61, 76}, {63, 16},
	{65, 88}, {67, 33}, {68, 34}, {69, 50}, {74, 8}, {87, 10}, {88, 115}, {89, 102}, {90, 99},
};

int hipDeviceGetAttribute(int *v, int attribute, int d) {
	for (size_t i = 0; i < sizeof attributes / sizeof *attributes; i++)
		if (attributes[i].hip == attribute) FORWARD(cu.cuDeviceGetAttribute(v, attributes[i].cuda, d));
	return result(1);
}

/* The 1472-byte structure of HIP 6 and 7. Filled are the fields that have no call of their own, and a few more. */
int hipGetDevicePropertiesR0600(char *p, int d) {
	static const struct { int attribute, at; } fields[] = {
		{87, 308}, {63, 388}, {16, 396}, {23, 360}, {61, 364}, /* warp size, multiprocessors, integrated, major, minor */
	};
	memset(p, 0, 1472);
	int code = hipDeviceGetName(p, 256, d), major, minor;
	if (code) return code;
	size_t memory = 0;
	hipDeviceTotalMem(&memory, d);
	memcpy(p + 288, &memory, sizeof memory);
	for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
		int v = 0;
		hipDeviceGetAttribute(&v, fields[i].attribute, d);
		memcpy(p + fields[i].at, &v, sizeof v);
	}
	memcpy(&major, p + 360, sizeof major);
	memcpy(&minor, p + 364, sizeof minor);
	snprintf(p + 1160, 256, "sm_%d%d", major, minor);
	return 0;
}

int hipDeviceCanAccessPeer(int *can, int a, int b) { FORWARD(cu.cuDeviceCanAccessPeer(can, a, b)); }

int hipDeviceEnablePeerAccess(int peer, unsigned flags) {
	int was = current, code = hipSetDevice(peer); /* so that the peer has a context */
	if (code) return code;
	CUctx c = contexts[peer];
	code = hipSetDevice(was);
	return result(code ? code : cu.cuCtxEnablePeerAccess(c, flags));
}

const char *hipGetErrorName(int code) {
	const char *s = NULL;
	started();
	if (cu.cuGetErrorName) cu.cuGetErrorName(code, &s);
	return s ? s : "hipErrorUnknown";
}

const char *hipGetErrorString(int code) {
	const char *s = NULL;
	started();
	if (cu.cuGetErrorString) cu.cuGetErrorString(code, &s);
	return s ? s : "unknown error";
}

int hipGetLastError(void) {
	int code = last_error;
	last_error = 0;
	return code;
}

int hipPeekAtLastError(void) { return last_error; }
