/* hipsim is a libamdhip64.so that needs no GPU. It has the HIP functions that gguf2gpu uses and checks each call more
 * strictly than AMD's runtime does. README.md says how to build it and how to steer it.
 *
 * This is the one file to compile. It includes the parts, in an order in which each one needs only those before it.
 * All state is behind one lock, and each stream has a thread that executes what is queued on it. */
#include "parts/base.c"    /* error codes, settings, statistics, injected faults, the frame of an entry point */
#include "parts/defects.c" /* what AMD's runtimes do wrong */
#include "parts/memory.c"  /* the list of all memory that HIP knows */
#include "parts/flip.c"    /* bits that flip in copies and later */
#include "parts/queue.c"   /* operations, streams, events, and the thread that executes them */
#include "parts/capture.c" /* what may be called while a stream is captured; nothing where graphs are left out */
#include "parts/devices.c" /* versions, devices, access between devices */
#include "parts/alloc.c"   /* hipMalloc, page-locked memory of the host */
#include "parts/streams.c" /* hipStream..., hipEvent... */
#include "parts/copy.c"    /* copies and fills */
#ifndef HIPSIM_NO_OPTIONAL
#include "parts/modules.c" /* code objects and launches */
#include "parts/graphs.c"  /* capture of streams, graphs */
#include "parts/virtual.c" /* hipMemCreate, hipMemMap and their like */
#include "parts/ipc.c"     /* hipIpc...: memory of another process */
#else /* a library that has only what gguf2gpu requires */
static void settle(void) {}
static int run_kernel(struct launch *l) { (void)l; return NOT_SUPPORTED; }
#endif
#include "parts/control.c" /* texts of errors, settings, what tests ask for */
