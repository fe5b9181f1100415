package amdhip

import (
	"fmt"
	"log/slog"
	"math"
	"reflect"
	"sync"
	"sync/atomic"
	"time"
)

// maxSoftDevices keeps the address spaces of the devices apart, see deviceSpace.
const maxSoftDevices = 64

// SoftwareOptions describes the machine that OpenSoftware imitates. The zero value is one device with as much memory as
// the host and a link that is as fast as the CPU copies.
type SoftwareOptions struct {
	// Devices is the number of devices, at most 64; 0 means 1.
	Devices int
	// Memory is the capacity of each device in bytes; 0 means the memory of the host. Pages are taken from the host when
	// they are first written, so a large capacity costs nothing by itself.
	Memory uint64
	// LinkBytesPerSecond is the speed of the host-device link of one device, shared by all its streams, each direction
	// for itself; 0 means unlimited.
	LinkBytesPerSecond float64
	// LinkLatency is what each copy over the link costs before its first byte moves. Copies of different streams hide it
	// behind each other, copies of one stream do not.
	LinkLatency time.Duration
	// Integrated makes the devices say that they share the host's memory, as an APU does.
	Integrated bool
	// Poison fills fresh device memory with a pattern, so that bytes nobody wrote show.
	Poison bool
	// Shared makes device memory so that other processes can open it by its IPC handle. Linux only.
	Shared bool
	// Logger receives what was left unreleased at Close, at debug level; nil is silent.
	Logger *slog.Logger
}

// SoftwareStats counts what exists in the software device and what it did. Closing a Runtime does not reset what its
// users left behind, so after Close the first group shows leaks.
type SoftwareStats struct {
	Allocations     int    // device allocations
	DeviceBytes     uint64 // in device allocations, of all devices
	HostAllocations int    // hipHostMalloc
	Registrations   int    // hipHostRegister
	PinnedBytes     uint64 // in host allocations and registrations
	IPCMappings     int    // opened IPC handles
	Streams, Events int
	Modules         int // loaded code

	// Since OpenSoftware.

	PeakDeviceBytes uint64
	PeakPinnedBytes uint64
	Copies          int64  // that ended well, of any direction
	CopiedBytes     uint64 // by them
	UnpinnedCopies  int64  // calls whose host side was not wholly pinned
}

// Software is the software device behind a Runtime that OpenSoftware made: the switches and gauges of tests. It may be
// used from several goroutines.
//
// It answers as the HIP runtime does, only more strictly where HIP would go on in a way that is slow or undefined:
//   - The null stream is refused with ErrNotSupported.
//   - A copy or memset whose device memory is not on the stream's device is refused with ErrInvalidValue (HIP would move
//     it to the other device's null stream). Copies between devices go through hipMemcpyPeerAsync.
//   - The kind of a copy must fit its addresses, else ErrInvalidValue.
//   - Kernels are Go functions, see Offer; hipRTC makes no code but checks that they are known. A function is looked up and
//     launched with its device current, and launched with as many arguments as the kernel has, on a grid of one dimension.
//   - Addresses of freed memory are never used again; memory that is gone when a copy executes is ErrIllegalAddress.
//   - An operation that fails makes its stream fail: later operations of it are skipped, and everything that waits for
//     them is told the same code. Streams that wait for an event of a failed stream fail, too.
type Software struct {
	opts   SoftwareOptions
	epoch  time.Time // of the model's clock
	serial uint64    // tells Softwares of this process apart in IPC handles
	start  uint64    // of this process, for IPC handles; 0 without SoftwareOptions.Shared
	names  map[string]*softCall
	quit   chan struct{} // closed by close
	ended  sync.WaitGroup

	otherClock       atomic.Bool // time.Now does not tell the system's time
	copies, unpinned atomic.Int64
	copied           atomic.Uint64

	// mu guards everything below, the regions of the devices and the fields of regions, blocks and events. It is never
	// held while memory is copied or something is waited for. A stream's own lock is taken inside it, never around it.
	mu      sync.Mutex
	closed  bool
	devices []*softDevice
	current map[uint64]int32 // OS thread → device, when it is not 0
	host    regionList       // pinned memory
	streams map[uintptr]*softStream
	events  map[uintptr]*softEvent
	handle  uintptr // the last handle given out; none is used twice
	stats   SoftwareStats
	stalls  []chan struct{} // of the faults injected since the last ClearFaults

	kernels   map[string]softKernel // that Offer made known
	programs  map[uintptr]*softProgram
	modules   map[uintptr]*softModule
	functions map[uintptr]*softFunction

	unmapping error // of unmapping memory; the bookkeeping is wrong then
}

// OpenSoftware makes a Runtime whose devices are imitated in Go: no GPU, no library, the same code above. The caller must
// Close it, which ends its goroutines, gives up operations that are still queued, and unmaps device memory and what
// HostMalloc returned. Under testing/synctest, open it inside the bubble: the link then runs on the bubble's clock.
func OpenSoftware(o SoftwareOptions) (*Runtime, error) {
	sw, err := newSoftware(o)
	if err != nil {
		return nil, err
	}
	rt := newRuntime(sw.table(), "soft", "", o.Logger)
	rt.soft = sw
	lib := &rtcLibrary{api: sw.rtcTable(), path: "software device"}
	rt.rtc = func() (*rtcLibrary, error) { return lib, nil }
	return rt, nil
}

func newSoftware(o SoftwareOptions) (*Software, error) {
	switch {
	case o.Devices < 0 || o.Devices > maxSoftDevices:
		return nil, fmt.Errorf("software device: %d devices, want 1 to %d", o.Devices, maxSoftDevices)
	case o.LinkBytesPerSecond < 0 || math.IsNaN(o.LinkBytesPerSecond):
		return nil, fmt.Errorf("software device: a link of %v bytes per second", o.LinkBytesPerSecond)
	case o.LinkLatency < 0:
		return nil, fmt.Errorf("software device: a link latency of %v", o.LinkLatency)
	case o.Memory > deviceSpace/2:
		return nil, fmt.Errorf("software device: %d bytes of memory, the limit is %d", o.Memory, uint64(deviceSpace/2))
	}
	if o.Devices == 0 {
		o.Devices = 1
	}
	if math.IsInf(o.LinkBytesPerSecond, 1) {
		o.LinkBytesPerSecond = 0
	}
	if o.Memory == 0 {
		total, err := hostMemory()
		if err != nil {
			return nil, fmt.Errorf("software device: the size of the host's memory: %w; set SoftwareOptions.Memory", err)
		}
		o.Memory = total
	}
	var start uint64
	if o.Shared {
		var err error
		if start, err = processStart("self"); err != nil {
			return nil, fmt.Errorf("software device: memory to share with other processes: %w", err)
		}
	}
	sw := &Software{
		opts:    o,
		start:   start,
		epoch:   time.Now(),
		serial:  ipcSerial.Add(1),
		names:   make(map[string]*softCall),
		quit:    make(chan struct{}),
		current: make(map[uint64]int32),
		streams: make(map[uintptr]*softStream),
		events:  make(map[uintptr]*softEvent),
		handle:  firstHandle,

		kernels:   make(map[string]softKernel),
		programs:  make(map[uintptr]*softProgram),
		modules:   make(map[uintptr]*softModule),
		functions: make(map[uintptr]*softFunction),
	}
	for _, table := range []reflect.Type{reflect.TypeFor[api](), reflect.TypeFor[rtcAPI]()} {
		for field := range table.Fields() {
			if field.Name != "_" {
				sw.names[field.Name] = new(softCall)
			}
		}
	}
	for i := range o.Devices {
		sw.devices = append(sw.devices, newSoftDevice(i, o))
	}
	return sw, nil
}

// table returns the symbol table of the software device.
func (sw *Software) table() *api {
	return &api{
		hipRuntimeGetVersion:    sw.runtimeGetVersion,
		hipDriverGetVersion:     sw.driverGetVersion,
		hipGetDeviceCount:       sw.getDeviceCount,
		hipSetDevice:            sw.setDevice,
		hipGetDevice:            sw.getDevice,
		hipDeviceGetName:        sw.deviceGetName,
		hipDeviceGetPCIBusId:    sw.deviceGetPCIBusID,
		hipDeviceGetAttribute:   sw.deviceGetAttribute,
		hipDeviceTotalMem:       sw.deviceTotalMem,
		hipGetDeviceProperties:  sw.getDeviceProperties,
		hipMemGetInfo:           sw.memGetInfo,
		hipMalloc:               sw.malloc,
		hipFree:                 sw.free,
		hipHostMalloc:           sw.hostMalloc,
		hipHostFree:             sw.hostFree,
		hipHostRegister:         sw.hostRegister,
		hipHostUnregister:       sw.hostUnregister,
		hipHostGetDevicePointer: sw.hostGetDevicePointer,
		hipDeviceSynchronize:    sw.deviceSynchronize,

		hipMemcpyAsync:           sw.memcpyAsync,
		hipMemsetAsync:           sw.memsetAsync,
		hipStreamCreateWithFlags: sw.streamCreate,
		hipStreamDestroy:         sw.streamDestroy,
		hipStreamSynchronize:     sw.streamSynchronize,
		hipStreamQuery:           sw.streamQuery,
		hipStreamWaitEvent:       sw.streamWaitEvent,
		hipEventCreateWithFlags:  sw.eventCreate,
		hipEventDestroy:          sw.eventDestroy,
		hipEventRecord:           sw.eventRecord,
		hipEventQuery:            sw.eventQuery,
		hipEventSynchronize:      sw.eventSynchronize,
		hipEventElapsedTime:      sw.eventElapsedTime,

		hipGetErrorName:   sw.getErrorName,
		hipGetErrorString: sw.getErrorString,

		hipGetDevicePropertiesR0600: sw.getDevicePropertiesR0600,
		hipDeviceGetUuid:            sw.deviceGetUUID,
		hipMallocAsync:              sw.mallocAsync,
		hipFreeAsync:                sw.freeAsync,
		hipDeviceCanAccessPeer:      sw.deviceCanAccessPeer,
		hipDeviceEnablePeerAccess:   sw.deviceEnablePeerAccess,
		hipDeviceDisablePeerAccess:  sw.deviceDisablePeerAccess,
		hipMemcpyPeerAsync:          sw.memcpyPeerAsync,
		hipIpcGetMemHandle:          sw.ipcGetMemHandle,
		hipIpcOpenMemHandle:         sw.ipcOpenMemHandle,
		hipIpcCloseMemHandle:        sw.ipcCloseMemHandle,

		hipModuleLoadData:     sw.moduleLoadData,
		hipModuleUnload:       sw.moduleUnload,
		hipModuleGetFunction:  sw.moduleGetFunction,
		hipModuleLaunchKernel: sw.moduleLaunchKernel,
	}
}

// now is the time on the model's clock.
func (sw *Software) now() time.Duration { return time.Since(sw.epoch) }

// newHandle returns an address-like number that was never given out before. sw.mu is held.
func (sw *Software) newHandle() uintptr {
	sw.handle += 16
	return sw.handle
}

// Calls returns how often each function of HIP and hipRTC was called, under its own name, for those that were.
func (sw *Software) Calls() map[string]int {
	calls := make(map[string]int)
	for name, c := range sw.names {
		if n := c.count.Load(); n > 0 {
			calls[name] = int(n)
		}
	}
	return calls
}

// Stats returns the current counts.
func (sw *Software) Stats() SoftwareStats {
	sw.mu.Lock()
	defer sw.mu.Unlock()
	s := sw.stats
	s.Copies, s.CopiedBytes, s.UnpinnedCopies = sw.copies.Load(), sw.copied.Load(), sw.unpinned.Load()
	return s
}

// FlipBit inverts one bit (0 to 7) of the byte at p, an address of device memory or of pinned host memory.
func (sw *Software) FlipBit(p DevicePtr, bit uint8) error {
	if bit > 7 {
		return fmt.Errorf("flip bit %d of a byte", bit)
	}
	b, st := sw.hold(uintptr(p), 1)
	if st != Success {
		return fmt.Errorf("flip a bit at %#x: %w", uintptr(p), st)
	}
	defer sw.release(b.block)
	b.mem[0] ^= 1 << bit
	return nil
}

// close ends all streams without finishing their queues, waits for their goroutines and unmaps what is still allocated.
func (sw *Software) close() error {
	sw.mu.Lock()
	if sw.closed {
		sw.mu.Unlock()
		return nil
	}
	sw.closed = true
	close(sw.quit)
	for _, s := range sw.streams {
		s.leave()
	}
	left := sw.stats
	sw.mu.Unlock()

	sw.ended.Wait()
	if log := sw.opts.Logger; log != nil && left.Allocations+left.HostAllocations+left.Registrations+
		left.IPCMappings+left.Streams+left.Events+left.Modules > 0 {
		log.Debug("software device closed while in use", "allocations", left.Allocations,
			"host allocations", left.HostAllocations, "registrations", left.Registrations,
			"IPC mappings", left.IPCMappings, "streams", left.Streams, "events", left.Events, "modules", left.Modules)
	}

	sw.mu.Lock()
	lists := []*regionList{&sw.host}
	for _, d := range sw.devices {
		lists = append(lists, &d.regions)
	}
	var blocks []*block
	for _, l := range lists {
		for _, r := range *l {
			blocks = append(blocks, r.block)
		}
		*l = nil
	}
	sw.mu.Unlock()
	for _, b := range blocks {
		sw.release(b)
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	return sw.unmapping
}
