package amdhip

import (
	"errors"
	"fmt"
	"sync"
	"unsafe"

	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hostmem"
)

// HostMemory is memory of the host that streams copy from and to. It is never part of Go's heap: an asynchronous copy
// touches it after the call that started it has returned. The caller must Close it.
type HostMemory struct {
	handle
	bytes   []byte
	addr    uintptr
	pinned  bool
	release func() error
}

// HostMalloc allocates n bytes, at least one, of page-locked memory that is mapped into the address space of every
// device: kernels use it through DevicePtr. The content is undefined.
func (d *Device) HostMalloc(n int) (*HostMemory, error) {
	if err := checkHostSize(n); err != nil {
		return nil, err
	}
	api := d.rt.api
	var p uintptr
	err := d.current("hipHostMalloc", fmt.Sprintf("%d bytes", n), func() Status {
		return api.HipHostMalloc(&p, uintptr(n), hip.HostMallocPortable|hip.HostMallocMapped)
	})
	if err != nil {
		return nil, err
	}
	d.rt.pins.add(p, n)
	return d.newHostMemory("pinned memory", hostmem.At(p, uintptr(n)), true, func() error {
		d.rt.pins.remove(p)
		if st := api.HipHostFree(p); st != Success {
			return d.rt.fail("hipHostFree", st, "%d bytes at %#x", n, p)
		}
		return nil
	}), nil
}

// HostRegister page-locks existing memory, which must not be Go's heap: a mapping or C's memory. Close only unlocks it;
// the memory itself stays the caller's and must outlive that Close. An empty slice is refused, and so is one that
// overlaps memory that is page-locked already (ErrHostMemoryAlreadyRegistered), as some versions of HIP do not notice.
// Locking a mapping without write permission fails on many systems.
func (d *Device) HostRegister(b []byte) (*HostMemory, error) {
	n := len(b)
	if err := checkHostSize(n); err != nil {
		return nil, err
	}
	api := d.rt.api
	p := uintptr(unsafe.Pointer(unsafe.SliceData(b)))
	if !d.rt.pins.add(p, n) {
		return nil, fmt.Errorf("amdhip: %d bytes at %#x overlap memory that is page-locked already: %w",
			n, p, ErrHostMemoryAlreadyRegistered)
	}
	err := d.current("hipHostRegister", fmt.Sprintf("%d bytes at %#x", n, p), func() Status {
		return api.HipHostRegister(p, uintptr(n), hip.HostRegisterPortable|hip.HostRegisterMapped)
	})
	if err != nil {
		d.rt.pins.remove(p)
		return nil, err
	}
	return d.newHostMemory("registered memory", b[:n:n], true, func() error {
		defer d.rt.pins.remove(p)
		if st := api.HipHostUnregister(p); st != Success {
			return d.rt.fail("hipHostUnregister", st, "%d bytes at %#x", n, p)
		}
		return nil
	}), nil
}

// HostPlain allocates n bytes, at least one, that are page-aligned and zeroed but not page-locked: what to fall back to
// when locking fails. Copies from and to it work, slower and often synchronously, and are counted by UnpinnedCopies.
func (d *Device) HostPlain(n int) (*HostMemory, error) {
	if err := checkHostSize(n); err != nil {
		return nil, err
	}
	if err := d.rt.usable(); err != nil {
		return nil, err
	}
	b, err := hostmem.Map(n)
	if err != nil {
		return nil, fmt.Errorf("amdhip: mapping %d bytes: %w", n, err)
	}
	return d.newHostMemory("plain memory", b, false, func() error {
		// As hipHostFree does on its own: no copy may be under way when the pages go.
		err := d.onThread("hipDeviceSynchronize", "", d.rt.api.HipDeviceSynchronize)
		return errors.Join(err, hostmem.Unmap(b))
	}), nil
}

func (d *Device) newHostMemory(what string, b []byte, pinned bool, release func() error) *HostMemory {
	h := &HostMemory{bytes: b, addr: uintptr(unsafe.Pointer(unsafe.SliceData(b))), pinned: pinned, release: release}
	h.track(d, what, 2)
	return h
}

func checkHostSize(n int) error {
	if n <= 0 {
		return fmt.Errorf("amdhip: cannot use %d bytes of host memory: %w", n, ErrInvalidValue)
	}
	return nil
}

// Bytes returns the memory, nil after Close. The slice is invalid after Close, and the GPU reads or writes it while a
// copy is in progress.
func (h *HostMemory) Bytes() []byte {
	if h.enter() != nil {
		return nil
	}
	defer h.leave()
	return h.bytes
}

// Len returns the size in bytes.
func (h *HostMemory) Len() int { return len(h.bytes) }

// Pinned reports whether the memory is page-locked.
func (h *HostMemory) Pinned() bool { return h.pinned }

// DevicePtr returns the address under which the device that the memory was made for sees it. For memory that is not
// page-locked the error matches ErrUnsupported.
func (h *HostMemory) DevicePtr() (DevicePtr, error) {
	if err := h.enter(); err != nil {
		return 0, err
	}
	defer h.leave()
	if !h.pinned {
		return 0, fmt.Errorf("amdhip: %s is not visible to the device: %w", h.what, ErrUnsupported)
	}
	var p uintptr
	err := h.dev.onThread("hipHostGetDevicePointer", fmt.Sprintf("of %#x", h.addr),
		func() Status { return h.dev.rt.api.HipHostGetDevicePointer(&p, h.addr, 0) })
	return DevicePtr(p), err
}

// Close gives the memory back, or only unlocks it if it came from HostRegister. It waits for the whole device first, so
// it does not belong between copies. It is idempotent.
func (h *HostMemory) Close() error { return h.shut(h.release) }

// pinTable knows which host memory is page-locked.
type pinTable struct {
	mu     sync.Mutex
	ranges map[uintptr]uintptr // start to end, without overlaps
}

// add enters [p, p+n) and reports whether it was free.
func (t *pinTable) add(p uintptr, n int) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	end := p + uintptr(n)
	for start, stop := range t.ranges {
		if p < stop && start < end {
			return false
		}
	}
	if t.ranges == nil {
		t.ranges = map[uintptr]uintptr{}
	}
	t.ranges[p] = end
	return true
}

func (t *pinTable) remove(p uintptr) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.ranges, p)
}
