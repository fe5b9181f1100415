package loader

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// TestSplitReadiness waits for single tensors while the load runs, on the host and on streams, and finds them.
func TestSplitReadiness(t *testing.T) {
	t.Parallel()
	for _, by := range bothSplits {
		synctest.Test(t, func(t *testing.T) {
			m := llama(t)
			devs, _ := openDevices(t, 2, soft.Options{LinkBytesPerSecond: 20e6})
			o := tight.on(2)
			o.Split.By = by
			w := start(t.Context(), t, m, o, devs...)
			streams := []*amdhip.Stream{newStream(t, devs[0]), newStream(t, devs[1])}
			for _, x := range m.Tensors() {
				if err := w.Wait(t.Context(), x.Name); err != nil {
					t.Fatal(err)
				}
				first, err := w.Tensor(x.Name)
				if err != nil || first.Name != x.Name {
					t.Errorf("%s: %v, %v", x.Name, first, err)
				}
				for i, dev := range devs {
					here := by == plan.SplitNone || first.Device == dev
					err := errors.Join(w.WaitStream(t.Context(), streams[i], x.Name), streams[i].Synchronize())
					if here != (err == nil) || !here && !errors.Is(err, amdhip.ErrInvalidDevice) {
						t.Errorf("%s on a stream of device %d: %v", x.Name, i, err)
					}
					got, err := w.TensorOn(dev, x.Name)
					if here != (err == nil) || here && got.Device != dev || !here && !errors.Is(err, amdhip.ErrInvalidDevice) {
						t.Errorf("%s on device %d: %+v, %v", x.Name, i, got, err)
					}
				}
			}
			if err := w.WaitAll(t.Context()); err != nil {
				t.Error(err)
			}
			if len(w.Tensors()) != len(m.Tensors()) {
				t.Errorf("%d tensors, want %d", len(w.Tensors()), len(m.Tensors()))
			}
			if _, err := w.Tensor("x"); err == nil || w.Wait(t.Context(), "x") == nil {
				t.Error("a tensor that is not there was found")
			}
			mustClose(t, w)
			wantClosed(t, w, streams[1], "output.weight")
		})
	}
}

// TestSplitEnds cancels loads, closes them, and lets a copy to one device fail, all while they run: nothing is left.
func TestSplitEnds(t *testing.T) {
	t.Parallel()
	for _, by := range bothSplits {
		for name, end := range map[string]func(t *testing.T, w *Model, sw *soft.Software, cancel func()) error{
			"cancel": func(t *testing.T, w *Model, _ *soft.Software, cancel func()) error {
				cancel()
				err := w.WaitAll(t.Context())
				if !errors.Is(err, context.Canceled) || strings.Contains(err.Error(), "device") {
					t.Errorf("%v, want %v", err, context.Canceled)
				}
				return w.Close()
			},
			"close": func(_ *testing.T, w *Model, _ *soft.Software, _ func()) error { return w.Close() },
			"fail": func(t *testing.T, w *Model, sw *soft.Software, _ func()) error {
				sw.Inject(soft.Fault{Func: "hipMemcpyAsync", N: 1, Code: amdhip.ErrUnknown})
				err := w.WaitAll(t.Context())
				if !errors.Is(err, amdhip.ErrUnknown) || !strings.Contains(err.Error(), "device ") {
					t.Errorf("%v, want %v and the device", err, amdhip.ErrUnknown)
				}
				return w.Close()
			},
		} {
			t.Run(fmt.Sprint(by, name), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					m := llama(t)
					devs, sw := openDevices(t, 3, soft.Options{LinkBytesPerSecond: 1e6})
					ctx, cancel := context.WithCancel(t.Context())
					defer cancel()
					o := tight.on(3)
					o.Split.By = by
					w := start(ctx, t, m, o, devs...)
					if err := w.Wait(t.Context(), "token_embd.weight"); err != nil {
						t.Fatal(err)
					}
					if err := end(t, w, sw, cancel); err != nil {
						t.Error(err)
					}
				})
			})
		}
	}
}

// TestSplitStall: a copy to one device never ends. The others' memory is free afterwards.
func TestSplitStall(t *testing.T) {
	t.Parallel()
	for _, by := range bothSplits {
		synctest.Test(t, func(t *testing.T) {
			m := llama(t)
			devs, sw := leakyDevices(t, 2, soft.Options{})
			sw.Inject(soft.Fault{Func: "hipMemcpyAsync", N: 9, Stall: true})
			o := tight.on(2)
			o.Split.By = by
			_, err := load(t.Context(), m, o, devs...)
			if !errors.Is(err, ErrStalled) {
				t.Errorf("%v, want %v", err, ErrStalled)
			}
			if by == plan.SplitLayers && !strings.Contains(err.Error(), "device ") {
				t.Errorf("%v does not say which device", err)
			}
			s := sw.Stats()
			if s.HostAllocations+s.Registrations == 0 || s.Allocations == 0 {
				t.Errorf("memory was freed although the device may still use it: %+v", s)
			}
			if want := map[plan.SplitBy]int{plan.SplitLayers: 1, plan.SplitNone: 2}[by]; s.Allocations != want {
				t.Errorf("%d allocations are left, want %d", s.Allocations, want)
			}
			if e, ok := errors.AsType[*LeftError](err); !ok || e.DeviceBytes+e.HostBytes == 0 {
				t.Errorf("%v does not say what is left", err)
			}
		})
	}
}

// TestSplitCancelAnywhere cancels after each arrival in turn: nothing is left on any device, or all is there.
func TestSplitCancelAnywhere(t *testing.T) {
	t.Parallel()
	for _, by := range bothSplits {
		synctest.Test(t, func(t *testing.T) {
			m := openModel(t, sample)
			devs, sw := openDevices(t, 2, soft.Options{})
			for at, arrivals := 1, 1; at <= arrivals; at++ {
				ctx, cancel := context.WithCancel(t.Context())
				o := rawTight().on(2)
				o.Split.By = by
				calls := 0
				o.Progress = func(done, total int64) {
					if calls++; calls == at {
						cancel()
					}
					arrivals = max(arrivals, calls+1)
				}
				w, err := load(ctx, m, o, devs...)
				cancel()
				switch {
				case err == nil:
					if at < calls-8 { // the last copies may be on their way when the first of them arrives
						t.Errorf("%v: no error although it was cancelled at arrival %d of %d", by, at, calls)
					}
					if err := errors.Join(verify(t.Context(), w, m), w.Close()); err != nil {
						t.Error(err)
					}
					arrivals = calls
				case !errors.Is(err, context.Canceled):
					t.Errorf("%v: %v, want %v", by, err, context.Canceled)
				}
				wantBack(t, sw, resources{})
			}
		})
	}
}

// TestSplitIntegrated spreads a model over devices that share the host's memory.
func TestSplitIntegrated(t *testing.T) {
	t.Parallel()
	m := llama(t)
	for _, by := range bothSplits {
		for _, d := range []Dequant{DequantCPU, DequantGPU} {
			devs, _ := openDevices(t, 2, soft.Options{Integrated: true})
			w, err := load(t.Context(), m, options{Dequant: d, Split: plan.Split{By: by}}, devs...)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(verify(t.Context(), w, m), w.Close()); err != nil {
				t.Error(err)
			}
		}
	}
}

// TestIntegratedMemory: devices that share the host's memory have equal parts of it. The plan shows them, and divides
// the model evenly.
func TestIntegratedMemory(t *testing.T) {
	t.Parallel()
	host, ok := hostAvailable()
	if !ok {
		t.Skip("this system does not say how much memory the host has available")
	}
	m := llama(t)
	devs, _ := openDevices(t, 3, soft.Options{Integrated: true, Memory: 1 << 10}) // of the carve-out
	p := mustPlan(t, newLoader(t, options{}, devs...), m, options{})
	if len(p.Free) != 3 || p.Free[0] != p.Free[1] || p.Free[0] != p.Free[2] || p.Free[0] == 0 || p.Free[0] > host {
		t.Errorf("free are %v of %d bytes", p.Free, host)
	}
	if err := p.Fits(); err != nil {
		t.Error(err)
	}
	even := mustPlan(t, newLoader(t, options{}, devs...), m, options{Split: plan.Split{Ratio: []float64{1, 1, 1}}})
	for i := range p.Groups {
		if got, want := len(p.Groups[i].Tensors), len(even.Groups[i].Tensors); got != want {
			t.Errorf("device %d gets %d tensors, want %d", i, got, want)
		}
	}
}
