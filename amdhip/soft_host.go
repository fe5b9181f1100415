package amdhip

import (
	"encoding/binary"
	"os"
	"sync/atomic"
	"unsafe"
)

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
