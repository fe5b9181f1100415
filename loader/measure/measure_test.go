package measure

import (
	"context"
	"errors"
	"math"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
)

// checkNothingLeft wants the device to have nothing more of a measurement.
func checkNothingLeft(t *testing.T, rt *amdhip.Runtime) {
	t.Helper()
	if s := soft.Of(rt).Stats(); s.Allocations+s.HostAllocations+s.Registrations+s.Streams+s.Events != 0 {
		t.Errorf("left behind: %+v", s)
	}
}

// TestLink measures a link of a known speed, by a clock that the link alone moves.
func TestLink(t *testing.T) {
	t.Parallel()
	for _, want := range []float64{1e8, 2.5e10} {
		synctest.Test(t, func(t *testing.T) {
			dev, err := soft.Open(soft.Options{LinkBytesPerSecond: want})
			if err != nil {
				t.Fatal(err)
			}
			got, err := Link(t.Context(), dev)
			if err != nil || math.Abs(got/want-1) > 0.01 {
				t.Errorf("a link of %g is measured as %g, %v", want, got, err)
			}
			checkNothingLeft(t, dev.Runtime())
			if err := dev.Runtime().Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestLinkFails: whichever call fails, the error says so, and all that was taken is given back.
func TestLinkFails(t *testing.T) {
	t.Parallel()
	for _, call := range []string{
		"hipHostMalloc", "hipMalloc", "hipStreamCreateWithFlags", "hipMemcpyAsync", "hipStreamSynchronize",
	} {
		dev, err := soft.Open(soft.Options{})
		if err != nil {
			t.Fatal(err)
		}
		soft.Of(dev.Runtime()).Inject(soft.Fault{Func: call, Code: amdhip.ErrOutOfMemory})
		_, err = Link(t.Context(), dev)
		if e, ok := errors.AsType[*amdhip.Error](err); !ok || !strings.Contains(err.Error(), call) {
			t.Errorf("%s fails: %v (%+v)", call, err, e)
		}
		checkNothingLeft(t, dev.Runtime())
		if err := dev.Runtime().Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestCopy(t *testing.T) {
	t.Parallel()
	speed, err := Copy(t.Context(), 2)
	if err != nil || !(speed > 0) || math.IsInf(speed, 0) {
		t.Errorf("%g bytes per second, %v", speed, err)
	}
	for _, threads := range []int{0, -1} {
		if _, err := Copy(t.Context(), threads); err == nil || !strings.Contains(err.Error(), "threads: use 1 or more") {
			t.Errorf("%d threads: %v", threads, err)
		}
	}
}

// TestMedian: one run that is much slower or much faster does not count.
func TestMedian(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var batches []int
		speed, err := medianSpeed(t.Context(), func(n int) error {
			batches = append(batches, n)
			each := 5 * time.Millisecond
			switch len(batches) { // the fourth and later ones count
			case 5:
				each = time.Microsecond
			case 7:
				each = time.Second
			}
			time.Sleep(time.Duration(n) * each)
			return nil
		})
		const want = batchBytes / 0.005
		if err != nil || math.Abs(speed/want-1) > 1e-9 {
			t.Errorf("%g bytes per second, want %g; %v", speed, want, err)
		}
		last := batches[len(batches)-1]
		if n := len(batches); last < 8 || batches[n-runs] != last || batches[0] != 1 || batches[1] != 2 {
			t.Errorf("batches of %v", batches)
		}
	})
	broken := errors.New("broken")
	if _, err := medianSpeed(t.Context(), func(int) error { return broken }); !errors.Is(err, broken) {
		t.Error(err)
	}
	stopped := errors.New("stopped")
	ctx, cancel := context.WithCancelCause(t.Context())
	n := 0
	_, err := medianSpeed(ctx, func(int) error { n++; cancel(stopped); return nil })
	if !errors.Is(err, stopped) || n != 1 {
		t.Errorf("%d batches, %v", n, err)
	}
}

// TestNoTime: work that takes no time that a clock could show ends all the same.
func TestNoTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		speed, err := medianSpeed(t.Context(), func(int) error { return nil })
		if err != nil || !(speed > 0) || math.IsInf(speed, 0) {
			t.Errorf("%g bytes per second, %v", speed, err)
		}
	})
}
