package pinned

import (
	"context"
	"errors"
	"fmt"
)

var (
	// ErrLeft is matched by the error of a Close that leaves staging memory behind, a *LeftError.
	ErrLeft = errors.New("pinned: staging memory is left")

	errAbandoned = errors.New("the device was given up")
)

// LeftError says what a Close has left, because freeing it would wait for the device, or has failed. It matches ErrLeft
// and Err.
type LeftError struct {
	Bytes    int64 // of staging memory, page-locked or not
	InFlight int   // buffers whose copies have not ended
	Err      error // why: the cause of the context's end, the errors of HIP, or that Abandon was called
}

// Error says how much is left, and why.
func (e *LeftError) Error() string {
	s := fmt.Sprintf("pinned: %d bytes of staging memory are left", e.Bytes)
	if e.InFlight > 0 {
		s += fmt.Sprintf(", %d buffers in flight", e.InFlight)
	}
	return s + ": " + e.Err.Error()
}

// Unwrap returns ErrLeft and Err.
func (e *LeftError) Unwrap() []error { return []error{ErrLeft, e.Err} }

// Close waits for the copies in flight and frees every buffer, also those that callers still own: they must not use
// them any more. The streams of copies that the pool does not watch must be at rest, see the package documentation. A
// device that hangs lets Close wait until Abandon is called: use CloseContext where that may be. The error is a
// *LeftError that matches ErrLeft when memory is left. It may be called again.
func (p *Pool) Close() error { return p.CloseContext(context.Background()) }

// CloseContext is Close with a limit. When ctx ends first, the *LeftError matches the cause of its end and says what is
// left at that moment. The pool goes on closing in the background: what is left is freed if the device comes back, and
// another Close waits for that. After Abandon it frees nothing and returns at once.
func (p *Pool) CloseContext(ctx context.Context) error {
	p.mu.Lock()
	p.beginClose()
	p.mu.Unlock()
	// Any call of HIP may wait for a device that hangs, so all of them are made by a goroutine that can be left behind.
	p.shutOnce.Do(func() { go p.shutdown() })
	var why error
	select {
	case <-p.shut:
		return p.shutErr
	case <-p.abandoned:
		why = errAbandoned
	case <-ctx.Done():
		why = context.Cause(ctx)
	}
	if left := p.leftOver(why); left != nil {
		return left
	}
	<-p.shut // it has just freed the last byte
	return p.shutErr
}

// Abandon gives up on a device that hangs. Acquire returns ErrClosed, copies in flight are no longer watched, and
// Close, also one that waits already, returns at once. Nothing is freed any more, because the device may still read or
// write any of the buffers, and because freeing would wait for it: that memory is lost until the process ends, and
// Close says how much it is. A Completion that is being told when Abandon is called may still be told.
func (p *Pool) Abandon() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.givenUp {
		return
	}
	p.givenUp, p.stopped = true, true
	close(p.abandoned)
	p.beginClose()
}

// beginClose ends Acquire and grow, and the reaper when it has nothing to do. p.mu is held.
func (p *Pool) beginClose() {
	if !p.closed {
		p.closed = true
		close(p.closing)
	}
}

// shutdown waits for the pool's goroutines and frees everything.
func (p *Pool) shutdown() {
	defer close(p.shut)
	for _, ended := range []<-chan struct{}{p.grown, p.reaped} {
		select {
		case <-ended:
		case <-p.abandoned:
		}
	}
	p.shutErr = p.freeAll()
}

// freeAll frees every event and slab; it stops when the device is given up.
func (p *Pool) freeAll() error {
	p.mu.Lock()
	slots, slabs := p.all, p.slabs
	p.mu.Unlock()
	var errs []error
	for _, s := range slots {
		if p.isAbandoned() {
			break
		}
		errs = append(errs, s.closeEvents())
	}
	for _, sl := range slabs {
		if p.isAbandoned() {
			errs = append(errs, errAbandoned)
			break
		}
		err := sl.close()
		errs = append(errs, err)
		if err == nil || !sl.mem.Pinned() { // plain memory is gone, whatever the error says
			p.mu.Lock()
			sl.freed = true
			p.left -= int64(sl.mem.Len())
			p.mu.Unlock()
		}
	}
	err := errors.Join(errs...)
	if left := p.leftOver(err); left != nil {
		return left
	}
	return err
}

func (p *Pool) isAbandoned() bool {
	select {
	case <-p.abandoned:
		return true
	default:
		return false
	}
}

// leftOver says what memory is left, and why; nil: none.
func (p *Pool) leftOver(why error) *LeftError {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.left == 0 {
		return nil
	}
	return &LeftError{Bytes: p.left, InFlight: p.flying, Err: why}
}
