package hold

import (
	"errors"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// TestEveryCallOfTiersFails counts the HIP calls of putting a model to sleep and waking it, and then lets each fail
// once, with both ways to share and with page-locked memory. Whatever comes of that, the Holder goes on: without the
// fault the model is woken with all its bytes, what is counted as taken is what is taken, and Close leaves nothing but
// what the failed call would have given back.
func TestEveryCallOfTiersFails(t *testing.T) {
	t.Parallel()
	for _, share := range []Share{ShareIPC, ShareFD} {
		t.Run(share.String(), func(t *testing.T) {
			t.Parallel()
			calls := tierCalls(t, share)
			struck := 0
			for call, n := range calls {
				for i := 1; i <= min(n, 12); i++ {
					for _, f := range faultsOf(call, i) {
						struck += failTiers(t, share, f)
					}
				}
			}
			if struck < 20 {
				t.Errorf("%d faults struck", struck)
			}
			t.Logf("%d faults", struck)
		})
	}
}

// sleeper is a Holder of a model that is asleep in page-locked memory.
func sleeper(t *testing.T, share Share) (*amdhip.Runtime, *Holder) {
	t.Helper()
	rt, err := soft.OpenRuntime(soft.Options{Shared: true, Poison: true})
	if err != nil {
		t.Fatal(err)
	}
	dev, err := rt.Device(0)
	if err != nil {
		t.Fatal(err)
	}
	h, err := New([]*amdhip.Device{dev}, Options{
		Config: tight(), Share: share, RAM: 64 << 20, slabBytes: slab, Spec: plan.Spec{Policy: plan.Raw},
	})
	if err != nil {
		t.Fatal(err)
	}
	_, err = h.Add(t.Context(), "m", sample)
	if err = errors.Join(err, h.Wait(t.Context(), "m"), h.Sleep(t.Context(), "m")); err != nil {
		t.Fatal(err)
	}
	return rt, h
}

// tierCalls counts the calls of a wake and a sleep.
func tierCalls(t *testing.T, share Share) map[string]int {
	t.Helper()
	rt, h := sleeper(t, share)
	defer rt.Close()
	before := soft.Of(rt).Calls()
	if err := errors.Join(h.Wake(t.Context(), "m"), h.Sleep(t.Context(), "m")); err != nil {
		t.Fatal(err)
	}
	calls := soft.Of(rt).Calls()
	for call, n := range before {
		if calls[call] -= n; calls[call] <= 0 {
			delete(calls, call)
		}
	}
	if err := h.Close(); err != nil {
		t.Error(err)
	}
	return calls
}

// leaves says what calls leave that should give something back, and fail.
var leaves = map[string]bool{
	"hipFree": true, "hipMemRelease": true, "hipMemUnmap": true, "hipEventDestroy": true, "hipStreamDestroy": true,
	"hipMemAddressFree": true, "hipHostFree": true,
}

// failTiers wakes a model and puts it to sleep with one fault, and then without. It returns 1 if the fault struck.
func failTiers(t *testing.T, share Share, f soft.Fault) (struck int) {
	t.Helper()
	rt, h := sleeper(t, share)
	defer rt.Close()
	sw := soft.Of(rt)
	called := sw.Calls()[f.Func]
	sw.Inject(f)
	err := h.Wake(t.Context(), "m")
	if err == nil {
		err = h.Sleep(t.Context(), "m")
	}
	if sw.Calls()[f.Func] >= called+f.N {
		struck = 1
	}
	sw.ClearFaults()
	if err != nil && !errors.Is(err, f.Code) {
		t.Errorf("%+v: %v", f, err)
	}
	if err := h.Wake(t.Context(), "m"); err != nil {
		t.Errorf("after %+v: %v", f, err)
	} else {
		m, err := h.Model("m")
		if err != nil {
			t.Fatal(err)
		}
		wantContents(t, m, openFile(t, sample))
		if err := h.Sleep(t.Context(), "m"); err != nil {
			t.Errorf("after %+v: to sleep again: %v", f, err)
		}
	}
	h.mu.Lock()
	if h.claimed[0] != 0 || h.freeing[0] != 0 {
		t.Errorf("after %+v: %d bytes count as taken, %d as being freed", f, h.claimed[0], h.freeing[0])
	}
	h.mu.Unlock()
	if err := h.Close(); err != nil && !leaves[f.Func] {
		t.Errorf("after %+v: closing: %v", f, err)
	}
	s := sw.Stats()
	n := s.Allocations + s.HostAllocations + s.Registrations + s.Streams + s.Events
	n += s.Physical + s.Mappings + s.Reservations
	if n > 0 && !leaves[f.Func] || n > 3 {
		t.Errorf("after %+v: left are %+v", f, s)
	}
	if t.Failed() {
		t.FailNow()
	}
	return struck
}
