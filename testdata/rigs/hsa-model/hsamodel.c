/* A model of a GPU for AMD's own runtime. ROCr's thunk (libhsakmt) has a mode in which a library takes the place of the
 * kernel driver and of the GPU: HSA_MODEL_LIB names it, HSA_MODEL_TOPOLOGY the directory that describes the machine.
 * The thunk itself manages memory and events; the library executes what the runtime writes into its queues. This one
 * executes what loading a model needs and refuses everything else with a message. README.md has the facts.
 *
 * This is the one file to compile; it includes the parts. */
#define _GNU_SOURCE
#include "parts/interface.h" /* what the thunk calls, and what it is given */
#include "parts/say.c"       /* messages, settings */
#include "parts/memory.c"    /* device addresses: translated, checked, copied */
#include "parts/signals.c"   /* signals and events of the runtime */
#include "parts/queues.c"    /* a thread for each queue; stalls */
#include "parts/sdma.c"      /* packets of the copy engines */
#include "parts/aql.c"       /* packets of compute queues */
#include "parts/device.c"    /* devices, and the table that the thunk asks for */
#include "parts/ipc.c"       /* memory of other processes */
