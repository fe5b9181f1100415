package soft

import (
	"errors"
	"math/rand/v2"
	"os"
	"slices"

	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hostmem"
)

// Device i has the addresses from deviceBase + i·deviceSpace on. No 64-bit host gives such addresses to a process
// unless it asks for them. So a device pointer that is used as a host pointer faults, and a host pointer that is used
// as a device pointer is noticed.
const (
	deviceBase  = 1 << 56
	deviceSpace = 1 << 48
	pageSize    = 4096 // allocations begin on such a boundary and have at least one page without memory behind them
)

// poisonByte fills fresh memory with Options.Poison. As a floating-point number of any width it is a tiny negative
// number.
const poisonByte = 0xA5

// block is host memory that stands for device memory or pinned memory. It is unmapped when no region and no operation
// uses it any more.
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
	mappedRegion                       // hipMemMap
)

// region is a range of addresses that HIP knows.
type region struct {
	addr  uintptr
	kind  regionKind
	dev   *device // whose memory it is, or which was current when host memory was pinned
	block *block
	going bool // hipFreeAsync was called, but not yet executed
	given bool // hipHostGetDevicePointer told the address, so it may serve as a device pointer

	physical *physical         // of a mappedRegion: what is mapped
	access   []hip.AccessFlags // of a mappedRegion: what each device may do
}

func (r *region) size() uintptr { return uintptr(len(r.block.mem)) }

// onDevice reports whether r is device memory. A nil r is memory that HIP does not know.
func (r *region) onDevice() bool {
	return r != nil && (r.kind == deviceRegion || r.kind == ipcRegion || r.kind == mappedRegion)
}

// reachable reports whether operations of the device may read, or with write set also write, r. Host memory always is.
func (r *region) reachable(dev *device, write bool) bool {
	switch {
	case !r.onDevice():
		return true
	case r.kind != mappedRegion:
		return r.dev == dev
	case write:
		return r.access[dev.index] == hip.AccessReadWrite
	}
	return r.access[dev.index] != hip.AccessNone
}

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

// hold returns n bytes at addr for an operation that executes now. They must lie in one region, to which allowed
// agrees, and stay mapped until release.
func (sw *Software) hold(addr, n uintptr, allowed func(*region) bool) (held, hip.Status) {
	sw.mu.Lock()
	defer sw.mu.Unlock()
	r, _ := sw.lookup(addr, n)
	if r == nil || !allowed(r) {
		return held{}, hip.ErrInvalidValue
	}
	r.block.refs++
	return held{r.block.mem[addr-r.addr:][:n:n], r.block}, hip.Success
}

// release gives back one reference to b, which may be nil. If the system refuses to unmap the memory, Close reports it.
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
	if err := hostmem.Unmap(b.mem); err != nil {
		sw.mu.Lock()
		sw.unmapping = errors.Join(sw.unmapping, err)
		sw.mu.Unlock()
	}
}

// lookup returns the region that has the n bytes at addr. The answer is nil and Success for host memory that is not
// pinned, of which nothing is known. A range that begins in a region and leaves it is an error, as in HIP. sw.mu is
// held.
func (sw *Software) lookup(addr, n uintptr) (*region, hip.Status) {
	if addr < pageSize || addr+n < addr { // nothing is ever mapped on the first page
		return nil, hip.ErrInvalidValue
	}
	list := sw.regions(addr)
	if list == nil {
		return nil, hip.ErrInvalidValue
	}
	r := list.find(addr)
	switch {
	case r == nil && addr+n <= deviceBase:
		return nil, hip.Success
	case r == nil || n > r.addr+r.size()-addr:
		return nil, hip.ErrInvalidValue
	}
	return r, hip.Success
}

// regions returns the list that addr belongs to; nil if there is no such device. sw.mu is held.
func (sw *Software) regions(addr uintptr) *regionList {
	if addr < deviceBase {
		return &sw.host
	}
	if addr >= virtualBase && addr < virtualBase+virtualSpace {
		return &sw.virtual
	}
	if i := (addr - deviceBase) / deviceSpace; i < uintptr(len(sw.devices)) {
		return &sw.devices[i].regions
	}
	return nil
}

// insert adds r to the regions. sw.mu is held, and the Software is not closed.
func (sw *Software) insert(r *region) {
	r.block.refs++
	list := sw.regions(r.addr)
	*list = slices.Insert(*list, list.at(r.addr), r)
	sw.count(r, 1)
	if r.onDevice() || sw.opts.Integrated {
		sw.touch(r.dev)
	}
}

// remove takes r out of the regions. The caller releases its block after unlocking sw.mu.
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
	case mappedRegion:
		sw.stats.Mappings += sign
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
func (sw *Software) allocate(dev *device, n uintptr) (*region, hip.Status) {
	if sw.closed {
		return nil, hip.ErrDeinitialized
	}
	if uint64(n) > dev.capacity-dev.used {
		return nil, hip.ErrOutOfMemory
	}
	addr, ok := dev.address(n)
	if !ok {
		return nil, hip.ErrOutOfMemory
	}
	b, err := sw.newBlock(int(n))
	if err != nil {
		return nil, hip.ErrOutOfMemory
	}
	r := &region{addr: addr, kind: deviceRegion, dev: dev, block: b}
	sw.insert(r)
	return r, hip.Success
}

// newBlock maps the n bytes of a device allocation. It uses ordinary pages: virtual machines that give free memory back
// to their host are several times slower with huge ones.
func (sw *Software) newBlock(n int) (*block, error) {
	b := &block{mapped: true}
	var err error
	if sw.opts.Shared {
		b.nonce = rand.Uint64()
		b.mem, b.file, err = mapShared(n, b.nonce)
	} else {
		b.mem, err = hostmem.Map(n)
	}
	return b, err
}

// mallocOn is what hipMalloc and hipMallocAsync have in common.
func (sw *Software) mallocOn(dev *device, p *uintptr, n uintptr) hip.Status {
	if n == 0 {
		*p = 0
		return hip.Success
	}
	sw.mu.Lock()
	r, st := sw.allocate(dev, n)
	if st != hip.Success {
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
	return hip.Success
}

func (sw *Software) malloc(p *uintptr, n uintptr) hip.Status {
	if st := sw.call("hipMalloc"); st != hip.Success {
		return st
	}
	if p == nil {
		return hip.ErrInvalidValue
	}
	sw.mu.Lock()
	dev, st := sw.device(), sw.refuseCaptures()
	sw.mu.Unlock()
	if st != hip.Success {
		return st
	}
	return sw.mallocOn(dev, p, n)
}

func (sw *Software) mallocAsync(p *uintptr, n, stream uintptr) hip.Status {
	if st := sw.call("hipMallocAsync"); st != hip.Success {
		return st
	}
	if p == nil {
		return hip.ErrInvalidValue
	}
	s, st := sw.idleStream(stream)
	if st != hip.Success {
		return st
	}
	return sw.mallocOn(s.dev, p, n)
}

func (sw *Software) memGetInfo(free, total *uintptr) hip.Status {
	if st := sw.call("hipMemGetInfo"); st != hip.Success {
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
	return hip.Success
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

// drop frees the region of that kind that begins at p, after settle. If there is none, the answer is absent.
func (sw *Software) drop(p uintptr, kind regionKind, absent hip.Status) hip.Status {
	sw.mu.Lock()
	r, st := sw.begins(p, kind), sw.refuseCaptures()
	sw.mu.Unlock()
	if st != hip.Success {
		return st
	}
	if r == nil {
		return absent
	}
	sw.settle(r.dev)
	sw.mu.Lock()
	if sw.closed {
		sw.mu.Unlock()
		return hip.ErrDeinitialized
	}
	if sw.begins(p, kind) != r { // another call was quicker
		sw.mu.Unlock()
		return absent
	}
	sw.remove(r)
	sw.mu.Unlock()
	sw.release(r.block)
	return hip.Success
}

func (sw *Software) free(p uintptr) hip.Status {
	if st := sw.call("hipFree"); st != hip.Success || p == 0 {
		return st
	}
	return sw.drop(p, deviceRegion, hip.ErrInvalidValue)
}

func (sw *Software) freeAsync(p, stream uintptr) hip.Status {
	late, st := sw.enter("hipFreeAsync")
	if st != hip.Success {
		return st
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	s, st := sw.stream(stream)
	if st != hip.Success {
		return st
	}
	if st := s.refuseCapture(); st != hip.Success {
		return st
	}
	r := sw.begins(p, deviceRegion)
	if r == nil {
		return hip.ErrInvalidValue
	}
	r.going = true
	return s.enqueue(operation{kind: opFree, late: late, region: r})
}

// fill sets all bytes of b to v. It copies what is filled already, as copy is the fastest way to store that Go has.
func fill(b []byte, v byte) {
	if len(b) == 0 {
		return
	}
	b[0] = v
	for done := 1; done < len(b); {
		done += copy(b[done:], b[:min(done, 1<<16)])
	}
}
