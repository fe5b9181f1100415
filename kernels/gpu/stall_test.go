package gpu

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/internal/watch"
)

// leakySoft opens a software device on which something may be left at the end.
func leakySoft(t *testing.T) (*amdhip.Device, *soft.Software) {
	t.Helper()
	rt, err := soft.OpenRuntime(soft.Options{Waits: soft.WaitsForAll})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := rt.Close(); err != nil {
			t.Error(err)
		}
	})
	dev, err := rt.Device(0)
	if err != nil {
		t.Fatal(err)
	}
	return dev, soft.Of(rt)
}

// TestFailingQueryProvesNoRest: when the stream of the check cannot be asked, its kernels may still be running.
func TestFailingQueryProvesNoRest(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		dev, sw := leakySoft(t)
		sw.Inject(soft.Fault{Func: "hipModuleLaunchKernel", N: 1, Stall: true})
		sw.Inject(soft.Fault{Func: "hipStreamQuery", Code: amdhip.ErrUnknown})
		if _, err := new(Compiler).Load(t.Context(), dev, someKeys); !errors.Is(err, amdhip.ErrUnknown) {
			t.Errorf("error %v", err)
		}
		if s := sw.Stats(); s.Modules != len(someKeys) || s.Allocations != 1 || s.HostAllocations != 1 || s.Streams != 1 {
			t.Errorf("freed while the device may use it: %+v", s)
		}
	})
}

// TestEveryCallBlocks lets each call of HIP of a load of kernels never return. The load ends in time.
func TestEveryCallBlocks(t *testing.T) {
	t.Parallel()
	const stall = 10 * time.Second
	calls := make(map[string]int)
	synctest.Test(t, func(t *testing.T) {
		dev, sw := leakySoft(t)
		before := sw.Calls()
		if err := mustLoad(t, new(Compiler), dev, someKeys...).Close(); err != nil {
			t.Fatal(err)
		}
		for name, n := range sw.Calls() {
			if n -= before[name]; n > 0 && name[:6] != "hiprtc" { // compiling is no call of a device
				calls[name] = min(n, 8)
			}
		}
	})
	for name, n := range calls {
		for i := range n {
			t.Run(fmt.Sprint(name, i+1), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					dev, sw := leakySoft(t)
					sw.Inject(soft.Fault{Func: name, N: i + 1, Block: true})
					ctx := watch.With(context.Background(), new(watch.Calls).Limit(stall))
					start := time.Now()
					s, err := new(Compiler).Load(ctx, dev, someKeys)
					if took := time.Since(start); took > stall+time.Second {
						t.Errorf("took %v", took)
					}
					if err == nil { // it was a call of Close
						_, _ = new(watch.Calls).Limit(stall).Free("unloading", s.Close)
					} else if !errors.Is(err, watch.ErrStalled) {
						t.Errorf("%v, want ErrStalled", err)
					}
					sw.ClearFaults()
					time.Sleep(time.Minute) // for what was left to itself
				})
			})
		}
	}
	if len(calls) < 10 {
		t.Errorf("only %d functions were called", len(calls))
	}
}
