/* A hipRTC without a GPU: it compiles HIP C++ for the host with the machine's C++ compiler. The code object is a shared
 * library that hipsim.c loads and runs, thread by thread. Alone this is a libhiprtc.so; together with hipsim.c it is a
 * libamdhip64.so as HIP 5 and 6 have it. README.md says what it refuses. */
#define _GNU_SOURCE
#include <ctype.h>
#include <fcntl.h>
#include <pthread.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

/* hipsim_version is 10 * major + minor of HIP where this is part of a HIP library. Alone it is HIP 7's. */
int hipsim_version(void) __attribute__((weak));

/* known are the architectures that the compiler knows, up to a colon. */
static const char *const known[] = {
	"gfx906", "gfx90a", "gfx942", "gfx950", "gfx1030", "gfx1100", "gfx1151", "gfx1201",
};

static int is_known(const char *arch) {
	for (size_t i = 0; i < sizeof known / sizeof *known; i++)
		if (strlen(known[i]) == strcspn(arch, ":") && !strncmp(known[i], arch, strlen(known[i]))) return 1;
	return 0;
}

enum { SUCCESS, OUT_OF_MEMORY, PROGRAM_CREATION_FAILURE, INVALID_INPUT, INVALID_PROGRAM, INVALID_OPTION, COMPILATION,
	INTERNAL_ERROR = 11 };

struct text { char *bytes; size_t size; };
struct program { struct text source, name, log, code; struct program *next; };
static struct program *programs; /* alive; under the lock */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* fault counts a call and returns the code that HIPSIM_FAIL has for it, see hipsim.c: "FUNCTION:N:CODE", separated by
 * commas. */
static int fault(const char *function, long *calls) {
	const char *spec = getenv("HIPSIM_FAIL");
	pthread_mutex_lock(&lock);
	long n = ++*calls;
	pthread_mutex_unlock(&lock);
	while (spec && *spec) {
		char name[48];
		long nth;
		int code;
		if (sscanf(spec, "%47[^:,]:%ld:%d", name, &nth, &code) == 3 && !strcmp(name, function) && (nth == 0 || nth == n))
			return code;
		if ((spec = strchr(spec, ','))) spec++;
	}
	return SUCCESS;
}

#define FAULT(function) do { static long calls; int code = fault(function, &calls); if (code) return code; } while (0)

static struct program *find(void *handle) {
	pthread_mutex_lock(&lock);
	struct program *p = programs;
	while (p && p != handle) p = p->next;
	pthread_mutex_unlock(&lock);
	return p;
}

static void append(struct text *t, const char *bytes, size_t n) {
	t->bytes = realloc(t->bytes, t->size + n + 1);
	if (!t->bytes) abort();
	memcpy(t->bytes + t->size, bytes, n);
	t->bytes[t->size += n] = 0;
}

static void say(struct text *t, const char *line) { append(t, line, strlen(line)); }

int hiprtcVersion(int *major, int *minor) { *major = 9; *minor = 0; return SUCCESS; }

int hiprtcCreateProgram(void **out, const char *source, const char *name, int n, const char *const *headers,
	const char *const *names) {
	FAULT("hiprtcCreateProgram");
	if (!out || !source || !*source) return INVALID_INPUT;
	if (n || headers || names) return INVALID_INPUT; /* gguf2gpu has no headers */
	struct program *p = calloc(1, sizeof *p);
	if (!p) return OUT_OF_MEMORY;
	say(&p->source, source);
	say(&p->name, name && *name ? name : "program.hip");
	pthread_mutex_lock(&lock);
	p->next = programs;
	programs = p;
	pthread_mutex_unlock(&lock);
	*out = p;
	return SUCCESS;
}

int hiprtcDestroyProgram(void **handle) {
	FAULT("hiprtcDestroyProgram");
	if (!handle || !find(*handle)) return INVALID_PROGRAM;
	struct program *p = *handle, **link = &programs;
	pthread_mutex_lock(&lock);
	while (*link != p) link = &(*link)->next;
	*link = p->next;
	pthread_mutex_unlock(&lock);
	free(p->source.bytes), free(p->name.bytes), free(p->log.bytes), free(p->code.bytes), free(p);
	*handle = NULL;
	return SUCCESS;
}

/* What stands before the source: the device's language in terms of the host's. A thread of the device is a call. The
 * struct is the simulator's struct place. What is __shared__ belongs to an OS thread, as that runs one block at a
 * time; a piece of it whose size the launch decides is an object that turns into a pointer, see dynamic_shared. The
 * templates have no names outside of the library: else the loader would share them and never unload it. */
static const char prelude[] =
	"#include <utility>\n"
	"#define __global__\n#define __device__\n#define __host__\n#define __launch_bounds__(...)\n"
	"#define __shared__ static thread_local\n#define __syncthreads() hipsim_here.barrier()\n"
	"struct hipsim_index { unsigned x, y, z; };\n"
	"struct hipsim_state { hipsim_index thread, block, block_dim, grid_dim; char *shared; void (*barrier)(); };\n"
	"static thread_local hipsim_state hipsim_here;\n"
	"extern \"C\" hipsim_state *hipsim_place() { return &hipsim_here; }\n"
	"#define threadIdx (hipsim_here.thread)\n#define blockIdx (hipsim_here.block)\n"
	"#define blockDim (hipsim_here.block_dim)\n#define gridDim (hipsim_here.grid_dim)\n"
	"namespace {\n"
	"template <class T> struct hipsim_dynamic { operator T *() const { return (T *)hipsim_here.shared; } };\n"
	"template <class F> struct hipsim_kernel;\n"
	"template <class... P> struct hipsim_kernel<void(P...)> {\n"
	"	static constexpr unsigned params = sizeof...(P);\n"
	"	static constexpr unsigned long sizes[] = {sizeof(P)..., 0}, aligns[] = {alignof(P)..., 0};\n"
	"	template <void (*F)(P...), std::size_t... I>\n"
	"	static void with(void **a, std::index_sequence<I...>) { F(*(P *)a[I]...); }\n"
	"	template <void (*F)(P...)> static void call(void **a) { with<F>(a, std::index_sequence_for<P...>{}); }\n"
	"};\n"
	"}\n"
	"struct hipsim_entry {\n"
	"	const char *name; unsigned params; const unsigned long *sizes, *aligns; void (*call)(void **);\n"
	"};\n"
	"#define HIPSIM_KERNEL(f) {#f, hipsim_kernel<decltype(f)>::params, hipsim_kernel<decltype(f)>::sizes, \\\n"
	"	hipsim_kernel<decltype(f)>::aligns, hipsim_kernel<decltype(f)>::template call<f>},\n";

static const char *skip_space(const char *s) { while (isspace((unsigned char)*s)) s++; return s; }

/* tabulate writes the table of the source's kernels, with a line for each "__global__ ... void NAME(". */
static void tabulate(struct text *out, const char *source) {
	char line[256];
	say(out, "extern \"C\" const hipsim_entry hipsim_kernels[] = {\n");
	for (const char *s = source; (s = strstr(s, "__global__")); ) {
		const char *name = strstr(s, "void ");
		if (!name) break;
		name = skip_space(name + 5);
		size_t n = strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_");
		if (*skip_space(name + n) != '(' || n == 0 || n > 100) { s += 10; continue; }
		snprintf(line, sizeof line, "HIPSIM_KERNEL(%.*s)\n", (int)n, name);
		say(out, line);
		s = name + n;
	}
	say(out, "{0, 0, 0, 0, 0}};\nextern \"C\" const int hipsim_barriers = ");
	say(out, strstr(source, "__syncthreads") ? "1;\n" : "0;\n");
}

/* dynamic_shared copies the source and writes "extern __shared__ TYPE NAME[];" as a declaration of a
 * hipsim_dynamic<TYPE>. */
static void dynamic_shared(struct text *out, const char *source) {
	static const char shared[] = "__shared__";
	for (const char *s; (s = strstr(source, "extern")); ) {
		const char *type = skip_space(s + 6), *open = strchr(s, '['), *end = strchr(s, ';');
		append(out, source, s - source);
		source = s + 6;
		if (strncmp(type, shared, sizeof shared - 1) || !open || !end || open > end) {
			say(out, "extern");
			continue;
		}
		type += sizeof shared - 1;
		const char *last = open, *name;
		while (isspace((unsigned char)last[-1])) last--;
		for (name = last; isalnum((unsigned char)name[-1]) || name[-1] == '_'; ) name--;
		say(out, "static const hipsim_dynamic<");
		append(out, type, name - type);
		say(out, "> ");
		append(out, name, last - name);
		say(out, "{}");
		source = end;
	}
	say(out, source);
}

static int write_file(const char *path, const struct text *t) {
	FILE *f = fopen(path, "w");
	if (!f) return -1;
	size_t n = fwrite(t->bytes, 1, t->size, f);
	return fclose(f) || n != t->size ? -1 : 0;
}

static int read_file(const char *path, struct text *t) {
	FILE *f = fopen(path, "r");
	if (!f) return -1;
	char buf[1 << 16];
	for (size_t n; (n = fread(buf, 1, sizeof buf, f)); ) append(t, buf, n);
	return fclose(f);
}

/* run starts a program and waits for it; what it prints goes to the file log. */
static int run(char *const *argv, const char *log) {
	posix_spawn_file_actions_t actions;
	posix_spawn_file_actions_init(&actions);
	posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
	posix_spawn_file_actions_addopen(&actions, 1, log, O_WRONLY | O_CREAT | O_TRUNC, 0600);
	posix_spawn_file_actions_adddup2(&actions, 1, 2);
	pid_t pid;
	int status = -1, rc = posix_spawnp(&pid, argv[0], &actions, NULL, argv, environ);
	posix_spawn_file_actions_destroy(&actions);
	if (rc) return -1;
	while (waitpid(pid, &status, 0) < 0) {}
	return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/* build compiles the text with the machine's compiler, CXX or c++, in the directory dir. */
static int build(struct program *p, const struct text *text, const char *dir) {
	char source[64], object[64], log[64];
	snprintf(source, sizeof source, "%s/kernel.cc", dir);
	snprintf(object, sizeof object, "%s/kernel.so", dir);
	snprintf(log, sizeof log, "%s/log", dir);
	char *cxx = getenv("CXX") && *getenv("CXX") ? getenv("CXX") : "c++";
	char *argv[] = { cxx, "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-o", object, source, NULL };
	int rc = write_file(source, text) ? INTERNAL_ERROR : SUCCESS;
	if (!rc && run(argv, log)) rc = COMPILATION;
	if (read_file(log, &p->log) && rc) say(&p->log, "the machine's C++ compiler could not be started");
	if (!rc && read_file(object, &p->code)) rc = INTERNAL_ERROR;
	unlink(source), unlink(object), unlink(log);
	return rc;
}

int hiprtcCompileProgram(void *handle, int n, const char *const *options) {
	static const char target[] = "--gpu-architecture=";
	struct program *p = find(handle);
	if (!p) return INVALID_PROGRAM;
	if (n < 0 || (n && !options)) return INVALID_INPUT;
	const char *arch = NULL;
	free(p->log.bytes), free(p->code.bytes);
	p->log = p->code = (struct text){0};
	for (int i = 0; i < n; i++) {
		if (!strncmp(options[i], target, sizeof target - 1)) arch = options[i] + sizeof target - 1;
		else if (strncmp(options[i], "-std=", 5) && strncmp(options[i], "-O", 2)) {
			say(&p->log, "error: unknown argument: '");
			say(&p->log, options[i]);
			say(&p->log, "'\n");
			return COMPILATION;
		}
	}
	FAULT("hiprtcCompileProgram");
	if (arch && !is_known(arch) && hipsim_version && hipsim_version() < 70) {
		fprintf(stderr, "hipsim: architecture %s: up to HIP 6 the compiler ends the process here\n", arch);
		abort();
	}
	if (!arch || !is_known(arch) || strpbrk(arch, "\"\\\n")) {
		say(&p->log, "error: no architecture, or an unknown one\n");
		return COMPILATION;
	}
	struct text text = {0};
	say(&text, prelude);
	say(&text, "extern \"C\" const char hipsim_arch[] = \"");
	say(&text, arch);
	say(&text, "\";\n#line 1 \"");
	say(&text, p->name.bytes);
	say(&text, "\"\n");
	dynamic_shared(&text, p->source.bytes);
	say(&text, "\n#line 1 \"hipsim\"\n");
	tabulate(&text, p->source.bytes);
	char dir[] = "/tmp/hiprtc-XXXXXX";
	int rc = INTERNAL_ERROR;
	if (mkdtemp(dir)) {
		rc = build(p, &text, dir);
		rmdir(dir);
	}
	free(text.bytes);
	return rc;
}

/* The size of a log counts the zero byte at its end, as AMD's does. */
int hiprtcGetProgramLogSize(void *handle, size_t *n) {
	FAULT("hiprtcGetProgramLogSize");
	struct program *p = find(handle);
	if (!p) return INVALID_PROGRAM;
	if (!n) return INVALID_INPUT;
	*n = p->log.size + 1;
	return SUCCESS;
}

int hiprtcGetProgramLog(void *handle, char *log) {
	FAULT("hiprtcGetProgramLog");
	struct program *p = find(handle);
	if (!p) return INVALID_PROGRAM;
	if (!log) return INVALID_INPUT;
	memcpy(log, p->log.bytes ? p->log.bytes : "", p->log.size + 1);
	return SUCCESS;
}

int hiprtcGetCodeSize(void *handle, size_t *n) {
	FAULT("hiprtcGetCodeSize");
	struct program *p = find(handle);
	if (!p || !p->code.bytes) return INVALID_PROGRAM;
	if (!n) return INVALID_INPUT;
	*n = p->code.size;
	return SUCCESS;
}

int hiprtcGetCode(void *handle, char *code) {
	FAULT("hiprtcGetCode");
	struct program *p = find(handle);
	if (!p || !p->code.bytes) return INVALID_PROGRAM;
	if (!code) return INVALID_INPUT;
	memcpy(code, p->code.bytes, p->code.size);
	return SUCCESS;
}

const char *hiprtcGetErrorString(int code) {
	static const char *const names[] = {
		"HIPRTC_SUCCESS", "HIPRTC_ERROR_OUT_OF_MEMORY", "HIPRTC_ERROR_PROGRAM_CREATION_FAILURE",
		"HIPRTC_ERROR_INVALID_INPUT", "HIPRTC_ERROR_INVALID_PROGRAM", "HIPRTC_ERROR_INVALID_OPTION",
		"HIPRTC_ERROR_COMPILATION",
	};
	if (code == INTERNAL_ERROR) return "HIPRTC_ERROR_INTERNAL_ERROR";
	return code >= 0 && code <= COMPILATION ? names[code] : NULL;
}
