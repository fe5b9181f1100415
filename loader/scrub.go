package loader

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/internal/watch"
	"github.com/gguf2gpu/gguf2gpu/kernels"
	"github.com/gguf2gpu/gguf2gpu/kernels/gpu"
)

const (
	// scrubBytes is how much device memory a Scrubber looks at in one go. A GPU reads it in some 20 µs, less than it takes
	// to ask for it and to hear of the end, so that more would not be much quicker.
	scrubBytes = 32 << 20
	// scrubRuns is how many tensors that may be of.
	scrubRuns = 64
	// scrubSums is how many fingerprints that has at most.
	scrubSums = scrubBytes/kernels.FingerprintBlock + scrubRuns
)

// Scrubber looks again at the memory of one device, whether the models there still are what was loaded. It has a stream
// of its own. It is for one goroutine. The caller must Close it; the Close of its Loader waits for that.
type Scrubber struct {
	loader *Loader
	device *amdhip.Device
	set    *gpu.Set
	summer *summer // with a stream of its own; behind the sums its memory of the host has a block that is to be written
	stuck  bool    // the device may use that for ever
	closed bool
}

// NewScrubber returns a Scrubber for device number d of the Loader. It makes the kernel of fingerprints ready, and says
// why that cannot be.
func (l *Loader) NewScrubber(ctx context.Context, d int) (_ *Scrubber, err error) {
	l.mu.Lock()
	closed := l.closed
	if !closed {
		l.running.Add(1)
	}
	l.mu.Unlock()
	if closed {
		return nil, ErrClosed
	}
	limit := l.limit()
	s := &Scrubber{loader: l, device: l.devices[d]}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("loader: device %d (%s) cannot be scrubbed: %w", s.device.Index(), s.device.Name(), err),
				s.Close())
		}
	}()
	set, err := l.readyOn(ctx, limit, d, l.compiler(), fingerprintKeys)
	if err != nil {
		return nil, err
	}
	s.set = set[fingerprintKeys[0]]
	s.summer, err = l.takeSummer(ctx, limit, s.device, scrubSums+kernels.FingerprintBlock/sumSize)
	return s, err
}

// DeviceBytes is how much memory of the device the Scrubber has.
func (s *Scrubber) DeviceBytes() uint64 { return s.summer.mem.Size() }

// Close frees what the Scrubber has. What a device that hangs may still use is left; the Loader's Close says so.
func (s *Scrubber) Close() error {
	if s.closed {
		return nil
	}
	s.closed = true
	defer s.loader.running.Done()
	switch {
	case s.summer == nil:
		return nil
	case s.stuck:
		s.loader.leave(sum(s.summer.things()))
		return nil
	}
	return s.loader.freeSummers(s.loader.rest(), []*summer{s.summer})
}

// Scrub is a model that a Scrubber looks at, in rounds.
type Scrub struct {
	scrubber *Scrubber
	model    *Model
	tensors  []scrubbed
	next     int   // tensor that is next
	at       int64 // byte of it
	proved   bool
}

// scrubbed is a tensor on the device.
type scrubbed struct {
	Fingerprint
	part *part
}

// scrubRun is some whole blocks of a tensor.
type scrubRun struct {
	tensor    *scrubbed
	at, bytes int64
	sum       int // the number of its first fingerprint
}

// Watch returns m, which must have been loaded, for being looked at. With the fingerprints of a load that was proved
// the first round finds damage; else it takes them, and the later ones find damage that has come since.
func (s *Scrubber) Watch(m *Model) (*Scrub, error) {
	known, err := m.Fingerprints()
	if err != nil {
		return nil, err
	}
	sums := sumsOf(known)
	w := &Scrub{scrubber: s, model: m, proved: len(known) > 0}
	for _, p := range m.parts {
		for n, on := range p.on {
			if on.device != s.device {
				continue
			}
			for i := range p.group.Tensors {
				t := &p.group.Tensors[i]
				if t.Bytes == 0 {
					continue
				}
				w.tensors = append(w.tensors, scrubbed{part: p, Fingerprint: Fingerprint{
					Device: on.device, Tensor: t, Ptr: p.ptr(n, t.Arena, t.DeviceOffset), Bytes: int64(t.Bytes),
					Sums: sums[tensorOn{on.device, t.Name}],
				}})
			}
		}
	}
	return w, nil
}

// Proved reports whether the fingerprints are those of a load that was proved.
func (w *Scrub) Proved() bool { return w.proved }

// Next looks at the next piece of the model's memory, of 32 MiB at most. It returns how many bytes that were, the
// blocks that are not what they were, and whether the round has ended with it. The error is ErrClosed when the model is
// closed, one of HIP, or matches ErrStalled when the device hangs; then there is no use in going on.
func (w *Scrub) Next(ctx context.Context) (bytes int64, damage []*ProveError, ended bool, err error) {
	if err := w.model.acquire(); err != nil {
		return 0, nil, false, err
	}
	defer w.model.release()
	runs := w.take()
	if err := w.look(ctx, runs); err != nil {
		return 0, nil, false, err
	}
	for _, r := range runs {
		bytes += r.bytes
		damage = append(damage, w.compare(r)...)
	}
	if ended = w.next == len(w.tensors); ended {
		w.next = 0
	}
	return bytes, damage, ended, nil
}

// take returns what is looked at next.
func (w *Scrub) take() (runs []scrubRun) {
	room, sum := int64(scrubBytes), 0
	for room > 0 && len(runs) < scrubRuns && w.next < len(w.tensors) {
		t := &w.tensors[w.next]
		n := t.Bytes - w.at
		if n > room {
			n = room / kernels.FingerprintBlock * kernels.FingerprintBlock
		}
		if n == 0 {
			break
		}
		runs = append(runs, scrubRun{tensor: t, at: w.at, bytes: n, sum: sum})
		room, sum, w.at = room-n, sum+int(kernels.Fingerprints(n)), w.at+n
		if w.at == t.Bytes {
			w.next, w.at = w.next+1, 0
		}
	}
	return runs
}

// look computes the fingerprints of runs, and copies them to the host.
func (w *Scrub) look(ctx context.Context, runs []scrubRun) error {
	s, set, sums := w.scrubber.summer, w.scrubber.set, 0
	return w.do(ctx, "computing fingerprints", runs, func() error {
		for _, r := range runs {
			to, from := s.mem.Ptr()+amdhip.DevicePtr(sumSize*r.sum), r.tensor.Ptr+amdhip.DevicePtr(r.at)
			if err := set.Fingerprint(s.stream, to, from, r.bytes); err != nil {
				return err
			}
			sums = r.sum + int(kernels.Fingerprints(r.bytes))
		}
		if sums == 0 {
			return nil
		}
		return s.stream.CopyToHost(s.copied, 0, s.mem.Ptr(), sumSize*sums)
	})
}

// do enqueues something on the Scrubber's stream and waits for it, also when ctx ends: it takes a moment. When the
// device hangs, the memory of runs is never freed.
func (w *Scrub) do(ctx context.Context, doing string, runs []scrubRun, enqueue func() error) error {
	s := w.scrubber
	if s.stuck {
		return ErrStalled
	}
	limit := w.model.limit()
	left := limit.Left()
	deadline := time.Now().Add(left - left/8)
	var begun, over atomic.Bool
	err := watch.Call(context.WithoutCancel(ctx), limit, doing, func() error {
		begun.Store(true)
		err := enqueue() // may have enqueued some of it if it fails
		rest, failed := watch.Drain(s.summer.stream.Query, amdhip.StopsWork, deadline)
		over.Store(rest)
		return errors.Join(err, failed)
	})
	if s.stuck = begun.Load() && !over.Load(); s.stuck {
		for _, r := range runs {
			w.model.hangs(r.tensor.part)
		}
		s.loader.calls.Hang()
	}
	return err
}

// sum is a fingerprint that has come from the device.
func (s *Scrubber) sum(i int) uint64 {
	return binary.LittleEndian.Uint64(s.summer.copied.Bytes()[sumSize*i:])
}

// compare returns the blocks of r that are not what they were.
func (w *Scrub) compare(r scrubRun) (damage []*ProveError) {
	t, first := r.tensor, int(r.at/kernels.FingerprintBlock)
	n := int(kernels.Fingerprints(r.bytes))
	if len(t.Sums) == first && !w.proved { // in the first round
		for i := range n {
			t.Sums = append(t.Sums, w.scrubber.sum(r.sum+i))
		}
		return nil
	}
	for i := range n {
		if want, got := t.Sums[first+i], w.scrubber.sum(r.sum+i); want != got {
			e := &ProveError{Device: t.Device, Tensor: t.Tensor.Name, Want: want, Got: got, Blocks: 1}
			e.place(first+i, t.Tensor)
			damage = append(damage, e)
		}
	}
	return damage
}
