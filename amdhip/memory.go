package amdhip

import (
	"errors"
	"fmt"
)

// DevicePtr is an address in device memory. It is never dereferenced by Go.
type DevicePtr uintptr

// Memory is an allocation in device memory. The caller must Close it.
type Memory struct {
	handle
	ptr      DevicePtr
	size     uint64
	freeCall string
	free     func(uintptr) Status
	mapped   *AddressRange // of MapMemory: where it is mapped; else nil
}

// Malloc allocates n bytes of device memory, at least one. The content is undefined. When the device is full the error
// matches ErrOutOfMemory.
func (d *Device) Malloc(n uint64) (*Memory, error) {
	if err := checkSize(n); err != nil {
		return nil, err
	}
	var p uintptr
	err := d.current("hipMalloc", fmt.Sprintf("%d bytes", n), func() Status { return d.rt.api.HipMalloc(&p, uintptr(n)) })
	if err != nil {
		return nil, err
	}
	return d.newMemory(p, n, "hipFree", d.rt.api.HipFree), nil
}

func (d *Device) newMemory(p uintptr, n uint64, freeCall string, free func(uintptr) Status) *Memory {
	m := &Memory{ptr: DevicePtr(p), size: n, freeCall: freeCall, free: free}
	m.track(d, "device memory", 2)
	return m
}

// checkSize refuses sizes that no allocation can have. HIP itself answers 0 bytes with a null pointer and success.
func checkSize(n uint64) error {
	if n == 0 || uint64(uintptr(n)) != n {
		return fmt.Errorf("amdhip: cannot allocate %d bytes: %w", n, ErrInvalidValue)
	}
	return nil
}

// Ptr returns the address of the first byte. After Close it must not be used any more.
func (m *Memory) Ptr() DevicePtr { return m.ptr }

// Size returns the size in bytes, 0 for memory of OpenIPC.
func (m *Memory) Size() uint64 { return m.size }

// Device returns the device whose memory it is.
func (m *Memory) Device() *Device { return m.dev }

// Close frees the memory; that of MapMemory is unmapped. It waits for the whole device first, so it does not belong
// between copies. It is idempotent.
func (m *Memory) Close() error {
	return m.shut(func() error {
		if m.mapped != nil {
			// Unlike hipFree, unmapping does not wait for work that still uses the memory.
			err := m.dev.onThread("hipDeviceSynchronize", "", m.dev.rt.api.HipDeviceSynchronize)
			return errors.Join(err, m.mapped.Close())
		}
		if st := m.free(uintptr(m.ptr)); st != Success {
			return m.dev.rt.fail(m.freeCall, st, "%d bytes at %#x on device %d", m.size, m.ptr, m.dev.index)
		}
		return nil
	})
}

// MallocAsync allocates n bytes, at least one, from the device's memory pool, in stream order: work put on s later may
// use them. It needs HIP 5.2 and a device with memory pools; else the error matches ErrUnsupported. Close the memory,
// or give it back in stream order with FreeAsync.
func (s *Stream) MallocAsync(n uint64) (*Memory, error) {
	rt := s.dev.rt
	if err := rt.usable(); err != nil {
		return nil, err
	}
	if rt.api.HipMallocAsync == nil || rt.api.HipFreeAsync == nil || !s.dev.memoryPools {
		return nil, rt.missing("hipMallocAsync")
	}
	if err := checkSize(n); err != nil {
		return nil, err
	}
	if err := s.enter(); err != nil {
		return nil, err
	}
	defer s.leave()
	var p uintptr
	if st := rt.api.HipMallocAsync(&p, uintptr(n), s.raw); st != Success {
		return nil, rt.fail("hipMallocAsync", st, "%d bytes on device %d", n, s.dev.index)
	}
	return s.dev.newMemory(p, n, "hipFree", rt.api.HipFree), nil
}

// FreeAsync frees memory of MallocAsync when all work that was put on s before is done, and returns at once. It closes
// m. If m is closed already, nothing happens.
func (s *Stream) FreeAsync(m *Memory) error {
	rt := s.dev.rt
	if rt.api.HipFreeAsync == nil {
		return rt.missing("hipFreeAsync")
	}
	if err := s.enter(); err != nil {
		return err
	}
	defer s.leave()
	if err := s.sameRuntime(&m.handle); err != nil {
		return err
	}
	if m.mapped != nil {
		return rt.fail("hipFreeAsync", ErrInvalidValue, "not called: %s was mapped, not allocated", m.what)
	}
	return m.shut(func() error {
		if st := rt.api.HipFreeAsync(uintptr(m.ptr), s.raw); st != Success {
			return rt.fail("hipFreeAsync", st, "%d bytes at %#x on device %d", m.size, m.ptr, m.dev.index)
		}
		return nil
	})
}
