package loader

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/internal/watch"
)

// Wait blocks until the tensor of that name is in device memory, on all devices that get it. It returns the load's
// error if it failed before that, ErrClosed after Close, and the cause of ctx's end if that comes first; the load then
// goes on.
func (m *Model) Wait(ctx context.Context, name string) error {
	if err := m.failure(); err != nil {
		return err
	}
	p, i, err := m.find(name)
	if err != nil {
		return err
	}
	return m.await(ctx, p.ready, i)
}

// WaitAll blocks until the load has ended, and returns its error, or ErrClosed after Close.
func (m *Model) WaitAll(ctx context.Context) error {
	select {
	case <-m.finished:
		return m.failure()
	default:
	}
	select {
	case <-m.finished:
		return m.failure()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// failure is why the model cannot be used: the load failed, or the model is closed, or who holds it has gone.
func (m *Model) failure() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.unusable()
}

// unusable is failure with m.mu held.
func (m *Model) unusable() error {
	switch {
	case m.closed:
		return ErrClosed
	case m.err != nil:
		return m.err
	}
	return nil
}

// await blocks until tensor i has passed l.
func (m *Model) await(ctx context.Context, l *latch, i int) error {
	passed := l.done(i)
	select {
	case <-passed:
		return m.failure() // a tensor that has arrived may be gone again
	default:
	}
	select {
	case <-passed:
		return m.failure()
	case <-m.finished:
		return m.failure() // nil means that the load has ended well, so tensor i has arrived
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// WaitStream makes the work that is enqueued on s afterwards wait, on the device, until the tensor of that name has
// arrived on the device of s. The host is held up only as long as the tensor's copies have not been issued yet, never
// by their transfer: HIP cannot make a stream wait for a copy that is not enqueued. The error matches
// amdhip.ErrInvalidDevice when the tensor is not on the device of s.
func (m *Model) WaitStream(ctx context.Context, s *amdhip.Stream, name string) error {
	if err := m.failure(); err != nil {
		return err
	}
	p, i, err := m.find(name)
	if err != nil {
		return err
	}
	n := slices.IndexFunc(p.on, func(r *resident) bool { return r.device == s.Device() })
	if n < 0 {
		return fmt.Errorf("loader: tensor %q is on device %d (%s), the stream on device %d (%s): %w", name, p.on[0].device.Index(),
			p.on[0].device.Name(), s.Device().Index(), s.Device().Name(), amdhip.ErrInvalidDevice)
	}
	if err := m.await(ctx, p.issued, i); err != nil {
		return err
	}
	if done, err := m.enqueueWait(ctx, s, p, n, i); done || err != nil {
		return err
	}
	return m.await(ctx, p.ready, i)
}

// enqueueWait makes s wait for the streams of the n-th device that tensor i of the part was issued on. It does nothing
// and is false when the copies that were issued have failed, so that the load is about to fail, or to start over.
func (m *Model) enqueueWait(ctx context.Context, s *amdhip.Stream, p *part, n, i int) (done bool, err error) {
	m.mu.Lock()
	if err := m.unusable(); err != nil || p.ready.has(i) {
		m.mu.Unlock()
		return true, err
	}
	streams := p.on[n].streams
	if len(streams) == 0 || !p.issued.has(i) {
		m.mu.Unlock()
		return false, nil
	}
	p.following++ // so that they are not closed meanwhile
	m.mu.Unlock()
	return true, watch.Call(ctx, m.limit(), "making a stream wait for another one", func() error {
		defer m.unfollow(p)
		for _, from := range streams {
			if err := follow(s, from); err != nil {
				return err
			}
		}
		return nil
	})
}

func (m *Model) unfollow(p *part) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if p.following--; p.following == 0 {
		m.idle.Broadcast()
	}
}

// follow makes what is enqueued on s afterwards wait for all that is on from now.
func follow(s, from *amdhip.Stream) error {
	ev, err := from.Device().NewEvent(amdhip.EventOptions{})
	if err != nil {
		return err
	}
	if err = from.Record(ev); err == nil {
		err = s.Wait(ev)
	}
	return errors.Join(err, ev.Close()) // what waits for the event keeps it alive
}
