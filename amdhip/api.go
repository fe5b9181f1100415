package amdhip

import "unsafe"

// api is the symbol table: one Go function value per HIP entry point, under HIP's own name. The library binding fills it
// with calls into libamdhip64.so, the software device with Go functions, so everything above it is the same code.
//
// Handles (streams, events) and device or host addresses are uintptr: they are C's, never Go's, memory. Out-parameters are
// typed pointers; their Go memory must stay valid for the duration of the call only.
//
// The binding goes through the fields by reflection: a field's name is the symbol's name, and those after the blank one
// may be missing. Such a field is then nil and its user reports ErrUnsupported. The C prototypes are the same in HIP 5.0
// to 7.x.
type api struct {
	// Required: Open fails, by name, when one of these is missing.

	hipRuntimeGetVersion    func(version *int32) Status
	hipDriverGetVersion     func(version *int32) Status
	hipGetDeviceCount       func(count *int32) Status
	hipSetDevice            func(device int32) Status // per OS thread
	hipGetDevice            func(device *int32) Status
	hipDeviceGetName        func(name *byte, n, device int32) Status
	hipDeviceGetPCIBusId    func(id *byte, n, device int32) Status
	hipDeviceGetAttribute   func(value *int32, attr deviceAttribute, device int32) Status
	hipDeviceTotalMem       func(bytes *uintptr, device int32) Status
	hipMemGetInfo           func(free, total *uintptr) Status // of the thread's current device
	hipMalloc               func(p *uintptr, n uintptr) Status
	hipFree                 func(p uintptr) Status
	hipHostMalloc           func(p *uintptr, n uintptr, flags uint32) Status
	hipHostFree             func(p uintptr) Status
	hipHostRegister         func(p, n uintptr, flags uint32) Status
	hipHostUnregister       func(p uintptr) Status
	hipHostGetDevicePointer func(d *uintptr, h uintptr, flags uint32) Status
	hipDeviceSynchronize    func() Status

	hipMemcpyAsync           func(dst, src, n uintptr, kind memcpyKind, stream uintptr) Status
	hipMemsetAsync           func(dst uintptr, value int32, n, stream uintptr) Status
	hipStreamCreateWithFlags func(stream *uintptr, flags uint32) Status
	hipStreamDestroy         func(stream uintptr) Status
	hipStreamSynchronize     func(stream uintptr) Status
	hipStreamQuery           func(stream uintptr) Status
	hipStreamWaitEvent       func(stream, event uintptr, flags uint32) Status
	hipEventCreateWithFlags  func(event *uintptr, flags uint32) Status
	hipEventDestroy          func(event uintptr) Status
	hipEventRecord           func(event, stream uintptr) Status
	hipEventQuery            func(event uintptr) Status
	hipEventSynchronize      func(event uintptr) Status
	hipEventElapsedTime      func(ms *float32, start, stop uintptr) Status

	hipGetErrorName   func(code Status) string
	hipGetErrorString func(code Status) string

	_ struct{} // Optional from here on: nil when the library does not export them.

	hipGetDeviceProperties      func(prop *byte, device int32) Status // the 792-byte hipDeviceProp_tR0000
	hipGetDevicePropertiesR0600 func(prop *byte, device int32) Status // 1472 bytes, from HIP 6.0
	hipDeviceGetUuid            func(id *[16]byte, device int32) Status
	hipMallocAsync              func(p *uintptr, n, stream uintptr) Status
	hipFreeAsync                func(p, stream uintptr) Status
	hipDeviceCanAccessPeer      func(can *int32, device, peer int32) Status
	hipDeviceEnablePeerAccess   func(peer int32, flags uint32) Status
	hipDeviceDisablePeerAccess  func(peer int32) Status
	hipMemcpyPeerAsync          func(dst uintptr, dstDevice int32, src uintptr, srcDevice int32, n, stream uintptr) Status
	hipIpcGetMemHandle          func(handle *IPCHandle, p uintptr) Status
	hipIpcOpenMemHandle         func(p *uintptr, handle IPCHandle, flags uint32) Status
	hipIpcCloseMemHandle        func(p uintptr) Status

	// A module belongs to the device that was current when it was loaded. When another one is current, some versions end the
	// process in hipModuleGetFunction, and some answer hipErrorInvalidHandle to hipModuleLaunchKernel.

	hipModuleLoadData     func(module *uintptr, image uintptr) Status // image: the code, then at least one zero byte
	hipModuleUnload       func(module uintptr) Status
	hipModuleGetFunction  func(function *uintptr, module uintptr, name string) Status
	hipModuleLaunchKernel func(
		function uintptr, gridX, gridY, gridZ, blockX, blockY, blockZ, sharedBytes uint32, stream uintptr,
		params *unsafe.Pointer, // to the arguments' values, which HIP copies; then nil, for the software device
		extra *uintptr) Status
}

// rtcAPI is the symbol table of hipRTC, AMD's compiler at run time. All of it is required. It is bound as api is, in
// libhiprtc.so or, before HIP 7, in libamdhip64.so. The C prototypes are the same in HIP 5.0 to 7.x.
type rtcAPI struct {
	hiprtcCreateProgram     func(program *uintptr, source, name string, headers int32, headerSources, headerNames **byte) RTCStatus
	hiprtcCompileProgram    func(program uintptr, n int32, options **byte) RTCStatus
	hiprtcGetProgramLogSize func(program uintptr, n *uintptr) RTCStatus
	hiprtcGetProgramLog     func(program uintptr, log *byte) RTCStatus
	hiprtcGetCodeSize       func(program uintptr, n *uintptr) RTCStatus
	hiprtcGetCode           func(program uintptr, code *byte) RTCStatus
	hiprtcDestroyProgram    func(program *uintptr) RTCStatus
	hiprtcGetErrorString    func(code RTCStatus) string // "" for a code that it does not know
}

// IPCHandle names a device allocation to another process of the same host (hipIpcMemHandle_t, 64 bytes passed by value).
type IPCHandle struct{ b [64]byte }

// memcpyKind is hipMemcpyKind.
type memcpyKind int32

const (
	memcpyHostToHost     memcpyKind = 0
	memcpyHostToDevice   memcpyKind = 1
	memcpyDeviceToHost   memcpyKind = 2
	memcpyDeviceToDevice memcpyKind = 3
	memcpyDefault        memcpyKind = 4
)

// deviceAttribute is hipDeviceAttribute_t; these numbers are the same in HIP 5.0 to 7.x.
type deviceAttribute int32

const (
	attrAsyncEngineCount     deviceAttribute = 2
	attrCanMapHostMemory     deviceAttribute = 3
	attrIntegrated           deviceAttribute = 16
	attrMultiprocessorCount  deviceAttribute = 63
	attrPCIBusID             deviceAttribute = 67
	attrPCIDeviceID          deviceAttribute = 68
	attrPCIDomainID          deviceAttribute = 69
	attrWarpSize             deviceAttribute = 87
	attrMemoryPoolsSupported deviceAttribute = 88
)

// Flags of hipHostMalloc, hipHostRegister, hipStreamCreateWithFlags and hipEventCreateWithFlags. Only bits that HIP 5.0
// already knew are used.
const (
	hostMallocPortable uint32 = 1
	hostMallocMapped   uint32 = 2

	hostRegisterPortable uint32 = 1
	hostRegisterMapped   uint32 = 2

	streamNonBlocking uint32 = 1

	eventDefault       uint32 = 0
	eventBlockingSync  uint32 = 1
	eventDisableTiming uint32 = 2
)
