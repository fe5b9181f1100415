package amdhip

import (
	"encoding/binary"
	"os"
	"slices"
	"sync/atomic"
	"unsafe"
)

// Device i has the addresses from deviceBase + i·deviceSpace on. No host of 64 bits gives such addresses to a process
// unasked, so a device pointer that is taken for a host pointer faults, and the other way round it is found out.
const (
	deviceBase  = 1 << 56
	deviceSpace = 1 << 48
	softPage    = 4096 // allocations begin on such a boundary and have at least one page without memory behind them
)

// poisonByte fills fresh memory with SoftwareOptions.Poison; as a float of any width it is a tiny negative number.
const poisonByte = 0xA5

// block is memory of the host that regions stand for. It is unmapped when the last region and the last operation that
// works on it let go.
type block struct {
	mem    []byte
	mapped bool // by this package, so unmapped in the end
	refs   int
}

type regionKind uint8

const (
	deviceRegion     regionKind = iota // hipMalloc, hipMallocAsync
	ipcRegion                          // hipIpcOpenMemHandle
	hostRegion                         // hipHostMalloc
	registeredRegion                   // hipHostRegister
)

// region is a range of addresses that HIP knows.
type region struct {
	addr  uintptr
	kind  regionKind
	dev   *softDevice // whose memory it is, or which was current when host memory was pinned
	block *block
	going bool // hipFreeAsync was called, but not yet executed
	given bool // hipHostGetDevicePointer told the address, so it may serve as a device pointer
}

func (r *region) size() uintptr { return uintptr(len(r.block.mem)) }

// onDevice reports whether r is device memory; r may be nil, memory that HIP does not know.
func (r *region) onDevice() bool { return r != nil && (r.kind == deviceRegion || r.kind == ipcRegion) }

// visible reports whether addresses of r may be used as device pointers.
func (r *region) visible() bool { return r.onDevice() || r != nil && r.given }

// regionList is sorted by address; regions do not overlap.
type regionList []*region

// at returns the position of the first region that ends after addr.
func (l regionList) at(addr uintptr) int {
	i, _ := slices.BinarySearchFunc(l, addr, func(r *region, addr uintptr) int {
		if r.addr+r.size() <= addr {
			return -1
		}
		return 1
	})
	return i
}

// find returns the region that contains addr, or nil.
func (l regionList) find(addr uintptr) *region {
	if i := l.at(addr); i < len(l) && l[i].addr <= addr {
		return l[i]
	}
	return nil
}

func (l regionList) overlaps(addr, n uintptr) bool {
	i := l.at(addr)
	return i < len(l) && l[i].addr < addr+n
}

// held is memory that stays mapped until its block is released. The block of memory that HIP does not know is nil.
type held struct {
	mem   []byte
	block *block
}

// hold resolves n bytes at addr of a known region for an operation that executes now.
func (sw *Software) hold(addr, n uintptr) (held, Status) {
	sw.mu.Lock()
	defer sw.mu.Unlock()
	r, _ := sw.lookup(addr, n)
	if r == nil {
		return held{}, ErrInvalidValue
	}
	r.block.refs++
	return held{r.block.mem[addr-r.addr:][:n:n], r.block}, Success
}

// release undoes one reference to b, which may be nil.
func (sw *Software) release(b *block) error {
	if b == nil {
		return nil
	}
	sw.mu.Lock()
	b.refs--
	last := b.refs == 0
	sw.mu.Unlock()
	if last && b.mapped {
		return unmapAnonymous(b.mem)
	}
	return nil
}

// lookup returns the region of n bytes at addr; nil and Success for host memory that is not pinned, of which nothing
// is known. A range that begins in a region and leaves it is an error, as in HIP. sw.mu is held.
func (sw *Software) lookup(addr, n uintptr) (*region, Status) {
	if addr < softPage || addr+n < addr { // nothing is ever mapped on the first page
		return nil, ErrInvalidValue
	}
	list := sw.regions(addr)
	if list == nil {
		return nil, ErrInvalidValue
	}
	r := list.find(addr)
	switch {
	case r == nil && addr+n <= deviceBase:
		return nil, Success
	case r == nil || n > r.addr+r.size()-addr:
		return nil, ErrInvalidValue
	}
	return r, Success
}

// regions returns the list that addr belongs to; nil if there is no such device. sw.mu is held.
func (sw *Software) regions(addr uintptr) *regionList {
	if addr < deviceBase {
		return &sw.host
	}
	if i := (addr - deviceBase) / deviceSpace; i < uintptr(len(sw.devices)) {
		return &sw.devices[i].regions
	}
	return nil
}

// insert makes r known. sw.mu is held, and the Software is not closed.
func (sw *Software) insert(r *region) {
	r.block.refs++
	list := sw.regions(r.addr)
	*list = slices.Insert(*list, list.at(r.addr), r)
	sw.count(r, 1)
}

// remove makes r unknown; the caller releases its block after unlocking sw.mu.
func (sw *Software) remove(r *region) {
	list := sw.regions(r.addr)
	i := list.at(r.addr)
	*list = slices.Delete(*list, i, i+1)
	sw.count(r, -1)
}

func (sw *Software) count(r *region, sign int) {
	n := uint64(r.size()) * uint64(sign) // modulo 2^64, so adding it subtracts for sign -1
	switch r.kind {
	case deviceRegion:
		sw.stats.Allocations += sign
		sw.stats.DeviceBytes += n
		r.dev.used += n
		sw.stats.PeakDeviceBytes = max(sw.stats.PeakDeviceBytes, sw.stats.DeviceBytes)
		return
	case ipcRegion:
		sw.stats.IPCMappings += sign
		return
	case hostRegion:
		sw.stats.HostAllocations += sign
	case registeredRegion:
		sw.stats.Registrations += sign
	}
	sw.stats.PinnedBytes += n
	sw.stats.PeakPinnedBytes = max(sw.stats.PeakPinnedBytes, sw.stats.PinnedBytes)
}

// allocate makes a device allocation. sw.mu is held.
func (sw *Software) allocate(dev *softDevice, n uintptr) (*region, Status) {
	if sw.closed {
		return nil, ErrDeinitialized
	}
	if uint64(n) > dev.capacity-dev.used {
		return nil, ErrOutOfMemory
	}
	addr, ok := dev.address(n)
	if !ok {
		return nil, ErrOutOfMemory
	}
	mem, err := mapAnonymous(int(n))
	if err != nil {
		return nil, ErrOutOfMemory
	}
	adviseHuge(mem)
	r := &region{addr: addr, kind: deviceRegion, dev: dev, block: &block{mem: mem, mapped: true}}
	sw.insert(r)
	return r, Success
}

// mallocOn is hipMalloc and hipMallocAsync once the device is known.
func (sw *Software) mallocOn(dev *softDevice, p *uintptr, n uintptr) Status {
	if n == 0 {
		*p = 0
		return Success
	}
	sw.mu.Lock()
	r, st := sw.allocate(dev, n)
	if st != Success {
		sw.mu.Unlock()
		return st
	}
	r.block.refs++
	sw.mu.Unlock()
	if sw.opts.Poison {
		fill(r.block.mem, poisonByte)
	}
	_ = sw.release(r.block) // only Close can have taken the other reference
	*p = r.addr
	return Success
}

func (sw *Software) malloc(p *uintptr, n uintptr) Status {
	if st := sw.call("hipMalloc"); st != Success {
		return st
	}
	if p == nil {
		return ErrInvalidValue
	}
	sw.mu.Lock()
	dev := sw.device()
	sw.mu.Unlock()
	return sw.mallocOn(dev, p, n)
}

func (sw *Software) mallocAsync(p *uintptr, n, stream uintptr) Status {
	if st := sw.call("hipMallocAsync"); st != Success {
		return st
	}
	if p == nil {
		return ErrInvalidValue
	}
	sw.mu.Lock()
	s, st := sw.stream(stream)
	sw.mu.Unlock()
	if st != Success {
		return st
	}
	return sw.mallocOn(s.dev, p, n)
}

func (sw *Software) memGetInfo(free, total *uintptr) Status {
	if st := sw.call("hipMemGetInfo"); st != Success {
		return st
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	d := sw.device()
	if free != nil {
		*free = uintptr(d.capacity - d.used)
	}
	if total != nil {
		*total = uintptr(d.capacity)
	}
	return Success
}

// begins returns the region of that kind that begins at p, or nil. sw.mu is held.
func (sw *Software) begins(p uintptr, kind regionKind) *region {
	list := sw.regions(p)
	if list == nil {
		return nil
	}
	if r := list.find(p); r != nil && r.addr == p && r.kind == kind && !r.going {
		return r
	}
	return nil
}

// drop waits for the streams of the region's device and forgets the region; absent is the answer if there is none.
func (sw *Software) drop(p uintptr, kind regionKind, absent Status) Status {
	sw.mu.Lock()
	r := sw.begins(p, kind)
	sw.mu.Unlock()
	if r == nil {
		return absent
	}
	sw.drain(r.dev) // a failure of other work does not keep the memory
	sw.mu.Lock()
	if sw.closed {
		sw.mu.Unlock()
		return ErrDeinitialized
	}
	if sw.begins(p, kind) != r { // another call was quicker
		sw.mu.Unlock()
		return absent
	}
	sw.remove(r)
	sw.mu.Unlock()
	if sw.release(r.block) != nil {
		return ErrUnknown
	}
	return Success
}

func (sw *Software) free(p uintptr) Status {
	if st := sw.call("hipFree"); st != Success || p == 0 {
		return st
	}
	return sw.drop(p, deviceRegion, ErrInvalidValue)
}

func (sw *Software) freeAsync(p, stream uintptr) Status {
	late, st := sw.enter("hipFreeAsync")
	if st != Success {
		return st
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	s, st := sw.stream(stream)
	if st != Success {
		return st
	}
	r := sw.begins(p, deviceRegion)
	if r == nil {
		return ErrInvalidValue
	}
	r.going = true
	return s.enqueue(softOp{kind: opFree, late: late, region: r})
}

// Flags that HIP 6 knows beyond those of api.go.
const (
	hostMallocCoherent    = 0x40000000
	hostMallocNonCoherent = 0x80000000
	hostMallocKnown       = 7 | 0x20000000 | hostMallocCoherent | hostMallocNonCoherent
	hostRegisterKnown     = 15
)

func (sw *Software) hostMalloc(p *uintptr, n uintptr, flags uint32) Status {
	if st := sw.call("hipHostMalloc"); st != Success {
		return st
	}
	const either = hostMallocCoherent | hostMallocNonCoherent
	if p == nil || flags&^hostMallocKnown != 0 || flags&either == either {
		return ErrInvalidValue
	}
	if n == 0 {
		*p = 0
		return Success
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	if sw.closed {
		return ErrDeinitialized
	}
	if n >= deviceSpace {
		return ErrOutOfMemory
	}
	mem, err := mapAnonymous(int(n))
	if err != nil {
		return ErrOutOfMemory
	}
	*p = uintptr(unsafe.Pointer(unsafe.SliceData(mem)))
	sw.insert(&region{addr: *p, kind: hostRegion, dev: sw.device(), block: &block{mem: mem, mapped: true}})
	return Success
}

func (sw *Software) hostFree(p uintptr) Status {
	if st := sw.call("hipHostFree"); st != Success || p == 0 {
		return st
	}
	return sw.drop(p, hostRegion, ErrInvalidValue)
}

func (sw *Software) hostRegister(p, n uintptr, flags uint32) Status {
	if st := sw.call("hipHostRegister"); st != Success {
		return st
	}
	if p == 0 || n == 0 || p+n < p || p+n > deviceBase || flags > hostRegisterKnown {
		return ErrInvalidValue
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	if sw.closed {
		return ErrDeinitialized
	}
	if sw.host.overlaps(p, n) {
		return ErrHostMemoryAlreadyRegistered
	}
	sw.insert(&region{addr: p, kind: registeredRegion, dev: sw.device(), block: &block{mem: bytesAt(p, n)}})
	return Success
}

func (sw *Software) hostUnregister(p uintptr) Status {
	if st := sw.call("hipHostUnregister"); st != Success {
		return st
	}
	return sw.drop(p, registeredRegion, ErrHostMemoryNotRegistered)
}

// hostGetDevicePointer answers with the host address itself, as HIP does on systems where both share one address space.
func (sw *Software) hostGetDevicePointer(d *uintptr, h uintptr, flags uint32) Status {
	if st := sw.call("hipHostGetDevicePointer"); st != Success {
		return st
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	r := sw.host.find(h)
	if d == nil || flags != 0 || r == nil {
		return ErrInvalidValue
	}
	r.given = true
	*d = h
	return Success
}

// ipcMagic begins an IPC handle of the software device; the process, the Software in it and the address follow.
const ipcMagic = "softgpu1"

// ipcSerial numbers the Softwares of this process, because their addresses are the same.
var ipcSerial atomic.Uint64

func (sw *Software) ipcHandle(p uintptr) IPCHandle {
	var h IPCHandle
	copy(h.b[:], ipcMagic)
	for i, v := range []uint64{uint64(os.Getpid()), sw.serial, uint64(p)} {
		binary.LittleEndian.PutUint64(h.b[8+8*i:], v)
	}
	return h
}

func (sw *Software) ipcGetMemHandle(handle *IPCHandle, p uintptr) Status {
	if st := sw.call("hipIpcGetMemHandle"); st != Success {
		return st
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	if handle == nil || sw.begins(p, deviceRegion) == nil {
		return ErrInvalidValue
	}
	*handle = sw.ipcHandle(p)
	return Success
}

// ipcOpenMemHandle maps an allocation of the same Software a second time. Handles of another process, or of another
// Software, are ErrNotSupported.
func (sw *Software) ipcOpenMemHandle(p *uintptr, handle IPCHandle, flags uint32) Status {
	if st := sw.call("hipIpcOpenMemHandle"); st != Success {
		return st
	}
	if p == nil || flags != 1 || string(handle.b[:len(ipcMagic)]) != ipcMagic { // 1: LazyEnablePeerAccess, from HIP 6
		return ErrInvalidValue
	}
	addr := uintptr(binary.LittleEndian.Uint64(handle.b[24:]))
	if handle != sw.ipcHandle(addr) {
		return ErrNotSupported
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	r := sw.begins(addr, deviceRegion)
	if r == nil || sw.closed {
		return ErrInvalidValue
	}
	mapping, ok := r.dev.address(r.size())
	if !ok {
		return ErrOutOfMemory
	}
	sw.insert(&region{addr: mapping, kind: ipcRegion, dev: r.dev, block: r.block})
	*p = mapping
	return Success
}

func (sw *Software) ipcCloseMemHandle(p uintptr) Status {
	if st := sw.call("hipIpcCloseMemHandle"); st != Success {
		return st
	}
	return sw.drop(p, ipcRegion, ErrInvalidValue)
}

// bytesAt makes a slice of memory that Go did not allocate. The address comes from a C interface as a number; read through
// a pointer to it, the conversion is one that vet and checkptr accept. It is the only place that makes a host address a
// pointer, and Go must never move or free what is there: HIP's contract for the memory of asynchronous copies.
func bytesAt(addr, n uintptr) []byte {
	return unsafe.Slice((*byte)(*(*unsafe.Pointer)(unsafe.Pointer(&addr))), n)
}

// fill sets all bytes of b to v, by doubling copies: the copy is the fastest store that Go has.
func fill(b []byte, v byte) {
	if len(b) == 0 {
		return
	}
	b[0] = v
	for done := 1; done < len(b); {
		done += copy(b[done:], b[:min(done, 1<<16)])
	}
}
