package pinned

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
)

const (
	// DefaultBudget is the size in bytes of all the buffers of a pool when Options leaves it open.
	DefaultBudget = 64 << 20
	// DefaultBufferBytes is the size of a buffer when Options leaves it open. Copies of 4 MiB and more reach the speed
	// of a PCIe link; at 1 MiB the gaps between copies already cost a tenth of it.
	DefaultBufferBytes = 4 << 20
	// MinBufferBytes is the smallest buffer that a pool makes, also when memory cannot be pinned in larger pieces.
	MinBufferBytes = 64 << 10
)

var (
	// ErrClosed is returned by Acquire after Close or Abandon.
	ErrClosed = errors.New("pinned: pool is closed")
	// ErrExhausted is returned by Acquire when every buffer is lost, see the package documentation.
	ErrExhausted = errors.New("pinned: every buffer is lost, because the end of its copies cannot be observed: " +
		"close the pool and make a new one")
)

// Options describes a pool. The zero value is useful.
type Options struct {
	Budget      int64 // bytes of all buffers together; 0: DefaultBudget. At least one buffer is made.
	BufferBytes int   // bytes of a buffer; 0: DefaultBufferBytes; at least MinBufferBytes
	Timing      bool  // measure how long copies take on the device; see Completion
	// More are other devices of the same runtime that buffers are copied to, each buffer to one or to several at once.
	// A device that is named twice counts once.
	More   []*amdhip.Device
	Logger *slog.Logger // receives the warning when memory cannot be pinned; nil: silent
}

// Stats says what a pool holds.
type Stats struct {
	Buffers     int           // buffers made so far
	BufferBytes int           // size of each
	PinnedBytes int64         // bytes that are page-locked
	InFlight    int           // buffers whose copies have not ended yet
	Lost        int           // buffers that are out of use until Close, see the package documentation
	FirstPin    time.Duration // time until the first buffer was there: what the caller of New waited for
	TotalPin    time.Duration // time spent on making buffers, in the background too
}

// Pool is a fixed budget of staging buffers. Its methods are safe for concurrent use.
type Pool struct {
	devs   []*amdhip.Device // that buffers are copied to; the first one makes their memory
	log    *slog.Logger
	timing bool
	size   int // of a buffer; fixed when New returns
	want   int // buffers

	tokens    chan struct{} // one for each slot in free
	handed    chan *Buffer  // from ReleaseAfter to the reaper; has room for all buffers
	closing   chan struct{} // closed by Close and Abandon: Acquire and grow end
	abandoned chan struct{} // closed by Abandon
	exhausted chan struct{} // closed when every buffer is lost
	grown     chan struct{} // closed when the background pinning has ended
	reaped    chan struct{} // closed when the reaper has ended
	shut      chan struct{} // closed when shutdown has ended
	shutErr   error         // what shutdown ended with; set before shut is closed
	shutOnce  sync.Once

	mu      sync.Mutex // guards the rest; never held during a call of HIP
	free    []*slot    // a stack
	all     []*slot
	slabs   []*slab
	left    int64 // bytes of slabs that have not been freed
	flying  int   // buffers in flight
	lost    int   // buffers that are lost
	growing bool  // more buffers may come
	stopped bool  // the reaper takes no more buffers
	closed  bool  // closing is closed
	givenUp bool  // abandoned is closed
	stats   Stats
}

// slot is the memory of one buffer, and what copies from and to it need. It outlives the Buffers that stand for it in
// turn.
type slot struct {
	mem   *amdhip.HostMemory // of the slab
	off   int                // in mem
	bytes []byte
	sides []side // one for each of the pool's devices, in their order
}

// side is what a slot needs for copies to and from one device.
type side struct {
	begin  *amdhip.Event  // before the first copy; nil without timing
	begun  bool           // begin was recorded since Acquire
	event  *amdhip.Event  // behind the copies
	stream *amdhip.Stream // whose copies are in flight; nil: none
}

// New returns a pool for copies to and from dev and the devices in Options.More, with all or the first of its buffers
// ready; the others are pinned in the background. The caller must Close it. It fails when Options are wrong, when HIP
// cannot make events, or when not even plain memory can be had.
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
	devs := []*amdhip.Device{dev}
	for _, d := range o.More {
		if d.Runtime() != dev.Runtime() {
			return nil, fmt.Errorf("pinned: device %d belongs to another runtime than device %d: make a pool for each runtime",
				d.Index(), dev.Index())
		}
		if !slices.ContainsFunc(devs, func(have *amdhip.Device) bool { return have.Index() == d.Index() }) {
			devs = append(devs, d)
		}
	}
	p := &Pool{
		devs: devs, log: o.Logger, timing: o.Timing, size: o.BufferBytes,
		want:    int(max(1, o.Budget/int64(o.BufferBytes))),
		closing: make(chan struct{}), abandoned: make(chan struct{}), exhausted: make(chan struct{}),
		grown: make(chan struct{}), reaped: make(chan struct{}), shut: make(chan struct{}), growing: true,
	}
	p.tokens = make(chan struct{}, p.want)
	p.handed = make(chan *Buffer, p.want)
	if err := p.first(); err != nil {
		return nil, errors.Join(err, p.freeAll())
	}
	p.stats.FirstPin = p.stats.TotalPin
	go p.grow()
	go p.reap()
	return p, nil
}

// Acquire returns a free buffer, and waits for one while all are in use. It returns the cause of ctx's end, ErrClosed,
// or ErrExhausted.
func (p *Pool) Acquire(ctx context.Context) (*Buffer, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	select {
	case <-p.closing:
		return nil, ErrClosed
	default:
	}
	select {
	case <-p.tokens:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-p.closing:
		return nil, ErrClosed
	case <-p.exhausted:
		return nil, ErrExhausted
	}
	p.mu.Lock()
	s := p.free[len(p.free)-1]
	p.free = p.free[:len(p.free)-1]
	p.mu.Unlock()
	for i := range s.sides {
		s.sides[i].begun = false
	}
	return &Buffer{pool: p, slot: s}, nil
}

// putBack makes the slot free.
func (p *Pool) putBack(s *slot) {
	p.mu.Lock()
	p.free = append(p.free, s)
	p.mu.Unlock()
	p.tokens <- struct{}{}
}

// lose notes that a buffer stays out of use.
func (p *Pool) lose() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lost++
	p.checkExhausted()
}

// checkExhausted closes exhausted when there is no buffer left to wait for. p.mu is held. Lost buffers do not come
// back, so this happens once: when the last one is lost, or when no more are made.
func (p *Pool) checkExhausted() {
	if !p.growing && p.lost == len(p.all) {
		close(p.exhausted)
	}
}

// BufferBytes is the size of each buffer: the one asked for, or less when only smaller pieces could be pinned.
func (p *Pool) BufferBytes() int { return p.size }

// Stats returns what the pool holds now.
func (p *Pool) Stats() Stats {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.stats
	s.Buffers, s.BufferBytes, s.InFlight, s.Lost = len(p.all), p.size, p.flying, p.lost
	for _, sl := range p.slabs {
		if sl.mem.Pinned() && !sl.freed {
			s.PinnedBytes += int64(sl.mem.Len())
		}
	}
	return s
}
