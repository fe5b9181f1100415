/* Memory of another process. */

struct ipc { char tag[8]; int pid, fd; size_t size; char filler[40]; }; /* 64 bytes, passed by value */
_Static_assert(sizeof(struct ipc) == 64, "hipIpcMemHandle_t");

DEVICE_API(hipIpcGetMemHandle, (struct ipc *h, void *p), (h, p)) {
	NO_CAPTURE();
	struct range **link = find_start((uintptr_t)p), *r = overlap((uintptr_t)p, 1);
	if (r && r->kind == VIRTUAL) return leak(r);
	if (!h || !link || (*link)->kind != DEVICE || (*link)->ipc) return misuse(INVALID_VALUE, "hipIpcGetMemHandle");
	*h = (struct ipc){ .tag = "hipsim1", .pid = getpid(), .fd = (*link)->fd, .size = (*link)->size };
	for (size_t i = 0; i < sizeof h->filler; i++) h->filler[i] = (char)(i + 1);
	return SUCCESS;
}

DEVICE_API(hipIpcOpenMemHandle, (void **p, struct ipc h, unsigned flags), (p, h, flags)) {
	NO_CAPTURE();
	/* The value of hipIpcMemLazyEnablePeerAccess changed in HIP 6. */
	if (!p || flags != (cfg.version >= 6)) return misuse(INVALID_VALUE, "hipIpcOpenMemHandle: arguments");
	for (size_t i = 0; i < sizeof h.filler; i++)
		if (h.filler[i] != (char)(i + 1)) return misuse(INVALID_VALUE, "hipIpcOpenMemHandle: mangled handle");
	if (memcmp(h.tag, "hipsim1", 8)) return misuse(INVALID_VALUE, "hipIpcOpenMemHandle: not a handle");
	if (h.pid == getpid()) return misuse(INVALID_CONTEXT, "hipIpcOpenMemHandle: own memory");
	char path[64];
	snprintf(path, sizeof path, "/proc/%d/fd/%d", h.pid, h.fd);
	int fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0) return misuse(INVALID_VALUE, "hipIpcOpenMemHandle: the exporting process is gone");
	struct range *r = map_device(fd, h.size, current, 1);
	if (!r) { close(fd); return OUT_OF_MEMORY; }
	add(S_IPC, 1);
	*p = (void *)r->addr;
	return SUCCESS;
}

DEVICE_API(hipIpcCloseMemHandle, (void *p), (p)) {
	NO_CAPTURE();
	struct range **link = find_start((uintptr_t)p);
	if (!link || !(*link)->ipc) return misuse(INVALID_VALUE, "hipIpcCloseMemHandle");
	drain_device((*link)->dev);
	if ((link = find_start((uintptr_t)p))) remove_range(link);
	return SUCCESS;
}
