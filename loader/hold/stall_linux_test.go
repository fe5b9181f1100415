package hold

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// spread returns at most so many numbers from 1 to n: all of them, or the first, the last, and some between.
func spread(n, most int) (all []int) {
	for i := range min(n, most) {
		if n > most {
			i = i * (n - 1) / (most - 1)
		}
		all = append(all, i+1)
	}
	return all
}

// allFaults is the variable of the environment that makes the tests of faults try every call, and every second fault
// with it, where they take a sample otherwise: 'make faults' sets it.
const allFaults = "GGUF2GPU_ALL_FAULTS"

// countCalls leaves out what is no call of a device.
func countCalls(sw *soft.Software, before map[string]int) map[string]int {
	calls := sw.Calls()
	maps.DeleteFunc(calls, func(name string, n int) bool { return n == before[name] || strings.HasPrefix(name, "hipGetError") })
	for name := range calls {
		calls[name] -= before[name]
	}
	return calls
}

// TestHoldingBlocks lets each HIP call of adding two models, of putting one to sleep and waking it, of dropping the
// other one and of closing never return, or the operation of it never end, alone and with another call that fails.
// Every call ends within Stall and a second, and what is left is said.
func TestHoldingBlocks(t *testing.T) {
	t.Parallel()
	for _, share := range []Share{ShareFD, ShareIPC} {
		t.Run(share.String(), func(t *testing.T) { t.Parallel(); holdingBlocks(t, share) })
	}
}

func holdingBlocks(t *testing.T, share Share) {
	var calls map[string]int
	synctest.Test(t, func(t *testing.T) { calls, _ = holdBlocked(t, share) })
	alone, two, struck := 0, 0, 0
	names := slices.Sorted(maps.Keys(calls))
	most := 10
	switch {
	case os.Getenv(allFaults) != "":
		most = 1 << 20
	case testing.Short():
		most = 3
	}
	for _, name := range names {
		for i, n := range spread(calls[name], most) {
			faults := []soft.Fault{{Func: name, N: n, Block: true}}
			if name == "hipMemcpyAsync" || name == "hipEventRecord" {
				faults = append(faults, soft.Fault{Func: name, N: n, Stall: true})
			}
			for _, f := range faults {
				cases := [][]soft.Fault{{f}}
				for k, other := range names {
					if other != name && (k == (alone*5)%len(names) || most > 10) {
						cases = append(cases, []soft.Fault{f, {Func: other, N: (i + k) % 2, Code: amdhip.ErrUnknown}})
						two++
					}
				}
				for _, faults := range cases {
					synctest.Test(t, func(t *testing.T) {
						if got, _ := holdBlocked(t, share, faults...); got[name] >= n {
							struck++
						}
					})
					if t.Failed() {
						t.Fatalf("%+v", faults)
					}
				}
				alone++
			}
		}
	}
	t.Logf("%d faults alone, %d with a second one; %d struck", alone, two, struck)
	if struck < alone {
		t.Error("too few struck")
	}
}

// holdBlocked does the work once, and returns how often it called what.
func holdBlocked(t *testing.T, share Share, faults ...soft.Fault) (calls map[string]int, err error) {
	const stall = 10 * time.Second
	rt, err := soft.OpenRuntime(soft.Options{Devices: 2, Shared: true, Waits: soft.WaitsForAll})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := rt.Close(); err != nil {
			t.Error(err)
		}
	}()
	sw := soft.Of(rt)
	var devices []*amdhip.Device
	for i := range 2 {
		dev, err := rt.Device(i)
		if err != nil {
			t.Fatal(err)
		}
		if err := VirtualMemoryWorks(dev); err != nil { // before the faults: what a trial that hangs leaves is logged only
			t.Fatal(err)
		}
		devices = append(devices, dev)
	}
	before := sw.Calls()
	for _, f := range faults {
		sw.Inject(f)
	}
	var errs []error
	step := func(name string, f func() error) error {
		start := time.Now()
		err := f()
		if took := time.Since(start); took > stall+time.Second {
			t.Errorf("%s took %v: %v", name, took, err)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		}
		return err
	}
	c := tight()
	c.Staging *= 2
	c.Stall = stall
	h, err := New(devices, Options{
		Config: c, Share: share, RAM: 64 << 20, slabBytes: 1 << 20, Spec: plan.Spec{
			Policy: plan.Raw,
			Split:  plan.Split{By: plan.SplitLayers},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a", "b"} {
		if step("Add", func() error { _, err := h.Add(context.Background(), name, sample); return err }) == nil {
			_ = step("Wait", func() error { return h.Wait(context.Background(), name) })
		}
	}
	known := func(err error) error { // a model that was not added is none
		if errors.Is(err, ErrUnknownModel) {
			return nil
		}
		return err
	}
	for range 2 {
		_ = step("Sleep", func() error { return known(h.Sleep(context.Background(), "b")) })
		_ = step("Wake", func() error { return known(h.Wake(context.Background(), "b")) })
	}
	_ = step("Drop", func() error { return known(h.Drop("a")) })
	_ = step("Close", h.Close)
	err = errors.Join(errs...)
	s := sw.Stats()
	left := s.Allocations + s.HostAllocations + s.Registrations + s.Streams
	if _, refused := errors.AsType[*amdhip.Error](err); left > 0 && !errors.Is(err, loader.ErrStalled) && !refused {
		t.Errorf("%+v is left, and nobody says so: %v", s, err)
	}
	if len(faults) == 0 && (err != nil || left > 0) {
		t.Errorf("without a fault: %v, %+v", err, s)
	}
	calls = countCalls(sw, before)
	sw.ClearFaults()
	time.Sleep(10 * stall) // for what was left to itself
	return calls, err
}

// TestAttachingBlocks lets each HIP call of attaching, reading back and closing never return. Everything ends, on the
// clock of the machine as it talks to a Holder, and the Holder does not free what may be mapped.
func TestAttachingBlocks(t *testing.T) {
	t.Parallel()
	for _, share := range []Share{ShareFD, ShareIPC} {
		t.Run(share.String(), func(t *testing.T) { t.Parallel(); attachingBlocks(t, share) })
	}
}

func attachingBlocks(t *testing.T, share Share) {
	h := hold(t, Options{Share: share}, soft.Options{}).with(t, "", sample)
	calls, _ := h.attachBlocked(t)
	var struck, left atomic.Int64
	alone, most, seconds := 0, 4, []string{"", "hipIpcCloseMemHandle", "hipStreamQuery"}
	if os.Getenv(allFaults) != "" {
		most, seconds = 1<<20, append(slices.Sorted(maps.Keys(calls)), "")
	}
	t.Run("calls", func(t *testing.T) {
		for name, count := range calls {
			for _, n := range spread(count, most) {
				for _, second := range seconds {
					if second == name {
						continue
					}
					faults := []soft.Fault{{Func: name, N: n, Block: true}}
					if second != "" {
						faults = append(faults, soft.Fault{Func: second, Code: amdhip.ErrUnknown})
					}
					if second == "" {
						alone++
					}
					t.Run(fmt.Sprint(name, n, second), func(t *testing.T) {
						t.Parallel()
						calls, stays := h.attachBlocked(t, faults...)
						if second == "" && calls[name] >= n { // another fault may come before it
							struck.Add(1)
						}
						if stays {
							left.Add(1)
						}
					})
				}
			}
		}
	})
	t.Logf("%d of %d faults alone struck", struck.Load(), alone)
	if int(struck.Load()) < alone*2/3 {
		t.Error("too few struck")
	}
	h.wantAttached(t, int(left.Load())) // who could not unmap the memory stays connected
}

// attachBlocked does the work once, and returns how often it called what, and whether Close says that memory stays
// mapped.
func (h *testHolder) attachBlocked(t *testing.T, faults ...soft.Fault) (calls map[string]int, stays bool) {
	t.Helper()
	rt, err := soft.OpenRuntime(soft.Options{Shared: true, Waits: soft.WaitsForAll})
	if err != nil {
		t.Fatal(err)
	}
	sw := soft.Of(rt)
	dev, err := rt.Device(0)
	if err != nil {
		t.Fatal(err)
	}
	before := sw.Calls()
	for _, f := range faults {
		sw.Inject(f)
	}
	ended := make(chan error, 1)
	go func() {
		a, err := Attach(context.Background(), AttachOptions{
			Socket: h.socket, Devices: []*amdhip.Device{dev}, Stall: 200 * time.Millisecond,
		})
		if err == nil {
			err = a.ReadBack(context.Background(), loader.ReadOptions{}, func() func(loader.Piece) error {
				return func(loader.Piece) error { return nil }
			})
			closed := a.Close()
			_, stays = errors.AsType[*loader.LeftError](closed)
			err = errors.Join(err, closed)
		}
		ended <- err
	}()
	select {
	case err = <-ended:
	case <-time.After(time.Minute):
		t.Fatalf("%+v: attaching does not end", faults)
	}
	s := sw.Stats()
	left := s.IPCMappings + s.HostAllocations + s.Registrations + s.Streams
	if _, refused := errors.AsType[*amdhip.Error](err); left > 0 && !errors.Is(err, loader.ErrStalled) && !refused {
		t.Errorf("%+v: %+v is left, and nobody says so: %v", faults, s, err)
	}
	if len(faults) == 0 && (err != nil || left > 0) {
		t.Errorf("without a fault: %v, %+v", err, s)
	}
	calls = countCalls(sw, before)
	sw.ClearFaults()
	t.Cleanup(func() {
		if err := rt.Close(); err != nil {
			t.Error(err)
		}
	})
	return calls, stays
}
