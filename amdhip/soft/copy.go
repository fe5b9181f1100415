package soft

import (
	"sync"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hostmem"
)

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

// reserve gives the link to a transfer of n bytes, from time t on or from when the link is free, and returns which of
// the two is later.
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

// piece is how many bytes are moved at a time. With a modelled link it is what the link moves in a quarter of a
// millisecond, so that the last bytes of a long copy are read when it is their turn. Without one it is large enough to
// be fast, and small enough for Close not to wait long.
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
	write   bool // the operation writes it
}

// hold returns the memory of an operand for an operation of dev that executes now. Memory that is gone, or that the
// device may not use any more, is an illegal address.
func (s *stream) hold(o operand, dev *device) (held, hip.Status) {
	if o.raw {
		return held{mem: hostmem.At(o.addr, o.n)}, hip.Success
	}
	h, st := s.sw.hold(o.addr, o.n, func(r *region) bool { return r.reachable(dev, o.write) })
	if st != hip.Success {
		return held{}, hip.ErrIllegalAddress
	}
	return h, hip.Success
}

// copy executes opCopy. Each piece is read when its time on the link begins, so that memory that is used again too
// early shows in the result.
func (s *stream) copy(op *operation) hip.Status {
	dst, st := s.hold(op.dst, op.toDev)
	if st != hip.Success {
		return st
	}
	defer s.sw.release(dst.block)
	src, st := s.hold(op.src, op.fromDev)
	if st != hip.Success {
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
			return hip.ErrDeinitialized
		}
		to := min(off+piece, n)
		if st := guarded(func() { copy(dst.mem[off:to], src.mem[off:to]) }); st != hip.Success {
			return st
		}
	}
	if op.links == [2]*link{&op.toDev.up} {
		s.sw.deliver(op.toDev, dst.mem)
	}
	if way != nil && way.rate > 0 {
		s.end = begin + way.duration(n)
		s.wakeAt(s.end)
	} else {
		s.end = begin + s.sw.now() - started
	}
	if s.stopped() {
		return hip.ErrDeinitialized
	}
	s.sw.copies.Add(1)
	s.sw.copied.Add(uint64(n))
	return hip.Success
}

// set executes opSet.
func (s *stream) set(op *operation) hip.Status {
	dst, st := s.hold(op.dst, op.toDev)
	if st != hip.Success {
		return st
	}
	defer s.sw.release(dst.block)
	started := s.sw.now()
	st = guarded(func() { fill(dst.mem, op.value) })
	s.end += s.sw.now() - started
	return st
}

// guarded runs f, which touches memory that may be unmapped already. The goroutine has debug.SetPanicOnFault.
func guarded(f func()) (st hip.Status) {
	defer func() {
		if e := recover(); e != nil {
			if _, fault := e.(interface{ Addr() uintptr }); !fault {
				panic(e)
			}
			st = hip.ErrIllegalAddress
		}
	}()
	f()
	return hip.Success
}

// memcpyAsync returns before the copy is done if its host side is pinned. Else it waits for the stream, as HIP did
// before 6.3 and still does for most such copies.
func (sw *Software) memcpyAsync(dst, src, n uintptr, kind hip.MemcpyKind, stream uintptr) hip.Status {
	late, st := sw.enter("hipMemcpyAsync")
	if st != hip.Success {
		return st
	}
	m, st := sw.enqueueCopy(dst, src, n, kind, stream, late)
	if m != nil {
		return m.result()
	}
	return st
}

// enqueueCopy puts a copy on the stream. If the caller must wait for the copy, it returns the marker to wait for.
func (sw *Software) enqueueCopy(
	dst, src, n uintptr, kind hip.MemcpyKind, stream uintptr, late delayed,
) (*marker, hip.Status) {
	sw.mu.Lock()
	defer sw.mu.Unlock()
	s, st := sw.stream(stream)
	if st != hip.Success {
		return nil, st
	}
	if kind < hip.MemcpyHostToHost || kind > hip.MemcpyDefault && kind != hip.MemcpyDeviceToDeviceNoCU {
		return nil, hip.ErrInvalidMemcpyDirection
	}
	if n == 0 {
		return nil, hip.Success
	}
	to, st := sw.usable(dst, n, s.dev, true)
	if st != hip.Success {
		return nil, st
	}
	from, st := sw.usable(src, n, s.dev, false)
	if st != hip.Success {
		return nil, st
	}
	if !fits(kind, to, from) {
		return nil, hip.ErrInvalidValue
	}
	op := operation{
		kind: opCopy, late: late, toDev: s.dev, fromDev: s.dev,
		dst: operand{dst, n, to == nil, true}, src: operand{src, n, from == nil, false},
	}
	switch {
	case to.onDevice() && !from.onDevice():
		op.links[0] = &s.dev.up
	case from.onDevice() && !to.onDevice():
		op.links[0] = &s.dev.down
	}
	if to == nil || from == nil {
		if st := s.refuseCapture(); st != hip.Success { // it would wait for the copy
			return nil, st
		}
		sw.unpinned.Add(1)
		op.marker = newMarker()
	}
	st = s.put(op)
	return op.marker, st
}

// usable is lookup for an operation of dev that is enqueued now. write says whether the operation writes the memory.
// sw.mu is held.
func (sw *Software) usable(addr, n uintptr, dev *device, write bool) (*region, hip.Status) {
	r, st := sw.lookup(addr, n)
	if st != hip.Success || r == nil {
		return nil, st
	}
	if r.going || !r.reachable(dev, write) {
		return nil, hip.ErrInvalidValue
	}
	return r, hip.Success
}

// fits reports whether the kind of a copy suits its two ends. A nil region is host memory that is not pinned.
func fits(k hip.MemcpyKind, to, from *region) bool {
	switch k {
	case hip.MemcpyHostToHost:
		return !to.onDevice() && !from.onDevice()
	case hip.MemcpyHostToDevice:
		return to.visible() && !from.onDevice()
	case hip.MemcpyDeviceToHost:
		return !to.onDevice() && from.visible()
	case hip.MemcpyDefault:
		return true
	}
	return to.visible() && from.visible()
}

// memcpyPeerAsync copies over both devices' links, through the host, whether or not peer access is enabled.
func (sw *Software) memcpyPeerAsync(
	dst uintptr, dstDevice int32, src uintptr, srcDevice int32, n, stream uintptr,
) hip.Status {
	late, st := sw.enter("hipMemcpyPeerAsync")
	if st != hip.Success {
		return st
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	s, st := sw.stream(stream)
	if st != hip.Success {
		return st
	}
	toDev, fromDev := sw.byIndex(dstDevice), sw.byIndex(srcDevice)
	if toDev == nil || fromDev == nil {
		return hip.ErrInvalidDevice
	}
	if n == 0 {
		return hip.Success
	}
	to, st := sw.usable(dst, n, toDev, true)
	if st != hip.Success {
		return st
	}
	from, st := sw.usable(src, n, fromDev, false)
	if st != hip.Success {
		return st
	}
	if !to.onDevice() || !from.onDevice() || s.dev != toDev && s.dev != fromDev {
		return hip.ErrInvalidValue
	}
	op := operation{
		kind: opCopy, late: late, toDev: toDev, fromDev: fromDev,
		dst: operand{addr: dst, n: n, write: true}, src: operand{addr: src, n: n},
	}
	if toDev != fromDev {
		op.links = [2]*link{&fromDev.down, &toDev.up}
	}
	return s.put(op)
}

func (sw *Software) memsetAsync(dst uintptr, value int32, n, stream uintptr) hip.Status {
	late, st := sw.enter("hipMemsetAsync")
	if st != hip.Success {
		return st
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	s, st := sw.stream(stream)
	if st != hip.Success || n == 0 {
		return st
	}
	to, st := sw.usable(dst, n, s.dev, true)
	if st != hip.Success {
		return st
	}
	if !to.visible() {
		return hip.ErrInvalidValue
	}
	return s.put(operation{
		kind: opSet, late: late, toDev: s.dev, dst: operand{addr: dst, n: n, write: true}, value: byte(value),
	})
}
