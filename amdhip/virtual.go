package amdhip

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
)

// PhysicalMemory is memory of a device without an address. It is used by mapping it: with MapMemory, or with an
// AddressRange. It is freed when its Close was called and nothing maps it any more, in this process or in one that
// imported it. The caller must Close it.
type PhysicalMemory struct {
	handle
	raw  uintptr
	size uint64
}

// PhysicalOptions says what the memory must be able to do.
type PhysicalOptions struct {
	Exportable bool // needed by Export; Linux only, and from HIP 6 on: 5.7 answers hipErrorNotSupported
}

// virtualMemorySince is the first version of HIP whose structures for virtual memory are known to be those of today. In
// HIP 5.2 hipMemAllocationProp had its fields in another order.
const virtualMemorySince = 5_07_00000

// hasVirtualMemory reports whether the library has all functions for virtual memory.
func (rt *Runtime) hasVirtualMemory() (bool, error) {
	a := rt.api
	all := a.HipMemGetAllocationGranularity != nil && a.HipMemCreate != nil && a.HipMemRelease != nil &&
		a.HipMemAddressReserve != nil && a.HipMemAddressFree != nil && a.HipMemMap != nil && a.HipMemUnmap != nil &&
		a.HipMemSetAccess != nil && a.HipMemExportToShareableHandle != nil && a.HipMemImportFromShareableHandle != nil
	if !all {
		return false, nil
	}
	version, _, err := rt.Version()
	return version >= virtualMemorySince, err
}

// VirtualMemory reports whether the device has virtual memory: CreatePhysical, ImportPhysical, ReserveAddresses and
// what comes after them. Without it these calls return an error that matches ErrUnsupported.
//
// It is what HIP says. AMD's runtimes are known to say it and to fail later, or not to return from a call. Who wants to
// rely on it tries it first: create, map, copy there and back, export, import and compare.
func (d *Device) VirtualMemory() bool { return d.virtual }

// physical is what HIP is told about memory of the device.
func (d *Device) physical(o PhysicalOptions) *hip.AllocationProp {
	p := &hip.AllocationProp{
		Type:     hip.AllocationPinned,
		Location: hip.Location{Type: hip.LocationDevice, ID: d.index},
	}
	if o.Exportable {
		p.HandleTypes = hip.HandleDescriptor
	}
	return p
}

// virtualCall makes a call for virtual memory.
func (d *Device) virtualCall(call, detail string, f func(*hip.API) Status) error {
	if !d.virtual {
		return d.rt.missing(call)
	}
	return d.current(call, detail, func() Status { return f(d.rt.api) })
}

// Granularity returns what sizes, addresses and alignments of virtual memory are multiples of: they must be of the
// minimum, and are quicker with the recommended one.
func (d *Device) Granularity() (minimum, recommended uint64, err error) {
	var sizes [2]uintptr
	prop := d.physical(PhysicalOptions{Exportable: true})
	for option := range sizes {
		err := d.virtualCall("hipMemGetAllocationGranularity", "", func(api *hip.API) Status {
			return api.HipMemGetAllocationGranularity(&sizes[option], prop, hip.Granularity(option))
		})
		if err != nil {
			return 0, 0, err
		}
	}
	return uint64(sizes[hip.GranularityMinimum]), uint64(sizes[hip.GranularityRecommended]), nil
}

// CreatePhysical allocates n bytes, a multiple of the device's Granularity. The content is undefined. When the device
// is full the error matches ErrOutOfMemory.
func (d *Device) CreatePhysical(n uint64, o PhysicalOptions) (*PhysicalMemory, error) {
	if err := checkSize(n); err != nil {
		return nil, err
	}
	var raw uintptr
	prop := d.physical(o)
	err := d.virtualCall("hipMemCreate", fmt.Sprintf("%d bytes", n), func(api *hip.API) Status {
		return api.HipMemCreate(&raw, uintptr(n), prop, 0)
	})
	if err != nil {
		return nil, err
	}
	return d.newPhysical(raw, n), nil
}

// ImportPhysical makes memory known that another process exported, or this one; f stays the caller's, and may be closed
// afterwards. HIP does not tell how large it is: n is what the exporter said. Mapping more than there is fails.
func (d *Device) ImportPhysical(f *os.File, n uint64) (*PhysicalMemory, error) {
	if err := checkSize(n); err != nil {
		return nil, err
	}
	if !d.virtual {
		return nil, d.rt.missing("hipMemImportFromShareableHandle")
	}
	version, _, err := d.rt.Version()
	if err != nil {
		return nil, err
	}
	osHandle, release, err := descriptorArgument(int(f.Fd()), version)
	if err != nil {
		return nil, fmt.Errorf("amdhip: import of device memory: %w", err)
	}
	var raw uintptr
	err = d.virtualCall("hipMemImportFromShareableHandle", fmt.Sprintf("%d bytes", n), func(api *hip.API) Status {
		return api.HipMemImportFromShareableHandle(&raw, osHandle, hip.HandleDescriptor)
	})
	release()
	if err != nil {
		return nil, err
	}
	return d.newPhysical(raw, n), nil
}

func (d *Device) newPhysical(raw uintptr, n uint64) *PhysicalMemory {
	p := &PhysicalMemory{raw: raw, size: n}
	p.track(d, "physical memory", 2)
	return p
}

// Size returns the size in bytes.
func (p *PhysicalMemory) Size() uint64 { return p.size }

// Device returns the device whose memory it is.
func (p *PhysicalMemory) Device() *Device { return p.dev }

// Export returns a descriptor for the memory, which another process can import. The caller closes it; the memory exists
// for as long as one is open. Some versions of AMD's runtime make the memory unusable when its only descriptor is
// closed, or refuse a second one then (rocm-systems issue 8440): keep the first open for as long as the memory is used.
func (p *PhysicalMemory) Export() (*os.File, error) {
	if err := p.enter(); err != nil {
		return nil, err
	}
	defer p.leave()
	fd := int32(-1)
	err := p.dev.virtualCall("hipMemExportToShareableHandle", p.what, func(api *hip.API) Status {
		return api.HipMemExportToShareableHandle(&fd, p.raw, hip.HandleDescriptor, 0)
	})
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "memory of a GPU")
	if f == nil {
		return nil, fmt.Errorf("amdhip: hipMemExportToShareableHandle gave descriptor %d: %w", fd, ErrUnknown)
	}
	return f, nil
}

// Close releases the memory. What maps it keeps it. It is idempotent.
func (p *PhysicalMemory) Close() error {
	return p.shut(func() error {
		return p.dev.onThread("hipMemRelease", p.what, func() Status { return p.dev.rt.api.HipMemRelease(p.raw) })
	})
}

// Access is what a device may do with mapped memory.
type Access = hip.AccessFlags

// What a device may do with mapped memory.
const (
	AccessNone      = hip.AccessNone
	AccessRead      = hip.AccessRead
	AccessReadWrite = hip.AccessReadWrite
)

// AddressRange is a range of addresses of the GPU at which nothing is until physical memory is mapped there. Its
// methods are safe for concurrent use. The caller must Close it.
type AddressRange struct {
	handle
	ptr  DevicePtr
	size uint64

	changing chan struct{} // has room for one: a call of Map or Unmap, which may last for ever
	mappings []mapping
}

// mapping is a part of an AddressRange where memory is.
type mapping struct{ offset, size uint64 }

// ReserveAddresses reserves n bytes of addresses. n and align are multiples of the device's Granularity, align also a
// power of two; 0 is no wish. hint, if it is not 0, is where the range is wanted: HIP may choose another place, so
// compare Ptr.
func (d *Device) ReserveAddresses(n, align uint64, hint DevicePtr) (*AddressRange, error) {
	if err := checkSize(n); err != nil {
		return nil, err
	}
	var p uintptr
	err := d.virtualCall("hipMemAddressReserve", fmt.Sprintf("%d bytes", n), func(api *hip.API) Status {
		return api.HipMemAddressReserve(&p, uintptr(n), uintptr(align), uintptr(hint), 0)
	})
	if err != nil {
		return nil, err
	}
	d.rt.mapped.Store(true)
	r := &AddressRange{ptr: DevicePtr(p), size: n, changing: make(chan struct{}, 1)}
	r.track(d, "address range", 1)
	return r, nil
}

// Ptr returns the first address.
func (r *AddressRange) Ptr() DevicePtr { return r.ptr }

// Size returns how many addresses there are.
func (r *AddressRange) Size() uint64 { return r.size }

// Device returns the device that the range was reserved through.
func (r *AddressRange) Device() *Device { return r.dev }

// Map maps all of p, from offset on, which is a multiple of the Granularity. Nobody may use the memory before
// SetAccess.
func (r *AddressRange) Map(offset uint64, p *PhysicalMemory) error {
	if err := r.enter(); err != nil {
		return err
	}
	defer r.leave()
	if err := p.enter(); err != nil {
		return err
	}
	defer p.leave()
	if err := r.sameRuntime(&p.handle); err != nil {
		return err
	}
	if offset > r.size || p.size > r.size-offset {
		return r.dev.rt.fail("hipMemMap", ErrInvalidValue, "not called: %d bytes at offset %d of %d", p.size, offset, r.size)
	}
	r.changing <- struct{}{}
	defer func() { <-r.changing }()
	err := r.dev.virtualCall("hipMemMap", fmt.Sprintf("%d bytes at offset %d", p.size, offset), func(api *hip.API) Status {
		return api.HipMemMap(uintptr(r.ptr)+uintptr(offset), uintptr(p.size), 0, p.raw, 0)
	})
	if err == nil {
		r.mappings = append(r.mappings, mapping{offset, p.size})
	}
	return err
}

// SetAccess says what the devices may do with what is mapped to n bytes from offset on, which are whole mappings. AMD's
// runtime may report here what failed in Map.
func (r *AddressRange) SetAccess(offset, n uint64, a Access, devices ...*Device) error {
	if err := r.enter(); err != nil {
		return err
	}
	defer r.leave()
	if offset > r.size || n > r.size-offset || len(devices) == 0 {
		return r.dev.rt.fail("hipMemSetAccess", ErrInvalidValue, "not called: %d bytes at offset %d of %d, for %d devices",
			n, offset, r.size, len(devices))
	}
	desc := make([]hip.AccessDesc, len(devices))
	for i, d := range devices {
		if err := r.dev.sameRuntime(d); err != nil {
			return err
		}
		desc[i] = hip.AccessDesc{Location: hip.Location{Type: hip.LocationDevice, ID: d.index}, Flags: a}
	}
	return r.dev.virtualCall("hipMemSetAccess", fmt.Sprintf("%d bytes at offset %d", n, offset),
		func(api *hip.API) Status {
			return api.HipMemSetAccess(uintptr(r.ptr)+uintptr(offset), uintptr(n), &desc[0], uintptr(len(desc)))
		})
}

// Unmap undoes the Map at that offset. HIP does not wait: no work that is still to be done may use the memory.
func (r *AddressRange) Unmap(offset uint64) error {
	if err := r.enter(); err != nil {
		return err
	}
	defer r.leave()
	r.changing <- struct{}{}
	defer func() { <-r.changing }()
	i := slices.IndexFunc(r.mappings, func(m mapping) bool { return m.offset == offset })
	if i < 0 {
		return r.dev.rt.fail("hipMemUnmap", ErrNotMapped, "not called: nothing was mapped at offset %d", offset)
	}
	err := r.unmap(r.mappings[i])
	if err == nil {
		r.mappings = slices.Delete(r.mappings, i, i+1)
	}
	return err
}

// unmap makes the call, which must work after the runtime's Close, too.
func (r *AddressRange) unmap(m mapping) error {
	return r.dev.onThread("hipMemUnmap", fmt.Sprintf("%d bytes at offset %d", m.size, m.offset), func() Status {
		return r.dev.rt.api.HipMemUnmap(uintptr(r.ptr)+uintptr(m.offset), uintptr(m.size))
	})
}

// Close unmaps what is mapped and gives the addresses back. Like Unmap it does not wait. It is idempotent.
func (r *AddressRange) Close() error {
	return r.shut(func() error {
		var errs []error
		for _, m := range r.mappings {
			errs = append(errs, r.unmap(m))
		}
		errs = append(errs, r.dev.onThread("hipMemAddressFree", r.what, func() Status {
			return r.dev.rt.api.HipMemAddressFree(uintptr(r.ptr), uintptr(r.size))
		}))
		return errors.Join(errs...)
	})
}

// MapMemory maps p for the device, to read and to write, and returns it as Memory. hint is as for ReserveAddresses: the
// same address in every process, and after every mapping, if HIP can; compare Ptr. The memory stays for as long as it
// is mapped, also after the Close of p. Close of the Memory unmaps it, after all work of the device.
func (d *Device) MapMemory(p *PhysicalMemory, hint DevicePtr) (*Memory, error) {
	r, err := d.ReserveAddresses(p.size, 0, hint)
	if err != nil {
		return nil, err
	}
	if err = r.Map(0, p); err == nil {
		err = r.SetAccess(0, p.size, AccessReadWrite, d)
	}
	if err != nil {
		return nil, errors.Join(err, r.Close())
	}
	m := &Memory{ptr: r.ptr, size: p.size, mapped: r}
	m.track(d, "mapped memory", 1)
	return m, nil
}

// AddressRangeOf returns where the allocation or mapping begins that p lies in, and how many bytes it has, for memory
// of any kind that the device can use. It tells how large memory of OpenIPC is.
func (d *Device) AddressRangeOf(p DevicePtr) (base DevicePtr, size uint64, err error) {
	if d.rt.api.HipMemGetAddressRange == nil {
		return 0, 0, d.rt.missing("hipMemGetAddressRange")
	}
	var b, n uintptr
	err = d.current("hipMemGetAddressRange", fmt.Sprintf("of %#x", p), func() Status {
		return d.rt.api.HipMemGetAddressRange(&b, &n, uintptr(p))
	})
	return DevicePtr(b), uint64(n), err
}
