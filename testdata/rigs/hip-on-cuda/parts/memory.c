/* Device and host memory, copies, memory of other processes, and bits that flip. */

/* Damage that no call reports, as HIPCUDA_FLIP says: bits that are wrong in what copies deliver, and bits that flip in
 * memory at rest. README.md says how it is written. */
enum { MAX_FLIPS = 256, MAX_PIECES = 4096 };
struct flip { long copies, rest_ms; unsigned long long byte; int bit, dev; }; /* copies: that are still to come; 0: at rest */
static struct flip flips[MAX_FLIPS];
static struct { CUptr p; size_t n; int dev; } pieces[MAX_PIECES]; /* of device memory, to find the largest */
static int nflips, npieces;
static long long touched[MAX_DEVICES]; /* when something was last allocated or copied there, in milliseconds; 0: never */
static pthread_once_t flips_once = PTHREAD_ONCE_INIT;
static pthread_mutex_t flips_lock = PTHREAD_MUTEX_INITIALIZER; /* guards all of these */

static long long now_ms(void) {
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000LL + t.tv_nsec / 1000000;
}

/* flip_now flips a bit of the largest piece of the device's memory. It is 0 if there is none. */
static int flip_now(const struct flip *f) {
	unsigned char v;
	int most = -1;
	for (int i = 0; i < npieces; i++)
		if (pieces[i].dev == f->dev && (most < 0 || pieces[i].n > pieces[most].n)) most = i;
	if (most < 0) return 0;
	current = f->dev;
	CUptr at = pieces[most].p + f->byte % pieces[most].n;
	int code = ready();
	if (!code) code = cu.cuMemcpy(PTR(&v), at, 1);
	v ^= (unsigned char)(1 << f->bit);
	if (!code) code = cu.cuMemcpy(at, PTR(&v), 1);
	fprintf(stderr, "hip-on-cuda: flipped bit %d of byte %llu of %zu at rest on device %d: %d\n", f->bit,
		f->byte % pieces[most].n, pieces[most].n, f->dev, code);
	return 1;
}

/* flipper is a thread that flips the bits of memory at rest. */
static void *flipper(void *arg) {
	(void)arg;
	for (int waiting = 1; waiting; usleep(1000)) {
		waiting = 0;
		pthread_mutex_lock(&flips_lock);
		for (int i = nflips - 1; i >= 0; i--) {
			struct flip *f = &flips[i];
			if (f->copies) continue;
			if (touched[f->dev] && now_ms() - touched[f->dev] >= f->rest_ms && flip_now(f)) flips[i] = flips[--nflips];
			else waiting = 1;
		}
		pthread_mutex_unlock(&flips_lock);
	}
	return NULL;
}

static void read_flips(void) {
	const char *spec = getenv("HIPCUDA_FLIP");
	int resting = 0;
	while (spec && *spec) {
		struct flip f = {0};
		char *end;
		int used = 0;
		long when = strtol(spec, &end, 10);
		int bad = nflips == MAX_FLIPS || end == spec || when < 1;
		if (!strncmp(end, "ms", 2)) { f.rest_ms = when; end += 2; resting = 1; }
		else f.copies = when;
		bad |= sscanf(end, ":%llu:%d%n", &f.byte, &f.bit, &used) != 2;
		spec = end + used;
		if (!bad && f.rest_ms && *spec == ':') { bad = sscanf(spec, ":%d%n", &f.dev, &used) != 1; spec += used; }
		if (bad || f.bit < 0 || f.bit > 7 || f.dev < 0 || f.dev >= MAX_DEVICES || (*spec && *spec != ',')) {
			fprintf(stderr, "hip-on-cuda: bad value of HIPCUDA_FLIP: %s\n", getenv("HIPCUDA_FLIP"));
			exit(2);
		}
		flips[nflips++] = f;
		if (*spec) spec++;
	}
	pthread_t thread;
	if (resting && !pthread_create(&thread, NULL, flipper, NULL)) pthread_detach(thread);
}

/* add_piece notes memory of the current device. */
static void add_piece(CUptr p, size_t n) {
	pthread_once(&flips_once, read_flips);
	pthread_mutex_lock(&flips_lock);
	if (npieces < MAX_PIECES) {
		pieces[npieces].p = p;
		pieces[npieces].n = n;
		pieces[npieces++].dev = current;
	}
	touched[current] = now_ms();
	pthread_mutex_unlock(&flips_lock);
}

/* drop_piece forgets memory before it is freed, so that nothing flips there any more. */
static void drop_piece(CUptr p) {
	pthread_mutex_lock(&flips_lock);
	for (int i = 0; i < npieces; i++)
		if (pieces[i].p == p) { pieces[i] = pieces[--npieces]; break; }
	pthread_mutex_unlock(&flips_lock);
}

/* delivered follows a copy from the host on its stream, and queues the damage behind it: the byte is that of the source,
 * which the caller must not change before the copy is done. */
static int delivered(CUptr d, const unsigned char *s, size_t n, void *stream) {
	int code = 0;
	pthread_once(&flips_once, read_flips);
	pthread_mutex_lock(&flips_lock);
	touched[current] = now_ms();
	for (int i = nflips - 1; i >= 0; i--) {
		if (!flips[i].copies || --flips[i].copies) continue;
		size_t at = flips[i].byte % n;
		if (!code) code = cu.cuMemsetD8Async(d + at, (unsigned char)(s[at] ^ 1 << flips[i].bit), 1, stream);
		fprintf(stderr, "hip-on-cuda: flipped bit %d of byte %zu of a copy of %zu: %d\n", flips[i].bit, at, n, code);
		flips[i] = flips[--nflips];
	}
	pthread_mutex_unlock(&flips_lock);
	return code;
}

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
	if (!code && n) add_piece(q, n);
	return result(code);
}

int hipFree(void *p) {
	if (!p) return 0;
	drop_piece(PTR(p));
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

/* The driver finds out by itself where an address is, so that it does not need the kind of a copy. */
int hipMemcpy(void *d, const void *s, size_t n, int kind) {
	(void)kind;
	FORWARD(cu.cuMemcpy(PTR(d), PTR(s), n));
}

int hipMemcpyAsync(void *d, const void *s, size_t n, int kind, void *stream) {
	int code = ready();
	if (!code) code = cu.cuMemcpyAsync(PTR(d), PTR(s), n, stream);
	if (!code && n && kind == 1) code = delivered(PTR(d), s, n, stream);
	return result(code);
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
