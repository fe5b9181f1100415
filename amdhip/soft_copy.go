package amdhip

import (
	"sync"
	"time"
)

// memcpyDeviceToDeviceNoCU is a kind that HIP knows from 6.1 on.
const memcpyDeviceToDeviceNoCU memcpyKind = 1024

// link is one direction between the host and a device.
type link struct {
	rate float64 // bytes per second, 0: unlimited; set once

	mu   sync.Mutex
	free time.Duration // when the last transfer that was given to the link ends, on the model's clock
}

// duration is what n bytes take on the link.
func (l *link) duration(n int) time.Duration {
	if l.rate == 0 {
		return 0
	}
	return time.Duration(float64(n) / l.rate * float64(time.Second))
}

// reserve gives the link to a transfer of n bytes from time t on, or from when it is free, and returns when that is.
func (l *link) reserve(t time.Duration, n int) time.Duration {
	if l.rate == 0 {
		return t
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	t = max(t, l.free)
	l.free = t + l.duration(n)
	return t
}

// piece is how many bytes are moved at a time: with a modelled link what it moves in a quarter of a millisecond, so that
// the last bytes of a long copy are read when their time has come; without, enough to be fast and to notice Close.
func (l *link) piece() int {
	if l == nil || l.rate == 0 {
		return 64 << 20
	}
	return max(64<<10, int(min(l.rate/4000, 64<<20)))
}

// operand is the memory at one end of an operation.
type operand struct {
	addr, n uintptr
	raw     bool // host memory that HIP does not know: the address is taken as it is
}

// hold resolves an operand when the operation executes. Memory that is gone by then is an illegal address.
func (s *softStream) hold(o operand) (held, Status) {
	if o.raw {
		return held{mem: bytesAt(o.addr, o.n)}, Success
	}
	h, st := s.sw.hold(o.addr, o.n)
	if st != Success {
		return held{}, ErrIllegalAddress
	}
	return h, Success
}

// copy executes opCopy. A piece is read when its time on the link begins, so memory that is reused too early shows.
func (s *softStream) copy(op *softOp) Status {
	dst, st := s.hold(op.dst)
	if st != Success {
		return st
	}
	defer s.sw.release(dst.block)
	src, st := s.hold(op.src)
	if st != Success {
		return st
	}
	defer s.sw.release(src.block)

	n, begin, way := len(dst.mem), s.end, op.links[0]
	if way != nil {
		begin += s.sw.opts.LinkLatency
	}
	for _, l := range op.links {
		if l != nil {
			begin = l.reserve(begin, n)
		}
	}
	if way != nil && way.rate > 0 && !op.dst.raw {
		prefault(dst.mem) // while another stream has the link, so that fresh pages do not cost time on it: a device has none
	}
	s.wakeAt(begin)
	piece, started := way.piece(), s.sw.now()
	for off := 0; off < n; off += piece {
		if way != nil && off > 0 {
			s.sleepUntil(begin + way.duration(off))
		}
		if s.stopped() {
			return ErrDeinitialized
		}
		to := min(off+piece, n)
		if st := guarded(func() { copy(dst.mem[off:to], src.mem[off:to]) }); st != Success {
			return st
		}
	}
	if way != nil && way.rate > 0 {
		s.end = begin + way.duration(n)
		s.wakeAt(s.end)
	} else {
		s.end = begin + s.sw.now() - started
	}
	if s.stopped() {
		return ErrDeinitialized
	}
	s.sw.copies.Add(1)
	s.sw.copied.Add(uint64(n))
	return Success
}

// set executes opSet.
func (s *softStream) set(op *softOp) Status {
	dst, st := s.hold(op.dst)
	if st != Success {
		return st
	}
	defer s.sw.release(dst.block)
	started := s.sw.now()
	st = guarded(func() { fill(dst.mem, op.value) })
	s.end += s.sw.now() - started
	return st
}

// guarded runs f, which touches memory that may not be there any more, on a goroutine with debug.SetPanicOnFault.
func guarded(f func()) (st Status) {
	defer func() {
		if e := recover(); e != nil {
			if _, fault := e.(interface{ Addr() uintptr }); !fault {
				panic(e)
			}
			st = ErrIllegalAddress
		}
	}()
	f()
	return Success
}

// memcpyAsync returns before the copy is done, unless a host side is not wholly pinned: then it waits for the stream,
// as HIP did before 6.3 and does since for most such copies.
func (sw *Software) memcpyAsync(dst, src, n uintptr, kind memcpyKind, stream uintptr) Status {
	late, st := sw.enter("hipMemcpyAsync")
	if st != Success {
		return st
	}
	m, st := sw.enqueueCopy(dst, src, n, kind, stream, late)
	if m != nil {
		return m.result()
	}
	return st
}

// enqueueCopy puts a copy on the stream. If the caller has to wait for it, it returns the marker to wait for.
func (sw *Software) enqueueCopy(dst, src, n uintptr, kind memcpyKind, stream uintptr, late delayed) (*marker, Status) {
	sw.mu.Lock()
	defer sw.mu.Unlock()
	s, st := sw.stream(stream)
	if st != Success {
		return nil, st
	}
	if kind < memcpyHostToHost || kind > memcpyDefault && kind != memcpyDeviceToDeviceNoCU {
		return nil, ErrInvalidMemcpyDirection
	}
	if n == 0 {
		return nil, Success
	}
	to, st := sw.usable(dst, n, s.dev)
	if st != Success {
		return nil, st
	}
	from, st := sw.usable(src, n, s.dev)
	if st != Success {
		return nil, st
	}
	if !kind.fits(to, from) {
		return nil, ErrInvalidValue
	}
	op := softOp{kind: opCopy, late: late, dst: operand{dst, n, to == nil}, src: operand{src, n, from == nil}}
	switch {
	case to.onDevice() && !from.onDevice():
		op.links[0] = &s.dev.up
	case from.onDevice() && !to.onDevice():
		op.links[0] = &s.dev.down
	}
	if to == nil || from == nil {
		sw.unpinned.Add(1)
		op.marker = newMarker()
	}
	return op.marker, s.enqueue(op)
}

// usable is lookup for an operation of dev that is enqueued now. sw.mu is held.
func (sw *Software) usable(addr, n uintptr, dev *softDevice) (*region, Status) {
	r, st := sw.lookup(addr, n)
	if st != Success || r == nil {
		return nil, st
	}
	if r.going || r.onDevice() && r.dev != dev {
		return nil, ErrInvalidValue
	}
	return r, Success
}

// fits reports whether the kind of a copy suits its ends; nil is host memory that is not pinned.
func (k memcpyKind) fits(to, from *region) bool {
	switch k {
	case memcpyHostToHost:
		return !to.onDevice() && !from.onDevice()
	case memcpyHostToDevice:
		return to.visible() && !from.onDevice()
	case memcpyDeviceToHost:
		return !to.onDevice() && from.visible()
	case memcpyDefault:
		return true
	}
	return to.visible() && from.visible()
}

// memcpyPeerAsync copies over both devices' links, through the host, whether or not peer access is enabled.
func (sw *Software) memcpyPeerAsync(dst uintptr, dstDevice int32, src uintptr, srcDevice int32, n, stream uintptr) Status {
	late, st := sw.enter("hipMemcpyPeerAsync")
	if st != Success {
		return st
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	s, st := sw.stream(stream)
	if st != Success {
		return st
	}
	toDev, fromDev := sw.byIndex(dstDevice), sw.byIndex(srcDevice)
	if toDev == nil || fromDev == nil {
		return ErrInvalidDevice
	}
	if n == 0 {
		return Success
	}
	to, st := sw.usable(dst, n, toDev)
	if st != Success {
		return st
	}
	from, st := sw.usable(src, n, fromDev)
	if st != Success {
		return st
	}
	if !to.onDevice() || !from.onDevice() || s.dev != toDev && s.dev != fromDev {
		return ErrInvalidValue
	}
	op := softOp{kind: opCopy, late: late, dst: operand{addr: dst, n: n}, src: operand{addr: src, n: n}}
	if toDev != fromDev {
		op.links = [2]*link{&fromDev.down, &toDev.up}
	}
	return s.enqueue(op)
}

func (sw *Software) memsetAsync(dst uintptr, value int32, n, stream uintptr) Status {
	late, st := sw.enter("hipMemsetAsync")
	if st != Success {
		return st
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	s, st := sw.stream(stream)
	if st != Success || n == 0 {
		return st
	}
	to, st := sw.usable(dst, n, s.dev)
	if st != Success {
		return st
	}
	if !to.visible() {
		return ErrInvalidValue
	}
	return s.enqueue(softOp{kind: opSet, late: late, dst: operand{addr: dst, n: n}, value: byte(value)})
}
