package loader

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"sync"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/internal/watch"
)

// summer is where one device puts the sums of a round. It has a stream of its own, so that copies do not wait for sums.
// A Loader keeps those that are free for later loads: freeing device memory would wait for whatever else is running on
// the device.
type summer struct {
	device *amdhip.Device
	mem    *amdhip.Memory     // a slot takes sumSize bytes
	copied *amdhip.HostMemory // what mem had at the end
	stream *amdhip.Stream     // that bytes are summed up and the sums copied on
	event  *amdhip.Event      // behind what stream is to wait for; at the end, behind the copy of the sums
	mu     sync.Mutex         // held from recording event until stream waits for it
}

// sumSize is the size of a fingerprint in bytes.
const sumSize = 8

// summerBytes is how much memory there is for so many bytes of sums: there are few sizes, so that it serves other
// loads.
func summerBytes(n uint64) uint64 {
	if n == 0 {
		return 0
	}
	return sumSize << bits.Len64((n-1)/sumSize)
}

// takeSummer returns a summer for so many slots.
func (l *Loader) takeSummer(ctx context.Context, limit *watch.Limit, dev *amdhip.Device, slots int) (*summer, error) {
	l.mu.Lock()
	i := slices.IndexFunc(l.summers, func(s *summer) bool { return s.device == dev && s.copied.Len() >= sumSize*slots })
	if i >= 0 {
		s := l.summers[i]
		l.summers = slices.Delete(l.summers, i, i+1)
		l.mu.Unlock()
		return s, nil
	}
	l.mu.Unlock()
	s := &summer{device: dev}
	if err := s.open(ctx, limit, int(summerBytes(uint64(sumSize*slots)))); err != nil {
		return nil, errors.Join(err, l.freeSummers(limit, []*summer{s}))
	}
	return s, nil
}

// open makes memory for so many bytes of sums.
func (s *summer) open(ctx context.Context, limit *watch.Limit, bytes int) (err error) {
	s.mem, err = watch.Do(ctx, limit, "allocating device memory for fingerprints", func() (*amdhip.Memory, error) {
		return s.device.Malloc(uint64(bytes))
	}, func(m *amdhip.Memory) { _ = m.Close() })
	if errors.Is(err, amdhip.ErrOutOfMemory) {
		err = fmt.Errorf("%w: %w", ErrInsufficientMemory, err)
	}
	if err != nil {
		return err
	}
	s.copied, err = watch.Do(ctx, limit, "page-locking memory for fingerprints", func() (*amdhip.HostMemory, error) {
		return s.device.HostMalloc(bytes)
	}, func(m *amdhip.HostMemory) { _ = m.Close() })
	if err != nil {
		return err
	}
	s.event, err = watch.Do(ctx, limit, "creating an event", func() (*amdhip.Event, error) {
		return s.device.NewEvent(amdhip.EventOptions{})
	}, func(ev *amdhip.Event) { _ = ev.Close() })
	if err != nil {
		return err
	}
	s.stream, err = watch.Do(ctx, limit, "creating a stream", s.device.NewStream, func(x *amdhip.Stream) { _ = x.Close() })
	return err
}

// follow makes what is summed up from now on wait for what is on another stream.
func (s *summer) follow(stream *amdhip.Stream) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := stream.Record(s.event); err != nil {
		return err
	}
	return s.stream.Wait(s.event)
}

// sums is what was copied from the device: so many slots.
func (s *summer) sums(slots int) []uint64 {
	all := make([]uint64, slots)
	copied := s.copied.Bytes() // once: it takes a lock
	for i := range all {
		all[i] = binary.LittleEndian.Uint64(copied[sumSize*i:])
	}
	return all
}

// things is what open made.
func (s *summer) things() (all []thing) {
	if s.event != nil {
		all = append(all, thing{s.device, s.event.Close, LeftError{}})
	}
	if s.stream != nil {
		all = append(all, thing{s.device, s.stream.Close, LeftError{Streams: 1}})
	}
	if s.copied != nil {
		all = append(all, thing{s.device, s.copied.Close, LeftError{HostBytes: uint64(s.copied.Len())}})
	}
	if s.mem != nil {
		all = append(all, thing{s.device, s.mem.Close, LeftError{DeviceBytes: s.mem.Size()}})
	}
	return all
}

// freeSummers frees them. What a device does not let go is left.
func (l *Loader) freeSummers(limit *watch.Limit, all []*summer) error {
	var things []thing
	for _, s := range all {
		things = append(things, s.things()...)
	}
	left, err := freeAll(limit, "freeing memory of fingerprints", things)
	l.leave(left)
	return err
}

// idle waits until no device sums up anything any more; false: the deadline came first, or nobody can tell.
func (p *proof) idle(deadline time.Time) bool {
	if p == nil {
		return true
	}
	for _, r := range p.rounds {
		for _, s := range r.on {
			if rest, _ := watch.Drain(s.stream.Query, amdhip.StopsWork, deadline); !rest { // copying the sums will tell
				return false
			}
		}
	}
	return true
}

// close gives back the summers of all rounds. After a failure they are freed, unless a device is stuck, which may still
// use them: then they are left.
func (p *proof) close(limit *watch.Limit, failed, stuck bool) error {
	if p == nil {
		return nil
	}
	var all []*summer
	for _, r := range p.rounds {
		all = append(all, r.on...)
		r.on = nil
	}
	l := p.loader
	switch {
	case stuck:
		for _, s := range all {
			l.leave(sum(s.things()))
		}
		return nil
	case failed:
		return l.freeSummers(limit, all)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.summers = append(l.summers, all...)
	return nil
}
