package hold

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
	"github.com/gguf2gpu/gguf2gpu/loader/readback"
)

// divided are options that hold the parts of ranks of three.
func divided(by plan.ShardBy, ranks ...int) (o Options, path string) {
	o = Options{Ranks: ranks, slabBytes: slab, Spec: plan.Spec{Policy: plan.F16, Shard: plan.Shard{By: by, World: 3}}}
	if by == plan.ShardLayers {
		return o, sample
	}
	o.Spec.Shard.World = 2
	o.Spec.Shard.Rules = []plan.ShardRule{{Name: regexp.MustCompile("^type"), As: plan.DivideColumns}}
	return o, "../../testdata/gguf/all-types.gguf"
}

// attachRank attaches to a rank's part.
func (h *testHolder) attachRank(t *testing.T, name string, rank, world int) (*Attached, error) {
	t.Helper()
	o := h.to(t, name)
	o.Rank, o.World = &rank, world
	a, err := Attach(t.Context(), o)
	if err == nil {
		t.Cleanup(func() { mustClose(t, a) })
	}
	return a, err
}

// wantPart attaches to a rank's part, and compares it with the file and with what that rank would have loaded alone.
func (h *testHolder) wantPart(t *testing.T, path string, rank, device int) *Attached {
	t.Helper()
	s := h.options.Spec
	s.Shard.Rank = rank
	a, err := h.attachRank(t, "", rank, s.Shard.World)
	if err != nil {
		t.Fatal(err)
	}
	f := openFile(t, path)
	alone, err := plan.New(f, s, []uint64{1 << 40})
	if err != nil {
		t.Fatal(err)
	}
	if got := a.Plan().Spec.Shard; got.Rank != rank || got.World != s.Shard.World || a.Info.Name != fmt.Sprintf("m@%d", rank) {
		t.Errorf("rank %d has %+v, %q", rank, got, a.Info.Name)
	}
	devices := a.Devices()
	if len(devices) != 1 || devices[0].Index() != device {
		t.Errorf("rank %d is on %v, want device %d", rank, devices, device)
	}
	if a.Plan().Len() != alone.Len() || a.Plan().Len() == 0 {
		t.Errorf("rank %d has %d tensors, alone %d", rank, a.Plan().Len(), alone.Len())
	}
	for i, x := range alone.Tensors() {
		if got := a.Plan().Tensors()[i]; got.Name != x.Name || got.Bytes != x.Bytes {
			t.Errorf("rank %d has %s of %d bytes, want %s of %d", rank, got.Name, got.Bytes, x.Name, x.Bytes)
		}
	}
	if r, err := readback.Verify(t.Context(), a.Model, f); err != nil || r.Tensors != alone.Len() {
		t.Errorf("rank %d: verified %+v, %v", rank, r, err)
	}
	return a
}

// TestParts holds the parts of several ranks, each on a device of its own or all on one. Who attaches gets the part of
// its rank, and needs no device but that one. The model's name stands for all parts.
func TestParts(t *testing.T) {
	t.Parallel()
	for _, share := range []Share{ShareFD, ShareIPC} {
		for _, by := range []plan.ShardBy{plan.ShardLayers, plan.ShardTensors} {
			for _, oneDevice := range []bool{false, true} {
				t.Run(fmt.Sprintf("%v/%v/%t", share, by, oneDevice), func(t *testing.T) {
					t.Parallel()
					ranks := map[plan.ShardBy][]int{plan.ShardLayers: {2, 0}, plan.ShardTensors: {0, 1}}[by]
					o, path := divided(by, ranks...)
					o.Share, o.RAM = share, 64<<20
					var mu sync.Mutex
					var done, total int64
					o.Request.Progress = func(d, n int64) {
						mu.Lock()
						defer mu.Unlock()
						if d < done {
							t.Errorf("progress goes from %d to %d", done, d)
						}
						done, total = d, n
					}
					machine := soft.Options{Devices: len(ranks)}
					if oneDevice {
						machine.Devices = 1
					}
					h := hold(t, o, machine)
					if name, err := h.Add(t.Context(), "m", path); name != "m" || err != nil {
						t.Fatal(name, err)
					}
					if err := h.Wait(t.Context(), "m"); err != nil {
						t.Fatal(err)
					}
					want := slices.Sorted(slices.Values([]string{partName("m", ranks[0]), partName("m", ranks[1])}))
					if parts, err := h.Parts(""); err != nil || !slices.Equal(parts, want) {
						t.Errorf("parts %q, %v", parts, err)
					}
					var bytes int64
					at := make(map[int]uintptr)
					var attached []*Attached
					for i, rank := range ranks {
						if oneDevice {
							i = 0
						}
						a := h.wantPart(t, path, rank, i)
						attached = append(attached, a)
						bytes += int64(a.Plan().TensorBytes())
						at[rank] = uintptr(a.Tensors()[0].Ptr)
						m := h.wantState(t, a.Info.Name, stateResident, true)
						if s := m.Shard; s == nil || s.By != by || s.Rank != rank || s.Model != "m" || !slices.Equal(m.Devices, []int{i}) {
							t.Errorf("%+v of %+v", s, m)
						}
					}
					mu.Lock()
					if done != bytes || total != bytes {
						t.Errorf("progress ended with %d of %d, %d bytes were loaded", done, total, bytes)
					}
					mu.Unlock()
					mustClose(t, attached[0])
					eventually(t, "the first has gone", func() bool { return h.model(t, attached[0].Info.Name).Attached == 0 })
					// One that is used keeps them all.
					for what, err := range map[string]error{"sleep": h.Sleep(t.Context(), "m"), "drop": h.Drop("m")} {
						if !errors.Is(err, ErrAttached) {
							t.Errorf("%s: %v", what, err)
						}
					}
					for _, name := range want {
						h.wantState(t, name, stateResident, true)
					}
					mustClose(t, attached[1])
					eventually(t, "both have gone", func() bool { return h.model(t, attached[1].Info.Name).Attached == 0 })
					if err := h.Sleep(t.Context(), "m"); err != nil {
						t.Fatal(err)
					}
					for _, name := range want {
						h.wantState(t, name, stateAsleep, true)
					}
					if err := errors.Join(h.Wake(t.Context(), ""), h.Pin("m")); err != nil {
						t.Fatal(err)
					}
					for i, rank := range ranks {
						if oneDevice {
							i = 0
						}
						a := h.wantPart(t, path, rank, i)
						if ptr := uintptr(a.Tensors()[0].Ptr); share == ShareFD && ptr != at[rank] {
							t.Errorf("rank %d woke at %#x, was at %#x", rank, ptr, at[rank])
						}
						if m := h.model(t, a.Info.Name); !m.Pinned || m.Wakes != 1 {
							t.Errorf("%+v", m)
						}
						mustClose(t, a)
						eventually(t, "it has gone", func() bool { return h.model(t, a.Info.Name).Attached == 0 })
					}
					if err := h.Drop("m"); err != nil || len(h.Models()) > 0 {
						t.Errorf("%+v, %v", h.Models(), err)
					}
				})
			}
		}
	}
}

// TestWhosePart asks for parts that are held and others.
func TestWhosePart(t *testing.T) {
	t.Parallel()
	o, path := divided(plan.ShardLayers, 0, 2)
	h := hold(t, o, soft.Options{}).with(t, "m", path)
	for _, c := range []struct {
		name        string
		rank, world int
		want        string
	}{
		{"m", 0, 3, ""},
		{"m", 2, 0, ""},
		{"m@2", 2, 3, ""},
		{"m", 1, 3, `"m" is held for rank 0 of 3, rank 2 of 3, and not for rank 1 of 3`},
		{"m", 0, 2, "and not for rank 0 of 2"},
		{"m@2", 0, 3, "and not for rank 0 of 3"},
		{"x", 0, 3, "no such model is held"},
	} {
		a, err := h.attachRank(t, c.name, c.rank, c.world)
		switch {
		case c.want == "" && err != nil:
			t.Errorf("%+v: %v", c, err)
		case c.want == "":
			if got := a.Plan().Spec.Shard.Rank; got != c.rank {
				t.Errorf("%+v: rank %d", c, got)
			}
		case !errors.Is(err, ErrUnknownModel) || !strings.Contains(err.Error(), c.want):
			t.Errorf("%+v: %v", c, err)
		}
	}
	if _, err := Attach(t.Context(), h.to(t, "m")); !errors.Is(err, ErrUnknownModel) ||
		!strings.Contains(err.Error(), `"m" is held in parts, for rank 0 of 3, rank 2 of 3: say for which rank`) {
		t.Errorf("without a rank: %v", err)
	}
	if _, err := h.Model("m"); !errors.Is(err, ErrUnknownModel) {
		t.Errorf("a part is to be named: %v", err)
	}
	whole := hold(t, Options{}, soft.Options{}).with(t, "", sample)
	if _, err := whole.attachRank(t, "", 5, 8); err != nil {
		t.Errorf("what is whole is for all ranks: %v", err)
	}
}

// TestBadRanks refuses parts that cannot be held.
func TestBadRanks(t *testing.T) {
	t.Parallel()
	_, devices := openSoft(t, soft.Options{Devices: 3})
	by := plan.Shard{By: plan.ShardLayers, World: 4}
	for want, o := range map[string]Options{
		"nothing says how the model is divided": {Ranks: []int{0, 1, 2}},
		"rank 4 of a world of 4":                {Ranks: []int{0, 1, 4}, Spec: plan.Spec{Shard: by}},
		"rank -1 of a world of 4":               {Ranks: []int{-1}, Spec: plan.Spec{Shard: by}},
		"rank 1 is there twice":                 {Ranks: []int{1, 0, 1}, Spec: plan.Spec{Shard: by}},
		"parts of 2 ranks on 3 devices":         {Ranks: []int{1, 0}, Spec: plan.Spec{Shard: by}},
		"a split over devices":                  {Ranks: []int{0, 1, 2}, Spec: plan.Spec{Shard: by, Split: plan.Split{By: plan.SplitNone}}},
	} {
		h, err := New(devices, o)
		if h != nil || !errors.Is(err, loader.ErrBadOption) || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q, got %v", want, err)
		}
	}
}

// TestPartsTogether: all parts of a model are added, or none. They make no room for each other.
func TestPartsTogether(t *testing.T) {
	t.Parallel()
	o, path := divided(plan.ShardLayers, 0, 1, 2)
	h := hold(t, o, soft.Options{}).with(t, "m", path)
	var need uint64
	for _, m := range h.Models() {
		need += sharedSize(m.Bytes)
	}
	o.VRAM = need - sharedAlign
	tight := hold(t, o, soft.Options{})
	if _, err := tight.Add(t.Context(), "m", path); !errors.Is(err, loader.ErrInsufficientMemory) ||
		!strings.Contains(err.Error(), "(of the same model)") {
		t.Errorf("without room for all: %v", err)
	}
	if all := tight.Models(); len(all) > 0 {
		t.Errorf("some are left: %+v", all)
	}
	if s := tight.soft.Stats(); s.DeviceBytes != 0 {
		t.Errorf("%d bytes are left", s.DeviceBytes)
	}
	if _, err := h.Add(t.Context(), "m", path); !errors.Is(err, ErrModelExists) || len(h.Models()) != 3 {
		t.Errorf("twice: %v, and there is %+v", err, h.Models())
	}
	if err := h.Drop("m@1"); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Add(t.Context(), "m", path); !errors.Is(err, ErrModelExists) || len(h.Models()) != 2 {
		t.Errorf("where two are there already: %v, and there is %+v", err, h.Models())
	}
}

// TestAdoptParts: the next Holder takes all parts over, each on its device, and keeps those that are as they should be.
func TestAdoptParts(t *testing.T) {
	t.Parallel()
	k := keeping(t)
	o, path := divided(plan.ShardLayers, 0, 1, 2)
	o.Share, o.Keep = ShareFD, k
	h := hold(t, o, soft.Options{Devices: 3}).with(t, "m", path)
	wantKept(t, k, 3)
	o.RAM = 64 << 20
	h = h.again(t, o)
	names, err := h.Adopt(t.Context())
	slices.Sort(names)
	if err != nil || !slices.Equal(names, []string{"m@0", "m@1", "m@2"}) {
		t.Fatalf("adopted %q, %v", names, err)
	}
	h.with(t, "m", path)
	for i, name := range names {
		if m := h.wantState(t, name, stateResident, true); !m.Adopted || !slices.Equal(m.Devices, []int{i}) {
			t.Errorf("%+v", m)
		}
		a := h.wantPart(t, path, i, i)
		mustClose(t, a)
		eventually(t, "it has gone", func() bool { return h.model(t, name).Attached == 0 })
	}
	if err := errors.Join(h.Sleep(t.Context(), "m"), h.Wake(t.Context(), "m")); err != nil {
		t.Fatal(err)
	}
	for i := range names {
		mustClose(t, h.wantPart(t, path, i, i))
	}
	wantKept(t, k, 3)
	// The ranks on other devices are others.
	o.Ranks = []int{0, 2, 1}
	other := h.again(t, o)
	if _, err := other.Adopt(t.Context()); err != nil {
		t.Fatal(err)
	}
	other.with(t, "m", path)
	for name, adopted := range map[string]bool{"m@0": true, "m@1": false, "m@2": false} {
		if m := other.wantState(t, name, stateResident, true); m.Adopted != adopted {
			t.Errorf("%+v", m)
		}
	}
	other.wantPart(t, path, 1, 2)
}
