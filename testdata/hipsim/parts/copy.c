/* Copies and fills. */

/* device_side checks that [p, p+n) is memory that device dev may read, or write. HIP 7 wants virtual memory to be
 * accessible to the thread's current device, too. */
static int device_side(uintptr_t p, size_t n, int dev, int prot) {
	struct range *r = overlap(p, n);
	if (!inside(r, p, n))
		return misuse(INVALID_VALUE, reserved(p, n) ? "not inside one mapping of virtual memory"
			: "not inside one allocation of the device");
	if (!reach(r, dev, prot))
		return misuse(INVALID_VALUE, r->kind == VIRTUAL ? "hipMemSetAccess has not given this device this access"
			: "memory of another device than the stream's");
	if (r->kind == VIRTUAL && cfg.version >= HIP_7_2 && !reach(r, current, prot))
		return misuse(INVALID_VALUE, "hipMemSetAccess has not given the current device this access");
	return SUCCESS;
}

/* host_side checks that [p, p+n) is memory of the host and says whether it is page-locked. */
static int host_side(uintptr_t p, size_t n, int *pinned) {
	struct range *r = overlap(p, n);
	*pinned = r != NULL;
	if (r && (on_device(r) || !inside(r, p, n))) return misuse(INVALID_VALUE, "not wholly in one piece of host memory");
	if (!r && reserved(p, n)) return misuse(INVALID_VALUE, "reserved addresses, where nothing is mapped");
	return p ? SUCCESS : misuse(INVALID_VALUE, "null pointer");
}

static int device_to_device(uintptr_t d, uintptr_t s, size_t n, struct stream *st) {
	int code = device_side(d, n, st->dev, PROT_WRITE);
	if (!code) code = device_side(s, n, st->dev, PROT_READ);
	if (!code && d < s + n && s < d + n) code = misuse(INVALID_VALUE, "a copy whose source and destination overlap");
	return code ? code : enqueue(st, (struct op){ .what = COPY, .dst = d, .src = s, .n = n });
}

DEVICE_API(hipMemcpyAsync, (void *dst, const void *src, size_t n, int kind, void *h), (dst, src, n, kind, h)) {
	uintptr_t d = (uintptr_t)dst, s = (uintptr_t)src;
	struct stream *st = find_stream(h);
	if (!st) return CONTEXT_DESTROYED;
	if (n == 0) return SUCCESS;
	struct range *dr = overlap(d, n), *sr = overlap(s, n);
	int to_device = on_device(dr), from_device = on_device(sr);
	if (kind == 4) kind = to_device ? (from_device ? 3 : 1) : from_device ? 2 : 0;
	int pinned = 1, code;
	switch (kind) {
	case 1: code = device_side(d, n, st->dev, PROT_WRITE); if (!code) code = host_side(s, n, &pinned); break;
	case 2: code = device_side(s, n, st->dev, PROT_READ); if (!code) code = host_side(d, n, &pinned); break;
	case 3: return device_to_device(d, s, n, st);
	default: return misuse(INVALID_KIND, "hipMemcpyAsync: kind");
	}
	if (code) return code;
	if (pinned) return enqueue(st, (struct op){ .what = COPY, .dst = d, .src = s, .n = n });
	NOT_CAPTURED(st);
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
	int code = device_side((uintptr_t)dst, n, s->dev, PROT_WRITE);
	return code ? code : enqueue(s, (struct op){ .what = SET, .dst = (uintptr_t)dst, .n = n, .value = value });
}

#ifndef HIPSIM_NO_OPTIONAL
DEVICE_API(hipMemcpyDtoDAsync, (void *dst, void *src, size_t n, void *h), (dst, src, n, h)) {
	struct stream *s = find_stream(h);
	if (!s) return CONTEXT_DESTROYED;
	return n ? device_to_device((uintptr_t)dst, (uintptr_t)src, n, s) : SUCCESS;
}

DEVICE_API(hipMemcpyPeerAsync, (void *dst, int ddev, const void *src, int sdev, size_t n, void *h),
	(dst, ddev, src, sdev, n, h)) {
	struct stream *s = find_stream(h);
	if (!s) return CONTEXT_DESTROYED;
	if (no_such(ddev) || no_such(sdev)) return misuse(INVALID_DEVICE, "hipMemcpyPeerAsync");
	if (n == 0) return SUCCESS;
	struct range *d = overlap((uintptr_t)dst, n), *r = overlap((uintptr_t)src, n);
	if (!inside(d, (uintptr_t)dst, n) || !inside(r, (uintptr_t)src, n) || d->dev != ddev || r->dev != sdev)
		return misuse(INVALID_VALUE, "hipMemcpyPeerAsync: not memory of the devices named");
	if ((d->kind == VIRTUAL && !reach(d, s->dev, PROT_WRITE)) || (r->kind == VIRTUAL && !reach(r, s->dev, PROT_READ)))
		return misuse(INVALID_VALUE, "hipMemcpyPeerAsync: hipMemSetAccess has not given the stream's device this access");
	return enqueue(s, (struct op){ .what = COPY, .dst = (uintptr_t)dst, .src = (uintptr_t)src, .n = n });
}
#endif
