// Package pinned keeps a bounded pool of equal, page-locked staging buffers for copies between host and device.
//
// The pool is the only bound on host memory of whatever streams through it: [Pool.Acquire] blocks while every buffer is in
// flight, which is the back-pressure of the whole pipeline. A buffer is given back with the stream that reads it
// ([Buffer.ReleaseAfter]); it becomes free once the copy is done, never before. The buffer that became free last is taken
// first, since its memory is the likeliest to be in a cache still.
//
// Pinning is slow: 0.15 to 0.6 s per GiB through hipHostMalloc, so a pool that needs it starts with a few buffers and pins the
// others in the background while the first are already in use. Huge pages that are touched and then registered take a fifth of
// that; where they can be had, the pool makes all its buffers at once, since registering in the background disturbed
// the copies by more than it saved. Where memory cannot be pinned (locked-memory limits, containers) the pool
// makes do with fewer buffers, then smaller ones, and at last with plain memory, and says so once.
package pinned

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
)

const (
	// DefaultBudget is the size in bytes of all the buffers of a pool when Options leaves it open.
	DefaultBudget = 64 << 20
	// DefaultBufferBytes is the size of a buffer when Options leaves it open. Copies of 4 MiB and more reach the speed of a
	// PCIe link; at 1 MiB the gaps between copies already cost a tenth of it.
	DefaultBufferBytes = 4 << 20
	// MinBufferBytes is the smallest buffer that a pool makes, also when memory cannot be pinned in larger pieces.
	MinBufferBytes = 64 << 10

	// firstShare is the part of the buffers, one in so many, that New makes by hipHostMalloc before it returns.
	firstShare = 4

	// pollInterval is how long the reaper sleeps between two looks at copies in flight, at first. The pool holds a millisecond
	// and more of a fast link's work, so that this delay starves nobody. While nothing ends, each sleep is twice the last, up to
	// maxPollInterval: on a slow link waking up for nothing would take a fair part of a core.
	pollInterval    = 40 * time.Microsecond
	maxPollInterval = 8 * pollInterval
)

// ErrClosed is returned by Acquire after Close.
var ErrClosed = errors.New("pinned: pool is closed")

// Options describes a pool. The zero value is useful.
type Options struct {
	Budget      int64 // bytes of all buffers together; 0: DefaultBudget. At least one buffer is made.
	BufferBytes int   // bytes of a buffer; 0: DefaultBufferBytes; at least MinBufferBytes
	Timing      bool  // measure how long copies take on the device; see Completion
	// More are other devices of the same runtime that buffers are copied to, each buffer to one or to several at once.
	More   []*amdhip.Device
	Logger *slog.Logger // receives the warning when memory cannot be pinned; nil: silent
}

// Stats says what a pool holds.
type Stats struct {
	Buffers     int           // buffers made so far
	BufferBytes int           // size of each
	PinnedBytes int64         // bytes that are page-locked
	FirstPin    time.Duration // time until the first buffer was there: what the caller of New waited for
	TotalPin    time.Duration // time spent on making buffers, in the background too
}

// Completion is told that the copy of a buffer has ended. Done is called by the pool's own goroutine, in the order in which
// copies end; it must not block. The tag is the one given to ReleaseAfter. took is the time that the device worked on the
// buffer's copies, the longest of several devices', if Options.Timing is set, else 0. A non-nil error means that a copy failed.
type Completion interface {
	Done(tag int, took time.Duration, err error)
}

// Pool is a fixed budget of staging buffers. Its methods are safe for concurrent use.
type Pool struct {
	dev      *amdhip.Device   // that memory is made by
	devs     []*amdhip.Device // that it is copied to
	log      *slog.Logger
	timing   bool
	size     int           // of a buffer; fixed when New returns
	want     int           // buffers
	tokens   chan struct{} // one for each buffer in free
	inflight chan *Buffer  // to the reaper
	closing  chan struct{} // closed by Close
	grown    chan struct{} // closed when the background pinning has ended
	reaped   chan struct{} // closed when the reaper has ended
	closed   atomic.Bool
	lost     atomic.Bool // by Abandon

	mu    sync.Mutex
	free  []*Buffer // a stack
	all   []*Buffer
	slabs []*slab
	stats Stats
}

// Buffer is one staging buffer. Between Acquire and Release it belongs to the caller.
type Buffer struct {
	pool  *Pool
	mem   *amdhip.HostMemory // of the slab
	off   int                // in mem
	bytes []byte
	sides []side // one for each of the pool's devices
	to    Completion
	tag   int
	took  time.Duration // of the copies that have ended
	err   error
}

// side is what a buffer needs for copies to one device.
type side struct {
	begin  *amdhip.Event  // before the copy; nil without timing
	event  *amdhip.Event  // behind the copy
	stream *amdhip.Stream // of the copy in flight; nil: none
}

// New returns a pool with all or the first of its buffers ready; the others are pinned in the background. The caller must Close it. It
// fails only when not even plain memory can be had.
func New(dev *amdhip.Device, o Options) (*Pool, error) {
	if o.Budget <= 0 {
		o.Budget = DefaultBudget
	}
	if o.BufferBytes <= 0 {
		o.BufferBytes = DefaultBufferBytes
	}
	if o.BufferBytes < MinBufferBytes {
		return nil, fmt.Errorf("pinned: buffers of %d bytes: at least %d are needed", o.BufferBytes, MinBufferBytes)
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	p := &Pool{
		dev: dev, devs: append([]*amdhip.Device{dev}, o.More...), log: o.Logger, timing: o.Timing, size: o.BufferBytes,
		want:    int(max(1, o.Budget/int64(o.BufferBytes))),
		closing: make(chan struct{}), grown: make(chan struct{}), reaped: make(chan struct{}),
	}
	p.tokens = make(chan struct{}, p.want)
	p.inflight = make(chan *Buffer, p.want)
	if err := p.first(); err != nil {
		return nil, errors.Join(err, p.release())
	}
	p.stats.FirstPin = p.stats.TotalPin
	go p.grow()
	go p.reap()
	return p, nil
}

// first makes the first buffers: all of them at once where memory can be registered, else a part of them by hipHostMalloc,
// else fewer, else smaller ones, else plain memory.
func (p *Pool) first() error {
	asked := p.size
	regErr := p.add(p.want, registeredSlab)
	if !errors.Is(regErr, errCannotPin) {
		return regErr
	}
	n := (p.want + firstShare - 1) / firstShare
	pinErr := p.add(n, pinnedSlab)
	for err := pinErr; err != nil; {
		if !errors.Is(err, errCannotPin) {
			return err
		}
		switch {
		case n > 1:
			n /= 2
		case p.size/2 >= MinBufferBytes:
			p.size /= 2
		default:
			p.size = asked
			if err := p.add(p.want, plainSlab); err != nil {
				return fmt.Errorf("pinned: no staging memory: %w", errors.Join(regErr, pinErr, err))
			}
			p.log.Warn("host memory cannot be pinned, copies will be slow: raise the locked-memory limit (ulimit -l)",
				"error", errors.Join(regErr, pinErr))
			return nil
		}
		err = p.add(n, pinnedSlab)
	}
	if p.size != asked {
		p.log.Warn("host memory can be pinned in small pieces only, copies will be slower: raise the locked-memory limit (ulimit -l)",
			"buffer_bytes", p.size, "error", pinErr)
	}
	return nil
}

// grow makes the buffers after the first. It ends when all are made, when no more can be made, or with Close.
func (p *Pool) grow() {
	defer close(p.grown)
	have := len(p.all)
	for n := have; have < p.want; {
		select {
		case <-p.closing:
			return
		default:
		}
		n = min(n, p.want-have)
		err := p.add(n, pinnedSlab)
		if err == nil {
			have += n
			continue
		}
		if n /= 2; n == 0 || !errors.Is(err, errCannotPin) {
			p.log.Warn("fewer staging buffers than asked for: memory cannot be pinned", "buffers", have, "wanted", p.want, "error", err)
			return
		}
	}
}

// add makes n more buffers in a slab of their own and puts them among the free ones; on an error it makes none.
func (p *Pool) add(n int, alloc func(dev *amdhip.Device, n int) (*slab, error)) error {
	start := time.Now()
	s, err := alloc(p.dev, n*p.size)
	if err != nil {
		return err
	}
	bytes := s.mem.Bytes()
	buffers := make([]*Buffer, n)
	for i := range buffers {
		off := i * p.size
		buffers[i] = &Buffer{
			pool: p, mem: s.mem, off: off, bytes: bytes[off : off+p.size : off+p.size], sides: make([]side, len(p.devs)),
		}
		if err := buffers[i].makeEvents(); err != nil {
			errs := []error{err}
			for _, b := range buffers[:i+1] {
				errs = append(errs, b.closeEvents())
			}
			return errors.Join(append(errs, s.close())...)
		}
	}
	p.mu.Lock()
	p.slabs = append(p.slabs, s)
	p.all = append(p.all, buffers...)
	p.stats.TotalPin += time.Since(start)
	p.mu.Unlock()
	for _, b := range buffers {
		b.Release()
	}
	return nil
}

// makeEvents makes the buffer's events.
func (b *Buffer) makeEvents() (err error) {
	o := amdhip.EventOptions{Timing: b.pool.timing}
	for i, dev := range b.pool.devs {
		s := &b.sides[i]
		if b.pool.timing {
			if s.begin, err = dev.NewEvent(o); err != nil {
				return err
			}
		}
		if s.event, err = dev.NewEvent(o); err != nil {
			return err
		}
	}
	return nil
}

// closeEvents frees the events that were made.
func (b *Buffer) closeEvents() error {
	var errs []error
	for _, s := range b.sides {
		for _, ev := range []*amdhip.Event{s.begin, s.event} {
			if ev != nil {
				errs = append(errs, ev.Close())
			}
		}
	}
	return errors.Join(errs...)
}

// reap waits for the copies in flight and sets their buffers free. It polls: a goroutine that waits inside the runtime for
// an event spins on a core with some versions of HIP, and could not be called back. It ends with Close, after the last copy.
func (p *Pool) reap() {
	defer close(p.reaped)
	var flying []*Buffer
	wait := pollInterval
	for {
		if len(flying) == 0 {
			select {
			case b := <-p.inflight:
				flying = append(flying, b)
			case <-p.closing:
				select { // a copy may have been handed over just before
				case b := <-p.inflight:
					flying = append(flying, b)
				default:
					return
				}
			}
		}
		for more := true; more; {
			select {
			case b := <-p.inflight:
				flying = append(flying, b)
			default:
				more = false
			}
		}
		if p.lost.Load() {
			return
		}
		if left := p.look(flying); len(left) == len(flying) {
			pause(wait)
			wait = min(2*wait, maxPollInterval)
		} else {
			clear(flying[len(left):])
			flying, wait = left, pollInterval
		}
	}
}

// look frees those buffers whose copies have ended and returns the others, in order.
func (p *Pool) look(flying []*Buffer) []*Buffer {
	left := flying[:0]
	for _, b := range flying {
		if !b.ended(left) {
			left = append(left, b)
			continue
		}
		to, tag, took, err := b.to, b.tag, b.took, b.err
		b.Release()
		to.Done(tag, took, err)
	}
	return left
}

// ended reports whether all copies of b have ended, one way or the other. Copies on one stream end in order, so a stream is not asked
// when one of the buffers that were before b, and are not free, waits for it.
func (b *Buffer) ended(before []*Buffer) bool {
	all := true
	for i := range b.sides {
		s := &b.sides[i]
		if s.stream == nil {
			continue
		}
		waits := slices.ContainsFunc(before, func(l *Buffer) bool { return l.sides[i].stream == s.stream })
		if waits || !b.look(s) {
			all = false
		}
	}
	return all
}

// look asks whether the copy of side s has ended, and remembers how.
func (b *Buffer) look(s *side) bool {
	done, err := s.event.Query()
	if !done && err == nil {
		return false
	}
	if err == nil && s.begin != nil {
		var took time.Duration
		took, err = s.event.Elapsed(s.begin)
		b.took = max(b.took, took)
	}
	if err != nil && len(b.sides) > 1 {
		err = fmt.Errorf("device %d: %w", s.event.Device().Index(), err)
	}
	b.err = errors.Join(b.err, err)
	s.stream = nil
	return true
}

// Acquire returns a free buffer, waiting for one while all are in use. It returns the cause of ctx's end, or ErrClosed.
func (p *Pool) Acquire(ctx context.Context) (*Buffer, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if p.closed.Load() {
		return nil, ErrClosed
	}
	select {
	case <-p.tokens:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-p.closing:
		return nil, ErrClosed
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	b := p.free[len(p.free)-1]
	p.free = p.free[:len(p.free)-1]
	return b, nil
}

// BufferBytes is the size of each buffer: the one asked for, or less when only smaller pieces could be pinned.
func (p *Pool) BufferBytes() int { return p.size }

// Stats returns what the pool holds now.
func (p *Pool) Stats() Stats {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.stats
	s.Buffers, s.BufferBytes = len(p.all), p.size
	for _, sl := range p.slabs {
		if sl.mem.Pinned() {
			s.PinnedBytes += int64(sl.mem.Len())
		}
	}
	return s
}

// Close waits for the copies that are in flight and frees every buffer; those that callers still hold become invalid. If
// a copy never ends, Close never returns: call Abandon before. It is idempotent.
func (p *Pool) Close() error {
	if !p.closed.Swap(true) {
		close(p.closing)
	}
	<-p.grown
	<-p.reaped
	return p.release()
}

// release frees every slab and event, unless the device may still use them.
func (p *Pool) release() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var errs []error
	if !p.lost.Load() {
		for _, b := range p.all {
			errs = append(errs, b.closeEvents())
		}
		for _, s := range p.slabs {
			errs = append(errs, s.close())
		}
	}
	p.all, p.slabs = nil, nil
	return errors.Join(errs...)
}

// Abandon gives up on copies that do not end: Close then returns without freeing anything, since the device may still
// read or write any of the buffers, and freeing would wait for it. Their memory is lost until the process ends.
func (p *Pool) Abandon() { p.lost.Store(true) }

// Bytes is the whole buffer; it is valid until Release.
func (b *Buffer) Bytes() []byte { return b.bytes }

// Pinned reports whether the buffer is page-locked.
func (b *Buffer) Pinned() bool { return b.mem.Pinned() }

// CopyToDevice starts a copy of the buffer's first n bytes to dst.
func (b *Buffer) CopyToDevice(s *amdhip.Stream, dst amdhip.DevicePtr, n int) error {
	if begin := b.side(s).begin; begin != nil {
		if err := s.Record(begin); err != nil {
			return err
		}
	}
	return s.CopyToDevice(dst, b.mem, b.off, n)
}

// side is that of s's device, which must be one of the pool's.
func (b *Buffer) side(s *amdhip.Stream) *side {
	for i := range b.sides[1:] {
		if b.pool.devs[1+i].Index() == s.Device().Index() {
			return &b.sides[1+i]
		}
	}
	return &b.sides[0]
}

// CopyToHost starts a copy of n bytes from src to the beginning of the buffer.
func (b *Buffer) CopyToHost(s *amdhip.Stream, src amdhip.DevicePtr, n int) error {
	return s.CopyToHost(b.mem, b.off, src, n)
}

// Release gives back a buffer that no copy uses.
func (b *Buffer) Release() {
	b.to, b.took, b.err = nil, 0, nil
	p := b.pool
	p.mu.Lock()
	p.free = append(p.free, b)
	p.mu.Unlock()
	p.tokens <- struct{}{}
}

// ReleaseAfter gives the buffer back once everything enqueued on s so far has ended, and then tells to, with tag. When it
// returns an error, the end of the copy cannot be observed: the buffer stays out of circulation until the pool is closed, and the
// caller must make sure that s is idle before that.
func (b *Buffer) ReleaseAfter(s *amdhip.Stream, to Completion, tag int) error {
	return b.ReleaseAfterAll([]*amdhip.Stream{s}, to, tag)
}

// ReleaseAfterAll is ReleaseAfter for copies on several streams, each of another one of the pool's devices. The buffer is given back
// when all have ended; one that has failed does not spare the others.
func (b *Buffer) ReleaseAfterAll(on []*amdhip.Stream, to Completion, tag int) error {
	for _, s := range on {
		if err := s.Record(b.side(s).event); err != nil {
			return err
		}
	}
	for _, s := range on {
		b.side(s).stream = s
	}
	b.to, b.tag = to, tag
	b.pool.inflight <- b
	return nil
}
