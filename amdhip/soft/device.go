package soft

import (
	"encoding/binary"
	"fmt"
	"math"
	"runtime"
	"time"
	"unsafe"

	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
)

// What the software devices say about themselves.
const (
	hipVersion = 6_02_00000 // HIP 6.2.0, whose answers are imitated
	archName   = "gfx-soft"
)

// device is one device of a Software. Its fields are guarded by Software.mu; the links have their own locks.
type device struct {
	index    int
	capacity uint64
	used     uint64
	base     uintptr // of its address space
	next     uintptr // the next allocation's address; addresses are never used twice
	regions  regionList
	streams  map[*stream]struct{} // also those being destroyed
	peers    map[int32]bool       // that this device was given access to
	up, down link                 // host to device, device to host
	touched  time.Duration        // when something was last allocated or copied here, for Flip; 0: never
}

func newDevice(i int, o Options) *device {
	base := uintptr(deviceBase + i*deviceSpace)
	return &device{
		index: i, capacity: o.Memory, base: base, next: base + pageSize,
		streams: make(map[*stream]struct{}), peers: make(map[int32]bool),
		up: link{rate: o.LinkBytesPerSecond}, down: link{rate: o.LinkBytesPerSecond},
	}
}

// address reserves n bytes of the device's address space.
func (d *device) address(n uintptr) (uintptr, bool) {
	addr := d.next
	taken := (n+pageSize-1)/pageSize*pageSize + pageSize
	if taken > d.base+deviceSpace-addr {
		return 0, false
	}
	d.next += taken
	return addr, true
}

func (d *device) name() string { return fmt.Sprintf("Software device %d", d.index) }

// uuid is 16 characters, as HIP's are on AMD.
func (d *device) uuid() string { return fmt.Sprintf("50f7000000000%03x", d.index) }

// pciBus is made up but different for each device.
func (d *device) pciBus() int { return d.index + 1 }

// device returns the current device of the calling thread. sw.mu is held.
func (sw *Software) device() *device { return sw.devices[sw.current[threadID()]] }

// byIndex returns device i, or nil.
func (sw *Software) byIndex(i int32) *device {
	if i < 0 || int(i) >= len(sw.devices) {
		return nil
	}
	return sw.devices[i]
}

func (sw *Software) runtimeGetVersion(version *int32) hip.Status {
	return put(sw.call("hipRuntimeGetVersion"), version, hipVersion)
}

func (sw *Software) driverGetVersion(version *int32) hip.Status {
	return put(sw.call("hipDriverGetVersion"), version, hipVersion)
}

func (sw *Software) getDeviceCount(count *int32) hip.Status {
	return put(sw.call("hipGetDeviceCount"), count, int32(len(sw.devices)))
}

// put finishes a call: it stores v and answers Success, unless the call has failed with st.
func put[T any](st hip.Status, out *T, v T) hip.Status {
	if st != hip.Success {
		return st
	}
	if out == nil {
		return hip.ErrInvalidValue
	}
	*out = v
	return hip.Success
}

func (sw *Software) setDevice(device int32) hip.Status {
	if st := sw.call("hipSetDevice"); st != hip.Success {
		return st
	}
	if sw.byIndex(device) == nil {
		return hip.ErrInvalidDevice
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	if device == 0 {
		delete(sw.current, threadID()) // so that the map does not grow with every thread there ever was
	} else {
		sw.current[threadID()] = device
	}
	return hip.Success
}

func (sw *Software) getDevice(device *int32) hip.Status {
	st := sw.call("hipGetDevice")
	sw.mu.Lock()
	defer sw.mu.Unlock()
	return put(st, device, int32(sw.device().index))
}

func (sw *Software) deviceGetName(name *byte, n, device int32) hip.Status {
	if st := sw.call("hipDeviceGetName"); st != hip.Success {
		return st
	}
	d := sw.byIndex(device)
	if d == nil {
		return hip.ErrInvalidDevice
	}
	if name == nil || n <= 0 {
		return hip.ErrInvalidValue
	}
	putString(unsafe.Slice(name, n), d.name())
	return hip.Success
}

// deviceGetPCIBusID needs room for 13 bytes. With less it writes what fits and answers ErrInvalidValue, as HIP does.
func (sw *Software) deviceGetPCIBusID(id *byte, n, device int32) hip.Status {
	if st := sw.call("hipDeviceGetPCIBusId"); st != hip.Success {
		return st
	}
	d := sw.byIndex(device)
	if d == nil {
		return hip.ErrInvalidDevice
	}
	if id == nil || n <= 0 {
		return hip.ErrInvalidValue
	}
	s := fmt.Sprintf("%04x:%02x:%02x.%x", 0, d.pciBus(), 0, 0)
	putString(unsafe.Slice(id, n), s)
	if int(n) <= len(s) {
		return hip.ErrInvalidValue
	}
	return hip.Success
}

// putString writes a C string, truncated to what fits.
func putString(dst []byte, s string) { dst[copy(dst[:len(dst)-1], s)] = 0 }

func (sw *Software) deviceGetAttribute(value *int32, attr hip.DeviceAttribute, device int32) hip.Status {
	st := sw.call("hipDeviceGetAttribute")
	if st != hip.Success {
		return st
	}
	d := sw.byIndex(device)
	if d == nil {
		return hip.ErrInvalidDevice
	}
	var v int32
	switch attr {
	case hip.AttrAsyncEngineCount:
		v = 8 // AMD's constant; it says nothing about engines
	case hip.AttrCanMapHostMemory, hip.AttrMemoryPoolsSupported, hip.AttrVirtualMemory:
		v = 1
	case hip.AttrIntegrated:
		v = sw.integrated()
	case hip.AttrMultiprocessorCount:
		v = int32(runtime.NumCPU())
	case hip.AttrPCIBusID:
		v = int32(d.pciBus())
	case hip.AttrPCIDeviceID, hip.AttrPCIDomainID:
		v = 0
	case hip.AttrWarpSize:
		v = 64
	case hip.AttrTotalGlobalMem: // clamped
		v = int32(min(d.capacity, math.MaxInt32))
	default:
		return hip.ErrInvalidValue
	}
	return put(hip.Success, value, v)
}

func (sw *Software) integrated() int32 {
	if sw.opts.Integrated {
		return 1
	}
	return 0
}

func (sw *Software) deviceTotalMem(bytes *uintptr, device int32) hip.Status {
	if st := sw.call("hipDeviceTotalMem"); st != hip.Success {
		return st
	}
	d := sw.byIndex(device)
	if d == nil {
		return hip.ErrInvalidDevice
	}
	return put(hip.Success, bytes, uintptr(d.capacity))
}

func (sw *Software) deviceGetUUID(id *[16]byte, device int32) hip.Status {
	if st := sw.call("hipDeviceGetUuid"); st != hip.Success {
		return st
	}
	d := sw.byIndex(device)
	if d == nil {
		return hip.ErrInvalidDevice
	}
	return put(hip.Success, id, [16]byte([]byte(d.uuid())))
}

func (sw *Software) getDeviceProperties(prop *byte, device int32) hip.Status {
	return sw.properties("hipGetDeviceProperties", prop, device, hip.PropR0000)
}

func (sw *Software) getDevicePropertiesR0600(prop *byte, device int32) hip.Status {
	return sw.properties("hipGetDevicePropertiesR0600", prop, device, hip.PropR0600)
}

func (sw *Software) properties(call string, prop *byte, device int32, at hip.PropLayout) hip.Status {
	if st := sw.call(call); st != hip.Success {
		return st
	}
	d := sw.byIndex(device)
	if d == nil {
		return hip.ErrInvalidDevice
	}
	if prop == nil {
		return hip.ErrInvalidValue
	}
	b := unsafe.Slice(prop, at.Size)
	clear(b)
	putString(b[:256], d.name())
	putString(b[at.ArchName:][:hip.PropNameSize], archName)
	if at.UUID != 0 {
		copy(b[at.UUID:], d.uuid())
	}
	binary.LittleEndian.PutUint64(b[at.TotalGlobalMem:], d.capacity)
	for offset, v := range map[int]int32{
		at.WarpSize: 64, at.MultiProcessors: int32(runtime.NumCPU()), at.Integrated: sw.integrated(), at.CanMapHost: 1,
		at.PCIDomain: 0, at.PCIBus: int32(d.pciBus()),
	} {
		binary.LittleEndian.PutUint32(b[offset:], uint32(v))
	}
	return hip.Success
}

func (sw *Software) deviceCanAccessPeer(can *int32, device, peer int32) hip.Status {
	if st := sw.call("hipDeviceCanAccessPeer"); st != hip.Success {
		return st
	}
	if sw.byIndex(device) == nil || sw.byIndex(peer) == nil {
		return hip.ErrInvalidDevice
	}
	if device == peer {
		return put(hip.Success, can, 0)
	}
	return put(hip.Success, can, 1)
}

func (sw *Software) deviceEnablePeerAccess(peer int32, flags uint32) hip.Status {
	if st := sw.call("hipDeviceEnablePeerAccess"); st != hip.Success {
		return st
	}
	if flags != 0 {
		return hip.ErrInvalidValue
	}
	return sw.setPeer(peer, true, hip.ErrPeerAccessAlreadyEnabled)
}

func (sw *Software) deviceDisablePeerAccess(peer int32) hip.Status {
	if st := sw.call("hipDeviceDisablePeerAccess"); st != hip.Success {
		return st
	}
	return sw.setPeer(peer, false, hip.ErrPeerAccessNotEnabled)
}

// setPeer changes whether the current device may access peer. If nothing changes, the answer is same.
func (sw *Software) setPeer(peer int32, on bool, same hip.Status) hip.Status {
	sw.mu.Lock()
	defer sw.mu.Unlock()
	d := sw.device()
	if sw.byIndex(peer) == nil || int(peer) == d.index {
		return hip.ErrInvalidDevice
	}
	if d.peers[peer] == on {
		return same
	}
	d.peers[peer] = on
	return hip.Success
}

func (sw *Software) getErrorName(code hip.Status) string {
	_ = sw.call("hipGetErrorName") // counted; no fault can be injected
	if name, ok := hip.StatusNames[code]; ok {
		return name
	}
	return hip.StatusNames[hip.ErrUnknown]
}

func (sw *Software) getErrorString(code hip.Status) string {
	_ = sw.call("hipGetErrorString")
	if name, ok := hip.StatusNames[code]; ok {
		return name
	}
	return hip.StatusNames[hip.ErrUnknown]
}
