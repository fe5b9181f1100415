package soft

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"reflect"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
	"github.com/gguf2gpu/gguf2gpu/internal/cgroup"
)

// maxDevices keeps the address spaces of the devices apart, see deviceSpace.
const maxDevices = 64

// Options describes the machine that Open and OpenRuntime make. The zero value is one device that has as much memory as
// the host, and a link as fast as the CPU copies.
type Options struct {
	// Devices is the number of devices, at most 64; 0 means 1.
	Devices int
	// Memory is the capacity of each device in bytes; 0 means the memory of the host, or a share of what control groups
	// leave of it. Pages are taken from the host when they are first written, so a large capacity costs nothing by
	// itself.
	Memory uint64
	// LinkBytesPerSecond is the speed of the host-device link of one device, shared by all its streams, each direction
	// for itself; 0 means unlimited.
	LinkBytesPerSecond float64
	// LinkLatency is how long each copy over the link takes before its first byte moves. Copies of different streams
	// wait for it at the same time, copies of one stream one after the other.
	LinkLatency time.Duration
	// Integrated makes the devices report that they share the host's memory, as an APU does.
	Integrated bool
	// Poison fills fresh device memory with a pattern, so that bytes nobody wrote show.
	Poison bool
	// Waits says what calls that free something wait for.
	Waits Waits
	// Shared lets other processes open allocations by their IPC handles. Linux only.
	Shared bool
	// Flips are bits that get damaged, as Software.Flip does it.
	Flips []Flip
	// Logger receives, at debug level, what was not released before Close. Nil is silent.
	Logger *slog.Logger
}

// Waits says what calls that free something wait for: hipFree, hipHostFree, hipHostUnregister, hipIpcCloseMemHandle,
// hipStreamDestroy and hipModuleUnload.
type Waits uint8

const (
	// WaitsForDevice is what HIP's sources say: the first four wait for the device that the memory belongs to, which was
	// current when host memory was pinned, hipStreamDestroy for its stream, and hipModuleUnload for nothing.
	WaitsForDevice Waits = iota
	// WaitsForAll makes all of them wait for the work of all devices, as a runtime may do inside.
	WaitsForAll
	// WaitsForNothing frees at once. Work that still uses what is freed is counted by Stats.Stray.
	WaitsForNothing
)

// Stats counts what exists in the software device and what it has done. Closing a Runtime does not reset what its users
// left behind, so after Close the first group shows leaks.
type Stats struct {
	Allocations     int    // device allocations
	DeviceBytes     uint64 // in device allocations, of all devices
	HostAllocations int    // hipHostMalloc
	Registrations   int    // hipHostRegister
	PinnedBytes     uint64 // in host allocations and registrations
	IPCMappings     int    // opened IPC handles
	Streams, Events int
	Modules         int // loaded code
	Physical        int // handles of physical memory, see amdhip.PhysicalMemory
	Reservations    int // ranges of addresses
	Mappings        int // of physical memory to addresses
	Graphs          int // recorded, and not destroyed
	GraphExecs      int // instantiated, and not destroyed

	// Since OpenRuntime.

	PeakDeviceBytes uint64
	PeakPinnedBytes uint64
	Copies          int64  // that ended well, of any direction
	CopiedBytes     uint64 // by them
	UnpinnedCopies  int64  // calls whose host side was not wholly pinned
	Stray           int64  // copies and memsets that found their memory freed, unmapped or out of reach
	Flips           int64  // bits that were flipped
}

// Software is a machine with software devices: its counters, and its switches for tests. It may be used from several
// goroutines. Of returns that of a Runtime.
//
// It answers as the HIP runtime does, only more strictly where HIP would go on in a way that is slow or undefined:
//   - The null stream is refused with ErrNotSupported.
//   - A copy or memset whose device memory is not on the stream's device is refused with ErrInvalidValue, where HIP
//     would move it to the other device's null stream. Copies between devices go through hipMemcpyPeerAsync.
//   - The kind of a copy must fit its addresses, else ErrInvalidValue.
//   - Kernels are Go functions, see Offer; hipRTC makes no code but checks that they are known. A function is looked up
//     and launched with its device current, and launched with as many arguments as the kernel has.
//   - Addresses of freed memory are never used again, except for reserved ones that are asked for; memory that is gone
//     when a copy executes is ErrIllegalAddress.
//   - Virtual memory is mapped as a whole and at offset 0. Nobody may use it before hipMemSetAccess, and an operation
//     stays inside one mapping. Unmapping does not wait: operations that use the memory later fail.
//   - While a stream is captured, whatever cannot be recorded is refused and spoils the capture.
//   - An operation that fails makes its stream fail: later operations of it are skipped, and everything that waits for
//     them is told the same code. Streams that wait for an event of a failed stream fail, too.
type Software struct {
	opts   Options
	epoch  time.Time // of the model's clock
	serial uint64    // tells Softwares of this process apart in IPC handles
	start  uint64    // of this process, for IPC handles; 0 without Options.Shared
	names  map[string]*call
	quit   chan struct{} // closed by close
	ended  sync.WaitGroup

	otherClock       atomic.Bool // time.Now does not tell the system's time
	copies, unpinned atomic.Int64
	copied           atomic.Uint64
	stray, flipped   atomic.Int64

	// mu guards everything below, the regions of the devices and the fields of regions, blocks and events. It is never
	// held while memory is copied or something is waited for. A stream's own lock is taken inside it, never around it.
	mu      sync.Mutex
	closed  bool
	devices []*device
	current map[uint64]int32 // OS thread → device, when it is not 0
	host    regionList       // pinned memory
	streams map[uintptr]*stream
	events  map[uintptr]*event
	handle  uintptr // the last handle given out; none is used twice
	stats   Stats
	stalls  []chan struct{} // of Stall and Block, of the faults injected since the last ClearFaults
	flips   []Flip          // of copies that are still to come; Copy says how many

	kernels   map[string]kernel // that Offer made known
	programs  map[uintptr]*program
	modules   map[uintptr]*module
	functions map[uintptr]*function

	virtual     regionList // what is mapped to reserved addresses
	reserved    []reservation
	reservedEnd uintptr       // behind the last address that was ever reserved
	phantoms    []reservation // what hipMemMap said to have mapped, see Fault.Async
	physicals   map[uintptr]*physical

	captures []*capture
	graphs   map[uintptr]*graph
	execs    map[uintptr]*graphExec

	unmapping error // of unmapping memory; the bookkeeping is wrong then
}

// processMemory is left to the process beside its device memory: for staging buffers, most of all.
const processMemory = 192 << 20

// defaultMemory is the capacity of each device on a host with total bytes of memory. In a container that may use less,
// the devices together have what it may still use: a process that takes more gets no error, it is ended. The files of
// the kernel are below root.
func defaultMemory(total uint64, root string, devices int) uint64 {
	most, limited := cgroup.Available(root)
	if !limited || most >= total {
		return total
	}
	return max(1<<20, (most-min(most/2, processMemory))/uint64(devices))
}

// Open makes a machine with software devices and returns its device 0. Close of the device's Runtime ends the machine.
func Open(o Options) (*amdhip.Device, error) {
	rt, err := OpenRuntime(o)
	if err != nil {
		return nil, err
	}
	dev, err := rt.Device(0)
	if err != nil {
		return nil, errors.Join(err, rt.Close())
	}
	return dev, nil
}

// OpenRuntime makes a machine with software devices and returns its Runtime. The caller must Close it. That ends the
// goroutines of the machine, gives up operations that are still queued, and unmaps device memory and what HostMalloc
// returned. Under testing/synctest, call it inside the bubble: the link then runs on the clock of the bubble.
func OpenRuntime(o Options) (*amdhip.Runtime, error) {
	sw, err := newSoftware(o)
	if err != nil {
		return nil, err
	}
	compiler := &hip.Compiler{RTC: sw.rtcTable(), Path: "software device"}
	return amdhip.NewRuntime(hip.Backend{
		API: sw.table(), Kind: "soft", Owner: sw, Close: sw.close,
		Compiler: func() (*hip.Compiler, error) { return compiler, nil },
	}, o.Logger), nil
}

// Of returns the software device behind rt, nil if rt was not made by OpenRuntime or Open.
func Of(rt *amdhip.Runtime) *Software {
	sw, _ := rt.Backend().(*Software)
	return sw
}

func newSoftware(o Options) (*Software, error) {
	switch {
	case o.Devices < 0 || o.Devices > maxDevices:
		return nil, fmt.Errorf("software device: %d devices, want 1 to %d", o.Devices, maxDevices)
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
			return nil, fmt.Errorf("software device: the size of the host's memory: %w; set Options.Memory", err)
		}
		o.Memory = defaultMemory(total, "/", o.Devices)
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
		names:   make(map[string]*call),
		quit:    make(chan struct{}),
		current: make(map[uint64]int32),
		streams: make(map[uintptr]*stream),
		events:  make(map[uintptr]*event),
		handle:  firstHandle,

		kernels:   make(map[string]kernel),
		programs:  make(map[uintptr]*program),
		modules:   make(map[uintptr]*module),
		functions: make(map[uintptr]*function),
		physicals: make(map[uintptr]*physical),
		graphs:    make(map[uintptr]*graph),
		execs:     make(map[uintptr]*graphExec),
	}
	for _, table := range []reflect.Type{reflect.TypeFor[hip.API](), reflect.TypeFor[hip.RTC]()} {
		required, optional := hip.Symbols(table)
		for _, name := range append(required, optional...) {
			sw.names[name] = new(call)
		}
	}
	for i := range o.Devices {
		sw.devices = append(sw.devices, newDevice(i, o))
	}
	for _, f := range o.Flips {
		if err := f.check(o.Devices); err != nil {
			return nil, fmt.Errorf("software device: %w", err)
		}
	}
	for _, f := range o.Flips {
		if err := sw.Flip(f); err != nil {
			return nil, err
		}
	}
	return sw, nil
}

// table returns the symbol table of the software device.
func (sw *Software) table() *hip.API {
	return &hip.API{
		HipRuntimeGetVersion:    sw.runtimeGetVersion,
		HipDriverGetVersion:     sw.driverGetVersion,
		HipGetDeviceCount:       sw.getDeviceCount,
		HipSetDevice:            sw.setDevice,
		HipGetDevice:            sw.getDevice,
		HipDeviceGetName:        sw.deviceGetName,
		HipDeviceGetPCIBusId:    sw.deviceGetPCIBusID,
		HipDeviceGetAttribute:   sw.deviceGetAttribute,
		HipDeviceTotalMem:       sw.deviceTotalMem,
		HipGetDeviceProperties:  sw.getDeviceProperties,
		HipMemGetInfo:           sw.memGetInfo,
		HipMalloc:               sw.malloc,
		HipFree:                 sw.free,
		HipHostMalloc:           sw.hostMalloc,
		HipHostFree:             sw.hostFree,
		HipHostRegister:         sw.hostRegister,
		HipHostUnregister:       sw.hostUnregister,
		HipHostGetDevicePointer: sw.hostGetDevicePointer,
		HipDeviceSynchronize:    sw.deviceSynchronize,

		HipMemcpyAsync:           sw.memcpyAsync,
		HipMemsetAsync:           sw.memsetAsync,
		HipStreamCreateWithFlags: sw.streamCreate,
		HipStreamDestroy:         sw.streamDestroy,
		HipStreamSynchronize:     sw.streamSynchronize,
		HipStreamQuery:           sw.streamQuery,
		HipStreamWaitEvent:       sw.streamWaitEvent,
		HipEventCreateWithFlags:  sw.eventCreate,
		HipEventDestroy:          sw.eventDestroy,
		HipEventRecord:           sw.eventRecord,
		HipEventQuery:            sw.eventQuery,
		HipEventSynchronize:      sw.eventSynchronize,
		HipEventElapsedTime:      sw.eventElapsedTime,

		HipGetErrorName:   sw.getErrorName,
		HipGetErrorString: sw.getErrorString,

		HipGetDevicePropertiesR0600: sw.getDevicePropertiesR0600,
		HipDeviceGetUuid:            sw.deviceGetUUID,
		HipMallocAsync:              sw.mallocAsync,
		HipFreeAsync:                sw.freeAsync,
		HipDeviceCanAccessPeer:      sw.deviceCanAccessPeer,
		HipDeviceEnablePeerAccess:   sw.deviceEnablePeerAccess,
		HipDeviceDisablePeerAccess:  sw.deviceDisablePeerAccess,
		HipMemcpyPeerAsync:          sw.memcpyPeerAsync,
		HipIpcGetMemHandle:          sw.ipcGetMemHandle,
		HipIpcOpenMemHandle:         sw.ipcOpenMemHandle,
		HipIpcCloseMemHandle:        sw.ipcCloseMemHandle,

		HipModuleLoadData:     sw.moduleLoadData,
		HipModuleUnload:       sw.moduleUnload,
		HipModuleGetFunction:  sw.moduleGetFunction,
		HipModuleLaunchKernel: sw.moduleLaunchKernel,

		HipMemGetAddressRange:           sw.memGetAddressRange,
		HipMemGetAllocationGranularity:  sw.memGetAllocationGranularity,
		HipMemCreate:                    sw.memCreate,
		HipMemRelease:                   sw.memRelease,
		HipMemAddressReserve:            sw.memAddressReserve,
		HipMemAddressFree:               sw.memAddressFree,
		HipMemMap:                       sw.memMap,
		HipMemUnmap:                     sw.memUnmap,
		HipMemSetAccess:                 sw.memSetAccess,
		HipMemExportToShareableHandle:   sw.memExportToShareableHandle,
		HipMemImportFromShareableHandle: sw.memImportFromShareableHandle,

		HipStreamBeginCapture: sw.streamBeginCapture,
		HipStreamEndCapture:   sw.streamEndCapture,
		HipGraphDestroy:       sw.graphDestroy,
		HipGraphInstantiate:   sw.graphInstantiate,
		HipGraphLaunch:        sw.graphLaunch,
		HipGraphExecDestroy:   sw.graphExecDestroy,
	}
}

// now is the time on the model's clock.
func (sw *Software) now() time.Duration { return time.Since(sw.epoch) }

// newHandle returns an address-like number that was never given out before. sw.mu is held.
func (sw *Software) newHandle() uintptr {
	sw.handle += 16
	return sw.handle
}

// Calls returns how often each function of HIP and hipRTC was called, by its own name. Functions that were not called
// are left out.
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
func (sw *Software) Stats() Stats {
	sw.mu.Lock()
	defer sw.mu.Unlock()
	s := sw.stats
	s.Copies, s.CopiedBytes, s.UnpinnedCopies = sw.copies.Load(), sw.copied.Load(), sw.unpinned.Load()
	s.Stray, s.Flips = sw.stray.Load(), sw.flipped.Load()
	return s
}

// close ends all streams without executing what is queued, waits for their goroutines, and unmaps what is still
// allocated.
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
		left.IPCMappings+left.Streams+left.Events+left.Modules+left.Physical+left.Reservations+
		left.Graphs+left.GraphExecs > 0 {
		log.Debug("software device closed while in use", "allocations", left.Allocations,
			"host allocations", left.HostAllocations, "registrations", left.Registrations,
			"IPC mappings", left.IPCMappings, "streams", left.Streams, "events", left.Events, "modules", left.Modules,
			"physical memory", left.Physical, "address ranges", left.Reservations, "graphs", left.Graphs+left.GraphExecs)
	}

	sw.mu.Lock()
	lists := []*regionList{&sw.host, &sw.virtual}
	for _, d := range sw.devices {
		lists = append(lists, &d.regions)
	}
	var blocks []*block
	for _, l := range lists {
		for _, r := range *l {
			blocks = append(blocks, r.block)
		}
	}
	for _, p := range sw.allPhysical() { // which has a reference besides those of its mappings
		blocks = append(blocks, p.block)
	}
	for _, l := range lists {
		*l = nil
	}
	sw.physicals = nil
	sw.mu.Unlock()
	for _, b := range blocks {
		sw.release(b)
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	return sw.unmapping
}
