package amdhip

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"runtime"
	"sync/atomic"

	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
)

// Device is one GPU of a Runtime. It is safe for concurrent use, from any goroutine: calls for which HIP looks at the
// current device of the OS thread set it first and restore it afterwards.
type Device struct {
	rt          *Runtime
	index       int32
	name        string
	arch        string
	pci         string
	uuid        string
	memory      uint64
	integrated  bool
	cores       int
	memoryPools bool
	virtual     bool
	unpinned    atomic.Int64
}

// Device returns GPU i, counted from 0 as HIP_VISIBLE_DEVICES leaves them. Asking again gives the same *Device.
func (rt *Runtime) Device(i int) (*Device, error) {
	n, err := rt.DeviceCount()
	if err != nil {
		return nil, err
	}
	if i < 0 || i >= n {
		return nil, fmt.Errorf("amdhip: there is no device %d, the last is %d: %w", i, n-1, ErrInvalidDevice)
	}
	if d := rt.known(i, nil); d != nil {
		return d, nil
	}
	d, err := rt.describe(int32(i)) // without the lock: calls of HIP may last for ever
	if err != nil {
		return nil, err
	}
	return rt.known(i, d), nil
}

// known returns the *Device that was given out for GPU i; if there is none yet, that is d from now on.
func (rt *Runtime) known(i int, d *Device) *Device {
	rt.mu.Lock()
	defer rt.mu.Unlock()
	if have, ok := rt.devices[i]; ok {
		return have
	}
	if d != nil {
		rt.devices[i] = d
	}
	return d
}

// describe asks for all properties that do not change. Those that only describe the device (name of the architecture,
// bus address, identity) may be unknown.
func (rt *Runtime) describe(i int32) (*Device, error) {
	d := &Device{rt: rt, index: i}
	var text [256]byte
	if st := rt.api.HipDeviceGetName(&text[0], int32(len(text)), i); st != Success {
		return nil, rt.fail("hipDeviceGetName", st, "device %d", i)
	}
	d.name = cString(text[:])
	var total uintptr
	if st := rt.api.HipDeviceTotalMem(&total, i); st != Success {
		return nil, rt.fail("hipDeviceTotalMem", st, "device %d", i)
	}
	d.memory = uint64(total)
	integrated, err := d.attribute(hip.AttrIntegrated)
	if err != nil {
		return nil, err
	}
	d.integrated = integrated != 0
	if d.cores, err = d.attribute(hip.AttrMultiprocessorCount); err != nil {
		return nil, err
	}
	if pools, err := d.attribute(hip.AttrMemoryPoolsSupported); err == nil { // HIP before 5.2 does not know it
		d.memoryPools = pools != 0
	}
	if virtual, err := rt.hasVirtualMemory(); err != nil {
		return nil, err
	} else if virtual {
		v, err := d.attribute(hip.AttrVirtualMemory)
		d.virtual = err == nil && v != 0
	}
	text = [256]byte{}
	if st := rt.api.HipDeviceGetPCIBusId(&text[0], 64, i); st == Success {
		d.pci = cString(text[:])
	}
	var uuid [16]byte
	if rt.api.HipDeviceGetUuid != nil && rt.api.HipDeviceGetUuid(&uuid, i) == Success {
		d.uuid = uuidString(uuid)
	}
	d.arch = rt.arch(i)
	return d, nil
}

// arch returns gcnArchName, the one property that has no call of its own.
func (rt *Runtime) arch(i int32) string {
	var prop [4096]byte // the structs have 792 and 1472 bytes
	call, offset := rt.api.HipGetDevicePropertiesR0600, hip.PropR0600.ArchName
	if call == nil {
		call, offset = rt.api.HipGetDeviceProperties, hip.PropR0000.ArchName
	}
	if call == nil || call(&prop[0], i) != Success {
		return ""
	}
	return cString(prop[offset : offset+hip.PropNameSize])
}

// uuidString prints a hipUUID: on AMD its 16 bytes are the hexadecimal digits themselves.
func uuidString(uuid [16]byte) string {
	if _, err := hex.DecodeString(string(uuid[:])); err == nil {
		return "GPU-" + string(uuid[:])
	}
	if uuid == [16]byte{} {
		return ""
	}
	return "GPU-" + hex.EncodeToString(uuid[:])
}

func cString(b []byte) string {
	s, _, _ := bytes.Cut(b, []byte{0})
	return string(s)
}

func (d *Device) attribute(a hip.DeviceAttribute) (int, error) {
	var v int32
	if st := d.rt.api.HipDeviceGetAttribute(&v, a, d.index); st != Success {
		return 0, d.rt.fail("hipDeviceGetAttribute", st, "attribute %d of device %d", a, d.index)
	}
	return int(v), nil
}

// Runtime returns the runtime that the device belongs to.
func (d *Device) Runtime() *Runtime { return d.rt }

// Index returns the device's number.
func (d *Device) Index() int { return int(d.index) }

// Name returns the marketing name.
func (d *Device) Name() string { return d.name }

// Arch returns the instruction set with its features (gcnArchName, "gfx90a:sramecc+:xnack-"), "" if it is unknown.
func (d *Device) Arch() string { return d.arch }

// PCIBusID returns domain, bus, device and function ("0000:c1:00.0"), "" if they are unknown.
func (d *Device) PCIBusID() string { return d.pci }

// UUID returns the identity of the GPU as ROCR_VISIBLE_DEVICES takes it ("GPU-" and 16 digits), "" if it is unknown.
func (d *Device) UUID() string { return d.uuid }

// TotalMemory returns the device's memory in bytes.
func (d *Device) TotalMemory() uint64 { return d.memory }

// Integrated reports whether the device shares the host's memory (an APU).
func (d *Device) Integrated() bool { return d.integrated }

// Multiprocessors returns the number of compute units.
func (d *Device) Multiprocessors() int { return d.cores }

// UnpinnedCopies returns how many copies of the device's streams had a host side that is not page-locked.
func (d *Device) UnpinnedCopies() int64 { return d.unpinned.Load() }

// MemInfo returns the free and the total bytes of the device's memory.
func (d *Device) MemInfo() (free, total uint64, err error) {
	var f, t uintptr
	err = d.current("hipMemGetInfo", "", func() Status { return d.rt.api.HipMemGetInfo(&f, &t) })
	return uint64(f), uint64(t), err
}

// Synchronize waits until the device has done all work of all its streams.
func (d *Device) Synchronize() error {
	return d.current("hipDeviceSynchronize", "", d.rt.api.HipDeviceSynchronize)
}

// current makes a call for which HIP uses the current device. HIP keeps that per OS thread, and goroutines move between
// threads, so the goroutine is locked to its thread for the call. Afterwards the thread gets back the current device
// that it had: a caller who uses HIP by other means may depend on it. detail goes into the error.
func (d *Device) current(call, detail string, f func() Status) error {
	if err := d.rt.usable(); err != nil {
		return err
	}
	return d.onThread(call, detail, f)
}

// forCopies makes a call that starts a copy or a memset. These calls take the device from the stream, with one
// exception: HIP 7 checks virtual memory against the current device. So the current device is set once virtual memory
// is in use. Before that the call costs nothing more.
func (d *Device) forCopies(f func() Status) (st Status) {
	if !d.rt.mapped.Load() {
		return f()
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var before int32
	if st := d.rt.api.HipGetDevice(&before); st != Success {
		return st
	}
	if before != d.index {
		if st := d.rt.api.HipSetDevice(d.index); st != Success {
			return st
		}
		defer func() { _ = d.rt.api.HipSetDevice(before) }() // as in onThread
	}
	return f()
}

// onThread is current without the check for Close, for calls that must work after the Close of the runtime, too.
func (d *Device) onThread(call, detail string, f func() Status) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var before int32
	if st := d.rt.api.HipGetDevice(&before); st != Success {
		return d.rt.fail("hipGetDevice", st, "for %s", call)
	}
	if before != d.index {
		if st := d.rt.api.HipSetDevice(d.index); st != Success {
			return d.rt.fail("hipSetDevice", st, "device %d, for %s", d.index, call)
		}
		// For other users of the thread. Nothing here depends on it, so a failure is theirs to meet.
		defer func() { _ = d.rt.api.HipSetDevice(before) }()
	}
	st := f()
	if st == Success {
		return nil
	}
	if detail != "" {
		detail += " "
	}
	return d.rt.fail(call, st, "%son device %d", detail, d.index)
}
