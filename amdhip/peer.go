package amdhip

import (
	"errors"
	"fmt"

	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
)

// IPCHandle names a device allocation to another process of the same host (hipIpcMemHandle_t). Its MarshalBinary
// returns 64 bytes to send there, from which UnmarshalBinary of the other process restores it.
type IPCHandle = hip.IPCHandle

// IPCHandle returns the name under which another process can open the memory. It is valid until Close. Memory of
// MapMemory has no such name: the error matches ErrUnsupported, and HIP is not asked, because AMD's runtime would leak
// the memory until the next boot (ROCm/clr issue 266). PhysicalMemory.Export gives such memory to other processes.
func (m *Memory) IPCHandle() (IPCHandle, error) {
	var h IPCHandle
	rt := m.dev.rt
	if m.mapped != nil {
		return h, fmt.Errorf("amdhip: hipIpcGetMemHandle, not called: virtual memory has no IPC handle, Export gives a "+
			"descriptor: %w", ErrUnsupported)
	}
	if rt.api.HipIpcGetMemHandle == nil {
		return h, rt.missing("hipIpcGetMemHandle")
	}
	if err := m.enter(); err != nil {
		return h, err
	}
	defer m.leave()
	if st := rt.api.HipIpcGetMemHandle(&h, uintptr(m.ptr)); st != Success {
		return IPCHandle{}, rt.fail("hipIpcGetMemHandle", st, "%d bytes at %#x on device %d", m.size, m.ptr, m.dev.index)
	}
	return h, nil
}

// OpenIPC opens memory that another process of this host exported with IPCHandle. HIP does not tell its size here, so
// Size is 0; AddressRangeOf tells it if the library can. The caller must Close the memory before the exporting process
// frees it.
func (d *Device) OpenIPC(h IPCHandle) (*Memory, error) {
	api := d.rt.api
	if api.HipIpcOpenMemHandle == nil || api.HipIpcCloseMemHandle == nil {
		return nil, d.rt.missing("hipIpcOpenMemHandle")
	}
	version, _, err := d.rt.Version()
	if err != nil {
		return nil, err
	}
	// hipIpcMemLazyEnablePeerAccess, the only flag there is, changed its value in HIP 6.
	var flags uint32
	if version >= 6e7 {
		flags = 1
	}
	var p uintptr
	err = d.current("hipIpcOpenMemHandle", "", func() Status { return api.HipIpcOpenMemHandle(&p, h, flags) })
	if err != nil {
		return nil, err
	}
	return d.newMemory(p, 0, "hipIpcCloseMemHandle", api.HipIpcCloseMemHandle), nil
}

// sameRuntime refuses a device of another runtime. Devices are passed to HIP by number, so it would be taken for a
// device of this runtime.
func (d *Device) sameRuntime(other *Device) error {
	if d.rt != other.rt {
		return fmt.Errorf("amdhip: device %d and device %d belong to different runtimes: %w", d.index, other.index,
			ErrInvalidDevice)
	}
	return nil
}

// CanAccessPeer reports whether the device can read and write the memory of peer.
func (d *Device) CanAccessPeer(peer *Device) (bool, error) {
	if d.rt.api.HipDeviceCanAccessPeer == nil {
		return false, d.rt.missing("hipDeviceCanAccessPeer")
	}
	if err := errors.Join(d.rt.usable(), d.sameRuntime(peer)); err != nil {
		return false, err
	}
	var can int32
	if st := d.rt.api.HipDeviceCanAccessPeer(&can, d.index, peer.index); st != Success {
		return false, d.rt.fail("hipDeviceCanAccessPeer", st, "device %d to device %d", d.index, peer.index)
	}
	return can != 0, nil
}

// EnablePeerAccess maps the memory of peer into the device. A second time the error matches
// ErrPeerAccessAlreadyEnabled.
func (d *Device) EnablePeerAccess(peer *Device) error {
	if d.rt.api.HipDeviceEnablePeerAccess == nil {
		return d.rt.missing("hipDeviceEnablePeerAccess")
	}
	if err := d.sameRuntime(peer); err != nil {
		return err
	}
	return d.current("hipDeviceEnablePeerAccess", fmt.Sprintf("to device %d", peer.index),
		func() Status { return d.rt.api.HipDeviceEnablePeerAccess(peer.index, 0) })
}

// DisablePeerAccess undoes EnablePeerAccess. Without it the error matches ErrPeerAccessNotEnabled.
func (d *Device) DisablePeerAccess(peer *Device) error {
	if d.rt.api.HipDeviceDisablePeerAccess == nil {
		return d.rt.missing("hipDeviceDisablePeerAccess")
	}
	if err := d.sameRuntime(peer); err != nil {
		return err
	}
	return d.current("hipDeviceDisablePeerAccess", fmt.Sprintf("to device %d", peer.index),
		func() Status { return d.rt.api.HipDeviceDisablePeerAccess(peer.index) })
}

// CopyPeer copies n bytes from src on srcDev to dst on the stream's device, asynchronously.
func (s *Stream) CopyPeer(dst, src DevicePtr, srcDev *Device, n uint64) error {
	rt := s.dev.rt
	if rt.api.HipMemcpyPeerAsync == nil {
		return rt.missing("hipMemcpyPeerAsync")
	}
	if err := s.enter(); err != nil {
		return err
	}
	defer s.leave()
	if err := s.dev.sameRuntime(srcDev); err != nil {
		return err
	}
	st := s.dev.forCopies(func() Status {
		return rt.api.HipMemcpyPeerAsync(uintptr(dst), s.dev.index, uintptr(src), srcDev.index, uintptr(n), s.raw)
	})
	if st != Success {
		return rt.fail("hipMemcpyPeerAsync", st, "%d bytes from %#x on device %d to %#x on device %d",
			n, src, srcDev.index, dst, s.dev.index)
	}
	return nil
}
