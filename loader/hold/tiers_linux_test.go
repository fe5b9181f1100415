package hold

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// slab is a small size for pieces of page-locked memory, so that tensors lie in several.
const slab = 1 << 20

// model is what the Holder says of the model of that name.
func (h *testHolder) model(t *testing.T, name string) Model {
	t.Helper()
	for _, m := range h.Models() {
		if m.Name == name {
			return m
		}
	}
	t.Fatalf("no model %q", name)
	return Model{}
}

// wantState waits until the model is in a state, and has page-locked memory or not.
func (h *testHolder) wantState(t *testing.T, name, state string, ram bool) Model {
	t.Helper()
	var m Model
	eventually(t, fmt.Sprintf("%s is %s", name, state), func() bool {
		m = h.model(t, name)
		return m.State == state && (m.Tiers.RAM > 0) == ram
	})
	if resident := state == stateResident; (m.Tiers.VRAM > 0) != resident || m.Bytes != m.Tiers.VRAM {
		t.Errorf("%+v", m)
	}
	return m
}

// TestSleepAndWake puts a model to sleep and wakes it, again and again, with page-locked memory and without. It comes
// back with all bytes; with descriptors it comes back at the same addresses. Sleeping copies nothing, and all device
// memory is free then.
func TestSleepAndWake(t *testing.T) {
	t.Parallel()
	for _, share := range []Share{ShareIPC, ShareFD} {
		for _, ram := range []int64{0, 64 << 20} {
			for _, policy := range []plan.Policy{plan.Raw, plan.F16} {
				t.Run(fmt.Sprintf("%v/%d/%v", share, ram, policy), func(t *testing.T) {
					t.Parallel()
					o := Options{Share: share, RAM: ram, Spec: plan.Spec{Policy: policy}, slabBytes: slab}
					h := hold(t, o, soft.Options{Devices: 2, Poison: true}).with(t, "m", sample)
					h.wantState(t, "m", stateResident, ram > 0)
					f := openFile(t, sample)
					asleep := stateStored
					if ram > 0 {
						asleep = stateAsleep
					}
					var at amdhip.DevicePtr
					for i := range 3 {
						a := h.attach(t, "m")
						wantContents(t, a.Model, f)
						held, err := h.Model("m")
						if err != nil {
							t.Fatal(err)
						}
						ptr, ours := a.Tensors()[0].Ptr, held.Tensors()[0].Ptr
						if at == 0 {
							at = ptr
						}
						if share == ShareFD && (ptr != at || ours != at) {
							t.Errorf("round %d: at %#x and %#x, before at %#x", i, ptr, ours, at)
						}
						if err := h.Sleep(t.Context(), "m"); !errors.Is(err, ErrAttached) {
							t.Errorf("while it is in use: %v", err)
						}
						mustClose(t, a)
						h.wantAttached(t, 0)
						if err := h.Pin("m"); err != nil {
							t.Error(err)
						}
						if err := h.Sleep(t.Context(), "m"); !errors.Is(err, ErrPinned) {
							t.Errorf("pinned: %v", err)
						}
						before := h.soft.Stats()
						if err := errors.Join(h.Unpin("m"), h.Sleep(t.Context(), "m"), h.Sleep(t.Context(), "m")); err != nil {
							t.Fatal(err)
						}
						s := h.soft.Stats()
						if s.DeviceBytes != 0 || s.Physical+s.Mappings != 0 || s.CopiedBytes != before.CopiedBytes {
							t.Errorf("asleep, the device has %+v, before %+v", s, before)
						}
						h.wantState(t, "m", asleep, ram > 0)
						if _, err := h.Model("m"); !errors.Is(err, ErrAsleep) {
							t.Errorf("a model that is asleep: %v", err)
						}
						if err := h.Wake(t.Context(), "m"); err != nil {
							t.Fatal(err)
						}
						m := h.wantState(t, "m", stateResident, ram > 0)
						if m.Wakes != i+1 || m.WakeTime <= 0 || m.Adopted {
							t.Errorf("%+v", m)
						}
						if held, err = h.Model("m"); err != nil {
							t.Fatal(err)
						}
						if r := held.Report(); (r.ImageBytes > 0) != (ram > 0) {
							t.Errorf("woken with %+v", r)
						}
					}
				})
			}
		}
	}
}

// copies makes n copies of the sample, as models of their own.
func copies(t *testing.T, n int) (paths []string) {
	t.Helper()
	b, err := os.ReadFile(sample)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for i := range n {
		path := filepath.Join(dir, fmt.Sprintf("m%d.gguf", i))
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		paths = append(paths, path)
	}
	return paths
}

// need is the device memory that the sample takes as raw.
func need(t *testing.T) uint64 {
	t.Helper()
	p, err := plan.New(openFile(t, sample), plan.Spec{Policy: plan.Raw}, []uint64{1 << 40})
	if err != nil {
		t.Fatal(err)
	}
	var sum uint64
	for _, n := range p.Groups[0].Arenas {
		sum += sharedSize(n)
	}
	return sum
}

// TestRoom adds models under a budget for two. What was used least recently makes room; what is attached or pinned does
// not, and what does not fit then is refused with the numbers, and nothing has moved.
func TestRoom(t *testing.T) {
	t.Parallel()
	one := need(t)
	h := hold(t, Options{VRAM: 2*one + one/2, RAM: 64 << 20, Spec: plan.Spec{Policy: plan.Raw}, slabBytes: slab},
		soft.Options{})
	for i, path := range copies(t, 4) {
		h.with(t, fmt.Sprintf("m%d", i), path)
	}
	h.wantState(t, "m0", stateAsleep, true)
	h.wantState(t, "m1", stateAsleep, true)
	h.wantState(t, "m2", stateResident, true)
	h.wantState(t, "m3", stateResident, true)
	f := openFile(t, sample)
	a := h.attach(t, "m0") // wakes it: m2 goes
	wantContents(t, a.Model, f)
	h.wantState(t, "m2", stateAsleep, true)
	h.wantState(t, "m3", stateResident, true)
	if err := h.Pin("m3"); err != nil {
		t.Fatal(err)
	}
	before := h.soft.Stats()
	_, err := Attach(t.Context(), h.to(t, "m1"))
	if !errors.Is(err, loader.ErrInsufficientMemory) || !strings.Contains(err.Error(), fmt.Sprint(one)+" bytes") ||
		!strings.Contains(err.Error(), `"m0" with`) || !strings.Contains(err.Error(), `(pinned)`) {
		t.Errorf("with no room: %v", err)
	}
	if s := h.soft.Stats(); s.CopiedBytes != before.CopiedBytes || s.DeviceBytes != before.DeviceBytes {
		t.Errorf("something moved: %+v, before %+v", s, before)
	}
	if err := h.Unpin("m3"); err != nil {
		t.Fatal(err)
	}
	b := h.attach(t, "m1")
	wantContents(t, b.Model, f)
	h.wantState(t, "m3", stateAsleep, true)
	if s := h.soft.Stats(); s.PeakDeviceBytes > 2*one+one/2 {
		t.Errorf("%d bytes of device memory at most, the budget is %d", s.PeakDeviceBytes, 2*one+one/2)
	}
	if _, err := h.Add(t.Context(), "large", sample); !errors.Is(err, loader.ErrInsufficientMemory) {
		t.Errorf("one more: %v", err)
	}
}

// TestRoomOnDevice makes room where the device itself is the limit.
func TestRoomOnDevice(t *testing.T) {
	t.Parallel()
	one := need(t)
	h := hold(t, Options{Spec: plan.Spec{Policy: plan.Raw}, Share: ShareFD}, soft.Options{Memory: one + one/2})
	for i, path := range copies(t, 2) {
		h.with(t, fmt.Sprintf("m%d", i), path)
	}
	h.wantState(t, "m0", stateStored, false)
	a := h.attach(t, "m0")
	wantContents(t, a.Model, openFile(t, sample))
	if _, err := Attach(t.Context(), h.to(t, "m1")); !errors.Is(err, loader.ErrInsufficientMemory) {
		t.Errorf("with no room: %v", err)
	}
}

// TestRoomForScratch lets devices convert under a budget for one model and what its load takes besides. That is never
// exceeded, also when several processes want different models at once; with a byte less, the model is refused with the
// numbers, and nothing moves.
func TestRoomForScratch(t *testing.T) {
	t.Parallel()
	for _, by := range []loader.Prove{loader.ProveOff, loader.ProveOn} {
		t.Run(by.String(), func(t *testing.T) {
			t.Parallel()
			testRoomForScratch(t, loader.Request{Prove: by})
		})
	}
}

func testRoomForScratch(t *testing.T, q loader.Request) {
	config := tight()
	config.Dequant = loader.DequantGPU
	spec := plan.Spec{Policy: plan.F16}
	f := openFile(t, sample)
	_, devices := openSoft(t, soft.Options{})
	l, err := loader.New(devices, config)
	if err != nil {
		t.Fatal(err)
	}
	p, err := l.Plan(f, spec)
	if err != nil {
		t.Fatal(err)
	}
	scratch, err := p.ScratchBytes(q.Prove)
	if err != nil || scratch[0] == 0 {
		t.Fatalf("%d bytes of scratch, %v", scratch, err)
	}
	var one uint64
	for _, n := range p.Groups[0].Arenas {
		one += sharedSize(n)
	}
	if m, err := l.Load(t.Context(), p, q); err != nil {
		t.Fatal(err)
	} else if n := l.ScratchBytes(); n[0] == 0 || n[0] > scratch[0] ||
		(m.Report().ScratchBytes == n[0]) != (q.Prove == loader.ProveOff) {
		t.Errorf("%d bytes of scratch, the plan said %d, the report says %d", n, scratch, m.Report().ScratchBytes)
	} else if err := errors.Join(l.Trim(), m.Close(), l.Close()); err != nil || l.ScratchBytes()[0] != 0 {
		t.Errorf("%v, %d bytes of scratch are left", err, l.ScratchBytes())
	}

	budget := one + scratch[0]
	o := Options{Config: config, VRAM: budget, RAM: 64 << 20, Spec: spec, slabBytes: slab, Request: q}
	h := hold(t, o, soft.Options{})
	for i, path := range copies(t, 3) {
		h.with(t, fmt.Sprintf("m%d", i), path)
	}
	var all sync.WaitGroup
	for i := range 3 {
		all.Go(func() {
			for range 5 {
				if err := h.Wake(t.Context(), fmt.Sprintf("m%d", i)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	if err := h.Wake(t.Context(), "m1"); err != nil {
		t.Fatal(err)
	}
	m, err := h.Model("m1")
	if err != nil {
		t.Fatal(err)
	}
	wantContents(t, m, f)
	if n := m.Report().ScratchBytes; n == 0 {
		t.Error("the device converted nothing")
	}
	if s := h.soft.Stats(); s.PeakDeviceBytes > budget {
		t.Errorf("%d bytes of device memory at most, the budget is %d", s.PeakDeviceBytes, budget)
	}

	h = hold(t, Options{Config: config, VRAM: budget - 1, Spec: spec, Request: q}, soft.Options{})
	_, err = h.Add(t.Context(), "m", sample)
	if !errors.Is(err, loader.ErrInsufficientMemory) || !strings.Contains(err.Error(), "for blocks that the device converts") {
		t.Errorf("with a byte less: %v", err)
	}
	if s := h.soft.Stats(); s.PeakDeviceBytes > 0 {
		t.Errorf("%d bytes of device memory were taken", s.PeakDeviceBytes)
	}
}

// TestRAMBudget holds three models where page-locked memory is there for one: the one that was used last has it.
func TestRAMBudget(t *testing.T) {
	t.Parallel()
	p, err := plan.New(openFile(t, sample), plan.Spec{Policy: plan.Raw}, []uint64{1 << 40})
	if err != nil {
		t.Fatal(err)
	}
	budget := (loader.ImageBytes(p) + slab - 1) / slab * slab
	h := hold(t, Options{RAM: budget, Spec: plan.Spec{Policy: plan.Raw}, slabBytes: slab}, soft.Options{})
	for i, path := range copies(t, 3) {
		h.with(t, fmt.Sprintf("m%d", i), path)
		h.wantState(t, fmt.Sprintf("m%d", i), stateResident, true)
	}
	for i := range 3 {
		name := fmt.Sprintf("m%d", i)
		if err := h.Sleep(t.Context(), name); err != nil {
			t.Fatal(err)
		}
		if i < 2 {
			h.wantState(t, name, stateStored, false)
		} else {
			h.wantState(t, name, stateAsleep, true)
		}
	}
	a := h.attach(t, "m0")
	wantContents(t, a.Model, openFile(t, sample))
	h.wantState(t, "m0", stateResident, true)
	h.wantState(t, "m2", stateStored, false)
	if n := h.soft.Stats().PeakPinnedBytes; n > uint64(budget)+3*64<<10+1<<20 {
		t.Errorf("%d bytes of page-locked memory at most, the budget is %d", n, budget)
	}
}

// TestNoRAM: page-locked memory that cannot be had is said once, and models sleep in their files.
func TestNoRAM(t *testing.T) {
	t.Parallel()
	log := new(lines)
	h := hold(t, Options{RAM: 1 << 30, Spec: plan.Spec{Policy: plan.Raw}, Logger: log.logger()}, soft.Options{})
	for i, path := range copies(t, 2) {
		h.soft.Inject(soft.Fault{Func: "hipHostMalloc", Code: amdhip.ErrOutOfMemory})
		name := fmt.Sprintf("m%d", i)
		h.with(t, name, path)
		if err := h.Sleep(t.Context(), name); err != nil {
			t.Fatal(err)
		}
		h.soft.ClearFaults()
		h.wantState(t, name, stateStored, false)
	}
	if n := log.count("page-locked memory can be had"); n != 1 {
		t.Errorf("it was said %d times", n)
	}
}

// TestWakeChangedFile: a file that has changed since is not what the model was, so it is not woken from it.
func TestWakeChangedFile(t *testing.T) {
	t.Parallel()
	path := copies(t, 1)[0]
	h := hold(t, Options{Spec: plan.Spec{Policy: plan.Raw}}, soft.Options{}).with(t, "m", path)
	if err := h.Sleep(t.Context(), "m"); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b[60] ^= 1
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := h.Wake(t.Context(), "m"); err == nil {
		t.Error("it was woken")
	}
	h.wantState(t, "m", stateStored, false)
	b[60] ^= 1
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := h.Wake(t.Context(), "m"); err != nil {
		t.Error(err)
	}
}
