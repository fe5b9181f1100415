package amdhip

import "fmt"

// IPCHandle returns the name under which another process can open the memory. It is valid until Close.
func (m *Memory) IPCHandle() (IPCHandle, error) {
	var h IPCHandle
	rt := m.dev.rt
	if rt.api.hipIpcGetMemHandle == nil {
		return h, rt.missing("hipIpcGetMemHandle")
	}
	if err := m.enter(); err != nil {
		return h, err
	}
	defer m.leave()
	if st := rt.api.hipIpcGetMemHandle(&h, uintptr(m.ptr)); st != Success {
		return IPCHandle{}, rt.fail("hipIpcGetMemHandle", st, "%d bytes at %#x on device %d", m.size, m.ptr, m.dev.index)
	}
	return h, nil
}

// OpenIPC opens memory that another process of this host exported with IPCHandle. HIP does not tell its size. The caller
// must Close it before the exporting process frees it.
func (d *Device) OpenIPC(h IPCHandle) (*Memory, error) {
	api := d.rt.api
	if api.hipIpcOpenMemHandle == nil || api.hipIpcCloseMemHandle == nil {
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
	err = d.current("hipIpcOpenMemHandle", "", func() Status { return api.hipIpcOpenMemHandle(&p, h, flags) })
	if err != nil {
		return nil, err
	}
	return d.newMemory(p, 0, "hipIpcCloseMemHandle", api.hipIpcCloseMemHandle), nil
}

// CanAccessPeer reports whether the device can read and write the memory of peer.
func (d *Device) CanAccessPeer(peer *Device) (bool, error) {
	if d.rt.api.hipDeviceCanAccessPeer == nil {
		return false, d.rt.missing("hipDeviceCanAccessPeer")
	}
	if err := d.rt.usable(); err != nil {
		return false, err
	}
	var can int32
	if st := d.rt.api.hipDeviceCanAccessPeer(&can, d.index, peer.index); st != Success {
		return false, d.rt.fail("hipDeviceCanAccessPeer", st, "device %d to device %d", d.index, peer.index)
	}
	return can != 0, nil
}

// EnablePeerAccess maps the memory of peer into the device. A second time the error matches ErrPeerAccessAlreadyEnabled.
func (d *Device) EnablePeerAccess(peer *Device) error {
	if d.rt.api.hipDeviceEnablePeerAccess == nil {
		return d.rt.missing("hipDeviceEnablePeerAccess")
	}
	return d.current("hipDeviceEnablePeerAccess", fmt.Sprintf("to device %d", peer.index),
		func() Status { return d.rt.api.hipDeviceEnablePeerAccess(peer.index, 0) })
}

// DisablePeerAccess undoes EnablePeerAccess. Without it the error matches ErrPeerAccessNotEnabled.
func (d *Device) DisablePeerAccess(peer *Device) error {
	if d.rt.api.hipDeviceDisablePeerAccess == nil {
		return d.rt.missing("hipDeviceDisablePeerAccess")
	}
	return d.current("hipDeviceDisablePeerAccess", fmt.Sprintf("to device %d", peer.index),
		func() Status { return d.rt.api.hipDeviceDisablePeerAccess(peer.index) })
}

// CopyPeer copies n bytes from src on srcDev to dst on the stream's device, asynchronously.
func (s *Stream) CopyPeer(dst, src DevicePtr, srcDev *Device, n uint64) error {
	rt := s.dev.rt
	if rt.api.hipMemcpyPeerAsync == nil {
		return rt.missing("hipMemcpyPeerAsync")
	}
	if err := s.enter(); err != nil {
		return err
	}
	defer s.leave()
	st := rt.api.hipMemcpyPeerAsync(uintptr(dst), s.dev.index, uintptr(src), srcDev.index, uintptr(n), s.raw)
	if st != Success {
		return rt.fail("hipMemcpyPeerAsync", st, "%d bytes from %#x on device %d to %#x on device %d",
			n, src, srcDev.index, dst, s.dev.index)
	}
	return nil
}

// MarshalBinary returns the 64 bytes of the handle, for the process that shall open it.
func (h IPCHandle) MarshalBinary() ([]byte, error) { return h.b[:], nil }

// UnmarshalBinary sets the handle from the bytes of MarshalBinary.
func (h *IPCHandle) UnmarshalBinary(data []byte) error {
	if len(data) != len(h.b) {
		return fmt.Errorf("amdhip: an IPC handle has %d bytes, not %d: %w", len(h.b), len(data), ErrInvalidValue)
	}
	copy(h.b[:], data)
	return nil
}
