package loader

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/internal/watch"
	"github.com/gguf2gpu/gguf2gpu/kernels"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
	"github.com/gguf2gpu/gguf2gpu/pinned"
)

// transport brings a worker's chunks to the devices. A worker acquires a buffer before it takes a chunk, so that chunks
// are begun in file order by whoever may go on; then it fills the buffer and submits it, or releases it.
type transport interface {
	acquire(wk *worker) error // waits until there is a buffer for the worker
	// Fills the buffer with c. ahead is the chunks that the same worker reads next.
	fill(wk *worker, c *plan.Chunk, ahead []plan.Chunk) error
	submit(wk *worker, i int, c *plan.Chunk) error
	release(wk *worker) // instead of submit

	uncached() bool // whether what is written to buffers leaves the caches before it is read
	streams(i int) []*amdhip.Stream
	// Waits until nothing of this load is on its way any more; false: the deadline came first.
	idle(deadline time.Time) bool
	// Gives back what it has made; a device may go on using it when it is stuck.
	close(limit *watch.Limit, stuck bool) error
}

// staged goes through pinned staging buffers and copies on several streams.
type staged struct {
	p *pipeline
	*stage
}

func (s *staged) acquire(wk *worker) (err error) {
	wk.buf, err = s.pool.Acquire(s.p.ctx)
	return err
}

// buffer returns a place in the worker's buffer. A chunk that is not converted begins there as far behind a page
// boundary as its bytes do in the file, if the buffer is large enough: then direct reads can bring them to their
// places.
func (s *staged) buffer(wk *worker, c *plan.Chunk) []byte {
	bytes := wk.buf.Bytes()
	wk.shift = 0
	if shift := s.p.offPage(c); c.Bytes+shift <= len(bytes) {
		wk.shift = shift
	}
	return bytes[wk.shift:][:c.Bytes]
}

// pageBytes is what direct reads are aligned to, in the file and in memory, at most.
const pageBytes = 4096

// offPage is how far behind a page boundary a chunk is to begin so that its first segment does so as in the file.
func (p *pipeline) offPage(c *plan.Chunk) int {
	seg := &c.Segs[0]
	t := &p.part.group.Tensors[seg.Tensor]
	at, _ := t.Span(seg.Src, int64(seg.SrcBytes))
	return int(uint64(at-int64(seg.Dst)) % pageBytes)
}

func (s *staged) fill(wk *worker, c *plan.Chunk, ahead []plan.Chunk) error {
	return wk.fillBuffer(s.buffer(wk, c), c, ahead)
}

func (s *staged) release(wk *worker) { wk.buf.Release() }

func (s *staged) submit(wk *worker, i int, c *plan.Chunk) error {
	return s.submitTo(wk.buf, wk.shift, i, c, s)
}

// submitTo enqueues what brings chunk i, which begins at byte shift of buf, to the devices. to is told of the end.
func (s *staged) submitTo(buf *pinned.Buffer, shift, i int, c *plan.Chunk, to pinned.Completion) error {
	p := s.p
	var on [4]*amdhip.Stream
	streams := on[:0]
	for n, o := range s.outlets {
		k := i % len(o.streams)
		if o.scratch != nil && c.Expand { // what belongs together follows each other on the stream
			place := &o.scratch.places[k]
			place.taken <- struct{}{}
			defer func() { <-place.taken }()
		}
		copied, err := s.issue(n, o, k, buf, shift, i, c)
		if err != nil {
			if n == 0 && !copied {
				buf.Release() // else the streams are drained before the buffer is freed
			}
			return onDevice(o.device, len(s.outlets) > 1, err)
		}
		streams = append(streams, o.streams[k])
	}
	if !buf.Pinned() {
		p.unpinned.Add(int64(len(streams)))
	}
	p.flying.Add(1)
	if err := buf.ReleaseAfterAll(streams, to, i); err != nil {
		p.flying.Add(-1)
		return err // the streams are drained before the buffer is freed
	}
	p.part.issued.pass(c)
	return nil
}

// issue enqueues what brings chunk i, at byte shift of buf, to the n-th device, on its stream number k. Copied is
// whether the device may be reading buf.
func (s *staged) issue(n int, o *outlet, k int, buf *pinned.Buffer, shift, i int, c *plan.Chunk) (copied bool,
	err error,
) {
	to := s.p.part.ptr(n, c.Arena, c.Offset)
	if c.Expand {
		to = o.scratch.places[k].ptr
	}
	if err := buf.CopyRangeToDevice(o.streams[k], to, shift, c.Bytes); err != nil {
		return false, err
	}
	return true, s.behind(n, o.streams[k], i, c, to)
}

// behind enqueues what is done with chunk i when its bytes have come to the address at of the n-th device: they are
// summed up if the load is proved, and made into tensors if the device converts them.
func (s *staged) behind(n int, stream *amdhip.Stream, i int, c *plan.Chunk, at amdhip.DevicePtr) error {
	err := s.p.round.travelled(n, stream, i, at)
	if err == nil && c.Expand {
		if err = s.expand(n, stream, c, at); err == nil {
			err = s.p.round.expanded(n, stream, i)
		}
	}
	return err
}

// expand enqueues the kernels that turn c, whose bytes are at from when they run, into tensors.
func (s *staged) expand(n int, stream *amdhip.Stream, c *plan.Chunk, from amdhip.DevicePtr) error {
	part := s.p.part
	for i := range c.Segs {
		seg := &c.Segs[i]
		t := &part.group.Tensors[seg.Tensor]
		out := part.ptr(n, t.Arena, t.DeviceOffset+part.group.TensorOffset(seg))
		blocks := uint64(seg.SrcBytes / t.Type.BlockBytes())
		key := keyOf(t)
		if err := s.p.kernels[n][key].Launch(stream, key, out, from+amdhip.DevicePtr(seg.Dst), blocks); err != nil {
			return err
		}
	}
	return nil
}

// Done is called by the pool when the copies of chunk i have ended.
func (s *staged) Done(i int, took time.Duration, err error) {
	p := s.p
	defer p.flying.Add(-1)
	c := &p.chunks[i]
	if p.request.Trace != nil { // how long is the device's word, when is where the pool saw the end
		now := time.Now()
		track := fmt.Sprintf("%sstream %d", p.label, i%len(s.outlets[0].streams))
		p.request.Trace.Add(track, "copy", now.Add(-took), now, p.name(c), c.Bytes)
	}
	if err != nil {
		p.cancel(p.chunkError(c, err))
		return
	}
	p.arrive(c)
}

// uncached compares the staging memory with the last-level cache. While it fits, the device reads most of it from
// there, and stores around the caches made loads a tenth slower; where it does not fit, ordinary stores read every line
// first.
func (s *staged) uncached() bool {
	cache := int64(kernels.CacheBytes())
	return cache > 0 && s.p.sizes.staging > cache
}

func (s *staged) streams(i int) []*amdhip.Stream { return s.outlets[i].streams }

func (s *staged) close(*watch.Limit, bool) error { return nil }

// idle waits for this load's copies only: others may go on using the stage. Copies that could not be counted, since
// releasing their buffer failed, make the stage broken, and giving it back waits for them.
func (s *staged) idle(deadline time.Time) bool {
	for wait := 20 * time.Microsecond; s.p.flying.Load() > 0; wait = min(2*wait, 2*time.Millisecond) {
		if time.Now().After(deadline) {
			return false
		}
		time.Sleep(wait)
	}
	return !s.p.failed.Load() || s.stage.idle(deadline)
}

// shared writes into memory that the device shares with the host: nothing is staged, nothing copied.
type shared struct {
	p  *pipeline
	mu sync.Mutex // chunks arrive one at a time, as they do from a pool
}

func (s *shared) acquire(*worker) error {
	if s.p.ctx.Err() != nil {
		return context.Cause(s.p.ctx)
	}
	return nil
}

func (s *shared) fill(wk *worker, c *plan.Chunk, ahead []plan.Chunk) error {
	return wk.fillBuffer(s.p.part.on[0].arenas[c.Arena].host[c.Offset:c.Offset+uint64(c.Bytes)], c, ahead)
}

func (s *shared) release(*worker) {}

func (s *shared) submit(_ *worker, i int, c *plan.Chunk) error {
	if r := s.p.round; r != nil { // the device reads what has just been written, through its own caches
		if err := r.travelled(0, nil, i, s.p.part.ptr(0, c.Arena, c.Offset)); err != nil {
			return err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.p.part.issued.pass(c)
	s.p.arrive(c)
	return nil
}

func (s *shared) uncached() bool                 { return true }
func (s *shared) streams(int) []*amdhip.Stream   { return nil }
func (s *shared) idle(time.Time) bool            { return true }
func (s *shared) close(*watch.Limit, bool) error { return nil }
