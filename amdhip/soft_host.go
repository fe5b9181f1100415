package amdhip

import "unsafe"

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
