/* Memory of the device, and page-locked memory of the host. */

DEVICE_API(hipMalloc, (void **p, size_t n), (p, n)) {
	NO_CAPTURE();
	return device_malloc(p, n, current);
}

DEVICE_API(hipFree, (void *p), (p)) {
	if (!p) return SUCCESS;
	NO_CAPTURE();
	struct range **link = find_start((uintptr_t)p);
	if (!link || (*link)->kind != DEVICE || (*link)->ipc) return misuse(INVALID_VALUE, "hipFree: unknown pointer");
	settle_work((*link)->dev);
	link = find_start((uintptr_t)p); /* the list may have changed while waiting */
	if (!link) return misuse(INVALID_VALUE, "hipFree: freed twice at once");
	remove_range(link);
	return SUCCESS;
}

DEVICE_API(hipHostMalloc, (void **p, size_t n, unsigned flags), (p, n, flags)) {
	NO_CAPTURE();
	if (!p) return misuse(INVALID_VALUE, "hipHostMalloc: null pointer");
	if ((flags & ~0xE0000007u) || (flags & 0xC0000000u) == 0xC0000000u)
		return misuse(INVALID_VALUE, "hipHostMalloc: flags");
	if (n == 0) { *p = NULL; return SUCCESS; }
	size_t map = whole_pages(n);
	char *data = mmap(NULL, map, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (data == MAP_FAILED) return OUT_OF_MEMORY;
	new_range((struct range){ .kind = HOST, .dev = current, .addr = (uintptr_t)data, .data = data, .size = n,
		.map = map });
	add(S_HOST, 1);
	add(S_HOSTBYTES, n);
	*p = data;
	return SUCCESS;
}

/* unpin is hipHostFree and hipHostUnregister. */
static int unpin(void *p, enum kind kind, int code) {
	NO_CAPTURE();
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
	NO_CAPTURE();
	if (!p || !n || flags > 15) return misuse(INVALID_VALUE, "hipHostRegister: arguments");
	if (overlap(a, n)) return misuse(ALREADY_REGISTERED, "hipHostRegister: overlap");
	if (!writable(a, n)) return misuse(INVALID_VALUE, "hipHostRegister: not writable memory");
	new_range((struct range){ .kind = REGISTERED, .dev = current, .addr = a, .data = p, .size = n });
	add(S_REG, 1);
	return SUCCESS;
}

DEVICE_API(hipHostUnregister, (void *p), (p)) { return unpin(p, REGISTERED, NOT_REGISTERED); }

/* All page-locked memory of the host is mapped for the devices, at the address that the host has for it. */
DEVICE_API(hipHostGetDevicePointer, (void **d, void *h, unsigned flags), (d, h, flags)) {
	struct range *r = overlap((uintptr_t)h, 1);
	if (!d || flags || !r || on_device(r)) return misuse(INVALID_VALUE, "hipHostGetDevicePointer");
	*d = h;
	return SUCCESS;
}

#ifndef HIPSIM_NO_OPTIONAL
DEVICE_API(hipMallocAsync, (void **p, size_t n, void *h), (p, n, h)) {
	struct stream *s = find_stream(h);
	if (!s) return CONTEXT_DESTROYED;
	NOT_CAPTURED(s);
	return device_malloc(p, n, s->dev);
}

DEVICE_API(hipFreeAsync, (void *p, void *h), (p, h)) {
	struct stream *s = find_stream(h);
	if (!s) return CONTEXT_DESTROYED;
	NOT_CAPTURED(s);
	if (!p) return cfg.version < HIP_7_2 ? misuse(INVALID_VALUE, "hipFreeAsync: null pointer") : SUCCESS;
	struct range **link = find_start((uintptr_t)p);
	if (!link || (*link)->kind != DEVICE || (*link)->ipc) return misuse(INVALID_VALUE, "hipFreeAsync: unknown pointer");
	return enqueue(s, (struct op){ .what = FREE, .dst = (uintptr_t)p });
}
#endif
