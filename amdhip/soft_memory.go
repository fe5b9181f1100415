package amdhip

import (
	"errors"
	"math/rand/v2"
	"os"
	"slices"
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
	file   *os.File // through which other processes map it while it is allocated; else nil
	nonce  uint64   // in the file's name
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

// release undoes one reference to b, which may be nil. Should the system refuse to unmap it, Close will tell.
func (sw *Software) release(b *block) {
	if b == nil {
		return
	}
	sw.mu.Lock()
	b.refs--
	last := b.refs == 0
	if last {
		sw.unshare(b)
	}
	sw.mu.Unlock()
	if !last || !b.mapped {
		return
	}
	if err := unmapAnonymous(b.mem); err != nil {
		sw.mu.Lock()
		sw.unmapping = errors.Join(sw.unmapping, err)
		sw.mu.Unlock()
	}
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
	if r.kind == deviceRegion {
		sw.unshare(r.block)
	}
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
	b, err := sw.newBlock(int(n))
	if err != nil {
		return nil, ErrOutOfMemory
	}
	r := &region{addr: addr, kind: deviceRegion, dev: dev, block: b}
	sw.insert(r)
	return r, Success
}

// newBlock maps the n bytes of a device allocation, of ordinary pages: virtual machines that give free memory back to their host
// are several times slower with huge ones.
func (sw *Software) newBlock(n int) (*block, error) {
	b := &block{mapped: true}
	var err error
	if sw.opts.Shared {
		b.nonce = rand.Uint64()
		b.mem, b.file, err = mapShared(n, b.nonce)
	} else {
		b.mem, err = mapAnonymous(n)
	}
	return b, err
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
	sw.release(r.block)
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
	_ = sw.drain(r.dev) // a failure of other work does not keep the memory
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
	sw.release(r.block)
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
