package loader

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/internal/watch"
	"github.com/gguf2gpu/gguf2gpu/pinned"
)

// stage is what is expensive to make and serves many loads of a group of devices, at once and in turn: staging memory
// with its events, streams, and the places for blocks that devices convert.
type stage struct {
	devices []*amdhip.Device
	asked   sizes
	timing  bool         // its events can tell how long copies took
	pool    *pinned.Pool // nil: there is no staging memory, as all is copied from an Image
	outlets []*outlet    // one for each device

	// Under the Loader's lock.

	users  int
	broken bool // a stream has failed, or a buffer could not be given back: no other load may have it
	stuck  bool // a device may use it for ever: it is never freed
}

// outlet is the way to one device.
type outlet struct {
	device  *amdhip.Device
	streams []*amdhip.Stream
	scratch *scratch // nil: nothing is expanded on the device
}

// serves reports whether the stage is what a load of these sizes wants.
func (s *stage) serves(devices []*amdhip.Device, z sizes, timing bool) bool {
	return slices.Equal(s.devices, devices) && s.timing == timing && s.asked.streams == z.streams &&
		s.asked.scratch == z.scratch && s.asked.unstaged == z.unstaged &&
		s.asked.chunk >= z.chunk && s.asked.staging >= z.staging
}

// takeStage returns a stage for the devices: one that is there, or a new one. The caller must give it back.
func (l *Loader) takeStage(ctx context.Context, limit *watch.Limit, devices []*amdhip.Device, z sizes,
	timing bool,
) (*stage, error) {
	// Only one is made at a time, so that loads that begin together share it.
	began := time.Now()
	select {
	case l.making <- struct{}{}: // whoever has it gives it back within the limit of its own
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	defer func() { <-l.making }()
	if l.calls.Hanging() {
		limit.Use(time.Since(began))
	}
	if s := l.findStage(devices, z, timing); s != nil {
		return s, nil
	}
	if err := l.closeIdle(limit, devices, z.unstaged); err != nil { // those that are too small
		return nil, err
	}
	s, err := l.newStage(ctx, limit, devices, z, timing)
	if err != nil {
		return nil, err
	}
	s.users = 1
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stages = append(l.stages, s)
	return s, nil
}

// findStage counts a user of a stage that is there already.
func (l *Loader) findStage(devices []*amdhip.Device, z sizes, timing bool) *stage {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.stages {
		if !s.broken && s.serves(devices, z, timing) {
			s.users++
			return s
		}
	}
	return nil
}

// closeIdle frees the stages of these devices, with or without staging memory, that nobody uses; nil means all stages.
func (l *Loader) closeIdle(limit *watch.Limit, devices []*amdhip.Device, unstaged bool) error {
	l.mu.Lock()
	var idle []*stage
	l.stages = slices.DeleteFunc(l.stages, func(s *stage) bool {
		other := !slices.Equal(s.devices, devices) || s.asked.unstaged != unstaged
		if s.users > 0 || devices != nil && other {
			return false
		}
		idle = append(idle, s)
		return true
	})
	l.closing = append(l.closing, idle...)
	l.mu.Unlock()
	var errs []error
	for _, s := range idle {
		errs = append(errs, l.closeStage(limit, s))
	}
	return errors.Join(errs...)
}

// ScratchBytes is how much device memory the Loader has on each device for blocks that devices convert, and for sums of
// loads that are proved, and no load uses at present. Trim frees it.
func (l *Loader) ScratchBytes() []uint64 {
	all := make([]uint64, len(l.devices))
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range slices.Concat(l.stages, l.closing) {
		for _, o := range s.outlets {
			if d := slices.Index(l.devices, o.device); s.users == 0 && o.scratch != nil {
				all[d] += o.scratch.mem.Size()
			}
		}
	}
	for _, s := range slices.Concat(l.summers, l.trimmed) {
		if d := slices.Index(l.devices, s.device); s.mem != nil {
			all[d] += s.mem.Size()
		}
	}
	return all
}

// Trim frees what the Loader has made for loads and none uses at present: staging memory, streams, and memory for
// blocks that devices convert and for sums. The next load makes them again. Kernels stay. It waits for other calls of
// it, and for loads that are making these things.
func (l *Loader) Trim() error {
	l.making <- struct{}{} // whoever has it gives it back within the limit of its own
	defer func() { <-l.making }()
	limit := l.rest()
	l.mu.Lock()
	all := l.summers
	l.summers, l.trimmed = nil, all
	l.mu.Unlock()
	err := l.freeSummers(limit, all)
	l.mu.Lock()
	l.trimmed = nil
	l.mu.Unlock()
	return errors.Join(err, l.closeIdle(limit, nil, false))
}

// gone notes that a stage is freed, or never will be.
func (l *Loader) gone(s *stage) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closing = slices.DeleteFunc(l.closing, func(x *stage) bool { return x == s })
}

// giveBack ends one use of a stage. A broken one is freed when its last user has gone, once its streams are at rest; if
// they do not come to rest within the limit it is stuck, and what it holds is never freed.
func (l *Loader) giveBack(limit *watch.Limit, s *stage, broken, stuck bool) error {
	l.mu.Lock()
	s.users--
	s.broken, s.stuck = s.broken || broken || stuck, s.stuck || stuck
	free := s.broken && s.users == 0
	if free {
		l.stages = slices.DeleteFunc(l.stages, func(x *stage) bool { return x == s })
		l.closing = append(l.closing, s)
	}
	l.mu.Unlock()
	if !free {
		return nil
	}
	if !s.stuck && atRest(limit, s.idle) {
		return l.closeStage(limit, s)
	}
	l.calls.Hang()
	l.gone(s)
	l.leave(sum(s.things()))
	if s.pool == nil {
		return nil
	}
	s.pool.Abandon()
	return l.leavePool(s.pool.Close()) // what is left is no error yet: the load fails anyway, and the Loader's Close tells
}

// atRest asks idle, which may wait for a device, whether something is at rest. The answer is no if it does not come
// within the limit.
func atRest(limit *watch.Limit, idle func(deadline time.Time) bool) bool {
	left := limit.Left()
	deadline := time.Now().Add(left - left/8) // so that idle answers before it is given up
	yes, err := watch.Do(context.Background(), limit, "waiting for copies to end",
		func() (bool, error) { return idle(deadline), nil }, func(bool) {})
	if err == nil && !yes {
		limit.Use(left)
	}
	return err == nil && yes
}

// closeStage frees a stage whose streams are at rest. What the devices do not let go within the limit is left; the
// Loader's Close tells.
func (l *Loader) closeStage(limit *watch.Limit, s *stage) error {
	defer l.gone(s)
	var err error
	if s.pool != nil {
		left := limit.Left()
		ctx, cancel := context.WithTimeout(context.Background(), left)
		defer cancel()
		err = s.pool.CloseContext(ctx)
		if ctx.Err() != nil {
			limit.Use(left)
		}
		err = l.leavePool(err)
	}
	stays, closed := freeAll(limit, "closing streams", s.things())
	l.leave(stays)
	return errors.Join(err, closed)
}

// leavePool counts what closing a pool has left, and returns what HIP said.
func (l *Loader) leavePool(err error) error {
	e, ok := errors.AsType[*pinned.LeftError](err)
	if !ok {
		return err
	}
	if refused, ok := errors.AsType[*amdhip.Error](e.Err); ok { // no device hangs
		return refused
	}
	l.calls.Hang()
	l.leave(LeftError{HostBytes: uint64(e.Bytes)})
	return nil
}

// newStage makes the pool, the streams, and what it takes to expand on the devices.
func (l *Loader) newStage(ctx context.Context, limit *watch.Limit, devices []*amdhip.Device, z sizes,
	timing bool,
) (*stage, error) {
	s := &stage{devices: devices, asked: z, timing: timing}
	chunk := z.chunk
	if !z.unstaged {
		var err error
		s.pool, err = watch.Do(ctx, limit, "page-locking staging memory", func() (*pinned.Pool, error) {
			return pinned.New(devices[0], pinned.Options{
				Budget: z.staging, BufferBytes: z.chunk, Timing: timing, Logger: l.config.Logger, More: devices[1:],
			})
		}, func(p *pinned.Pool) { _ = p.Close() })
		if err != nil {
			return nil, err
		}
		chunk = s.pool.BufferBytes()
	}
	for _, dev := range devices {
		o := &outlet{device: dev}
		s.outlets = append(s.outlets, o)
		if err := o.open(ctx, limit, z, chunk); err != nil {
			return nil, errors.Join(onDevice(dev, len(devices) > 1, err), l.closeStage(limit, s))
		}
	}
	return s, nil
}

// open makes the streams, and the scratch memory if the device is to expand chunks of so many bytes.
func (o *outlet) open(ctx context.Context, limit *watch.Limit, z sizes, chunk int) (err error) {
	if z.scratch > 0 {
		if o.scratch, err = newScratch(ctx, limit, o.device, z.scratch, chunk); err != nil {
			return err
		}
	}
	for range z.streams {
		stream, err := watch.Do(ctx, limit, "creating a stream", o.device.NewStream, func(s *amdhip.Stream) { _ = s.Close() })
		if err != nil {
			return err
		}
		o.streams = append(o.streams, stream)
	}
	return nil
}

// chunkBytes is the size of a copy at most: what was asked for, or less if only smaller pieces could be pinned.
func (s *stage) chunkBytes(z sizes) int {
	if s.pool == nil {
		return z.chunk
	}
	return min(z.chunk, s.pool.BufferBytes())
}

// scratchBytes is what the places for blocks take on each device.
func (s *stage) scratchBytes() uint64 {
	if s.outlets[0].scratch == nil {
		return 0
	}
	return s.outlets[0].scratch.mem.Size()
}

// idle waits until nothing is on any stream any more; false: the deadline came first, or nobody can tell.
func (s *stage) idle(deadline time.Time) bool {
	for _, o := range s.outlets {
		for _, stream := range o.streams {
			if rest, _ := watch.Drain(stream.Query, amdhip.StopsWork, deadline); !rest { // the load has its error already
				return false
			}
		}
	}
	return true
}

// things are the streams and the scratch memory.
func (s *stage) things() (all []thing) {
	for _, o := range s.outlets {
		for _, stream := range o.streams {
			all = append(all, thing{o.device, stream.Close, LeftError{Streams: 1}})
		}
		if o.scratch != nil {
			all = append(all, thing{o.device, o.scratch.mem.Close, LeftError{DeviceBytes: o.scratch.mem.Size()}})
		}
	}
	return all
}
