package hip

import (
	"reflect"
	"strings"
	"unsafe"
)

// API is the table of functions: one Go function value per function of HIP. The binding fills it with calls into
// libamdhip64.so, the software device with Go functions, so everything above it is the same code.
//
// Handles (streams, events) and device or host addresses are uintptr: they are C's, never Go's, memory. Out-parameters
// are typed pointers; their Go memory must stay valid for the duration of the call only.
//
// A field has the name of its symbol with an upper-case first letter; Symbol undoes that. Fields after the blank one
// are optional: a library that lacks one leaves it nil, and its user reports ErrUnsupported. The C prototypes are the
// same in HIP 5.0 to 7.x.
type API struct {
	// Required: Open fails, by name, when one of these is missing.

	HipRuntimeGetVersion    func(version *int32) Status
	HipDriverGetVersion     func(version *int32) Status
	HipGetDeviceCount       func(count *int32) Status
	HipSetDevice            func(device int32) Status // per OS thread
	HipGetDevice            func(device *int32) Status
	HipDeviceGetName        func(name *byte, n, device int32) Status
	HipDeviceGetPCIBusId    func(id *byte, n, device int32) Status
	HipDeviceGetAttribute   func(value *int32, attr DeviceAttribute, device int32) Status
	HipDeviceTotalMem       func(bytes *uintptr, device int32) Status
	HipMemGetInfo           func(free, total *uintptr) Status // of the thread's current device
	HipMalloc               func(p *uintptr, n uintptr) Status
	HipFree                 func(p uintptr) Status
	HipHostMalloc           func(p *uintptr, n uintptr, flags uint32) Status
	HipHostFree             func(p uintptr) Status
	HipHostRegister         func(p, n uintptr, flags uint32) Status
	HipHostUnregister       func(p uintptr) Status
	HipHostGetDevicePointer func(d *uintptr, h uintptr, flags uint32) Status
	HipDeviceSynchronize    func() Status

	HipMemcpyAsync           func(dst, src, n uintptr, kind MemcpyKind, stream uintptr) Status
	HipMemsetAsync           func(dst uintptr, value int32, n, stream uintptr) Status
	HipStreamCreateWithFlags func(stream *uintptr, flags uint32) Status
	HipStreamDestroy         func(stream uintptr) Status
	HipStreamSynchronize     func(stream uintptr) Status
	HipStreamQuery           func(stream uintptr) Status
	HipStreamWaitEvent       func(stream, event uintptr, flags uint32) Status
	HipEventCreateWithFlags  func(event *uintptr, flags uint32) Status
	HipEventDestroy          func(event uintptr) Status
	HipEventRecord           func(event, stream uintptr) Status
	HipEventQuery            func(event uintptr) Status
	HipEventSynchronize      func(event uintptr) Status
	HipEventElapsedTime      func(ms *float32, start, stop uintptr) Status

	HipGetErrorName   func(code Status) string
	HipGetErrorString func(code Status) string

	_ struct{} // Optional from here on: nil when the library does not export them.

	HipGetDeviceProperties      func(prop *byte, device int32) Status // the 792-byte hipDeviceProp_tR0000
	HipGetDevicePropertiesR0600 func(prop *byte, device int32) Status // 1472 bytes, from HIP 6.0
	HipDeviceGetUuid            func(id *[16]byte, device int32) Status
	HipMallocAsync              func(p *uintptr, n, stream uintptr) Status
	HipFreeAsync                func(p, stream uintptr) Status
	HipDeviceCanAccessPeer      func(can *int32, device, peer int32) Status
	HipDeviceEnablePeerAccess   func(peer int32, flags uint32) Status
	HipDeviceDisablePeerAccess  func(peer int32) Status
	HipMemcpyPeerAsync          func(dst uintptr, dstDevice int32, src uintptr, srcDevice int32, n, stream uintptr) Status
	HipIpcGetMemHandle          func(handle *IPCHandle, p uintptr) Status
	HipIpcOpenMemHandle         func(p *uintptr, handle IPCHandle, flags uint32) Status
	HipIpcCloseMemHandle        func(p uintptr) Status

	// A module belongs to the device that was current when it was loaded. When another one is current, some versions
	// end the process in hipModuleGetFunction, and some answer hipErrorInvalidHandle to hipModuleLaunchKernel.

	HipModuleLoadData     func(module *uintptr, image uintptr) Status // image: the code, then at least one zero byte
	HipModuleUnload       func(module uintptr) Status
	HipModuleGetFunction  func(function *uintptr, module uintptr, name string) Status
	HipModuleLaunchKernel func(
		function uintptr, gridX, gridY, gridZ, blockX, blockY, blockZ, sharedBytes uint32, stream uintptr,
		params *unsafe.Pointer, // to the arguments' values, which HIP copies; then nil, for the software device
		extra *uintptr) Status

	// Virtual memory: addresses are reserved, memory is created, and one is mapped to the other. From HIP 5.1.

	HipMemGetAddressRange          func(base, size *uintptr, p uintptr) Status
	HipMemGetAllocationGranularity func(granularity *uintptr, prop *AllocationProp, option Granularity) Status
	HipMemCreate                   func(handle *uintptr, size uintptr, prop *AllocationProp, flags uint64) Status
	HipMemRelease                  func(handle uintptr) Status
	HipMemAddressReserve           func(p *uintptr, size, align, hint uintptr, flags uint64) Status
	HipMemAddressFree              func(p, size uintptr) Status
	HipMemMap                      func(p, size, offset, handle uintptr, flags uint64) Status
	HipMemUnmap                    func(p, size uintptr) Status
	HipMemSetAccess                func(p, size uintptr, desc *AccessDesc, count uintptr) Status
	HipMemExportToShareableHandle  func(out *int32, handle uintptr, handleType HandleType, flags uint64) Status
	// osHandle is a descriptor from HIP 7.1 on, and a pointer to one before.
	HipMemImportFromShareableHandle func(handle *uintptr, osHandle uintptr, handleType HandleType) Status

	// Graphs: work that a stream recorded instead of doing it. From HIP 4.3.

	HipStreamBeginCapture func(stream uintptr, mode CaptureMode) Status
	HipStreamEndCapture   func(stream uintptr, graph *uintptr) Status
	HipGraphDestroy       func(graph uintptr) Status
	HipGraphInstantiate   func(exec *uintptr, graph uintptr, errorNode *uintptr, log *byte, n uintptr) Status
	HipGraphLaunch        func(exec, stream uintptr) Status
	HipGraphExecDestroy   func(exec uintptr) Status
}

// RTC is the table of functions of hipRTC, AMD's compiler at run time. All of it is required. It is filled as API is,
// from libhiprtc.so or, before HIP 7, from libamdhip64.so. The C prototypes are the same in HIP 5.0 to 7.x.
type RTC struct {
	HiprtcCreateProgram func(
		program *uintptr, source, name string, headers int32, headerSources, headerNames **byte) RTCStatus
	HiprtcCompileProgram    func(program uintptr, n int32, options **byte) RTCStatus
	HiprtcGetProgramLogSize func(program uintptr, n *uintptr) RTCStatus
	HiprtcGetProgramLog     func(program uintptr, log *byte) RTCStatus
	HiprtcGetCodeSize       func(program uintptr, n *uintptr) RTCStatus
	HiprtcGetCode           func(program uintptr, code *byte) RTCStatus
	HiprtcDestroyProgram    func(program *uintptr) RTCStatus
	HiprtcGetErrorString    func(code RTCStatus) string // "" for a code that it does not know
}

// Symbol returns the name under which a library exports the function of a field of API or RTC.
func Symbol(field string) string { return strings.ToLower(field[:1]) + field[1:] }

// Symbols returns the names of all functions of a table, which is the type API or RTC: those that a library must have,
// and those that it may have.
func Symbols(table reflect.Type) (required, optional []string) {
	list := &required
	for field := range table.Fields() {
		if field.Name == "_" {
			list = &optional
			continue
		}
		*list = append(*list, Symbol(field.Name))
	}
	return required, optional
}
