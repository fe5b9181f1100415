package pinned

import (
	"fmt"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
)

// Buffer is one staging buffer from Acquire to release; it belongs to who acquired it, and one goroutine at a time may
// use it. Using it after its release, and releasing it twice, panics.
type Buffer struct {
	pool    *Pool
	slot    *slot
	state   atomic.Uint32 // one of the states below
	written bool          // the device was told to write to it

	// What ReleaseAfter was told, and what the reaper has found out.
	to     Completion
	tag    int
	took   time.Duration // of the copies that have ended
	err    error         // what they have failed with
	unsure bool          // whether the device has stopped writing
}

// The states of a Buffer. The memory behind it has a state of its own: it is free while it is in Pool.free.
const (
	owned    uint32 = iota // by who acquired it
	inFlight               // until its copies have ended
	released
	lost // ReleaseAfter has failed
)

// Completion is told that the copies of a buffer have ended. Done is called by the pool's own goroutine, in the order
// in which buffers become free; it must not block. The tag is the one given to ReleaseAfter. took is the time that the
// device worked on the buffer's copies, the longest of several devices', if Options.Timing is set, else 0. A non-nil
// error means that a copy has failed, or that its event could not be asked.
type Completion interface {
	Done(tag int, took time.Duration, err error)
}

// misuse panics, because call needs a buffer that is owned and state says that it is not.
func misuse(call string, state uint32) {
	why := map[uint32]string{
		inFlight: "that was given back by ReleaseAfter already, and whose copies are in flight",
		released: "that was released already",
		lost:     "that is lost: ReleaseAfter failed, so nobody knows when its copies end",
	}[state]
	panic(fmt.Sprintf("pinned: %s of a buffer %s", call, why))
}

// use panics unless the buffer is owned.
func (b *Buffer) use(call string) {
	if state := b.state.Load(); state != owned {
		misuse(call, state)
	}
}

// leave changes the state from owned to another one, or panics.
func (b *Buffer) leave(call string, to uint32) {
	if !b.state.CompareAndSwap(owned, to) {
		misuse(call, b.state.Load())
	}
}

// Bytes is the whole buffer. The slice is valid until the buffer is released or the pool is closed. While a copy that
// was started with the buffer has not ended, do not write to what the device reads, and do not touch what it writes to.
func (b *Buffer) Bytes() []byte {
	b.use("Bytes")
	return b.slot.bytes
}

// Pinned reports whether the buffer is page-locked.
func (b *Buffer) Pinned() bool { return b.slot.mem.Pinned() }

// CopyToDevice starts a copy of the buffer's first n bytes to dst. The stream must belong to one of the pool's devices,
// else the error matches amdhip.ErrInvalidDevice and nothing is started. After another error a copy may have been
// started: HIP does not say.
func (b *Buffer) CopyToDevice(s *amdhip.Stream, dst amdhip.DevicePtr, n int) error {
	return b.CopyRangeToDevice(s, dst, 0, n)
}

// CopyRangeToDevice starts a copy of n bytes of the buffer, from byte off on, to dst. Its errors are those of
// CopyToDevice.
func (b *Buffer) CopyRangeToDevice(s *amdhip.Stream, dst amdhip.DevicePtr, off, n int) error {
	if err := b.begin("CopyToDevice", s, off, n); err != nil {
		return err
	}
	return s.CopyToDevice(dst, b.slot.mem, b.slot.off+off, n)
}

// CopyToHost starts a copy of n bytes from src to the beginning of the buffer. Its errors are those of CopyToDevice.
func (b *Buffer) CopyToHost(s *amdhip.Stream, src amdhip.DevicePtr, n int) error {
	if err := b.begin("CopyToHost", s, 0, n); err != nil {
		return err
	}
	b.written = true
	return s.CopyToHost(b.slot.mem, b.slot.off, src, n)
}

// begin checks a copy on s of n bytes from byte off on and records when it starts, for call.
func (b *Buffer) begin(call string, s *amdhip.Stream, off, n int) error {
	b.use(call)
	if have := len(b.slot.bytes); off < 0 || off > have || n < 0 || n > have-off { // HIP would go on into the next buffer
		return fmt.Errorf("pinned: %s of %d bytes from byte %d on: the buffer has %d: %w",
			call, n, off, have, amdhip.ErrInvalidValue)
	}
	sd, err := b.side(s)
	if err != nil || sd.begin == nil || sd.begun {
		return err
	}
	err = s.Record(sd.begin)
	sd.begun = err == nil
	return err
}

// side returns the part of the slot that belongs to the device of s.
func (b *Buffer) side(s *amdhip.Stream) (*side, error) {
	dev := s.Device()
	for i, d := range b.pool.devs {
		if d.Index() == dev.Index() && d.Runtime() == dev.Runtime() {
			return &b.slot.sides[i], nil
		}
	}
	if dev.Runtime() != b.pool.devs[0].Runtime() {
		return nil, fmt.Errorf("pinned: a stream of device %d of another runtime: make a pool for each runtime: %w",
			dev.Index(), amdhip.ErrInvalidDevice)
	}
	var have []string
	for _, d := range b.pool.devs {
		have = append(have, strconv.Itoa(d.Index()))
	}
	return nil, fmt.Errorf("pinned: a stream of device %d: the pool was made for device %s: name it in Options.More: %w",
		dev.Index(), strings.Join(have, ", "), amdhip.ErrInvalidDevice)
}

// Release gives back a buffer that no copy uses.
func (b *Buffer) Release() {
	b.leave("Release", released)
	b.pool.putBack(b.slot)
}

// ReleaseAfter gives the buffer back once everything put on s so far has ended, and then tells to, unless it is nil,
// with tag. If it fails, to is not told, and the buffer is lost: it stays out of use until the pool is closed, because
// nobody can tell when the copies have ended. The caller must bring s to rest before it closes the pool. After the
// pool's Close or Abandon it fails.
func (b *Buffer) ReleaseAfter(s *amdhip.Stream, to Completion, tag int) error {
	return b.ReleaseAfterAll([]*amdhip.Stream{s}, to, tag)
}

// ReleaseAfterAll is ReleaseAfter for copies on several streams, at most one of each of the pool's devices, in any
// order. Name all streams on which copies were started. The buffer is given back when all have ended, also when some of
// them have failed. With no streams it is given back at once.
func (b *Buffer) ReleaseAfterAll(on []*amdhip.Stream, to Completion, tag int) error {
	b.leave("ReleaseAfter", inFlight)
	err := b.record(on)
	if err == nil {
		b.to, b.tag = to, tag
		err = b.pool.hand(b)
	}
	if err != nil {
		b.state.Store(lost)
		b.pool.lose()
	}
	return err
}

// record records an event on each of the streams.
func (b *Buffer) record(on []*amdhip.Stream) error {
	for i := range b.slot.sides {
		b.slot.sides[i].stream = nil
	}
	for _, s := range on {
		sd, err := b.side(s)
		if err != nil {
			return err
		}
		if sd.stream != nil {
			return fmt.Errorf("pinned: ReleaseAfterAll with two streams of device %d: let one of them wait for the other: %w",
				s.Device().Index(), amdhip.ErrInvalidValue)
		}
		sd.stream = s
	}
	for i := range b.slot.sides {
		if sd := &b.slot.sides[i]; sd.stream != nil {
			if err := sd.stream.Record(sd.event); err != nil {
				return err
			}
		}
	}
	return nil
}

// hand gives the buffer to the reaper. If it succeeds, the reaper will see the buffer.
func (p *Pool) hand(b *Buffer) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stopped {
		return ErrClosed
	}
	p.flying++
	p.handed <- b // has room for all buffers
	return nil
}
