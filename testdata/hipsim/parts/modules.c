/* Code objects and launches. A code object is a shared library that hiprtc.c has made. */
#include <ucontext.h>

/* What the library has for each kernel: its parameters' sizes and alignments, and a function that calls it with
 * pointers to its arguments. hiprtc.c writes the table. */
struct kernel {
	const char *name;
	unsigned params;
	const size_t *sizes, *aligns;
	void (*call)(void **args);
};

/* Where the thread of a kernel is, as the code object sees it; hiprtc.c has the same struct in its prelude. */
struct index { unsigned x, y, z; };
struct place {
	struct index thread, block, block_dim, grid_dim;
	char *shared;          /* memory that the launch asks for, one piece for a block */
	void (*barrier)(void); /* __syncthreads */
};

enum { MAX_THREADS = 1024, MAX_SHARED = 65536, MAX_ARGS = 4096, STACK = 256 << 10 };
struct function { struct module *module; const struct kernel *kernel; size_t size; struct function *next; };
struct module {
	int dev, live;
	int fd;       /* of the file; open as long as it is loaded, as dlopen tells libraries apart by their names, too */
	int barriers; /* 1: its kernels call __syncthreads */
	void *lib;
	struct place *(*place)(void); /* of the calling OS thread */
	struct function *functions;
	struct module *next;
};
static struct module *modules; /* as streams, closed ones stay, and functions as well */

/* ---- executing ---- */

/* The threads of a block whose kernel has barriers take turns on one OS thread, each with a stack of its own. */
static __thread struct {
	ucontext_t home, *threads;
	char *done;
	unsigned now; /* which one runs */
	const struct kernel *kernel;
	void **args;
} turns;

static void barrier(void) { swapcontext(&turns.threads[turns.now], &turns.home); }

static void no_barrier(void) {}

static void thread_main(void) {
	turns.kernel->call(turns.args);
	turns.done[turns.now] = 1;
}

static void set_thread(struct place *at, unsigned n) {
	at->thread = (struct index){ n % at->block_dim.x, n / at->block_dim.x % at->block_dim.y,
		n / at->block_dim.x / at->block_dim.y };
}

/* take_turns runs the threads of one block: each up to its next barrier or its end, again and again. */
static void take_turns(struct place *at, unsigned threads, char *stacks) {
	for (unsigned n = 0; n < threads; n++) {
		ucontext_t *c = &turns.threads[n];
		getcontext(c);
		c->uc_stack.ss_sp = stacks + (size_t)n * STACK;
		c->uc_stack.ss_size = STACK;
		c->uc_link = &turns.home;
		makecontext(c, thread_main, 0);
		turns.done[n] = 0;
	}
	for (unsigned left = threads; left; ) {
		left = 0;
		for (unsigned n = 0; n < threads; n++) {
			if (turns.done[n]) continue;
			turns.now = n;
			set_thread(at, n);
			swapcontext(&turns.home, &turns.threads[n]);
			left += !turns.done[n];
		}
	}
}

/* run_grid runs all blocks of a launch, one after the other. Shared memory is filled anew for each: a kernel that
 * reads what it has not written finds no zeroes. */
static void run_grid(struct module *m, const struct kernel *k, const struct launch *l, void **args) {
	struct place *at = m->place();
	unsigned threads = l->block[0] * l->block[1] * l->block[2];
	int fibers = m->barriers && threads > 1;
	char *shared = malloc(l->shared + 16), *stacks = NULL;
	at->block_dim = (struct index){ l->block[0], l->block[1], l->block[2] };
	at->grid_dim = (struct index){ l->grid[0], l->grid[1], l->grid[2] };
	at->shared = shared;
	at->barrier = fibers ? barrier : no_barrier;
	if (fibers) {
		const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
		stacks = mmap(NULL, (size_t)threads * STACK, PROT_READ | PROT_WRITE, flags, -1, 0);
		turns.threads = malloc(threads * sizeof *turns.threads);
		turns.done = malloc(threads);
		turns.kernel = k;
		turns.args = args;
		if (stacks == MAP_FAILED || !turns.threads || !turns.done) abort();
	}
	for (unsigned z = 0; z < l->grid[2]; z++)
		for (unsigned y = 0; y < l->grid[1]; y++)
			for (unsigned x = 0; x < l->grid[0]; x++) {
				at->block = (struct index){ x, y, z };
				memset(shared, 0xA5, l->shared);
				if (fibers) take_turns(at, threads, stacks);
				else for (unsigned n = 0; n < threads; n++) {
					set_thread(at, n);
					k->call(args);
				}
			}
	if (fibers) {
		munmap(stacks, (size_t)threads * STACK);
		free(turns.threads);
		free(turns.done);
	}
	free(shared);
}

/* words calls found for each aligned word of the arguments that may be an address. It stops at the first answer but
 * 0. */
static int words(const struct launch *l, char *args, int (*found)(uintptr_t *word, void *ctx), void *ctx) {
	const struct kernel *k = l->function->kernel;
	size_t at = 0;
	for (unsigned i = 0; i < k->params; at += k->sizes[i++]) {
		at = (at + k->aligns[i] - 1) / k->aligns[i] * k->aligns[i];
		for (size_t w = (at + 7) / 8 * 8; w + 8 <= at + k->sizes[i]; w += 8) {
			int code = found((uintptr_t *)(args + w), ctx);
			if (code) return code;
		}
	}
	return SUCCESS;
}

/* translate turns an address in device memory into that of the bytes behind it, if the device may reach them. */
static int translate(uintptr_t *word, void *ctx) {
	int dev = *(int *)ctx;
	struct range *r = overlap(*word, 1);
	if (!r) return reserved(*word, 1) ? ILLEGAL_ADDRESS : SUCCESS;
	if (!reach(r, dev, r->kind == VIRTUAL ? PROT_READ : PROT_NONE)) return ILLEGAL_ADDRESS;
	*word = (uintptr_t)r->data + (*word - r->addr);
	return SUCCESS;
}

/* run_kernel runs a grid. Addresses of device memory in its arguments, in structures as well, become those of the
 * bytes. */
static int run_kernel(struct launch *l) {
	struct module *m = l->function->module;
	const struct kernel *k = l->function->kernel;
	if (!m->live) return ILLEGAL_ADDRESS; /* unloaded meanwhile */
	char values[MAX_ARGS] __attribute__((aligned(16)));
	memcpy(values, l->args, l->size);
	int code = words(l, values, translate, &m->dev);
	if (code) return code;
	void *args[MAX_ARGS];
	size_t at = 0;
	for (unsigned i = 0; i < k->params; at += k->sizes[i++]) {
		at = (at + k->aligns[i] - 1) / k->aligns[i] * k->aligns[i];
		args[i] = values + at;
	}
	pthread_mutex_unlock(&lock);
	run_grid(m, k, l, args);
	pthread_mutex_lock(&lock);
	add(S_LAUNCHES, 1);
	return SUCCESS;
}

/* ---- code objects ---- */

/* code_size is what the ELF header says: HIP has nothing else to go by. */
static size_t code_size(const void *image) {
	const Elf64_Ehdr *e = image;
	return e->e_shoff + (size_t)e->e_shnum * e->e_shentsize;
}

/* same_arch compares what the code is for with what every device of this library is. Features after a colon count if
 * the code names any. */
static int same_arch(const char *arch) {
	size_t n = strlen(arch);
	return !strncmp(ARCH, arch, n) && (ARCH[n] == ':' || !ARCH[n]);
}

/* unload closes a library and its file. If the library stays loaded all the same, so does its file: another file of
 * that name would be taken for it. */
static void unload(void *lib, int fd) {
	char path[64];
	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	dlclose(lib);
	if (dlopen(path, RTLD_LAZY | RTLD_NOLOAD)) return;
	close(fd);
}

DEVICE_API(hipModuleLoadData, (void **out, const void *image), (out, image)) {
	NO_CAPTURE();
	if (!out || !image) return misuse(INVALID_VALUE, "hipModuleLoadData: null pointer");
	if (memcmp(image, ELFMAG, SELFMAG)) return INVALID_IMAGE;
	int fd = memfd_create("code object", MFD_CLOEXEC);
	size_t n = code_size(image);
	char path[64];
	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	void *lib = fd >= 0 && write(fd, image, n) == (ssize_t)n ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL;
	if (!lib) { close(fd); return INVALID_IMAGE; }
	const char *arch = dlsym(lib, "hipsim_arch");
	const int *barriers = dlsym(lib, "hipsim_barriers");
	void *place = dlsym(lib, "hipsim_place");
	int code = !arch || !same_arch(arch) ? NO_BINARY_FOR_GPU : !barriers || !place ? INVALID_IMAGE : SUCCESS;
	if (code) { unload(lib, fd); return code; }
	struct module *m = calloc(1, sizeof *m);
	*m = (struct module){ .dev = current, .live = 1, .fd = fd, .lib = lib, .barriers = *barriers, .next = modules };
	*(void **)&m->place = place;
	modules = m;
	add(S_MODULES, 1);
	*out = m;
	return SUCCESS;
}

static struct module *find_module(void *h) {
	for (struct module *m = modules; m; m = m->next)
		if (m == h && m->live) return m;
	misuse(INVALID_HANDLE, "invalid module");
	return NULL;
}

/* HIP does not wait for kernels that are running; here it is a misuse to unload the module under them. */
DEVICE_API(hipModuleUnload, (void *h), (h)) {
	struct module *m = find_module(h);
	if (!m) return INVALID_HANDLE;
	NO_CAPTURE();
	for (struct stream *s = streams; s; s = s->next)
		for (struct op *op = s->stop ? NULL : s->head; op; op = op->next)
			if (op->what == LAUNCH && op->launch->function->module == m && !s->code) {
				misuse(SUCCESS, "hipModuleUnload: a kernel of the module is still to run");
				drain(s);
				break;
			}
	m->live = 0;
	unload(m->lib, m->fd);
	add(S_MODULES, -1);
	return SUCCESS;
}

DEVICE_API(hipModuleGetFunction, (void **out, void *h, const char *name), (out, h, name)) {
	struct module *m = find_module(h);
	if (!m) return INVALID_HANDLE;
	if (!out || !name) return misuse(INVALID_VALUE, "hipModuleGetFunction: null pointer");
	if (m->dev != current) return misuse(INVALID_HANDLE, "hipModuleGetFunction: the module's device is not current");
	const struct kernel *k = dlsym(m->lib, "hipsim_kernels");
	while (k->name && strcmp(k->name, name)) k++;
	if (!k->name) return NOT_FOUND;
	size_t size = 0;
	for (unsigned i = 0; i < k->params; i++) size = (size + k->aligns[i] - 1) / k->aligns[i] * k->aligns[i] + k->sizes[i];
	if (size > MAX_ARGS) return misuse(INVALID_VALUE, "hipModuleGetFunction: the kernel has too many bytes of parameters");
	struct function *f = calloc(1, sizeof *f);
	*f = (struct function){ .module = m, .kernel = k, .size = size, .next = m->functions };
	m->functions = f;
	*out = f;
	return SUCCESS;
}

static struct function *find_function(void *h) {
	for (struct module *m = modules; m; m = m->next)
		for (struct function *f = m->live ? m->functions : NULL; f; f = f->next)
			if (f == h) return f;
	misuse(INVALID_HANDLE, "invalid function");
	return NULL;
}

/* ---- launches ---- */

/* packed reads the list "1, buffer, 2, pointer to its size, 3" that extra is. */
static int packed(void **extra, const struct function *f, char *args) {
	const char *buffer = NULL;
	const size_t *size = NULL;
	for (int i = 0; ; i += 2) {
		switch ((uintptr_t)extra[i]) {
		case 1: buffer = extra[i + 1]; continue;
		case 2: size = extra[i + 1]; continue;
		case 3: break;
		default: return misuse(INVALID_VALUE, "hipModuleLaunchKernel: extra has an unknown key");
		}
		break;
	}
	if (!buffer || !size) return misuse(INVALID_VALUE, "hipModuleLaunchKernel: extra lacks the buffer or its size");
	/* A structure that holds the arguments may end with padding. */
	if (*size < f->size || *size > (f->size + 15) / 16 * 16)
		return misuse(INVALID_VALUE, "hipModuleLaunchKernel: the buffer has not the size of the kernel's arguments");
	memcpy(args, buffer, f->size);
	return SUCCESS;
}

/* by_pointers gathers the arguments, each from where its pointer says, in the size that its type has. */
static int by_pointers(void **params, const struct function *f, char *args) {
	const struct kernel *k = f->kernel;
	size_t at = 0;
	for (unsigned i = 0; i < k->params; at += k->sizes[i++]) {
		if (!params || !params[i])
			return misuse(INVALID_VALUE, "hipModuleLaunchKernel: fewer arguments than the kernel has parameters");
		at = (at + k->aligns[i] - 1) / k->aligns[i] * k->aligns[i];
		memcpy(args + at, params[i], k->sizes[i]);
	}
	return SUCCESS;
}

DEVICE_API(hipModuleLaunchKernel, (void *fn, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
	unsigned bz, unsigned shared, void *h, void **params, void **extra),
	(fn, gx, gy, gz, bx, by, bz, shared, h, params, extra)) {
	struct stream *s = find_stream(h);
	if (!s) return CONTEXT_DESTROYED;
	struct function *f = find_function(fn);
	if (!f) return INVALID_HANDLE;
	if (f->module->dev != current || s->dev != current)
		return misuse(INVALID_HANDLE, "hipModuleLaunchKernel: not the device of the module and the stream");
	if (!gx || !gy || !gz || !bx || !by || !bz || bx > MAX_THREADS || by > MAX_THREADS || bz > MAX_THREADS ||
		bx * by * bz > MAX_THREADS || (unsigned long long)gx * bx > UINT32_MAX || (unsigned long long)gy * by > UINT32_MAX ||
		(unsigned long long)gz * bz > UINT32_MAX)
		return misuse(INVALID_VALUE, "hipModuleLaunchKernel: the grid");
	if (shared > MAX_SHARED) return misuse(INVALID_VALUE, "hipModuleLaunchKernel: more shared memory than there is");
	if (params && extra) return misuse(INVALID_VALUE, "hipModuleLaunchKernel: params and extra together");
	struct launch *l = calloc(1, sizeof *l + f->size);
	*l = (struct launch){ .refs = 1, .function = f, .grid = { gx, gy, gz }, .block = { bx, by, bz }, .shared = shared,
		.size = f->size };
	int code = extra ? packed(extra, f, l->args) : by_pointers(params, f, l->args);
	if (code) { free(l); return code; }
	return enqueue(s, (struct op){ .what = LAUNCH, .launch = l });
}
