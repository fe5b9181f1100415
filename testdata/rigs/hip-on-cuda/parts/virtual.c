/* Virtual memory. All values (kinds of memory, of locations and of handles, access, options) are the same in HIP and
 * CUDA. A handle, a pointer in HIP, is an integer in CUDA. */

/* clean copies what memory is asked for without the padding at its end, where CUDA wants zeroes. */
static Prop clean(const Prop *p) {
	Prop copy = {0};
	memcpy(&copy, p, offsetof(Prop, flags.reserved));
	return copy;
}

int hipMemGetAllocationGranularity(size_t *n, const Prop *prop, int option) {
	if (!n || !prop) return result(1);
	Prop p = clean(prop);
	FORWARD_IF(cuMemGetAllocationGranularity, cu.cuMemGetAllocationGranularity(n, &p, option));
}

int hipMemCreate(void **h, size_t n, const Prop *prop, unsigned long long flags) {
	if (!h || !prop) return result(1);
	Prop p = clean(prop);
	CUhandle q = 0;
	int code = ready();
	if (!code) code = cu.cuMemCreate ? cu.cuMemCreate(&q, n, &p, flags) : NOT_SUPPORTED;
	if (!code) *h = (void *)(uintptr_t)q;
	return result(code);
}

int hipMemRelease(void *h) { FORWARD_IF(cuMemRelease, cu.cuMemRelease(PTR(h))); }

int hipMemAddressReserve(void **p, size_t n, size_t align, void *hint, unsigned long long flags) {
	CUptr q = 0;
	int code = ready();
	if (!p) return result(1);
	if (!code) code = cu.cuMemAddressReserve ? cu.cuMemAddressReserve(&q, n, align, PTR(hint), flags) : NOT_SUPPORTED;
	if (!code) *p = (void *)(uintptr_t)q;
	return result(code);
}

int hipMemAddressFree(void *p, size_t n) { FORWARD_IF(cuMemAddressFree, cu.cuMemAddressFree(PTR(p), n)); }

int hipMemMap(void *p, size_t n, size_t offset, void *h, unsigned long long flags) {
	int code = ready();
	if (!code) code = cu.cuMemMap ? cu.cuMemMap(PTR(p), n, offset, PTR(h), flags) : NOT_SUPPORTED;
	if (!code) add_piece(PTR(p), n);
	return result(code);
}

int hipMemUnmap(void *p, size_t n) {
	drop_piece(PTR(p));
	FORWARD_IF(cuMemUnmap, cu.cuMemUnmap(PTR(p), n));
}

int hipMemSetAccess(void *p, size_t n, const Access *access, size_t count) {
	FORWARD_IF(cuMemSetAccess, cu.cuMemSetAccess(PTR(p), n, access, count));
}

int hipMemExportToShareableHandle(void *out, void *h, int type, unsigned long long flags) {
	FORWARD_IF(cuMemExportToShareableHandle, cu.cuMemExportToShareableHandle(out, PTR(h), type, flags));
}

/* A descriptor comes as a value in the pointer, of which the lower 32 bits count, as with AMD. */
int hipMemImportFromShareableHandle(void **h, void *os, int type) {
	CUhandle q = 0;
	int code = ready();
	if (!h) return result(1);
	if (!code) code = cu.cuMemImportFromShareableHandle ? cu.cuMemImportFromShareableHandle(&q, (void *)(intptr_t)(int)(intptr_t)os, type) : NOT_SUPPORTED;
	if (!code) *h = (void *)(uintptr_t)q;
	return result(code);
}
