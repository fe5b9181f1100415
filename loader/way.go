package loader

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/kernels"
	"github.com/gguf2gpu/gguf2gpu/kernels/gpu"
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
	streams(i int) []*amdhip.Stream // of the pipeline's model, or of its copy i-1
	scratchBytes() uint64           // device memory that is not the model's
	idle(deadline time.Time) bool   // waits until nothing is on its way any more; false: the deadline came first
	stats() pinned.Stats
	close() error
	abandon() // frees nothing: the device may still be reading
}

// staged goes through pinned staging buffers and copies on several streams.
type staged struct {
	p       *pipeline
	pool    *pinned.Pool
	targets []*target // every buffer goes to each of them
}

// target is a device that a staged way leads to.
type target struct {
	model   *Model
	set     *gpu.Set // nil: nothing is expanded on the device
	scratch *scratch // likewise
	on      []*amdhip.Stream
}

// newStaged makes the pool, the streams, and what it takes to expand on the device.
func newStaged(p *pipeline) (_ *staged, err error) {
	s := &staged{p: p}
	var more []*amdhip.Device
	for _, w := range p.copies {
		more = append(more, w.dev)
	}
	if s.pool, err = newPool(p.model, p.opts.Staging, more...); err != nil {
		return nil, err
	}
	for i, w := range append([]*Model{p.model}, p.copies...) {
		t := &target{model: w}
		s.targets = append(s.targets, t)
		if p.sets != nil {
			t.set = p.sets[i]
		}
		if err := t.open(p.opts.Streams, s.pool.BufferBytes()); err != nil {
			return nil, errors.Join(err, s.close())
		}
	}
	return s, nil
}

// open makes the streams, and the scratch memory if the device is to expand chunks of so many bytes.
func (t *target) open(streams, chunk int) (err error) {
	if t.set != nil {
		if t.scratch, err = newScratch(t.model.dev, t.model.plan.scratchSlots(), chunk); err != nil {
			return err
		}
		streams = len(t.scratch.slots)
	}
	for range streams {
		stream, err := t.model.dev.NewStream()
		if err != nil {
			return err
		}
		t.on = append(t.on, stream)
	}
	return nil
}

// newPool returns a staging pool for w's bytes, no larger than they are. Its buffers go to more devices, if there are any.
func newPool(w *Model, budget int64, more ...*amdhip.Device) (*pinned.Pool, error) {
	bytes := min(alignUp(w.plan.DeviceBytes, pinned.MinBufferBytes), 1<<40)
	chunk := min(w.plan.opts.Chunk, max(pinned.MinBufferBytes, int(bytes)))
	return pinned.New(w.dev, pinned.Options{
		Budget: min(budget, int64(bytes)+int64(chunk)-1), BufferBytes: chunk,
		Timing: w.plan.opts.Trace != nil, Logger: w.plan.opts.Logger, More: more,
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
	var on [4]*amdhip.Stream
	streams := on[:0]
	for n, t := range s.targets {
		stream := t.on[i%len(t.on)]
		if t.scratch != nil { // what belongs together follows each other on the stream
			slot := &t.scratch.slots[i%len(t.on)]
			slot.mu.Lock()
			defer slot.mu.Unlock()
		}
		copied, err := t.issue(stream, buf, i, c)
		if err != nil {
			if n == 0 && !copied {
				buf.Release() // else the streams are drained before the buffer is freed
			}
			return s.of(t, err)
		}
		streams = append(streams, stream)
	}
	if !buf.Pinned() {
		p.unpinned.Add(int64(len(streams)))
	}
	p.flying.Add(1)
	if err := buf.ReleaseAfterAll(streams, s, i); err != nil {
		p.flying.Add(-1)
		return err // the streams are drained before the buffer is freed
	}
	for _, t := range s.targets {
		t.model.issued.pass(c)
	}
	return nil
}

// issue enqueues what brings chunk i, which is in buf, to the device. Copied is whether the device may be reading buf.
func (t *target) issue(stream *amdhip.Stream, buf *pinned.Buffer, i int, c *chunk) (copied bool, err error) {
	to := t.model.ptr(c.arena, c.off)
	if c.expand {
		to = t.scratch.slots[i%len(t.on)].ptr
	}
	if err := buf.CopyToDevice(stream, to, c.bytes); err != nil {
		return false, err
	}
	if c.expand {
		return true, t.expand(stream, c, to)
	}
	return true, nil
}

// of says which of several devices an error is of.
func (s *staged) of(t *target, err error) error {
	if len(s.targets) == 1 {
		return err
	}
	return fmt.Errorf("device %d: %w", t.model.dev.Index(), err)
}

// Done is called by the pool when the copy of chunk i has ended.
func (s *staged) Done(i int, took time.Duration, err error) {
	p := s.p
	p.flying.Add(-1)
	c := &p.model.chunks[i]
	if p.opts.Trace != nil { // how long is the device's word, when is where the pool saw the end
		now := time.Now()
		p.opts.Trace.add(fmt.Sprintf("%sstream %d", p.label, i%len(s.targets[0].on)), "copy", now.Add(-took), now, p.name(c), c.bytes)
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

func (s *staged) streams(i int) []*amdhip.Stream { return s.targets[i].on }

func (s *staged) scratchBytes() uint64 {
	if s.targets[0].scratch == nil {
		return 0
	}
	return s.targets[0].scratch.mem.Size()
}

func (s *staged) idle(deadline time.Time) bool {
	idle := true
	for _, t := range s.targets {
		for _, stream := range t.on {
			idle = idle && !errors.Is(drain(stream, deadline), ErrStalled)
		}
	}
	return idle
}

func (s *staged) stats() pinned.Stats { return s.pool.Stats() }

// close gives back streams and buffers; the streams must be idle.
func (s *staged) close() error {
	errs := []error{s.pool.Close()}
	for _, t := range s.targets {
		for _, stream := range t.on {
			errs = append(errs, stream.Close())
		}
		if t.scratch != nil {
			errs = append(errs, t.scratch.mem.Close())
		}
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

func (s *shared) uncached() bool               { return true }
func (s *shared) chunkBytes() int              { return s.p.opts.Chunk }
func (s *shared) streams(int) []*amdhip.Stream { return nil }
func (s *shared) scratchBytes() uint64         { return 0 }
func (s *shared) idle(time.Time) bool          { return true }
func (s *shared) stats() pinned.Stats          { return pinned.Stats{} }
func (s *shared) close() error                 { return nil }
func (s *shared) abandon()                     {}
