package hold

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// work is something whose every HIP call is made to fail, on devices of a machine of its own.
type work struct {
	name string
	do   func(ctx context.Context, devices []*amdhip.Device) error
}

// optional are the calls that work can do without: pinning has several ways, a pool may have fewer buffers, and which
// device is current is put right before every call that depends on it.
var optional = []string{
	"hipHostRegister", "hipHostMalloc", "hipEventCreateWithFlags", "hipSetDevice", "hipGetDevice", "hipStreamQuery",
}

// polls are asked until they say yes: how often is a matter of timing.
var polls = []string{"hipEventQuery", "hipStreamQuery"}

// keeps says what a call that gives something back leaves when it fails.
var keeps = map[string]func(*soft.Stats) *int{
	"hipFree":              func(s *soft.Stats) *int { return &s.Allocations },
	"hipIpcCloseMemHandle": func(s *soft.Stats) *int { return &s.IPCMappings },
	"hipHostFree":          func(s *soft.Stats) *int { return &s.HostAllocations },
	"hipHostUnregister":    func(s *soft.Stats) *int { return &s.Registrations },
	"hipStreamDestroy":     func(s *soft.Stats) *int { return &s.Streams },
	"hipEventDestroy":      func(s *soft.Stats) *int { return &s.Events },
}

// TestEveryCallFails counts the HIP calls of holding a model and of attaching to one, and then repeats that with each
// single call failing in turn, at once and, where that can be, when the device executes it. Either it succeeds in spite
// of that, or it ends in that very error, and afterwards nothing is left on the device.
func TestEveryCallFails(t *testing.T) {
	t.Parallel()
	spec := plan.Spec{Policy: plan.Raw, Split: plan.Split{By: plan.SplitLayers}}
	h := hold(t, Options{Spec: spec}, soft.Options{Devices: 2}).with(t, "", sample)
	for _, w := range []work{
		{"hold", func(ctx context.Context, devices []*amdhip.Device) error {
			c := tight()
			c.Staging *= 2
			h, err := New(devices, Options{Spec: spec, Config: c, Share: ShareIPC})
			if err != nil {
				return err
			}
			name, err := h.Add(ctx, "", sample)
			if err == nil {
				err = h.Wait(ctx, name)
			}
			return errors.Join(err, h.Close())
		}},
		{"attach", func(ctx context.Context, devices []*amdhip.Device) error {
			a, err := Attach(ctx, AttachOptions{Socket: h.socket, Devices: devices})
			if err != nil {
				return err
			}
			err = a.ReadBack(ctx, loader.ReadOptions{}, func() func(loader.Piece) error {
				return func(loader.Piece) error { return nil }
			})
			return errors.Join(err, a.Close())
		}},
	} {
		t.Run(w.name, func(t *testing.T) {
			t.Parallel()
			n := w.failEveryCall(t)
			t.Logf("%d faults", n)
			if models := h.Models(); len(models) != 1 || models[0].State != "resident" {
				t.Errorf("the Holder has %+v", models)
			}
		})
	}
}

// failEveryCall returns how many faults struck.
func (w *work) failEveryCall(t *testing.T) (total int) {
	calls := w.count(t)
	for _, call := range slices.Sorted(maps.Keys(calls)) {
		step, struck := 1, 0
		if testing.Short() {
			step = max(1, calls[call]/5)
		}
		for n := 1; n <= calls[call]; n += step {
			for _, f := range faultsOf(call, n) {
				struck += w.fail(t, f)
			}
		}
		if struck == 0 {
			t.Errorf("no call of %s failed, although there are %d", call, calls[call])
		}
		total += struck
	}
	return total
}

// faultsOf are the ways in which the nth call of a function is made to fail.
func faultsOf(call string, n int) []soft.Fault {
	faults := []soft.Fault{{Func: call, N: n, Code: amdhip.ErrUnknown}}
	if call == "hipMemcpyAsync" || call == "hipEventRecord" {
		faults = append(faults, soft.Fault{Func: call, N: n, Code: amdhip.ErrIllegalAddress, Async: true})
	}
	return faults
}

// machine opens two devices.
func machine(t *testing.T) (*amdhip.Runtime, []*amdhip.Device) {
	t.Helper()
	rt, err := soft.OpenRuntime(soft.Options{Devices: 2, Shared: true})
	if err != nil {
		t.Fatal(err)
	}
	var devices []*amdhip.Device
	for i := range 2 {
		dev, err := rt.Device(i)
		if err != nil {
			t.Fatal(err)
		}
		devices = append(devices, dev)
	}
	return rt, devices
}

// count does the work undisturbed and returns how often it calls what.
func (w *work) count(t *testing.T) map[string]int {
	t.Helper()
	rt, devices := machine(t)
	defer rt.Close()
	before := soft.Of(rt).Calls()
	if err := w.do(t.Context(), devices); err != nil {
		t.Fatal(err)
	}
	calls := soft.Of(rt).Calls()
	for call, n := range before {
		if calls[call] -= n; calls[call] == 0 {
			delete(calls, call)
		}
	}
	return calls
}

// fail does the work with one fault and returns 1 if that struck, else 0.
func (w *work) fail(t *testing.T, f soft.Fault) (struck int) {
	t.Helper()
	rt, devices := machine(t)
	defer rt.Close()
	sw := soft.Of(rt)
	called := sw.Calls()[f.Func]
	sw.Inject(f)
	err := w.do(t.Context(), devices)
	if sw.Calls()[f.Func] >= called+f.N {
		struck = 1
	}
	sw.ClearFaults()
	what := fmt.Sprintf("call %d of %s, %v, async=%v", f.N, f.Func, f.Code, f.Async)
	switch {
	case err == nil && struck == 1 && !slices.Contains(optional, f.Func):
		t.Errorf("%s: no error", what)
	case err != nil && !errors.Is(err, f.Code):
		t.Errorf("%s: %v", what, err)
	case err != nil && struck == 0:
		t.Errorf("%s: %v, although it never came to that", what, err)
	case err != nil && !f.Async && !strings.Contains(err.Error(), f.Func):
		t.Errorf("%s: %v does not name the call", what, err)
	case struck == 0 && !slices.Contains(polls, f.Func):
		t.Logf("%s did not strike", what)
	}
	left := sw.Stats()
	if kept := keeps[f.Func]; kept != nil {
		*kept(&left) -= struck
	}
	if left.Allocations > 0 || left.HostAllocations > 0 || left.Registrations > 0 || left.Streams > 0 || left.Events > 0 ||
		left.IPCMappings > 0 || left.Modules > 0 {
		t.Errorf("%s: left on the device: %+v", what, left)
	}
	if t.Failed() {
		t.FailNow() // the first one tells most
	}
	return struck
}
