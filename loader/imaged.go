package loader

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/internal/watch"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

const (
	// maxFlights is how many chunks of an Image may be on their way at the same time: enough to keep a link busy while
	// nobody looks, and few enough for a load that is cancelled to end soon.
	maxFlights = 32
	// flightPoll is how long to sleep between two looks at copies on their way. A chunk of 16 MiB takes 0.3 ms on a fast
	// link.
	flightPoll = 150 * time.Microsecond
	// After hungLooks looks in a row at which nothing has ended, a third of a second, the device is likely to hang. Then
	// each sleep may be as long as hungPoll.
	hungLooks = 2000
	hungPoll  = 10 * time.Millisecond
)

// imaged copies from an Image straight to the devices. What the CPU has to convert goes through staging memory.
type imaged struct {
	staged
	image *Image
	all   []*flight
	free  chan *flight // those that are not on their way
	begun chan *flight // from submit to watch; has room for all
	quit  chan struct{}
	ended chan struct{} // closed when watch has returned
	once  sync.Once
	mu    sync.Mutex // chunks arrive one at a time
}

// flight is a chunk on its way, and the events behind its copies, by device of the group.
type flight struct {
	chunk  int
	events []*amdhip.Event
	passed []bool // which of them
}

func newImaged(ctx context.Context, limit *watch.Limit, p *pipeline, s *stage, im *Image) (*imaged, error) {
	t := &imaged{
		staged: staged{p: p, stage: s}, image: im, quit: make(chan struct{}), ended: make(chan struct{}),
		free: make(chan *flight, maxFlights), begun: make(chan *flight, maxFlights),
	}
	for range maxFlights {
		f := &flight{passed: make([]bool, len(s.outlets))}
		t.all = append(t.all, f)
		t.free <- f
		for _, o := range s.outlets {
			ev, err := watch.Do(ctx, limit, "creating an event", func() (*amdhip.Event, error) {
				return o.device.NewEvent(amdhip.EventOptions{})
			}, func(ev *amdhip.Event) { _ = ev.Close() })
			if err != nil {
				close(t.ended)
				return nil, errors.Join(err, t.close(limit, false))
			}
			f.events = append(f.events, ev)
		}
	}
	go t.watch()
	return t, nil
}

// acquire waits until few enough chunks are on their way.
func (t *imaged) acquire(wk *worker) error {
	if t.p.ctx.Err() != nil {
		return context.Cause(t.p.ctx)
	}
	select {
	case wk.flight = <-t.free:
		return nil
	case <-t.p.ctx.Done():
		return context.Cause(t.p.ctx)
	}
}

// isDirect reports whether the devices get the bytes of c as they are in the file.
func (t *imaged) isDirect(c *plan.Chunk) bool {
	if c.Expand {
		return true
	}
	for i := range c.Segs {
		if x := &t.p.part.group.Tensors[c.Segs[i].Tensor]; x.Target != x.Type {
			return false
		}
	}
	return true
}

// fill does nothing for a chunk that the devices read from the Image.
func (t *imaged) fill(wk *worker, c *plan.Chunk, ahead []plan.Chunk) error {
	if t.isDirect(c) {
		return nil
	}
	t.free <- wk.flight
	wk.flight = nil
	if err := t.staged.acquire(wk); err != nil {
		return err
	}
	return t.staged.fill(wk, c, ahead)
}

func (t *imaged) release(wk *worker) {
	if wk.flight != nil {
		t.free <- wk.flight
	} else if wk.buf != nil {
		t.staged.release(wk)
	}
	wk.flight, wk.buf = nil, nil
}

func (t *imaged) submit(wk *worker, i int, c *plan.Chunk) error {
	f := wk.flight
	if wk.flight = nil; f == nil {
		return t.submitTo(wk.buf, wk.shift, i, c, t)
	}
	p := t.p
	p.flying.Add(1)
	for n, o := range t.outlets {
		if err := t.copy(n, o, i, f, c); err != nil {
			p.flying.Add(-1)
			return onDevice(o.device, len(t.outlets) > 1, err) // the streams are drained before anything is freed
		}
	}
	f.chunk = i
	clear(f.passed)
	p.part.issued.pass(c)
	t.begun <- f
	return nil
}

// copy enqueues what brings c, chunk i, to the n-th device, and the event behind it.
func (t *imaged) copy(n int, o *outlet, i int, f *flight, c *plan.Chunk) error {
	k := i % len(o.streams)
	to, stream := t.p.part.ptr(n, c.Arena, c.Offset), o.streams[k]
	if c.Expand { // what belongs together follows each other on the stream
		place := &o.scratch.places[k]
		place.taken <- struct{}{}
		defer func() { <-place.taken }()
		to = place.ptr
	}
	err := t.image.runs(t.p.part.group, c, func(slab, from, at, n int) error {
		if mem := t.image.slabs[slab]; !mem.Pinned() {
			t.p.unpinned.Add(1)
		}
		return stream.CopyToDevice(to+amdhip.DevicePtr(at), t.image.slabs[slab], from, n)
	})
	if err == nil {
		err = t.behind(n, stream, i, c, to)
	}
	if err == nil {
		err = stream.Record(f.events[n])
	}
	return err
}

// watch sees the ends of the copies. It polls, as a wait inside of the runtime could not be given up.
func (t *imaged) watch() {
	defer close(t.ended)
	var all []*flight
	waits := make([]bool, len(t.outlets[0].streams))
	for looks := 0; ; looks++ {
		if len(all) == 0 {
			select {
			case f := <-t.begun:
				all = append(all, f)
			case <-t.quit:
				return
			}
		}
		for more := true; more; {
			select {
			case f := <-t.begun:
				all = append(all, f)
			default:
				more = false
			}
		}
		left := all[:0]
		clear(waits)
		for _, f := range all {
			k := f.chunk % len(waits)
			var done bool
			var err error
			if !waits[k] { // else one before it on its stream has not ended
				done, err = f.done()
				waits[k] = !done && err == nil
			}
			if !done && err == nil {
				left = append(left, f)
				continue
			}
			i := f.chunk
			looks = 0
			t.free <- f
			t.Done(i, 0, err)
		}
		if all = left; len(all) == 0 {
			continue
		}
		wait := flightPoll
		if looks > hungLooks {
			wait = hungPoll
		}
		select {
		case <-t.quit:
			return
		case <-time.After(wait):
		}
	}
}

// done reports whether all copies of the chunk have ended, or what one has failed with.
func (f *flight) done() (bool, error) {
	for i, ev := range f.events {
		if f.passed[i] {
			continue
		}
		done, err := ev.Query()
		if err != nil || !done {
			return false, err
		}
		f.passed[i] = true
	}
	return true, nil
}

// Done is called when the copies of chunk i have ended.
func (t *imaged) Done(i int, took time.Duration, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.staged.Done(i, took, err)
}

// close ends watch and frees the events, within the limit; when a device hangs, it leaves them.
func (t *imaged) close(limit *watch.Limit, stuck bool) error {
	t.once.Do(func() { close(t.quit) })
	if stuck {
		return nil
	}
	if _, ended := limit.Free("asking after copies", func() error { <-t.ended; return nil }); !ended {
		return fmt.Errorf("%w: the device does not say whether copies have ended", ErrStalled)
	}
	var events []thing
	for _, f := range t.all {
		for i, ev := range f.events {
			events = append(events, thing{t.outlets[i].device, ev.Close, LeftError{}})
		}
	}
	_, err := freeAll(limit, "freeing events", events)
	return err
}
