package loader

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"slices"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/internal/watch"
)

// summer is where one device puts the sums of a round. A Loader keeps those that are free for later loads: freeing
// device memory would wait for whatever else is running on the device.
type summer struct {
	device *amdhip.Device
	mem    *amdhip.Memory     // a slot takes sumSize bytes
	copied *amdhip.HostMemory // what mem had at the end
	event  *amdhip.Event      // behind the copy
	own    *amdhip.Stream     // for loads that have no stream; nil: none was needed yet
	stream *amdhip.Stream     // that the sums are copied on
}

// sumSize is the size of a fingerprint in bytes.
const sumSize = 8

// takeSummer returns a summer for so many slots. streams are those of the load on the device, if it has any.
func (l *Loader) takeSummer(ctx context.Context, limit *watch.Limit, dev *amdhip.Device, slots int,
	streams []*amdhip.Stream) (s *summer, err error) {
	l.mu.Lock()
	i := slices.IndexFunc(l.summers, func(s *summer) bool { return s.device == dev && s.copied.Len() >= sumSize*slots })
	if i >= 0 {
		s = l.summers[i]
		l.summers = slices.Delete(l.summers, i, i+1)
	}
	l.mu.Unlock()
	if s == nil {
		s = &summer{device: dev}
		err = s.open(ctx, limit, sumSize<<bits.Len(uint(slots-1))) // so that there are few sizes
	}
	if len(streams) > 0 {
		s.stream = streams[0]
	} else if err == nil && s.own == nil {
		s.own, err = watch.Do(ctx, limit, "creating a stream", dev.NewStream, func(x *amdhip.Stream) { _ = x.Close() })
	}
	if err != nil {
		return nil, errors.Join(err, l.freeSummers(limit, []*summer{s}))
	}
	if len(streams) == 0 {
		s.stream = s.own
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
	return err
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
	if s.own != nil {
		all = append(all, thing{s.device, s.own.Close, LeftError{Streams: 1}})
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
