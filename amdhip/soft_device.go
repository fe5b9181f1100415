package amdhip

import (
	"encoding/binary"
	"fmt"
	"math"
	"runtime"
	"unsafe"
)

// What the software devices say about themselves.
const (
	softVersion = 6_02_00000 // HIP 6.2.0, whose answers are imitated
	softArch    = "gfx-soft"
)

// softDevice is one device of a Software. Its fields are guarded by Software.mu; the links have their own locks.
type softDevice struct {
	index    int
	capacity uint64
	used     uint64
	base     uintptr // of its address space
	next     uintptr // the next allocation's address; addresses are never used twice
	regions  regionList
	streams  map[*softStream]struct{} // also those being destroyed
	peers    map[int32]bool           // that this device was given access to
	up, down link                     // host to device, device to host
}

func newSoftDevice(i int, o SoftwareOptions) *softDevice {
	base := uintptr(deviceBase + i*deviceSpace)
	return &softDevice{
		index: i, capacity: o.Memory, base: base, next: base + softPage,
		streams: make(map[*softStream]struct{}), peers: make(map[int32]bool),
		up: link{rate: o.LinkBytesPerSecond}, down: link{rate: o.LinkBytesPerSecond},
	}
}

// address reserves n bytes of the device's address space.
func (d *softDevice) address(n uintptr) (uintptr, bool) {
	addr := d.next
	taken := (n+softPage-1)/softPage*softPage + softPage
	if taken > d.base+deviceSpace-addr {
		return 0, false
	}
	d.next += taken
	return addr, true
}

func (d *softDevice) name() string { return fmt.Sprintf("Software device %d", d.index) }

// uuid is 16 characters, as HIP's are on AMD.
func (d *softDevice) uuid() string { return fmt.Sprintf("50f7000000000%03x", d.index) }

// pciBus is made up but different for each device.
func (d *softDevice) pciBus() int { return d.index + 1 }

// device returns the current device of the calling thread. sw.mu is held.
func (sw *Software) device() *softDevice { return sw.devices[sw.current[threadID()]] }

// byIndex returns device i, or nil.
func (sw *Software) byIndex(i int32) *softDevice {
	if i < 0 || int(i) >= len(sw.devices) {
		return nil
	}
	return sw.devices[i]
}

func (sw *Software) runtimeGetVersion(version *int32) Status {
	return put(sw.call("hipRuntimeGetVersion"), version, softVersion)
}

func (sw *Software) driverGetVersion(version *int32) Status {
	return put(sw.call("hipDriverGetVersion"), version, softVersion)
}

func (sw *Software) getDeviceCount(count *int32) Status {
	return put(sw.call("hipGetDeviceCount"), count, int32(len(sw.devices)))
}

// put finishes a call that answers st and, if that is Success, v.
func put[T any](st Status, out *T, v T) Status {
	if st != Success {
		return st
	}
	if out == nil {
		return ErrInvalidValue
	}
	*out = v
	return Success
}

func (sw *Software) setDevice(device int32) Status {
	if st := sw.call("hipSetDevice"); st != Success {
		return st
	}
	if sw.byIndex(device) == nil {
		return ErrInvalidDevice
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	if device == 0 {
		delete(sw.current, threadID()) // so that the map does not grow with every thread there ever was
	} else {
		sw.current[threadID()] = device
	}
	return Success
}

func (sw *Software) getDevice(device *int32) Status {
	st := sw.call("hipGetDevice")
	sw.mu.Lock()
	defer sw.mu.Unlock()
	return put(st, device, int32(sw.device().index))
}

func (sw *Software) deviceGetName(name *byte, n, device int32) Status {
	if st := sw.call("hipDeviceGetName"); st != Success {
		return st
	}
	d := sw.byIndex(device)
	if d == nil {
		return ErrInvalidDevice
	}
	if name == nil || n <= 0 {
		return ErrInvalidValue
	}
	putString(unsafe.Slice(name, n), d.name())
	return Success
}

// deviceGetPCIBusID wants room for 13 bytes; with less it writes what fits and says ErrInvalidValue, as HIP does.
func (sw *Software) deviceGetPCIBusID(id *byte, n, device int32) Status {
	if st := sw.call("hipDeviceGetPCIBusId"); st != Success {
		return st
	}
	d := sw.byIndex(device)
	if d == nil {
		return ErrInvalidDevice
	}
	if id == nil || n <= 0 {
		return ErrInvalidValue
	}
	s := fmt.Sprintf("%04x:%02x:%02x.%x", 0, d.pciBus(), 0, 0)
	putString(unsafe.Slice(id, n), s)
	if int(n) <= len(s) {
		return ErrInvalidValue
	}
	return Success
}

// putString writes a C string, truncated to what fits.
func putString(dst []byte, s string) { dst[copy(dst[:len(dst)-1], s)] = 0 }

func (sw *Software) deviceGetAttribute(value *int32, attr deviceAttribute, device int32) Status {
	st := sw.call("hipDeviceGetAttribute")
	if st != Success {
		return st
	}
	d := sw.byIndex(device)
	if d == nil {
		return ErrInvalidDevice
	}
	var v int32
	switch attr {
	case attrAsyncEngineCount:
		v = 8 // AMD's constant; it says nothing about engines
	case attrCanMapHostMemory, attrMemoryPoolsSupported:
		v = 1
	case attrIntegrated:
		v = sw.integrated()
	case attrMultiprocessorCount:
		v = int32(runtime.NumCPU())
	case attrPCIBusID:
		v = int32(d.pciBus())
	case attrPCIDeviceID, attrPCIDomainID:
		v = 0
	case attrWarpSize:
		v = 64
	case 84: // TotalGlobalMem, clamped
		v = int32(min(d.capacity, math.MaxInt32))
	default:
		return ErrInvalidValue
	}
	return put(Success, value, v)
}

func (sw *Software) integrated() int32 {
	if sw.opts.Integrated {
		return 1
	}
	return 0
}

func (sw *Software) deviceTotalMem(bytes *uintptr, device int32) Status {
	if st := sw.call("hipDeviceTotalMem"); st != Success {
		return st
	}
	d := sw.byIndex(device)
	if d == nil {
		return ErrInvalidDevice
	}
	return put(Success, bytes, uintptr(d.capacity))
}

func (sw *Software) deviceGetUUID(id *[16]byte, device int32) Status {
	if st := sw.call("hipDeviceGetUuid"); st != Success {
		return st
	}
	d := sw.byIndex(device)
	if d == nil {
		return ErrInvalidDevice
	}
	return put(Success, id, [16]byte([]byte(d.uuid())))
}

// propLayout holds offsets in one of the two layouts of hipDeviceProp_t; the sizes and offsets are those of the headers
// of HIP 5.0 to 5.7 (R0000) and from 6.0 on (R0600).
type propLayout struct {
	size                                                int
	totalGlobalMem, warpSize, multiProcessors           int
	integrated, canMapHost, pciDomain, pciBus, archName int
	uuid                                                int // 0: not in this layout
}

var (
	propR0000 = propLayout{
		size: 792, totalGlobalMem: 256, warpSize: 276, multiProcessors: 336, integrated: 652,
		canMapHost: 388, pciDomain: 364, pciBus: 368, archName: archOffsetR0000,
	}
	propR0600 = propLayout{
		size: 1472, totalGlobalMem: 288, warpSize: 308, multiProcessors: 388, integrated: 396,
		canMapHost: 400, pciDomain: 592, pciBus: 584, archName: archOffsetR0600, uuid: 256,
	}
)

func (sw *Software) getDeviceProperties(prop *byte, device int32) Status {
	return sw.properties("hipGetDeviceProperties", prop, device, propR0000)
}

func (sw *Software) getDevicePropertiesR0600(prop *byte, device int32) Status {
	return sw.properties("hipGetDevicePropertiesR0600", prop, device, propR0600)
}

func (sw *Software) properties(call string, prop *byte, device int32, at propLayout) Status {
	if st := sw.call(call); st != Success {
		return st
	}
	d := sw.byIndex(device)
	if d == nil {
		return ErrInvalidDevice
	}
	if prop == nil {
		return ErrInvalidValue
	}
	b := unsafe.Slice(prop, at.size)
	clear(b)
	putString(b[:256], d.name())
	putString(b[at.archName:][:archSize], softArch)
	if at.uuid != 0 {
		copy(b[at.uuid:], d.uuid())
	}
	binary.LittleEndian.PutUint64(b[at.totalGlobalMem:], d.capacity)
	for offset, v := range map[int]int32{
		at.warpSize: 64, at.multiProcessors: int32(runtime.NumCPU()), at.integrated: sw.integrated(), at.canMapHost: 1,
		at.pciDomain: 0, at.pciBus: int32(d.pciBus()),
	} {
		binary.LittleEndian.PutUint32(b[offset:], uint32(v))
	}
	return Success
}

func (sw *Software) deviceCanAccessPeer(can *int32, device, peer int32) Status {
	if st := sw.call("hipDeviceCanAccessPeer"); st != Success {
		return st
	}
	if sw.byIndex(device) == nil || sw.byIndex(peer) == nil {
		return ErrInvalidDevice
	}
	if device == peer {
		return put(Success, can, 0)
	}
	return put(Success, can, 1)
}

func (sw *Software) deviceEnablePeerAccess(peer int32, flags uint32) Status {
	if st := sw.call("hipDeviceEnablePeerAccess"); st != Success {
		return st
	}
	if flags != 0 {
		return ErrInvalidValue
	}
	return sw.setPeer(peer, true, ErrPeerAccessAlreadyEnabled)
}

func (sw *Software) deviceDisablePeerAccess(peer int32) Status {
	if st := sw.call("hipDeviceDisablePeerAccess"); st != Success {
		return st
	}
	return sw.setPeer(peer, false, ErrPeerAccessNotEnabled)
}

// setPeer changes whether the current device may access peer; same is the answer if that is so already.
func (sw *Software) setPeer(peer int32, on bool, same Status) Status {
	sw.mu.Lock()
	defer sw.mu.Unlock()
	d := sw.device()
	if sw.byIndex(peer) == nil || int(peer) == d.index {
		return ErrInvalidDevice
	}
	if d.peers[peer] == on {
		return same
	}
	d.peers[peer] = on
	return Success
}

func (sw *Software) getErrorName(code Status) string {
	_ = sw.call("hipGetErrorName") // counted; no fault can be injected
	if name, ok := statusNames[code]; ok {
		return name
	}
	return statusNames[ErrUnknown]
}

func (sw *Software) getErrorString(code Status) string {
	_ = sw.call("hipGetErrorString")
	if name, ok := statusNames[code]; ok {
		return name
	}
	return statusNames[ErrUnknown]
}
