/* Messages, and the settings of a run. A message is one line on stderr: the runtime's and the command's own output
 * stay as they are. */
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* Nanoseconds of CLOCK_MONOTONIC_RAW: the clock of messages and of the device. */
static uint64_t ticks(void) {
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC_RAW, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static uint64_t began; /* when the library was opened */

static void say_va(const char *format, va_list args) {
	char line[512];
	int n = snprintf(line, sizeof line, "hsa-model: ");
	n += vsnprintf(line + n, sizeof line - n - 1, format, args);
	if (n > (int)sizeof line - 2) n = sizeof line - 2;
	line[n++] = '\n';
	if (write(2, line, n) < 0) abort();
}

__attribute__((format(printf, 1, 2))) static void say(const char *format, ...) {
	va_list args;
	va_start(args, format);
	say_va(format, args);
	va_end(args);
}

/* What the model does not know ends the process: a guess would make tests pass that should not. */
__attribute__((format(printf, 1, 2), noreturn)) static void die(const char *format, ...) {
	va_list args;
	va_start(args, format);
	say_va(format, args);
	va_end(args);
	abort();
}

/* A number from the environment, 0 where it is not set. */
static unsigned long setting(const char *name) {
	const char *text = getenv(name);
	char *end;
	if (!text) return 0;
	unsigned long value = strtoul(text, &end, 10);
	if (!*text || *end) die("%s=%s is no number", name, text);
	return value;
}

/* HSAMODEL_TRACE=1: a line for every packet and every allocation, with the milliseconds since the start. */
#define TRACE(format, ...)                                                                              \
	do {                                                                                            \
		if (settings.trace) say("%6.1f ms, " format, (ticks() - began) / 1e6, ##__VA_ARGS__); \
	} while (0)

static struct {
	unsigned long trace;
	const char *gate;         /* HSAMODEL_GATE: copies wait as long as a file of this name exists */
	unsigned long stall_copy; /* HSAMODEL_STALL_COPY: the queue stops for good at this copy; the first is 1 */
	unsigned long stall_aql;  /* HSAMODEL_STALL_AQL: the same for packets of compute queues */
	unsigned long fault_copy; /* HSAMODEL_FAULT_COPY: the memory of this copy is taken as not mapped */
	unsigned long flip_copy;  /* HSAMODEL_FLIP_COPY: a bit of this copy arrives wrong */
} settings;

static void read_settings(void) {
	began = ticks();
	settings.trace = setting("HSAMODEL_TRACE");
	settings.gate = getenv("HSAMODEL_GATE");
	settings.stall_copy = setting("HSAMODEL_STALL_COPY");
	settings.stall_aql = setting("HSAMODEL_STALL_AQL");
	settings.fault_copy = setting("HSAMODEL_FAULT_COPY");
	settings.flip_copy = setting("HSAMODEL_FLIP_COPY");
}
