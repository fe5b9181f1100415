package soft

import (
	"maps"
	"math/rand/v2"
	"slices"
	"unsafe"

	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hostmem"
)

// The addresses that hipMemAddressReserve gives out. They begin behind those of the last device. It takes any free
// place among them that it is asked for, in every process.
const (
	virtualBase  = deviceBase + maxDevices*deviceSpace
	virtualSpace = 1 << 52
)

// What sizes and addresses of virtual memory are multiples of. The two differ so that a program that takes one for the
// other is found out.
const (
	granularity = 4096
	recommended = 64 << 10
)

// physical is memory of hipMemCreate or hipMemImportFromShareableHandle. It is there for as long as it has a handle or
// is mapped. It is guarded by Software.mu.
type physical struct {
	dev        *device
	block      *block // of which it has one reference
	exportable bool
	imported   bool // it takes nothing of the capacity of the device here
	uses       int  // 1 for the handle, and the mappings
}

// reservation is a range of addresses.
type reservation struct{ addr, size uintptr }

func (r reservation) end() uintptr { return r.addr + r.size }

// virtualCall begins a call: st other than Success is its answer. sw.mu is held after it only if st is Success.
func (sw *Software) virtualCall(name string) (late delayed, st hip.Status) {
	late, st = sw.enter(name)
	if st != hip.Success {
		return late, st
	}
	sw.mu.Lock()
	if sw.closed {
		st = hip.ErrDeinitialized
	} else {
		st = sw.refuseCaptures()
	}
	if st != hip.Success {
		sw.mu.Unlock()
	}
	return late, st
}

// checkProp returns the device of a description of memory.
func (sw *Software) checkProp(p *hip.AllocationProp) (*device, hip.Status) {
	switch {
	case p == nil || p.Type != hip.AllocationPinned || p.Location.Type != hip.LocationDevice ||
		p.Win32 != 0 || p.Compression != 0 || p.Usage != 0:
		return nil, hip.ErrInvalidValue
	case sw.byIndex(p.Location.ID) == nil:
		return nil, hip.ErrInvalidDevice
	case p.HandleTypes != hip.HandleNone && (p.HandleTypes != hip.HandleDescriptor || !canExport):
		return nil, hip.ErrNotSupported
	}
	return sw.byIndex(p.Location.ID), hip.Success
}

func (sw *Software) memGetAllocationGranularity(
	g *uintptr, prop *hip.AllocationProp, option hip.Granularity,
) hip.Status {
	if _, st := sw.virtualCall("hipMemGetAllocationGranularity"); st != hip.Success {
		return st
	}
	defer sw.mu.Unlock()
	// Which kinds of handle there are does not matter here, so that the answer is the same on every system.
	if prop != nil && prop.HandleTypes == hip.HandleDescriptor {
		plain := *prop
		plain.HandleTypes = hip.HandleNone
		prop = &plain
	}
	if _, st := sw.checkProp(prop); st != hip.Success {
		return st
	}
	switch option {
	case hip.GranularityMinimum:
		return put(hip.Success, g, granularity)
	case hip.GranularityRecommended:
		return put(hip.Success, g, recommended)
	}
	return hip.ErrInvalidValue
}

func (sw *Software) memCreate(out *uintptr, size uintptr, prop *hip.AllocationProp, flags uint64) hip.Status {
	if _, st := sw.virtualCall("hipMemCreate"); st != hip.Success {
		return st
	}
	p, st := sw.newPhysical(out, size, prop, flags)
	sw.mu.Unlock()
	if st != hip.Success {
		return st
	}
	if sw.opts.Poison {
		fill(p.block.mem, poisonByte)
	}
	sw.release(p.block)
	return hip.Success
}

// newPhysical is memCreate but for the poison: it leaves one reference to the block to the caller. sw.mu is held.
func (sw *Software) newPhysical(
	out *uintptr, size uintptr, prop *hip.AllocationProp, flags uint64,
) (*physical, hip.Status) {
	dev, st := sw.checkProp(prop)
	switch {
	case st != hip.Success:
		return nil, st
	case out == nil || flags != 0 || size == 0 || size%granularity != 0:
		return nil, hip.ErrInvalidValue
	case uint64(size) > dev.capacity-dev.used:
		return nil, hip.ErrOutOfMemory
	}
	b := &block{mapped: true}
	var err error
	if prop.HandleTypes == hip.HandleDescriptor {
		b.nonce = rand.Uint64()
		b.mem, b.file, err = mapShared(int(size), b.nonce)
	} else {
		b.mem, err = hostmem.Map(int(size))
	}
	if err != nil {
		return nil, hip.ErrOutOfMemory
	}
	dev.used += uint64(size)
	sw.stats.DeviceBytes += uint64(size)
	sw.stats.PeakDeviceBytes = max(sw.stats.PeakDeviceBytes, sw.stats.DeviceBytes)
	p := &physical{dev: dev, block: b, exportable: prop.HandleTypes == hip.HandleDescriptor}
	b.refs++ // the caller's
	*out = sw.addPhysical(p)
	return p, hip.Success
}

// addPhysical gives memory a handle. sw.mu is held.
func (sw *Software) addPhysical(p *physical) uintptr {
	p.block.refs++
	p.uses++
	handle := sw.newHandle()
	sw.physicals[handle] = p
	sw.stats.Physical++
	return handle
}

// unuse undoes one use of the memory, and returns the block to release if it was the last. sw.mu is held.
func (sw *Software) unuse(p *physical) *block {
	p.uses--
	if p.uses > 0 {
		return nil
	}
	if !p.imported {
		p.dev.used -= uint64(len(p.block.mem))
		sw.stats.DeviceBytes -= uint64(len(p.block.mem))
	}
	return p.block
}

// allPhysical returns the memory that has a handle or is mapped. sw.mu is held.
func (sw *Software) allPhysical() []*physical {
	all := make(map[*physical]bool)
	for _, p := range sw.physicals {
		all[p] = true
	}
	for _, r := range sw.virtual {
		all[r.physical] = true
	}
	return slices.Collect(maps.Keys(all))
}

func (sw *Software) memRelease(handle uintptr) hip.Status {
	if _, st := sw.virtualCall("hipMemRelease"); st != hip.Success {
		return st
	}
	p := sw.physicals[handle]
	if p == nil {
		sw.mu.Unlock()
		return hip.ErrInvalidValue
	}
	delete(sw.physicals, handle)
	sw.stats.Physical--
	b := sw.unuse(p)
	sw.mu.Unlock()
	sw.release(b)
	return hip.Success
}

// memAddressReserve gives the hint, if it is among the addresses that there are and free.
func (sw *Software) memAddressReserve(out *uintptr, size, align, hint uintptr, flags uint64) hip.Status {
	if _, st := sw.virtualCall("hipMemAddressReserve"); st != hip.Success {
		return st
	}
	defer sw.mu.Unlock()
	if out == nil || flags != 0 || size == 0 || size%granularity != 0 || hint%granularity != 0 || align&(align-1) != 0 {
		return hip.ErrInvalidValue
	}
	align = max(align, granularity)
	addr, ok := hint, hint >= virtualBase && hint%align == 0 && sw.isFree(reservation{hint, size})
	if !ok {
		addr, ok = sw.findFree(size, align)
	}
	if !ok {
		return hip.ErrOutOfMemory
	}
	r := reservation{addr, size}
	i, _ := slices.BinarySearchFunc(sw.reserved, addr, func(r reservation, addr uintptr) int {
		if r.addr < addr {
			return -1
		}
		return 1
	})
	sw.reserved = slices.Insert(sw.reserved, i, r)
	sw.stats.Reservations++
	sw.reservedEnd = max(sw.reservedEnd, r.end())
	*out = addr
	return hip.Success
}

// isFree reports whether nothing of r is reserved, and all of it lies among the addresses that there are.
func (sw *Software) isFree(r reservation) bool {
	if r.addr < virtualBase || r.size > virtualSpace || r.addr-virtualBase > virtualSpace-r.size {
		return false
	}
	return !slices.ContainsFunc(sw.reserved, func(other reservation) bool {
		return r.addr < other.end() && other.addr < r.end()
	})
}

// findFree returns addresses behind all that were ever given out, with a gap, so that a stale address is found out.
func (sw *Software) findFree(size, align uintptr) (uintptr, bool) {
	addr := max(sw.reservedEnd+pageSize, virtualBase+pageSize)
	addr = (addr + align - 1) / align * align
	return addr, sw.isFree(reservation{addr, size})
}

// reservedAt returns the position of the reservation that has all of [p, p+size), -1 if there is none.
func (sw *Software) reservedAt(p, size uintptr) int {
	return slices.IndexFunc(sw.reserved, func(r reservation) bool {
		return p >= r.addr && size <= r.size && p-r.addr <= r.size-size
	})
}

func (sw *Software) memAddressFree(p, size uintptr) hip.Status {
	if _, st := sw.virtualCall("hipMemAddressFree"); st != hip.Success {
		return st
	}
	defer sw.mu.Unlock()
	i := slices.Index(sw.reserved, reservation{p, size})
	if i < 0 || sw.virtual.overlaps(p, size) {
		return hip.ErrInvalidValue
	}
	sw.reserved = slices.Delete(sw.reserved, i, i+1)
	sw.stats.Reservations--
	return hip.Success
}

// memMap maps all of the memory. With a Fault that is Async it answers Success and maps nothing, as AMD's runtime 7.2
// was seen to do; hipMemSetAccess then fails.
func (sw *Software) memMap(p, size, offset, handle uintptr, flags uint64) hip.Status {
	late, st := sw.virtualCall("hipMemMap")
	if st != hip.Success {
		return st
	}
	defer sw.mu.Unlock()
	m := sw.physicals[handle]
	switch {
	case m == nil || offset != 0 || flags != 0 || p%granularity != 0 || size != uintptr(len(m.block.mem)) ||
		sw.reservedAt(p, size) < 0:
		return hip.ErrInvalidValue
	case sw.virtual.overlaps(p, size) || slices.Contains(sw.phantoms, reservation{p, size}):
		return hip.ErrAlreadyMapped
	case late.code != hip.Success:
		sw.phantoms = append(sw.phantoms, reservation{p, size})
		return hip.Success
	}
	m.uses++
	sw.insert(&region{
		addr: p, kind: mappedRegion, dev: m.dev, block: m.block, physical: m,
		access: make([]hip.AccessFlags, len(sw.devices)),
	})
	return hip.Success
}

// memUnmap does not wait: operations that use the memory later fail.
func (sw *Software) memUnmap(p, size uintptr) hip.Status {
	if _, st := sw.virtualCall("hipMemUnmap"); st != hip.Success {
		return st
	}
	if i := slices.Index(sw.phantoms, reservation{p, size}); i >= 0 {
		sw.phantoms = slices.Delete(sw.phantoms, i, i+1)
		sw.mu.Unlock()
		return hip.Success
	}
	r := sw.begins(p, mappedRegion)
	if r == nil || r.size() != size {
		sw.mu.Unlock()
		return hip.ErrInvalidValue
	}
	sw.remove(r)
	b := sw.unuse(r.physical)
	sw.mu.Unlock()
	sw.release(r.block) // the mapping's reference
	sw.release(b)
	return hip.Success
}

func (sw *Software) memSetAccess(p, size uintptr, desc *hip.AccessDesc, count uintptr) hip.Status {
	if _, st := sw.virtualCall("hipMemSetAccess"); st != hip.Success {
		return st
	}
	defer sw.mu.Unlock()
	if desc == nil || count == 0 || size == 0 {
		return hip.ErrInvalidValue
	}
	descs := unsafe.Slice(desc, count)
	for _, d := range descs {
		known := d.Flags == hip.AccessNone || d.Flags == hip.AccessRead || d.Flags == hip.AccessReadWrite
		if d.Location.Type != hip.LocationDevice || !known {
			return hip.ErrInvalidValue
		}
		if sw.byIndex(d.Location.ID) == nil {
			return hip.ErrInvalidDevice
		}
	}
	regions, ok := sw.wholeMappings(p, size)
	if !ok {
		return hip.ErrInvalidValue
	}
	for _, r := range regions {
		for _, d := range descs {
			r.access[d.Location.ID] = d.Flags
		}
	}
	return hip.Success
}

// wholeMappings returns the mappings that [p, p+size) consists of; ok is false if it is anything else. sw.mu is held.
func (sw *Software) wholeMappings(p, size uintptr) (regions []*region, ok bool) {
	if sw.reservedAt(p, size) < 0 {
		return nil, false
	}
	for at := p; at < p+size; {
		r := sw.begins(at, mappedRegion)
		if r == nil || r.size() > p+size-at {
			return nil, false
		}
		regions = append(regions, r)
		at += r.size()
	}
	return regions, true
}

func (sw *Software) memExportToShareableHandle(
	out *int32, handle uintptr, kind hip.HandleType, flags uint64,
) hip.Status {
	if _, st := sw.virtualCall("hipMemExportToShareableHandle"); st != hip.Success {
		return st
	}
	defer sw.mu.Unlock()
	p := sw.physicals[handle]
	if out == nil || p == nil || !p.exportable || kind != hip.HandleDescriptor || flags != 0 {
		return hip.ErrInvalidValue
	}
	fd, err := duplicate(p.block.file)
	if err != nil {
		return openStatus(err)
	}
	*out = fd
	return hip.Success
}

// memImportFromShareableHandle takes a descriptor, or a pointer to one. The memory counts as the current device's.
func (sw *Software) memImportFromShareableHandle(out *uintptr, osHandle uintptr, kind hip.HandleType) hip.Status {
	if _, st := sw.virtualCall("hipMemImportFromShareableHandle"); st != hip.Success {
		return st
	}
	defer sw.mu.Unlock()
	if out == nil || kind != hip.HandleDescriptor {
		return hip.ErrInvalidValue
	}
	fd := int32(osHandle)
	if osHandle >= pageSize {
		fd = *(*int32)(unsafe.Pointer(unsafe.SliceData(hostmem.At(osHandle, 4))))
	}
	mem, file, nonce, err := openDescriptor(fd)
	if err != nil {
		return hip.ErrInvalidValue
	}
	*out = sw.addPhysical(&physical{
		dev: sw.device(), block: &block{mem: mem, mapped: true, file: file, nonce: nonce}, exportable: true, imported: true,
	})
	return hip.Success
}

// memGetAddressRange is for all memory of devices.
func (sw *Software) memGetAddressRange(base, size *uintptr, p uintptr) hip.Status {
	if st := sw.call("hipMemGetAddressRange"); st != hip.Success {
		return st
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	r, _ := sw.lookup(p, 1)
	if base == nil || size == nil || !r.onDevice() || r.going {
		return hip.ErrInvalidValue
	}
	*base, *size = r.addr, r.size()
	return hip.Success
}
