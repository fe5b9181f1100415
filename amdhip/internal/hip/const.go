package hip

import "fmt"

// IPCHandle names a device allocation to another process of the same host (hipIpcMemHandle_t, 64 bytes passed by
// value).
type IPCHandle struct{ b [64]byte }

// NewIPCHandle makes a handle of its 64 bytes.
func NewIPCHandle(b [64]byte) IPCHandle { return IPCHandle{b} }

// Bytes returns the 64 bytes of the handle.
func (h IPCHandle) Bytes() [64]byte { return h.b }

// MarshalBinary returns the 64 bytes of the handle, for the process that is to open it.
func (h IPCHandle) MarshalBinary() ([]byte, error) { return h.b[:], nil }

// UnmarshalBinary sets the handle from the bytes of MarshalBinary.
func (h *IPCHandle) UnmarshalBinary(data []byte) error {
	if len(data) != len(h.b) {
		return fmt.Errorf("amdhip: an IPC handle has %d bytes, not %d: %w", len(h.b), len(data), ErrInvalidValue)
	}
	copy(h.b[:], data)
	return nil
}

// MemcpyKind is hipMemcpyKind.
type MemcpyKind int32

// The directions of a copy.
const (
	MemcpyHostToHost     MemcpyKind = 0
	MemcpyHostToDevice   MemcpyKind = 1
	MemcpyDeviceToHost   MemcpyKind = 2
	MemcpyDeviceToDevice MemcpyKind = 3
	MemcpyDefault        MemcpyKind = 4

	MemcpyDeviceToDeviceNoCU MemcpyKind = 1024 // from HIP 6.1 on
)

// DeviceAttribute is hipDeviceAttribute_t.
type DeviceAttribute int32

// The attributes that are asked for. Their numbers are the same in HIP 5.0 to 7.x.
const (
	AttrAsyncEngineCount     DeviceAttribute = 2
	AttrCanMapHostMemory     DeviceAttribute = 3
	AttrIntegrated           DeviceAttribute = 16
	AttrMultiprocessorCount  DeviceAttribute = 63
	AttrPCIBusID             DeviceAttribute = 67
	AttrPCIDeviceID          DeviceAttribute = 68
	AttrPCIDomainID          DeviceAttribute = 69
	AttrTotalGlobalMem       DeviceAttribute = 84 // an int, so it cannot tell more than 2 GiB
	AttrWarpSize             DeviceAttribute = 87
	AttrMemoryPoolsSupported DeviceAttribute = 88
	AttrVirtualMemory        DeviceAttribute = 89 // hipDeviceAttributeVirtualMemoryManagementSupported, from HIP 5.3 on
)

// Flags of hipHostMalloc.
const (
	HostMallocPortable    uint32 = 1
	HostMallocMapped      uint32 = 2
	HostMallocNumaUser    uint32 = 0x20000000
	HostMallocCoherent    uint32 = 0x40000000
	HostMallocNonCoherent uint32 = 0x80000000
)

// Flags of hipHostRegister.
const (
	HostRegisterPortable uint32 = 1
	HostRegisterMapped   uint32 = 2
)

// StreamNonBlocking is the flag of hipStreamCreateWithFlags that keeps the null stream from waiting for the stream, and
// the stream for the null stream.
const StreamNonBlocking uint32 = 1

// Flags of hipEventCreateWithFlags.
const (
	EventDefault       uint32 = 0
	EventBlockingSync  uint32 = 1
	EventDisableTiming uint32 = 2
	EventInterprocess  uint32 = 4 // only together with EventDisableTiming
)

// Location is hipMemLocation, where memory is.
type Location struct {
	Type LocationType
	ID   int32 // of the device
}

// LocationType is hipMemLocationType.
type LocationType int32

// LocationDevice is memory of the device with the number Location.ID.
const LocationDevice LocationType = 1

// AllocationProp is hipMemAllocationProp, what kind of memory hipMemCreate makes.
type AllocationProp struct {
	Type        AllocationType
	HandleTypes HandleType // that hipMemExportToShareableHandle will be asked for
	Location    Location
	Win32       uintptr
	Compression uint8
	RDMA        uint8
	Usage       uint16
	_           [4]byte
}

// AllocationType is hipMemAllocationType.
type AllocationType int32

// AllocationPinned is memory that stays where it is, the only kind there is.
const AllocationPinned AllocationType = 1

// HandleType is hipMemAllocationHandleType.
type HandleType int32

// What memory can be exported as.
const (
	HandleNone       HandleType = 0
	HandleDescriptor HandleType = 1 // a file descriptor
)

// AccessDesc is hipMemAccessDesc, what a device may do with mapped memory.
type AccessDesc struct {
	Location Location
	Flags    AccessFlags
}

// AccessFlags is hipMemAccessFlags.
type AccessFlags int32

// What a device may do with mapped memory.
const (
	AccessNone      AccessFlags = 0
	AccessRead      AccessFlags = 1
	AccessReadWrite AccessFlags = 3
)

// Granularity is hipMemAllocationGranularity_flags.
type Granularity int32

// Sizes and addresses of virtual memory are multiples of the minimum; multiples of the recommended one are quicker.
const (
	GranularityMinimum     Granularity = 0
	GranularityRecommended Granularity = 1
)

// CaptureMode is hipStreamCaptureMode, which calls are refused while a stream records: those that cannot be recorded,
// of every thread, of the thread that records, or of none.
type CaptureMode int32

// The modes of recording.
const (
	CaptureGlobal      CaptureMode = 0
	CaptureThreadLocal CaptureMode = 1
	CaptureRelaxed     CaptureMode = 2
)

// PropLayout holds the offsets of fields in one of the two layouts of hipDeviceProp_t.
type PropLayout struct {
	Size                                                int
	TotalGlobalMem, WarpSize, MultiProcessors           int
	Integrated, CanMapHost, PCIDomain, PCIBus, ArchName int
	UUID                                                int // 0: the layout has none
}

// The two layouts of hipDeviceProp_t, from the headers of HIP 5.0 to 5.7 (R0000) and of 6.0 and later (R0600). The
// symbol hipGetDeviceProperties keeps the old one in every version of the library; the new one has a symbol of its own.
var (
	PropR0000 = PropLayout{
		Size: 792, TotalGlobalMem: 256, WarpSize: 276, MultiProcessors: 336, Integrated: 652,
		CanMapHost: 388, PCIDomain: 364, PCIBus: 368, ArchName: 396,
	}
	PropR0600 = PropLayout{
		Size: 1472, TotalGlobalMem: 288, WarpSize: 308, MultiProcessors: 388, Integrated: 396,
		CanMapHost: 400, PCIDomain: 592, PCIBus: 584, ArchName: 1160, UUID: 256,
	}
)

// PropNameSize is how many bytes the fields name and gcnArchName of hipDeviceProp_t have.
const PropNameSize = 256
