package watch

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// ErrStalled is matched by the error of a call that did not return in time.
var ErrStalled = errors.New("no progress")

const (
	// Moment is how long a call gets when the time of its operation is used up. It is long for a call that does not wait
	// for a device, and so short that what an operation frees at its end takes less than a second.
	Moment = 200 * time.Millisecond
	// cancelGrace is how long a call may still take after its context has ended, before it is given up.
	cancelGrace = time.Second
)

// Calls counts the lost calls of one user of a runtime. The zero value is ready. It is safe for concurrent use.
type Calls struct {
	lost atomic.Int64 // given up, and not returned
	hung atomic.Bool
}

// Hang notes for good that a device hangs, which something else than a lost call has shown.
func (c *Calls) Hang() { c.hung.Store(true) }

// Hanging reports whether a call is lost now, or Hang was called.
func (c *Calls) Hanging() bool { return c.hung.Load() || c.lost.Load() > 0 }

// Limit returns the limit of an operation whose calls may make no progress for the given time.
func (c *Calls) Limit(stall time.Duration) *Limit { return &Limit{stall: stall, calls: c} }

// Rest returns the limit of an operation that frees something: the time is used up from the start while a device hangs.
func (c *Calls) Rest(stall time.Duration) *Limit {
	l := c.Limit(stall)
	if c.Hanging() {
		l.Spend()
	}
	return l
}

// Limit is the time that the calls of one operation may take. It is safe for concurrent use.
type Limit struct {
	stall time.Duration
	calls *Calls
	used  atomic.Int64 // nanoseconds, by calls that did not return
}

// Use takes d from the time that is left.
func (l *Limit) Use(d time.Duration) { l.used.Add(int64(d)) }

// Spend uses up the time: further calls get a moment each.
func (l *Limit) Spend() { l.Use(l.stall) }

// Left is how long the next call may take.
func (l *Limit) Left() time.Duration {
	return max(l.stall-time.Duration(l.used.Load()), min(l.stall, Moment))
}

// lose notes that a call was given up after d. The result is to be called when it returns after all.
func (l *Limit) lose(d time.Duration) (back func()) {
	l.Use(d)
	l.calls.lost.Add(1)
	return func() { l.calls.lost.Add(-1) }
}

type limitKey struct{}

// With returns a context that carries l to the functions that it is given to.
func With(ctx context.Context, l *Limit) context.Context {
	return context.WithValue(ctx, limitKey{}, l)
}

// From returns the limit that ctx carries; if there is none, a new one of the given time.
func From(ctx context.Context, stall time.Duration) *Limit {
	if l, ok := ctx.Value(limitKey{}).(*Limit); ok {
		return l
	}
	return new(Calls).Limit(stall)
}

// Do returns what f makes. When f does not return within the limit, or soon after the end of ctx, Do returns without
// it, and what f makes after that is undone when it comes. doing names the call in the error, which matches ErrStalled,
// or is the cause of ctx's end.
func Do[T any](ctx context.Context, l *Limit, doing string, f func() (T, error), undo func(T)) (T, error) {
	type result struct {
		made T
		err  error
	}
	var none T
	if ctx.Err() != nil {
		return none, context.Cause(ctx)
	}
	done := make(chan result, 1)
	end := begin(doing)
	go func() {
		made, err := f()
		done <- result{made, err}
	}()
	nobody := func() { // will look at what f makes
		r := <-done
		if r.err == nil {
			undo(r.made)
		}
		end()
	}
	given := l.Left()
	limit := time.NewTimer(given)
	defer limit.Stop()
	select {
	case r := <-done:
		end()
		return r.made, r.err
	case <-limit.C:
		back := l.lose(given)
		go func() { nobody(); back() }()
		text := fmt.Sprintf("%v for %v: %s: the device or its driver hangs (see the kernel's log)", ErrStalled, given, doing)
		return none, &lostError{text, ErrStalled}
	case <-ctx.Done():
	}
	cause := context.Cause(ctx)
	over := make(chan struct{})
	go func() { nobody(); close(over) }() // undoing may wait for a device, too
	given = min(given, cancelGrace)
	grace := time.NewTimer(given)
	defer grace.Stop()
	select {
	case <-over:
		return none, cause
	case <-grace.C:
		back := l.lose(given)
		go func() { <-over; back() }()
		return none, &lostError{fmt.Sprintf("%v while waiting for the device: %s", cause, doing), cause}
	}
}

// Call is Do for a call that makes nothing which would have to be undone.
func Call(ctx context.Context, l *Limit, doing string, f func() error) error {
	_, err := Do(ctx, l, doing, func() (struct{}, error) { return struct{}{}, f() }, func(struct{}) {})
	return err
}

// Free runs f, which gives something back to the runtime. ended is false when f has not returned within the limit; it
// then goes on by itself, and err says nothing.
func (l *Limit) Free(doing string, f func() error) (err error, ended bool) {
	err = Call(context.Background(), l, doing, f)
	if Lost(err) {
		return nil, false
	}
	return err, true
}

// Lost reports whether err says that a call was given up, so that nobody knows what it has done and will do.
func Lost(err error) bool { return errors.Is(err, errLost) }

// errLost tells the error of a call that this package has given up from one that a call returned.
var errLost = errors.New("the call was given up")

// lostError says that a call did not return.
type lostError struct {
	text  string
	cause error
}

func (e *lostError) Error() string        { return e.text }
func (e *lostError) Unwrap() error        { return e.cause }
func (e *lostError) Is(target error) bool { return target == errLost }

// Waited is a call that is being waited for, or that was given up and has not returned.
type Waited struct {
	Doing string
	Since time.Time
}

// waiting is all such calls of the process.
var waiting struct {
	mu    sync.Mutex
	calls map[*Waited]struct{}
}

// begin enters a call into waiting, and end takes it out.
func begin(doing string) (end func()) {
	w := &Waited{doing, time.Now()}
	waiting.mu.Lock()
	defer waiting.mu.Unlock()
	if waiting.calls == nil {
		waiting.calls = make(map[*Waited]struct{})
	}
	waiting.calls[w] = struct{}{}
	return func() {
		waiting.mu.Lock()
		defer waiting.mu.Unlock()
		delete(waiting.calls, w)
	}
}

// Waiting returns the calls of this process that have not returned, the oldest first.
func Waiting() []Waited {
	waiting.mu.Lock()
	defer waiting.mu.Unlock()
	all := make([]Waited, 0, len(waiting.calls))
	for w := range waiting.calls {
		all = append(all, *w)
	}
	slices.SortFunc(all, func(a, b Waited) int { return a.Since.Compare(b.Since) })
	return all
}
