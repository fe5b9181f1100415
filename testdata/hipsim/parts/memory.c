/* The list of all memory that HIP knows. Device memory has two addresses: the one that the caller knows, at which
 * nobody may touch it, so that a host that follows it crashes; and the one of the bytes, which copies and kernels
 * use. */

enum kind { DEVICE, HOST, REGISTERED, VIRTUAL };
struct range {
	enum kind kind;
	int dev, fd, ipc;
	uintptr_t addr;   /* what the caller knows */
	char *data;       /* where the bytes are */
	size_t size, map; /* as asked for, and as mapped */
	struct physical *physical; /* of kind VIRTUAL: what is mapped here, see virtual.c */
	char access[MAX_DEVICES];  /* of kind VIRTUAL: what hipMemSetAccess has said, a protection as mmap takes it */
	struct range *next;
};
static struct range *ranges;
static size_t used[MAX_DEVICES];
static char peers[MAX_DEVICES][MAX_DEVICES];

/* A reservation is a piece of the address space for virtual memory, see virtual.c. */
struct reservation { uintptr_t addr; char *data; size_t size; struct reservation *next; };
static struct reservation *reservations;

static void settle(void);
static void touch(int dev);

/* on_device reports whether the range is memory of a device. */
static int on_device(const struct range *r) { return r && (r->kind == DEVICE || r->kind == VIRTUAL); }

/* overlap returns a range that shares bytes with [p, p+n). */
static struct range *overlap(uintptr_t p, size_t n) {
	for (struct range *r = ranges; r; r = r->next)
		if (p < r->addr + r->size && r->addr < p + n) return r;
	return NULL;
}

/* reserved returns a reservation that shares bytes with [p, p+n). */
static struct reservation *reserved(uintptr_t p, size_t n) {
	for (struct reservation *r = reservations; r; r = r->next)
		if (p < r->addr + r->size && r->addr < p + n) return r;
	return NULL;
}

static int inside(const struct range *r, uintptr_t p, size_t n) {
	return r && p >= r->addr && n <= r->size && p - r->addr <= r->size - n;
}

static struct range **find_start(uintptr_t p) {
	for (struct range **r = &ranges; *r; r = &(*r)->next)
		if ((*r)->addr == p) return r;
	return NULL;
}

static struct range *new_range(struct range init) {
	struct range *r = malloc(sizeof *r);
	*r = init;
	if (on_device(r) || cfg.integrated) touch(r->dev);
	r->next = ranges;
	return ranges = r;
}

static size_t whole_pages(size_t n) { return (n + PAGE - 1) / PAGE * PAGE; }

/* forbidden returns the middle of map + 2 pages that nobody may touch, NULL if there is no room. */
static char *forbidden(size_t map) {
	char *p = mmap(NULL, map + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	return p == MAP_FAILED ? NULL : p + PAGE;
}

static void allow(char *p, size_t map) { munmap(p - PAGE, map + 2 * PAGE); }

/* map_device gives the memory of the file fd its two addresses, with a forbidden page at each end of each. */
static struct range *map_device(int fd, size_t n, int dev, int ipc) {
	size_t map = whole_pages(n);
	char *addr = forbidden(map), *data = forbidden(map);
	if (!addr || !data || mmap(data, map, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) {
		if (addr) allow(addr, map);
		if (data) allow(data, map);
		return NULL;
	}
	return new_range((struct range){ .kind = DEVICE, .dev = dev, .fd = fd, .ipc = ipc, .addr = (uintptr_t)addr,
		.data = data, .size = n, .map = map });
}

/* take counts n bytes of the device as used; it is false if there are not so many. */
static int take(int dev, size_t n) {
	settle();
	if (n > cfg.memory || used[dev] > cfg.memory - n) return 0;
	used[dev] += n;
	add(S_DEVBYTES, n);
	return 1;
}

static void give(int dev, size_t n) {
	used[dev] -= n;
	add(S_DEVBYTES, -(long long)n);
}

static int device_malloc(void **p, size_t n, int dev) {
	if (!p) return misuse(INVALID_VALUE, "null pointer for the result");
	if (n == 0) { *p = NULL; return SUCCESS; }
	if (!take(dev, n)) return OUT_OF_MEMORY;
	int fd = memfd_create("hipsim", MFD_CLOEXEC);
	struct range *r = fd < 0 || ftruncate(fd, whole_pages(n)) ? NULL : map_device(fd, n, dev, 0);
	if (!r) {
		if (fd >= 0) close(fd);
		give(dev, n);
		return OUT_OF_MEMORY;
	}
	if (cfg.poison) memset(r->data, 0xA5, n);
	add(S_DEV, 1);
	*p = (void *)r->addr;
	return SUCCESS;
}

/* remove_range forgets memory and releases it, save virtual memory: virtual.c knows what belongs to that. */
static void remove_range(struct range **link) {
	struct range *r = *link;
	*link = r->next;
	switch (r->kind) {
	case DEVICE:
		allow((char *)r->addr, r->map);
		allow(r->data, r->map);
		close(r->fd);
		if (r->ipc) { add(S_IPC, -1); break; }
		give(r->dev, r->size);
		add(S_DEV, -1);
		break;
	case HOST:
		munmap(r->data, r->map);
		add(S_HOST, -1);
		add(S_HOSTBYTES, -(long long)r->size);
		break;
	case REGISTERED:
		add(S_REG, -1);
		break;
	case VIRTUAL:
		add(S_MAPPED, -1);
	}
	free(r);
}

/* reach reports whether device dev may read, or write, the memory of a range. */
static int reach(const struct range *r, int dev, int prot) {
	if (r->kind == VIRTUAL) return (r->access[dev] & prot) == prot;
	return r->kind != DEVICE || r->dev == dev || peers[dev][r->dev];
}

/* writable reports whether all pages of [p, p+n) are mapped for reading and writing. */
static int writable(uintptr_t p, size_t n) {
	FILE *f = fopen("/proc/self/maps", "r");
	if (!f) return 0;
	char line[512], perm[8];
	unsigned long from, to;
	uintptr_t at = p;
	while (at < p + n && fgets(line, sizeof line, f))
		if (sscanf(line, "%lx-%lx %7s", &from, &to, perm) == 3 && from <= at && at < to && perm[0] == 'r' && perm[1] == 'w')
			at = to;
	fclose(f);
	return at >= p + n;
}
