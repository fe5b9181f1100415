/* The driver's functions, the devices' contexts, and what each forwarded call does. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* CUdevice is the number of a device, CUdeviceptr and CUmemGenericAllocationHandle are integers of 64 bits, and
 * CUcontext, CUstream, CUevent, CUmodule, CUfunction, CUgraph, CUgraphExec and CUgraphNode are pointers. */
typedef int CUresult;
typedef int CUdevice;
typedef void *CUctx;
typedef unsigned long long CUptr, CUhandle;
typedef struct { char reserved[64]; } Ipc; /* hipIpcMemHandle_t and CUipcMemHandle alike */

/* CUmemLocation, CUmemAllocationProp and CUmemAccessDesc. HIP's structures have the same layouts, except that the
 * last four bytes of hipMemAllocationProp are padding, which may hold anything. */
typedef struct { int type, id; } Location;
typedef struct {
	int type, handles;
	Location location;
	void *win32;
	struct { unsigned char compression, rdma; unsigned short usage; unsigned char reserved[4]; } flags;
} Prop;
typedef struct { Location location; int flags; } Access;
_Static_assert(sizeof(Prop) == 32 && sizeof(Access) == 12, "CUDA's structures");

/* What every driver of the last years has. */
#define DRIVER(X) \
	X(cuInit, (unsigned)) X(cuDriverGetVersion, (int *)) X(cuDeviceGetCount, (int *)) X(cuDeviceGet, (CUdevice *, int)) \
	X(cuDeviceGetName, (char *, int, CUdevice)) X(cuDeviceTotalMem_v2, (size_t *, CUdevice)) \
	X(cuDeviceGetAttribute, (int *, int, CUdevice)) X(cuDeviceGetPCIBusId, (char *, int, CUdevice)) \
	X(cuDeviceGetUuid, (void *, CUdevice)) X(cuDevicePrimaryCtxRetain, (CUctx *, CUdevice)) \
	X(cuCtxSetCurrent, (CUctx)) X(cuCtxGetCurrent, (CUctx *)) X(cuCtxGetDevice, (CUdevice *)) \
	X(cuCtxSynchronize, (void)) X(cuMemGetInfo_v2, (size_t *, size_t *)) \
	X(cuMemGetAddressRange_v2, (CUptr *, size_t *, CUptr)) X(cuMemAlloc_v2, (CUptr *, size_t)) X(cuMemFree_v2, (CUptr)) \
	X(cuMemHostAlloc, (void **, size_t, unsigned)) X(cuMemFreeHost, (void *)) \
	X(cuMemHostRegister_v2, (void *, size_t, unsigned)) X(cuMemHostUnregister, (void *)) \
	X(cuMemHostGetDevicePointer_v2, (CUptr *, void *, unsigned)) \
	X(cuMemcpy, (CUptr, CUptr, size_t)) X(cuMemcpyAsync, (CUptr, CUptr, size_t, void *)) \
	X(cuMemsetD8_v2, (CUptr, unsigned char, size_t)) X(cuMemsetD8Async, (CUptr, unsigned char, size_t, void *)) \
	X(cuStreamCreate, (void **, unsigned)) X(cuStreamDestroy_v2, (void *)) X(cuStreamSynchronize, (void *)) \
	X(cuStreamQuery, (void *)) X(cuStreamWaitEvent, (void *, void *, unsigned)) \
	X(cuEventCreate, (void **, unsigned)) X(cuEventDestroy_v2, (void *)) X(cuEventRecord, (void *, void *)) \
	X(cuEventQuery, (void *)) X(cuEventSynchronize, (void *)) X(cuEventElapsedTime, (float *, void *, void *)) \
	X(cuGetErrorName, (CUresult, const char **)) X(cuGetErrorString, (CUresult, const char **)) \
	X(cuIpcGetMemHandle, (Ipc *, CUptr)) X(cuIpcOpenMemHandle_v2, (CUptr *, Ipc, unsigned)) \
	X(cuIpcCloseMemHandle, (CUptr)) \
	X(cuDeviceCanAccessPeer, (int *, CUdevice, CUdevice)) X(cuCtxEnablePeerAccess, (CUctx, unsigned)) \
	X(cuMemcpyPeerAsync, (CUptr, CUctx, CUptr, CUctx, size_t, void *)) \
	X(cuModuleLoadData, (void **, const void *)) X(cuModuleUnload, (void *)) \
	X(cuModuleGetFunction, (void **, void *, const char *)) \
	X(cuLaunchKernel, (void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **, \
		void **))

/* What a driver may lack: a call that needs it answers hipErrorNotSupported then. */
#define OPTIONAL(X) \
	X(cuMemGetAllocationGranularity, (size_t *, const Prop *, int)) \
	X(cuMemCreate, (CUhandle *, size_t, const Prop *, unsigned long long)) X(cuMemRelease, (CUhandle)) \
	X(cuMemAddressReserve, (CUptr *, size_t, size_t, CUptr, unsigned long long)) X(cuMemAddressFree, (CUptr, size_t)) \
	X(cuMemMap, (CUptr, size_t, size_t, CUhandle, unsigned long long)) X(cuMemUnmap, (CUptr, size_t)) \
	X(cuMemSetAccess, (CUptr, size_t, const Access *, size_t)) \
	X(cuMemExportToShareableHandle, (void *, CUhandle, int, unsigned long long)) \
	X(cuMemImportFromShareableHandle, (CUhandle *, void *, int)) \
	X(cuStreamGetCtx, (void *, CUctx *)) X(cuStreamGetFlags, (void *, unsigned *)) \
	X(cuStreamBeginCapture_v2, (void *, int)) X(cuStreamEndCapture, (void *, void **)) \
	X(cuStreamIsCapturing, (void *, int *)) \
	X(cuGraphInstantiateWithFlags, (void **, void *, unsigned long long)) \
	X(cuGraphInstantiate_v2, (void **, void *, void **, char *, size_t)) X(cuGraphLaunch, (void *, void *)) \
	X(cuGraphExecDestroy, (void *)) X(cuGraphDestroy, (void *)) X(cuFuncSetAttribute, (void *, int, int))

#define FIELD(name, params) CUresult (*name) params;
static struct { DRIVER(FIELD) OPTIONAL(FIELD) } cu;

enum { MAX_DEVICES = 64, NO_DEVICE = 100, INVALID_DEVICE = 101, NOT_SUPPORTED = 801 };
static CUctx contexts[MAX_DEVICES]; /* of the devices that were used: their primary contexts */
static int devices, start_code = 3;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread int current, last_error;

/* open_driver binds the driver's functions and starts it. */
static void open_driver(void) {
	void *h = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
	if (!h) {
		fprintf(stderr, "hip-on-cuda: %s\n", dlerror());
		start_code = NO_DEVICE;
		return;
	}
#define BIND(name, params) \
	*(void **)&cu.name = dlsym(h, #name); \
	if (!cu.name) { fprintf(stderr, "hip-on-cuda: no %s\n", #name); return; }
#define TRY(name, params) *(void **)&cu.name = dlsym(h, #name);
	DRIVER(BIND)
	OPTIONAL(TRY)
	start_code = cu.cuInit(0);
	if (!start_code) start_code = cu.cuDeviceGetCount(&devices);
	if (devices > MAX_DEVICES) devices = MAX_DEVICES;
}

/* started opens the driver once and returns why that failed. */
static int started(void) {
	pthread_once(&once, open_driver);
	return start_code;
}

/* result keeps an error for hipGetLastError. The driver's codes and HIP's have the same values for all that is
 * returned here (0 to 4, 100, 101, 200, 201, 205, 208, 400, 401, 600, 700, 712, 713, 719, 801, 900 to 908, 999). */
static int result(int code) {
	if (code) last_error = code;
	return code;
}

/* ready makes the context of the current device the thread's current one. */
static int ready(void) {
	int code = started();
	if (code) return code;
	if (current >= devices) return NO_DEVICE;
	pthread_mutex_lock(&lock);
	if (!contexts[current]) {
		CUdevice d;
		code = cu.cuDeviceGet(&d, current);
		if (!code) code = cu.cuDevicePrimaryCtxRetain(&contexts[current], d);
	}
	pthread_mutex_unlock(&lock);
	if (code) return code;
	CUctx now = NULL;
	cu.cuCtxGetCurrent(&now);
	return now == contexts[current] ? 0 : cu.cuCtxSetCurrent(contexts[current]);
}

#define PTR(p) ((CUptr)(uintptr_t)(p))
/* FORWARD returns what the expression says, if the device is ready; FORWARD_IF also asks whether the driver has a
 * function. */
#define FORWARD(call) do { int code_ = ready(); return result(code_ ? code_ : (call)); } while (0)
#define FORWARD_IF(name, call) do { \
	int code_ = ready(); \
	return result(code_ ? code_ : cu.name ? (call) : NOT_SUPPORTED); \
} while (0)
