/* Memory of another process. */

/* HIP 7's runtime passes memory over an abstract socket, which belongs to a network namespace. HIP 6.4 can do it, too,
 * and does unless HSA_ENABLE_IPC_MODE_LEGACY is anything but 0; HIP 7 does unless it is 1. The namespace is part of the
 * handle here; 0: none. */
struct ipc { char tag[8]; int pid, fd; size_t size; unsigned long network; char filler[32]; }; /* 64 bytes, by value */
_Static_assert(sizeof(struct ipc) == 64, "hipIpcMemHandle_t");

static unsigned long ipc_network(void) {
	const char *legacy = getenv("HSA_ENABLE_IPC_MODE_LEGACY");
	struct stat st;
	if (cfg.version < HIP_6_4 || (legacy ? strcmp(legacy, "0") != 0 : cfg.version < HIP_7_2)) return 0;
	if (cfg.network) return cfg.network;
	return stat("/proc/self/ns/net", &st) ? 1 : st.st_ino;
}

DEVICE_API(hipIpcGetMemHandle, (struct ipc *h, void *p), (h, p)) {
	NO_CAPTURE();
	struct range **link = find_start((uintptr_t)p), *r = overlap((uintptr_t)p, 1);
	if (r && r->kind == VIRTUAL) return leak(r);
	if (!h || !link || (*link)->kind != DEVICE || (*link)->ipc) return misuse(INVALID_VALUE, "hipIpcGetMemHandle");
	*h = (struct ipc){ .tag = "hipsim1", .pid = getpid(), .fd = (*link)->fd, .size = (*link)->size,
		.network = ipc_network() };
	for (size_t i = 0; i < sizeof h->filler; i++) h->filler[i] = (char)(i + 1);
	return SUCCESS;
}

DEVICE_API(hipIpcOpenMemHandle, (void **p, struct ipc h, unsigned flags), (p, h, flags)) {
	NO_CAPTURE();
	/* The value of hipIpcMemLazyEnablePeerAccess changed in HIP 6. */
	if (!p || flags != (cfg.version >= HIP_6_4)) return misuse(INVALID_VALUE, "hipIpcOpenMemHandle: arguments");
	for (size_t i = 0; i < sizeof h.filler; i++)
		if (h.filler[i] != (char)(i + 1)) return misuse(INVALID_VALUE, "hipIpcOpenMemHandle: mangled handle");
	if (memcmp(h.tag, "hipsim1", 8)) return misuse(INVALID_VALUE, "hipIpcOpenMemHandle: not a handle");
	if (h.pid == getpid()) return misuse(INVALID_CONTEXT, "hipIpcOpenMemHandle: own memory");
	if (h.network != ipc_network()) return INVALID_DEVICE_POINTER;
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
