package watch

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

const stall = 10 * time.Second

// TestReturns passes on what a call makes and what it fails with.
func TestReturns(t *testing.T) {
	t.Parallel()
	var calls Calls
	l := calls.Limit(stall)
	undo := func(int) { t.Error("undone although somebody has it") }
	if n, err := Do(t.Context(), l, "counting", func() (int, error) { return 7, nil }, undo); n != 7 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	bad := errors.New("bad")
	if _, err := Do(t.Context(), l, "counting", func() (int, error) { return 7, bad }, undo); err != bad {
		t.Errorf("%v, want what the call failed with", err)
	}
	if err, ended := l.Free("freeing", func() error { return bad }); err != bad || !ended {
		t.Errorf("%v, %v: want what the call failed with", err, ended)
	}
	if calls.Hanging() {
		t.Error("no call was lost")
	}
}

// TestLost gives up calls that do not return: the first after the limit, those after it after a moment. When they
// return after all, what they made is undone, and no device hangs any more.
func TestLost(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var calls Calls
		l := calls.Limit(stall)
		release := make(chan struct{})
		var undone atomic.Int32
		for i, want := range []time.Duration{stall, Moment, Moment} {
			start := time.Now()
			_, err := Do(t.Context(), l, "counting", func() (int, error) { <-release; return 7, nil }, func(int) { undone.Add(1) })
			if took := time.Since(start); took != want {
				t.Errorf("call %d was given up after %v, want %v", i, took, want)
			}
			if !errors.Is(err, ErrStalled) || !strings.Contains(err.Error(), "counting") {
				t.Errorf("call %d: %v, want ErrStalled and what was called", i, err)
			}
		}
		if err, ended := l.Free("freeing", func() error { <-release; return nil }); err != nil || ended {
			t.Errorf("%v, %v: want that it has not ended", err, ended)
		}
		if got := calls.Limit(stall).Left(); got != stall {
			t.Errorf("a new operation has %v, want %v", got, stall)
		}
		if got := calls.Rest(stall).Left(); got != Moment {
			t.Errorf("freeing has %v, want %v", got, Moment)
		}
		var doing []string
		for _, w := range Waiting() {
			doing = append(doing, w.Doing)
		}
		if got := strings.Join(doing, " "); strings.Count(got, "counting") < 3 || !strings.Contains(got, "freeing") {
			t.Errorf("waiting for %v", doing)
		}
		close(release)
		synctest.Wait()
		if undone.Load() != 3 || calls.Hanging() {
			t.Errorf("%d of 3 undone, hanging %v", undone.Load(), calls.Hanging())
		}
	})
}

// TestCancelled ends a call with its context: at once if it returns, else after the grace.
func TestCancelled(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var calls Calls
		for _, takes := range []time.Duration{cancelGrace / 2, time.Hour} {
			ctx, cancel := context.WithCancelCause(t.Context())
			gone := errors.New("gone")
			time.AfterFunc(time.Second, func() { cancel(gone) })
			start := time.Now()
			var undone atomic.Bool
			_, err := Do(ctx, calls.Limit(time.Minute), "counting", func() (int, error) {
				time.Sleep(time.Second + takes)
				return 7, nil
			}, func(int) { undone.Store(true) })
			if !errors.Is(err, gone) {
				t.Errorf("%v, want the cause", err)
			}
			if took, want := time.Since(start), time.Second+min(takes, cancelGrace); took != want {
				t.Errorf("took %v, want %v", took, want)
			}
			time.Sleep(2 * time.Hour)
			if !undone.Load() {
				t.Error("what the call made was not undone")
			}
			if _, err := Do(ctx, calls.Limit(time.Minute), "x", func() (int, error) { t.Error("called"); return 0, nil },
				nil); !errors.Is(err, gone) {
				t.Errorf("%v, want the cause", err)
			}
		}
	})
}

// TestUndoBlocks ends a call whose context ends, also when undoing it does not.
func TestUndoBlocks(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var calls Calls
		ctx, cancel := context.WithCancel(t.Context())
		release := make(chan struct{})
		start := time.Now()
		time.AfterFunc(time.Second, cancel)
		_, err := Do(ctx, calls.Limit(time.Minute), "counting", func() (int, error) {
			<-ctx.Done()
			return 7, nil
		}, func(int) { <-release })
		if !errors.Is(err, context.Canceled) || !Lost(err) {
			t.Errorf("%v, want the cause, and that the call is lost", err)
		}
		if took := time.Since(start); took != time.Second+cancelGrace {
			t.Errorf("took %v", took)
		}
		close(release)
		synctest.Wait()
		if calls.Hanging() {
			t.Error("hanging in the end")
		}
	})
}

// TestHang uses up the time of what frees, for good.
func TestHang(t *testing.T) {
	t.Parallel()
	var calls Calls
	calls.Hang()
	if got := calls.Rest(stall).Left(); got != Moment {
		t.Errorf("freeing has %v, want %v", got, Moment)
	}
	if got := calls.Rest(Moment / 2).Left(); got != Moment/2 {
		t.Errorf("freeing has %v, want no more than the limit", got)
	}
}

// TestContext passes a limit on by a context.
func TestContext(t *testing.T) {
	t.Parallel()
	l := new(Calls).Limit(stall)
	l.Use(stall / 2)
	if got := From(With(t.Context(), l), time.Hour).Left(); got != stall/2 {
		t.Errorf("%v are left, want %v", got, stall/2)
	}
	if got := From(t.Context(), time.Hour).Left(); got != time.Hour {
		t.Errorf("%v are left without a limit, want an hour", got)
	}
}

// TestDrain wants work to be known as ended exactly when that is certain.
func TestDrain(t *testing.T) {
	t.Parallel()
	fatal, odd := errors.New("fatal"), errors.New("odd")
	const ends = 5 * time.Second // of the work, after the start
	for name, tt := range map[string]struct {
		answer   func(since time.Duration) error // of a query; nil: whether the work has ended
		deadline time.Duration
		rest     bool
		err      error // matched
		after    time.Duration
	}{
		"ends":              {func(time.Duration) error { return nil }, time.Minute, true, nil, ends},
		"deadline":          {func(time.Duration) error { return nil }, 3 * time.Second, false, ErrStalled, 3 * time.Second},
		"fails for good":    {func(time.Duration) error { return fatal }, time.Minute, true, fatal, 0},
		"cannot be asked":   {func(time.Duration) error { return odd }, time.Minute, false, odd, unsureTime},
		"deadline is first": {func(time.Duration) error { return odd }, time.Second, false, ErrStalled, time.Second},
		"one query fails near the end": {func(since time.Duration) error {
			if since > ends-time.Second && since < ends-time.Second/2 {
				return odd
			}
			return nil
		}, time.Minute, true, odd, ends},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				start := time.Now()
				rest, err := Drain(func() (bool, error) {
					since := time.Since(start)
					return since >= ends, tt.answer(since)
				}, func(err error) bool { return err == fatal }, start.Add(tt.deadline))
				if rest != tt.rest || !errors.Is(err, tt.err) {
					t.Errorf("%v, %v, want %v, %v", rest, err, tt.rest, tt.err)
				}
				if took := time.Since(start); took < tt.after || took > tt.after+20*time.Millisecond {
					t.Errorf("after %v, want %v", took, tt.after)
				}
			})
		})
	}
}
