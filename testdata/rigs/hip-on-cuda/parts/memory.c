/* Device and host memory, copies, memory of other processes. */

int hipMemGetInfo(size_t *free_bytes, size_t *total) {
	size_t f = 0, t = 0;
	int code = ready();
	if (!code) code = cu.cuMemGetInfo_v2(&f, &t);
	if (!code && free_bytes) *free_bytes = f;
	if (!code && total) *total = t;
	return result(code);
}

int hipMalloc(void **p, size_t n) {
	CUptr q = 0;
	int code = ready();
	if (!code && n) code = cu.cuMemAlloc_v2(&q, n);
	if (!code) *p = (void *)(uintptr_t)q;
	return result(code);
}

int hipFree(void *p) {
	if (!p) return 0;
	FORWARD(cu.cuMemFree_v2(PTR(p)));
}

int hipMemGetAddressRange(void **base, size_t *n, void *p) {
	CUptr q = 0;
	size_t size = 0;
	int code = ready();
	if (!code) code = cu.cuMemGetAddressRange_v2(&q, &size, PTR(p));
	if (!code && base) *base = (void *)(uintptr_t)q;
	if (!code && n) *n = size;
	return result(code);
}

/* Flags for all contexts, mapped and write-combined are 1, 2 and 4 in both; HIP has more, for caches that CUDA has
 * not. */
int hipHostMalloc(void **p, size_t n, unsigned flags) { FORWARD(cu.cuMemHostAlloc(p, n, flags & 7)); }
int hipHostAlloc(void **p, size_t n, unsigned flags) { return hipHostMalloc(p, n, flags); }

int hipHostFree(void *p) {
	if (!p) return 0;
	FORWARD(cu.cuMemFreeHost(p));
}

int hipHostRegister(void *p, size_t n, unsigned flags) { FORWARD(cu.cuMemHostRegister_v2(p, n, flags & (1 | 2 | 8))); }
int hipHostUnregister(void *p) { FORWARD(cu.cuMemHostUnregister(p)); }

int hipHostGetDevicePointer(void **device, void *host, unsigned flags) {
	CUptr q = 0;
	int code = ready();
	if (!code) code = cu.cuMemHostGetDevicePointer_v2(&q, host, flags);
	if (!code) *device = (void *)(uintptr_t)q;
	return result(code);
}

/* The driver finds out by itself where an address is, so that the kind of a copy is not needed. */
int hipMemcpy(void *d, const void *s, size_t n, int kind) {
	(void)kind;
	FORWARD(cu.cuMemcpy(PTR(d), PTR(s), n));
}

int hipMemcpyAsync(void *d, const void *s, size_t n, int kind, void *stream) {
	(void)kind;
	FORWARD(cu.cuMemcpyAsync(PTR(d), PTR(s), n, stream));
}

int hipMemcpyHtoDAsync(void *d, const void *s, size_t n, void *stream) { return hipMemcpyAsync(d, s, n, 1, stream); }
int hipMemcpyDtoHAsync(void *d, const void *s, size_t n, void *stream) { return hipMemcpyAsync(d, s, n, 2, stream); }
int hipMemcpyDtoDAsync(void *d, void *s, size_t n, void *stream) { return hipMemcpyAsync(d, s, n, 3, stream); }

int hipMemcpyPeerAsync(void *d, int to, const void *s, int from, size_t n, void *stream) {
	int code = ready();
	if (code) return result(code);
	if (to < 0 || from < 0 || to >= devices || from >= devices || !contexts[to] || !contexts[from])
		return result(INVALID_DEVICE);
	return result(cu.cuMemcpyPeerAsync(PTR(d), contexts[to], PTR(s), contexts[from], n, stream));
}

int hipMemset(void *d, int v, size_t n) { FORWARD(cu.cuMemsetD8_v2(PTR(d), (unsigned char)v, n)); }

int hipMemsetAsync(void *d, int v, size_t n, void *stream) {
	FORWARD(cu.cuMemsetD8Async(PTR(d), (unsigned char)v, n, stream));
}

/* Memory of other processes. For a process that opens its own handle CUDA's code, invalid context, is HIP's: 201. The
 * one flag, lazy peer access, is 1 for CUDA and for HIP 6, the version that this library says it is. For a pointer
 * into an allocation CUDA would make a handle of the whole allocation; such pointers are refused, as HIP does. */
int hipIpcGetMemHandle(Ipc *h, void *p) {
	CUptr base = 0;
	size_t n = 0;
	int code = ready();
	if (!code) code = cu.cuMemGetAddressRange_v2(&base, &n, PTR(p));
	if (!code && base != PTR(p)) code = 1;
	return result(code ? code : cu.cuIpcGetMemHandle(h, PTR(p)));
}

int hipIpcOpenMemHandle(void **p, Ipc h, unsigned flags) {
	CUptr q = 0;
	int code = ready();
	if (!code && flags != 1) code = 1;
	if (!code) code = cu.cuIpcOpenMemHandle_v2(&q, h, flags);
	if (!code) *p = (void *)(uintptr_t)q;
	return result(code);
}

int hipIpcCloseMemHandle(void *p) { FORWARD(cu.cuIpcCloseMemHandle(PTR(p))); }
