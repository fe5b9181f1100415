package loader

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/kernels"
	"github.com/gguf2gpu/gguf2gpu/pinned"
)

// way is how a worker's chunk gets to the device. A worker takes leave to fill a chunk before it takes the chunk itself, so
// that chunks are begun in file order by whoever may go on; then it fills the room it is given, and delivers.
type way interface {
	take(wk *worker) error            // waits until the worker may fill one
	room(wk *worker, c *chunk) []byte // where c goes; what is there before is undefined
	deliver(wk *worker, i int, c *chunk) error
	untake(wk *worker) // instead of deliver

	uncached() bool // whether what is written there leaves the caches before it is read
	chunkBytes() int
	streams() []*amdhip.Stream
	scratchBytes() uint64         // device memory that is not the model's
	idle(deadline time.Time) bool // waits until nothing is on its way any more; false: the deadline came first
	stats() pinned.Stats
	close() error
	abandon() // frees nothing: the device may still be reading
}

// staged goes through pinned staging buffers and copies on several streams.
type staged struct {
	p       *pipeline
	pool    *pinned.Pool
	on      []*amdhip.Stream
	scratch *scratch // nil: nothing is expanded on the device
}

// newStaged makes the pool, the streams, and what it takes to expand on the device.
func newStaged(p *pipeline) (_ *staged, err error) {
	w := p.model
	s := &staged{p: p}
	if s.pool, err = newPool(w, p.opts.Staging); err != nil {
		return nil, err
	}
	streams := p.opts.Streams
	if p.conv.gpu != nil {
		if s.scratch, err = newScratch(w.dev, w.plan.scratchSlots(), s.pool.BufferBytes()); err != nil {
			return nil, errors.Join(err, s.close())
		}
		streams = len(s.scratch.slots)
	}
	for range streams {
		stream, err := w.dev.NewStream()
		if err != nil {
			return nil, errors.Join(err, s.close())
		}
		s.on = append(s.on, stream)
	}
	return s, nil
}

// newPool returns a staging pool for w's bytes, no larger than they are.
func newPool(w *Model, budget int64) (*pinned.Pool, error) {
	bytes := min(alignUp(w.plan.DeviceBytes, pinned.MinBufferBytes), 1<<40)
	chunk := min(w.plan.opts.Chunk, max(pinned.MinBufferBytes, int(bytes)))
	return pinned.New(w.dev, pinned.Options{
		Budget: min(budget, int64(bytes)+int64(chunk)-1), BufferBytes: chunk,
		Timing: w.plan.opts.Trace != nil, Logger: w.plan.opts.Logger,
	})
}

func (s *staged) take(wk *worker) (err error) {
	wk.buf, err = s.pool.Acquire(s.p.ctx)
	return err
}

func (s *staged) room(wk *worker, c *chunk) []byte { return wk.buf.Bytes()[:c.bytes] }

func (s *staged) untake(wk *worker) { wk.buf.Release() }

func (s *staged) deliver(wk *worker, i int, c *chunk) error {
	p, buf := s.p, wk.buf
	stream := s.on[i%len(s.on)]
	if s.scratch != nil { // what belongs together follows each other on the stream
		slot := &s.scratch.slots[i%len(s.on)]
		slot.mu.Lock()
		defer slot.mu.Unlock()
	}
	to := p.model.ptr(c.arena, c.off)
	if c.expand {
		to = s.scratch.slots[i%len(s.on)].ptr
	}
	if err := buf.CopyToDevice(stream, to, c.bytes); err != nil {
		buf.Release()
		return err
	}
	if c.expand {
		if err := p.expand(stream, c, to); err != nil {
			return err // as below
		}
	}
	if !buf.Pinned() {
		p.unpinned.Add(1)
	}
	p.flying.Add(1)
	if err := buf.ReleaseAfter(stream, s, i); err != nil {
		p.flying.Add(-1)
		return err // the stream is drained before the buffer is freed
	}
	p.model.issued.pass(c)
	return nil
}

// Done is called by the pool when the copy of chunk i has ended.
func (s *staged) Done(i int, took time.Duration, err error) {
	p := s.p
	p.flying.Add(-1)
	c := &p.model.chunks[i]
	if p.opts.Trace != nil { // how long is the device's word, when is where the pool saw the end
		now := time.Now()
		p.opts.Trace.add(fmt.Sprintf("stream %d", i%len(s.on)), "copy", now.Add(-took), now, p.name(c), c.bytes)
	}
	if err != nil {
		p.cancel(p.chunkError(c, err))
		return
	}
	p.arrive(c)
}

// uncached compares the staging memory with the last-level cache. While it fits, the device reads most of it from there, and
// stores around the caches made loads a tenth slower; where it does not fit, ordinary stores read every line first.
func (s *staged) uncached() bool {
	cache := int64(kernels.CacheBytes())
	return cache > 0 && s.p.opts.Staging > cache
}

func (s *staged) chunkBytes() int { return s.pool.BufferBytes() }

func (s *staged) streams() []*amdhip.Stream { return s.on }

func (s *staged) scratchBytes() uint64 {
	if s.scratch == nil {
		return 0
	}
	return s.scratch.mem.Size()
}

func (s *staged) idle(deadline time.Time) bool {
	for _, stream := range s.on {
		if errors.Is(drain(stream, deadline), ErrStalled) {
			return false
		}
	}
	return true
}

func (s *staged) stats() pinned.Stats { return s.pool.Stats() }

// close gives back streams and buffers; the streams must be idle.
func (s *staged) close() error {
	errs := []error{s.pool.Close()}
	for _, stream := range s.on {
		errs = append(errs, stream.Close())
	}
	if s.scratch != nil {
		errs = append(errs, s.scratch.mem.Close())
	}
	return errors.Join(errs...)
}

func (s *staged) abandon() { s.pool.Abandon() }

// shared writes into memory that the device shares with the host: nothing is staged, nothing copied.
type shared struct {
	p  *pipeline
	mu sync.Mutex // chunks arrive one at a time, as they do by a pool
}

func (s *shared) take(*worker) error {
	if s.p.ctx.Err() != nil {
		return context.Cause(s.p.ctx)
	}
	return nil
}

func (s *shared) room(_ *worker, c *chunk) []byte {
	return s.p.model.arenas[c.arena].host[c.off : c.off+uint64(c.bytes)]
}

func (s *shared) untake(*worker) {}

func (s *shared) deliver(_ *worker, _ int, c *chunk) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.p.model.issued.pass(c)
	s.p.arrive(c)
	return nil
}

func (s *shared) uncached() bool            { return true }
func (s *shared) chunkBytes() int           { return s.p.opts.Chunk }
func (s *shared) streams() []*amdhip.Stream { return nil }
func (s *shared) scratchBytes() uint64      { return 0 }
func (s *shared) idle(time.Time) bool       { return true }
func (s *shared) stats() pinned.Stats       { return pinned.Stats{} }
func (s *shared) close() error              { return nil }
func (s *shared) abandon()                  {}
