/* Virtual memory: physical memory that is a file in memory (memfd), so that another process can map it; pieces of the
 * address space; and mappings of the one at the other. A reservation has a second piece of the same size for the
 * bytes: kernels that walk over several mappings of one reservation find them side by side. */

enum { PINNED = 1, ON_DEVICE = 1, ON_HOST = 2, NO_HANDLE = 0, DESCRIPTOR = 1 }; /* HIP's enums */
struct location { int type, id; };
struct prop { /* hipMemAllocationProp */
	int type, handles;
	struct location location;
	void *win32;
	struct { unsigned char compression, rdma; unsigned short usage; } flags;
};
struct access { struct location location; int flags; }; /* hipMemAccessDesc; flags: as PROT_READ and PROT_WRITE */
_Static_assert(sizeof(struct prop) == 32 && sizeof(struct access) == 12, "HIP's structures");

/* A piece of physical memory, from hipMemCreate or imported. It goes when its handle, its mappings and the
 * descriptors that this process has been given are gone. */
struct physical {
	int dev, fd, imported, exportable;
	int live, maps, leaked; /* live: the handle is not released */
	int gone;
	size_t size;
	ino_t inode;
	int *exports, nexports; /* descriptors that the caller has got */
	struct physical *next;
};
static struct physical *physicals; /* as streams, those that are gone stay */

/* Where hipMemMap has said success without mapping: the defect map-lies. */
struct phantom { uintptr_t addr; size_t size; struct phantom *next; };
static struct phantom *phantoms;

/* high moves a descriptor of the simulator's own out of the way: the numbers that the caller gets and closes stay
 * his. */
static int high(int fd) {
	int up = fcntl(fd, F_DUPFD_CLOEXEC, 600);
	if (up < 0) return fd;
	close(fd);
	return up;
}

static int still_open(const struct physical *p, int fd) {
	struct stat st;
	return fstat(fd, &st) == 0 && st.st_ino == p->inode;
}

/* open_exports returns how many of the descriptors that the caller has got are still open. */
static int open_exports(struct physical *p) {
	int n = 0;
	for (int i = 0; i < p->nexports; i++) n += still_open(p, p->exports[i]);
	return n;
}

/* settle releases the physical memory that nothing refers to any more. A caller closes descriptors without telling,
 * so that it has to be called before anybody looks at what is used. */
static void settle(void) {
	for (struct physical *p = physicals; p; p = p->next) {
		if (p->gone || p->live || p->maps || p->leaked || open_exports(p)) continue;
		close(p->fd);
		p->gone = 1;
		if (p->imported) continue;
		give(p->dev, p->size);
		add(S_VIRTUAL, -1);
	}
}

static struct physical *find_physical(void *h) {
	for (struct physical *p = physicals; p; p = p->next)
		if (p == h && p->live) return p;
	misuse(INVALID_VALUE, "invalid handle of physical memory");
	return NULL;
}

static int closed_early(struct physical *p) {
	return cfg.defects & EARLY_CLOSE && open_exports(p) < p->nexports;
}

static int odd(size_t n) { return n == 0 || n % cfg.granularity; }

/* check_prop checks what memory is asked for. */
static int check_prop(const struct prop *p) {
	if (!p) return misuse(INVALID_VALUE, "hipMemAllocationProp: null pointer");
	if (p->type != PINNED) return misuse(INVALID_VALUE, "hipMemAllocationProp: type");
	if (p->location.type != ON_DEVICE) return misuse(INVALID_VALUE, "hipMemAllocationProp: not on a device");
	if (no_such(p->location.id)) return misuse(INVALID_DEVICE, "hipMemAllocationProp: no such device");
	if (p->handles != NO_HANDLE && p->handles != DESCRIPTOR)
		return misuse(NOT_SUPPORTED, "hipMemAllocationProp: kind of handle");
	if (p->win32 || p->flags.compression || p->flags.rdma > 1 || p->flags.usage)
		return misuse(INVALID_VALUE, "hipMemAllocationProp: flags or metadata of Windows");
	return SUCCESS;
}

/* VIRTUAL_API is SYNC_API for what HIP 5.2 does not have, and what a device may be without. */
#define VIRTUAL_API(name, params, args) \
	static int virtual_##name params; \
	DEVICE_API(name, params, args) { \
		if (cfg.version < HIP_5_7 || !cfg.virtual_memory) return NOT_SUPPORTED; \
		NO_CAPTURE(); \
		return virtual_##name args; \
	} \
	static int virtual_##name params
#define LATE_FAULT() do { int code_ = late_fault(); if (code_) return code_; } while (0)

/* ---- physical memory ---- */

VIRTUAL_API(hipMemGetAllocationGranularity, (size_t *g, const struct prop *prop, int option), (g, prop, option)) {
	LATE_FAULT();
	int code = check_prop(prop);
	if (code) return code;
	if (!g || option < 0 || option > 1) return misuse(INVALID_VALUE, "hipMemGetAllocationGranularity: arguments");
	*g = cfg.granularity;
	return SUCCESS;
}

static struct physical *new_physical(struct physical init) {
	struct stat st;
	struct physical *p = calloc(1, sizeof *p);
	*p = init;
	p->live = 1;
	p->inode = fstat(p->fd, &st) ? 0 : st.st_ino;
	p->next = physicals;
	physicals = p;
	add(S_VHANDLES, 1);
	return p;
}

/* new_file returns a descriptor of n bytes of memory for the device; its name says which one that is. */
static int new_file(int dev, size_t n) {
	char name[32];
	snprintf(name, sizeof name, "hipsim-%d", dev);
	int fd = memfd_create(name, MFD_CLOEXEC);
	if (fd < 0) return -1;
	void *p = ftruncate(fd, n) ? MAP_FAILED : mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (p == MAP_FAILED) { close(fd); return -1; }
	if (cfg.poison) memset(p, 0xA5, n);
	munmap(p, n);
	return high(fd);
}

VIRTUAL_API(hipMemCreate, (void **out, size_t n, const struct prop *prop, unsigned long long flags),
	(out, n, prop, flags)) {
	LATE_FAULT();
	int code = check_prop(prop);
	if (code) return code;
	if (prop->handles != NO_HANDLE && cfg.version < HIP_6_4) return NOT_SUPPORTED;
	if (!out || flags) return misuse(INVALID_VALUE, "hipMemCreate: arguments");
	if (odd(n)) return misuse(INVALID_VALUE, "hipMemCreate: the size is not a multiple of the granularity");
	int dev = prop->location.id;
	if (!take(dev, n)) return OUT_OF_MEMORY;
	int fd = new_file(dev, n);
	if (fd < 0) { give(dev, n); return OUT_OF_MEMORY; }
	*out = new_physical((struct physical){ .dev = dev, .fd = fd, .size = n, .exportable = prop->handles == DESCRIPTOR });
	add(S_VIRTUAL, 1);
	return SUCCESS;
}

VIRTUAL_API(hipMemRelease, (void *h), (h)) {
	LATE_FAULT();
	struct physical *p = find_physical(h);
	if (!p) return INVALID_VALUE;
	p->live = 0;
	add(S_VHANDLES, -1);
	settle();
	return SUCCESS;
}

/* ---- descriptors ---- */

VIRTUAL_API(hipMemExportToShareableHandle, (void *out, void *h, int type, unsigned long long flags),
	(out, h, type, flags)) {
	LATE_FAULT();
	if (cfg.version < HIP_6_4) return NOT_SUPPORTED;
	struct physical *p = find_physical(h);
	if (!p) return INVALID_VALUE;
	if (!out || flags || type != DESCRIPTOR) return misuse(INVALID_VALUE, "hipMemExportToShareableHandle: arguments");
	if (!p->exportable)
		return misuse(INVALID_VALUE, "hipMemExportToShareableHandle: created without requestedHandleTypes");
	if (closed_early(p)) return INVALID_VALUE;
	if (cfg.defects & SECOND_EXPORT && p->nexports && !open_exports(p)) return INVALID_VALUE;
	int fd = fcntl(p->fd, F_DUPFD_CLOEXEC, 0);
	if (fd < 0) return OUT_OF_MEMORY;
	p->exports = realloc(p->exports, (p->nexports + 1) * sizeof *p->exports);
	p->exports[p->nexports++] = fd;
	*(int *)out = fd;
	add(S_EXPORTS, 1);
	return SUCCESS;
}

/* exported_by returns the device that a descriptor is of, -1 if it is not of physical memory. */
static int exported_by(int fd) {
	char path[64], name[64] = "";
	int dev;
	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	ssize_t n = readlink(path, name, sizeof name - 1);
	return n > 0 && sscanf(name, "/memfd:hipsim-%d", &dev) == 1 ? dev : -1;
}

/* The descriptor stays the caller's. HIP 6.4 takes its address, HIP 7.2 its value, of which the lower 32 bits count;
 * HIPSIM_IMPORT says otherwise. */
VIRTUAL_API(hipMemImportFromShareableHandle, (void **out, void *os, int type), (out, os, type)) {
	LATE_FAULT();
	if (cfg.version < HIP_6_4) return NOT_SUPPORTED;
	if (!out || type != DESCRIPTOR) return misuse(INVALID_VALUE, "hipMemImportFromShareableHandle: arguments");
	int pointer = cfg.import_pointer < 0 ? cfg.version < HIP_7_2 : cfg.import_pointer;
	if (pointer && (uintptr_t)os < PAGE)
		return misuse(INVALID_VALUE, "hipMemImportFromShareableHandle: not the address of a descriptor");
	int fd = pointer ? *(int *)os : (int)(intptr_t)os, dev = exported_by(fd);
	struct stat st;
	if (no_such(dev) || fstat(fd, &st))
		return misuse(INVALID_VALUE, "hipMemImportFromShareableHandle: not a descriptor of a device's memory");
	int own = fcntl(fd, F_DUPFD_CLOEXEC, 600);
	if (own < 0) return OUT_OF_MEMORY;
	*out = new_physical((struct physical){ .dev = dev, .fd = own, .size = st.st_size, .imported = 1, .exportable = 1 });
	add(S_IMPORTS, 1);
	return SUCCESS;
}

/* ---- addresses ---- */

/* aligned_space returns size bytes of forbidden addresses at a multiple of align, at the hint if that is free. */
static char *aligned_space(size_t size, size_t align, void *hint) {
	if (hint && (uintptr_t)hint % align == 0 && !(cfg.defects & HINT_IGNORED)) {
		char *p = mmap(hint, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
		if (p == hint) return p;
		if (p != MAP_FAILED) munmap(p, size); /* a kernel that does not know MAP_FIXED_NOREPLACE */
	}
	char *p = mmap(NULL, size + align, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (p == MAP_FAILED) return NULL;
	size_t before = (align - (uintptr_t)p % align) % align;
	if (before) munmap(p, before);
	munmap(p + before + size, align - before);
	return p + before;
}

VIRTUAL_API(hipMemAddressReserve, (void **out, size_t n, size_t align, void *hint, unsigned long long flags),
	(out, n, align, hint, flags)) {
	LATE_FAULT();
	if (!out || flags || (align & (align - 1))) return misuse(INVALID_VALUE, "hipMemAddressReserve: arguments");
	if (odd(n) || (uintptr_t)hint % cfg.granularity)
		return misuse(INVALID_VALUE, "hipMemAddressReserve: size or hint is not a multiple of the granularity");
	char *addr = aligned_space(n, align > cfg.granularity ? align : cfg.granularity, hint), *data = forbidden(n);
	if (!addr || !data) {
		if (addr) munmap(addr, n);
		if (data) allow(data, n);
		return OUT_OF_MEMORY;
	}
	struct reservation *r = malloc(sizeof *r);
	*r = (struct reservation){ .addr = (uintptr_t)addr, .data = data, .size = n, .next = reservations };
	reservations = r;
	add(S_RESERVED, 1);
	*out = addr;
	return SUCCESS;
}

VIRTUAL_API(hipMemAddressFree, (void *addr, size_t n), (addr, n)) {
	LATE_FAULT();
	struct reservation **link = &reservations, *r;
	while (*link && (*link)->addr != (uintptr_t)addr) link = &(*link)->next;
	r = *link;
	if (!r || r->size != n) return misuse(INVALID_VALUE, "hipMemAddressFree: not a whole reservation");
	for (struct range *m = ranges; m; m = m->next)
		if (m->kind == VIRTUAL && m->addr - r->addr < r->size)
			return misuse(INVALID_VALUE, "hipMemAddressFree: something is mapped there");
	*link = r->next;
	munmap(addr, n);
	allow(r->data, n);
	free(r);
	add(S_RESERVED, -1);
	return SUCCESS;
}

/* ---- mappings ---- */

static int map_phantom(void *addr, size_t n) {
	struct phantom *p = malloc(sizeof *p);
	*p = (struct phantom){ .addr = (uintptr_t)addr, .size = n, .next = phantoms };
	phantoms = p;
	return SUCCESS;
}

static struct phantom **find_phantom(uintptr_t addr) {
	struct phantom **link = &phantoms;
	while (*link && (*link)->addr != addr) link = &(*link)->next;
	return *link ? link : NULL;
}

/* A fault that is to come later makes the call lie. */
VIRTUAL_API(hipMemMap, (void *addr, size_t n, size_t offset, void *h, unsigned long long flags),
	(addr, n, offset, h, flags)) {
	uintptr_t a = (uintptr_t)addr;
	struct physical *p = find_physical(h);
	if (!p) return INVALID_VALUE;
	if (offset || flags) return misuse(INVALID_VALUE, "hipMemMap: offset and flags have to be 0");
	if (odd(n) || a % cfg.granularity)
		return misuse(INVALID_VALUE, "hipMemMap: address or size is not a multiple of the granularity");
	if (n > p->size) return misuse(INVALID_VALUE, "hipMemMap: more than the memory has");
	struct reservation *r = reserved(a, n);
	if (!r || a < r->addr || a - r->addr > r->size - n)
		return misuse(INVALID_VALUE, "hipMemMap: not inside one reservation");
	if (overlap(a, n)) return misuse(INVALID_VALUE, "hipMemMap: something is mapped there");
	while (cfg.defects & MAP_HANGS) pthread_cond_wait(&changed, &lock);
	if (armed.mode == STALL) stall(armed.ms);
	if (armed.mode == ASYNC || cfg.defects & MAP_LIES) return map_phantom(addr, n);
	if (closed_early(p)) return INVALID_VALUE;
	char *data = r->data + (a - r->addr);
	if (mmap(data, n, PROT_NONE, MAP_SHARED | MAP_FIXED, p->fd, 0) == MAP_FAILED) return OUT_OF_MEMORY;
	new_range((struct range){ .kind = VIRTUAL, .dev = p->dev, .fd = p->fd, .ipc = p->imported, .addr = a, .data = data, .size = n, .map = n,
		.physical = p });
	p->maps++;
	add(S_MAPPED, 1);
	return SUCCESS;
}

static int word_inside(uintptr_t *word, void *range) { return inside(range, *word, 1); }

/* quiet waits for the devices if something that is queued uses the mapping. HIP does not wait: this is a misuse. */
static void quiet(struct range *r, const char *why) {
	int use = 0;
	for (struct stream *s = streams; s && !use; s = s->next)
		for (struct op *op = s->stop || s->code ? NULL : s->head; op && !use; op = op->next) {
			if (op->what == LAUNCH) use = words(op->launch, op->launch->args, word_inside, r);
			else if (op->what == COPY || op->what == SET)
				use = inside(r, op->dst, op->n) || (op->what == COPY && inside(r, op->src, op->n));
		}
	if (!use) return;
	misuse(SUCCESS, why);
	for (int dev = 0; dev < cfg.devices; dev++) drain_device(dev);
}

VIRTUAL_API(hipMemUnmap, (void *addr, size_t n), (addr, n)) {
	LATE_FAULT();
	struct phantom **lie = find_phantom((uintptr_t)addr);
	if (lie && (*lie)->size == n) {
		struct phantom *p = *lie;
		*lie = p->next;
		free(p);
		return SUCCESS;
	}
	struct range **link = find_start((uintptr_t)addr);
	if (!link || (*link)->kind != VIRTUAL || (*link)->size != n)
		return misuse(INVALID_VALUE, "hipMemUnmap: not a whole mapping");
	quiet(*link, "hipMemUnmap: an operation that uses the memory is still to run");
	if (!(link = find_start((uintptr_t)addr))) return misuse(INVALID_VALUE, "hipMemUnmap: twice at once");
	struct range *r = *link;
	const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
	mmap(r->data, n, PROT_NONE, flags, -1, 0);
	mmap(addr, n, PROT_NONE, flags, -1, 0);
	r->physical->maps--;
	remove_range(link);
	settle();
	return SUCCESS;
}

/* host_access lets the host at the memory, at the address that the caller knows. HIP 7 can do that. */
static int host_access(struct range *r, int flags) {
	if (cfg.version < HIP_7_2) return misuse(INVALID_VALUE, "hipMemSetAccess: not a device");
	if (r->physical->imported && cfg.defects & HOST_ACCESS) return INVALID_VALUE;
	if (r->physical->imported && cfg.defects & HOST_ACCESS_VOID) return SUCCESS;
	void *p = mmap((void *)r->addr, r->size, flags, MAP_SHARED | MAP_FIXED, r->physical->fd, 0);
	return p == MAP_FAILED ? OUT_OF_MEMORY : SUCCESS;
}

static int device_access(struct range *r, int dev, int flags) {
	if (r->access[dev] & ~flags) quiet(r, "hipMemSetAccess: takes away an access that an operation still needs");
	r->access[dev] = (char)flags;
	int all = 0;
	for (int d = 0; d < MAX_DEVICES; d++) all |= r->access[d];
	return mprotect(r->data, r->size, all) ? OUT_OF_MEMORY : SUCCESS;
}

VIRTUAL_API(hipMemSetAccess, (void *addr, size_t n, const struct access *desc, size_t count), (addr, n, desc, count)) {
	LATE_FAULT();
	uintptr_t a = (uintptr_t)addr, at = a;
	if (!desc || !count || odd(n)) return misuse(INVALID_VALUE, "hipMemSetAccess: arguments");
	if (find_phantom(a)) return INVALID_VALUE; /* the caller cannot know */
	for (size_t i = 0; i < count; i++) {
		int on = desc[i].location.type, flags = desc[i].flags;
		if ((flags & ~(PROT_READ | PROT_WRITE)) || flags == PROT_WRITE)
			return misuse(INVALID_VALUE, "hipMemSetAccess: flags");
		if (on != ON_DEVICE && on != ON_HOST) return misuse(INVALID_VALUE, "hipMemSetAccess: kind of location");
		if (on == ON_DEVICE && no_such(desc[i].location.id)) return misuse(INVALID_DEVICE, "hipMemSetAccess: no such device");
	}
	/* First all is checked: the range has to consist of whole mappings. */
	while (at < a + n) {
		struct range **link = find_start(at);
		if (!link || (*link)->kind != VIRTUAL || (*link)->size > a + n - at || reserved(at, 1) != reserved(a, 1))
			return misuse(INVALID_VALUE, "hipMemSetAccess: not whole mappings of one reservation");
		if (closed_early((*link)->physical)) return INVALID_VALUE;
		at += (*link)->size;
	}
	for (at = a; at < a + n; ) {
		struct range *r = *find_start(at);
		for (size_t i = 0; i < count; i++) {
			int code = desc[i].location.type == ON_HOST ? host_access(r, desc[i].flags)
				: device_access(r, desc[i].location.id, desc[i].flags);
			if (code) return code;
		}
		at += r->size;
	}
	return SUCCESS;
}

/* ---- other ---- */

/* hipMemGetAddressRange is for all memory of a device. */
SYNC_API(hipMemGetAddressRange, (void **base, size_t *n, void *p), (base, n, p)) {
	struct range *r = overlap((uintptr_t)p, 1);
	if (!on_device(r)) return misuse(INVALID_VALUE, "hipMemGetAddressRange: not memory of a device");
	if (base) *base = (void *)r->addr;
	if (n) *n = r->size;
	return SUCCESS;
}

/* leak is what hipIpcGetMemHandle does to virtual memory: it is never freed again, whatever the caller releases. */
static int leak(struct range *r) {
	r->physical->leaked = 1;
	add(S_LEAKS, 1);
	lost("hipIpcGetMemHandle of virtual memory");
	return misuse(INVALID_VALUE, "hipIpcGetMemHandle: virtual memory, which is leaked now");
}
