package hold

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// often is an interval for tests that wait for the next pass.
const often = 5 * time.Millisecond

// wantScrub waits until what is said of the model's memory is as it should be.
func (h *testHolder) wantScrub(t *testing.T, name string, ok func(s *Scrub) bool) *Scrub {
	t.Helper()
	var s *Scrub
	for range 4000 {
		if s = h.model(t, name).Scrub; s != nil && ok(s) {
			return s
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("it never came about: %+v", s)
	return nil
}

// another waits until another pass over the model's memory has begun and ended.
func (h *testHolder) another(t *testing.T, name string) *Scrub {
	t.Helper()
	n := h.model(t, name).Scrub.Passes
	return h.wantScrub(t, name, func(s *Scrub) bool { return s.Passes >= n+2 })
}

// flip flips a bit in the middle of a tensor of a model that is held, on each device that it is on.
func (h *testHolder) flip(t *testing.T, model, tensor string) {
	t.Helper()
	m, err := h.Model(model)
	if err != nil {
		t.Fatal(err)
	}
	for _, dev := range m.Devices() {
		x, err := m.TensorOn(dev, tensor)
		if errors.Is(err, amdhip.ErrInvalidDevice) {
			continue
		}
		if err == nil {
			err = h.soft.FlipBit(x.Ptr+amdhip.DevicePtr(x.Bytes/2), 4)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestScrubRewrites flips a bit of device memory that others have mapped. It is found and written again where it is,
// from page-locked memory or from the file, and they have the right bytes at the same addresses.
func TestScrubRewrites(t *testing.T) {
	t.Parallel()
	for _, share := range []Share{ShareIPC, ShareFD} {
		for _, ram := range []int64{0, 64 << 20} {
			for _, split := range []plan.SplitBy{plan.SplitLayers, plan.SplitNone} {
				for name, how := range map[string]loader.Config{"cpu": {Dequant: loader.DequantCPU}, "gpu": {Dequant: loader.DequantGPU}} {
					t.Run(fmt.Sprintf("%v/%d/%v/%s", share, ram, split, name), func(t *testing.T) {
						t.Parallel()
						config := tight()
						config.Dequant, config.Staging = how.Dequant, 2*config.Staging
						o := Options{
							Share: share, RAM: ram, Scrub: often, slabBytes: slab, Config: config,
							Spec: plan.Spec{Split: plan.Split{By: split}},
						}
						h := hold(t, o, soft.Options{Devices: 2}).with(t, "m", sample)
						h.wantState(t, "m", stateResident, ram > 0)
						if m := h.model(t, "m"); !m.Proved {
							t.Errorf("not proved: %+v", m)
						}
						f := openFile(t, sample)
						a := h.attach(t, "m")
						before := a.Tensors()[0].Ptr
						names := []string{"token_embd.weight", "blk.3.attn_q.weight", "output_norm.weight"}
						copies := 1
						if split == plan.SplitNone {
							copies = 2
						}
						for i, name := range names {
							h.flip(t, "m", name)
							s := h.wantScrub(t, "m", func(s *Scrub) bool { return s.Rewritten >= (i+1)*copies })
							if !strings.Contains(s.Last, name) || !strings.Contains(s.Last, "bit 4 of byte") {
								t.Errorf("%q does not name the tensor %q and the bit", s.Last, name)
							}
						}
						s, want := h.another(t, "m"), len(names)*copies
						if s.Damaged != want || s.Rewritten != want || s.Rewoken+s.HostDamaged != 0 || s.Bytes == 0 {
							t.Errorf("%+v, want %d blocks", s, want)
						}
						wantContents(t, a.Model, f)
						if a.Tensors()[0].Ptr != before {
							t.Error("the address has changed")
						}
					})
				}
			}
		}
	}
}

// damageImage flips a bit in the middle of a model's page-locked memory, and returns the image.
func (h *testHolder) damageImage(t *testing.T, name string) *hostImage {
	t.Helper()
	m, err := h.find(name)
	if err != nil {
		t.Fatal(err)
	}
	m.turn <- struct{}{} // nobody is looking now
	defer func() { <-m.turn }()
	h.mu.Lock()
	defer h.mu.Unlock()
	b := m.image.slabs[1].Bytes()
	b[len(b)/2] ^= 1
	return m.image
}

// TestScrubImage flips a bit of page-locked memory, of a model in device memory and of one that is asleep. It is found,
// and the file is read again.
func TestScrubImage(t *testing.T) {
	t.Parallel()
	for _, asleep := range []bool{false, true} {
		t.Run(fmt.Sprintf("asleep %v", asleep), func(t *testing.T) {
			t.Parallel()
			h := hold(t, Options{RAM: 64 << 20, Scrub: often, slabBytes: slab}, soft.Options{}).with(t, "m", sample)
			h.wantState(t, "m", stateResident, true)
			state := stateResident
			if asleep {
				state = stateAsleep
				if err := h.Sleep(t.Context(), "m"); err != nil {
					t.Fatal(err)
				}
			}
			damaged := h.damageImage(t, "m")
			h.wantScrub(t, "m", func(s *Scrub) bool { return s.HostDamaged > 0 })
			h.wantState(t, "m", state, true)
			m, _ := h.find("m")
			h.mu.Lock()
			same := m.image == damaged
			h.mu.Unlock()
			if same {
				t.Error("the image is the old one")
			}
			if s := h.model(t, "m").Scrub; s.HostDamaged != 1 || s.Damaged != 0 || !strings.Contains(s.Last, "host's copy") {
				t.Errorf("%+v", s)
			}
			if !asleep {
				if err := h.Sleep(t.Context(), "m"); err != nil {
					t.Fatal(err)
				}
			}
			wantContents(t, h.attach(t, "m").Model, openFile(t, sample))
		})
	}
}

// TestScrubBadMemory has memory that does not keep what is written to it. A model that nobody uses is woken anew. One
// that is in use stays as it is, and is written again when the memory keeps it.
func TestScrubBadMemory(t *testing.T) {
	t.Parallel()
	for _, used := range []bool{false, true} {
		t.Run(fmt.Sprintf("used %v", used), func(t *testing.T) {
			t.Parallel()
			h := hold(t, Options{Scrub: often}, soft.Options{}).with(t, "m", sample)
			if used {
				h.attach(t, "m")
			}
			for n := range 2 { // the block is written twice
				if err := h.soft.Flip(soft.Flip{Copy: n + 1}); err != nil {
					t.Fatal(err)
				}
			}
			h.flip(t, "m", "output_norm.weight")
			s := h.wantScrub(t, "m", func(s *Scrub) bool { return s.Rewoken+s.Rewritten > 0 })
			h.wantState(t, "m", stateResident, false)
			if s.Damaged != 1 || s.Rewoken == 1 == used || s.Rewritten == 1 != used {
				t.Errorf("%+v", s)
			}
			wantContents(t, h.attach(t, "m").Model, openFile(t, sample))
		})
	}
}

// TestScrubRewakes has a file that is not what was loaded any more where the damage is, so that nothing is written. The
// model, which nobody uses, is loaded again.
func TestScrubRewakes(t *testing.T) {
	t.Parallel()
	path := copies(t, 1)[0]
	h := hold(t, Options{Scrub: often}, soft.Options{}).with(t, "m", path)
	at := h.model(t, "m")
	held, err := h.Model("m")
	if err != nil {
		t.Fatal(err)
	}
	group, i, ok := held.Plan().Find("output_norm.weight")
	if !ok {
		t.Fatal("no such tensor")
	}
	lo, hi := held.Plan().Groups[group].Tensors[i].Span(0, held.Plan().Groups[group].Tensors[i].Size)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b[(lo+hi)/2+3] ^= 4
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	h.flip(t, "m", "output_norm.weight")
	s := h.wantScrub(t, "m", func(s *Scrub) bool { return s.Rewoken > 0 })
	m := h.wantState(t, "m", stateResident, false)
	if s.Rewritten != 0 || s.Damaged != 1 || m.Scrub.Now != 0 || m.Wakes != at.Wakes+1 {
		t.Errorf("%+v, woken %d times", s, m.Wakes)
	}
	if s := h.another(t, "m"); s.Damaged != 1 {
		t.Errorf("after it was woken: %+v", s)
	}
}

// TestScrubAdopted looks at a model that was taken over from an earlier Holder, which had not proved it: the first pass
// takes the fingerprints.
func TestScrubAdopted(t *testing.T) {
	t.Parallel()
	k := keeping(t)
	o := Options{Share: ShareFD, Keep: k, Scrub: often}
	unproved := o
	unproved.Request.Prove = loader.ProveOff
	h := hold(t, unproved, soft.Options{}).with(t, "m", sample)
	wantKept(t, k, 1)
	a := h.attach(t, "m")
	h = h.again(t, o)
	if _, err := h.Adopt(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.another(t, "m")
	if m := h.model(t, "m"); m.Proved || !m.Adopted {
		t.Errorf("%+v", m)
	}
	h.flip(t, "m", "token_embd.weight")
	if s := h.wantScrub(t, "m", func(s *Scrub) bool { return s.Rewritten > 0 }); s.Damaged != 1 {
		t.Errorf("%+v", s)
	}
	wantContents(t, a.Model, openFile(t, sample))
}

// TestScrubStays has damage and nothing to put it right from. It is said once, and put right when the file is back.
func TestScrubStays(t *testing.T) {
	t.Parallel()
	path := copies(t, 1)[0]
	h := hold(t, Options{Scrub: often}, soft.Options{}).with(t, "m", path)
	aside := filepath.Join(filepath.Dir(path), "aside")
	if err := os.Rename(path, aside); err != nil {
		t.Fatal(err)
	}
	h.flip(t, "m", "output_norm.weight")
	h.wantScrub(t, "m", func(s *Scrub) bool { return s.Damaged > 0 })
	if s := h.another(t, "m"); s.Damaged != 1 || s.Now != 1 || s.Rewritten+s.Rewoken != 0 {
		t.Errorf("without the file: %+v", s)
	}
	h.wantState(t, "m", stateResident, false)
	if err := os.Rename(aside, path); err != nil {
		t.Fatal(err)
	}
	if s := h.wantScrub(t, "m", func(s *Scrub) bool { return s.Rewritten > 0 }); s.Damaged != 1 || s.Now != 0 {
		t.Errorf("with the file: %+v", s)
	}
	wantContents(t, h.attach(t, "m").Model, openFile(t, sample))
}

// TestScrubSchedule counts passes by the clock: one in each interval, none while the model sleeps, and no more than
// their share of the time.
func TestScrubSchedule(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, devices := openSoft(t, soft.Options{Devices: 2})
		h, err := New(devices, Options{Scrub: time.Minute, Share: ShareIPC})
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := h.Close(); err != nil {
				t.Error(err)
			}
		}()
		if _, err := h.Add(t.Context(), "m", sample); err != nil {
			t.Fatal(err)
		}
		if err := h.Wait(t.Context(), "m"); err != nil {
			t.Fatal(err)
		}
		scrub := func() *Scrub { return h.Models()[0].Scrub }
		if s := scrub(); *s != (Scrub{}) {
			t.Errorf("before the first interval: %+v", s)
		}
		time.Sleep(10*time.Minute + 30*time.Second)
		s := scrub()
		if want := 10 * h.Models()[0].Bytes; s.Passes != 10 || s.Damaged != 0 || s.Bytes > want || s.Bytes < want*9/10 {
			t.Errorf("after ten intervals: %+v, want about %d bytes", s, want)
		}
		if err := h.Sleep(t.Context(), "m"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Minute)
		if got := scrub(); got.Bytes != s.Bytes {
			t.Errorf("asleep: %+v, before %+v", got, s)
		}
		if err := h.Wake(t.Context(), "m"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Minute)
		if got := scrub(); got.Passes != 12 {
			t.Errorf("woken: %+v", got)
		}
	})
	if got := scrubPause(time.Millisecond); got < 49*time.Millisecond-time.Microsecond || got > 50*time.Millisecond {
		t.Errorf("after a millisecond nobody looks for %v", got)
	}
}

// TestScrubMetrics wants the counts to be where they are looked for.
func TestScrubMetrics(t *testing.T) {
	t.Parallel()
	h := hold(t, Options{Scrub: often}, soft.Options{}).with(t, "m", sample)
	h.flip(t, "m", "output_norm.weight")
	h.wantScrub(t, "m", func(s *Scrub) bool { return s.Rewritten == 1 && s.Passes > 1 })
	var b strings.Builder
	if err := h.WriteMetrics(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"gguf2gpu_scrub_damage_total{model=\"m\"} 1\n", "gguf2gpu_scrub_rewritten_total{model=\"m\"} 1\n",
		"gguf2gpu_scrub_rewoken_total{model=\"m\"} 0\n", "gguf2gpu_scrub_host_damage_total{model=\"m\"} 0\n",
		"gguf2gpu_scrub_passes_total{model=\"m\"}", "gguf2gpu_scrubbed_bytes_total{model=\"m\"}",
	} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %q in\n%s", want, b.String())
		}
	}
	if _, err := New(h.devices, Options{Scrub: -1}); !errors.Is(err, loader.ErrBadOption) {
		t.Errorf("a negative interval: %v", err)
	}
}
