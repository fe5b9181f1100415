package soft

import (
	"unsafe"

	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hostmem"
)

// The flags that HIP 6 knows.
const (
	hostMallocKnown   = 7 | hip.HostMallocNumaUser | hip.HostMallocCoherent | hip.HostMallocNonCoherent
	hostRegisterKnown = 15
)

func (sw *Software) hostMalloc(p *uintptr, n uintptr, flags uint32) hip.Status {
	if st := sw.call("hipHostMalloc"); st != hip.Success {
		return st
	}
	const either = hip.HostMallocCoherent | hip.HostMallocNonCoherent
	if p == nil || flags&^hostMallocKnown != 0 || flags&either == either {
		return hip.ErrInvalidValue
	}
	if n == 0 {
		*p = 0
		return hip.Success
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	if sw.closed {
		return hip.ErrDeinitialized
	}
	if st := sw.refuseCaptures(); st != hip.Success {
		return st
	}
	if n >= deviceSpace {
		return hip.ErrOutOfMemory
	}
	mem, err := hostmem.Map(int(n))
	if err != nil {
		return hip.ErrOutOfMemory
	}
	*p = uintptr(unsafe.Pointer(unsafe.SliceData(mem)))
	sw.insert(&region{addr: *p, kind: hostRegion, dev: sw.device(), block: &block{mem: mem, mapped: true}})
	return hip.Success
}

func (sw *Software) hostFree(p uintptr) hip.Status {
	if st := sw.call("hipHostFree"); st != hip.Success || p == 0 {
		return st
	}
	return sw.drop(p, hostRegion, hip.ErrInvalidValue)
}

func (sw *Software) hostRegister(p, n uintptr, flags uint32) hip.Status {
	if st := sw.call("hipHostRegister"); st != hip.Success {
		return st
	}
	if p == 0 || n == 0 || p+n < p || p+n > deviceBase || flags > hostRegisterKnown {
		return hip.ErrInvalidValue
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	if sw.closed {
		return hip.ErrDeinitialized
	}
	if st := sw.refuseCaptures(); st != hip.Success {
		return st
	}
	if sw.host.overlaps(p, n) {
		return hip.ErrHostMemoryAlreadyRegistered
	}
	sw.insert(&region{addr: p, kind: registeredRegion, dev: sw.device(), block: &block{mem: hostmem.At(p, n)}})
	return hip.Success
}

func (sw *Software) hostUnregister(p uintptr) hip.Status {
	if st := sw.call("hipHostUnregister"); st != hip.Success {
		return st
	}
	return sw.drop(p, registeredRegion, hip.ErrHostMemoryNotRegistered)
}

// hostGetDevicePointer answers with the host address itself, as HIP does on systems where both share one address space.
func (sw *Software) hostGetDevicePointer(d *uintptr, h uintptr, flags uint32) hip.Status {
	if st := sw.call("hipHostGetDevicePointer"); st != hip.Success {
		return st
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	r := sw.host.find(h)
	if d == nil || flags != 0 || r == nil {
		return hip.ErrInvalidValue
	}
	r.given = true
	*d = h
	return hip.Success
}
