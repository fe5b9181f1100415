package hold

import (
	"fmt"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// TestProvedWakes: a model whose load is proved is proved each time that it is woken, and has fingerprints of what is
// in device memory. When its copy in host memory is damaged, it comes back from its file.
func TestProvedWakes(t *testing.T) {
	t.Parallel()
	for _, policy := range []plan.Policy{plan.Raw, plan.F16} {
		for _, by := range []loader.Dequant{loader.DequantCPU, loader.DequantGPU} {
			for _, damaged := range []bool{false, true} {
				t.Run(fmt.Sprintf("%v/%v/%v", policy, by, damaged), func(t *testing.T) {
					t.Parallel()
					c := tight()
					c.Dequant = by
					o := Options{
						RAM: 64 << 20, Spec: plan.Spec{Policy: policy}, Config: c, slabBytes: slab,
						Request: loader.Request{Prove: loader.ProveOn},
					}
					h := hold(t, o, soft.Options{Devices: 2}).with(t, "m", sample)
					f := openFile(t, sample)
					for range 2 {
						m := h.wantState(t, "m", stateResident, true)
						if !m.Proved || m.ProvedBytes == 0 {
							t.Errorf("not proved: %+v", m)
						}
						held, err := h.Model("m")
						if err != nil {
							t.Fatal(err)
						}
						if all, err := held.Fingerprints(); err != nil || len(all) != held.Plan().Len() {
							t.Errorf("%d fingerprints, %v", len(all), err)
						}
						wantContents(t, held, f)
						if err := h.Sleep(t.Context(), "m"); err != nil {
							t.Fatal(err)
						}
						h.wantState(t, "m", stateAsleep, true)
						if damaged {
							h.mu.Lock()
							h.models["m"].image.slabs[0].Bytes()[slab/2] ^= 1
							h.mu.Unlock()
						}
						if err := h.Wake(t.Context(), "m"); err != nil {
							t.Fatal(err)
						}
						held, err = h.Model("m")
						if err != nil {
							t.Fatal(err)
						}
						if fromFile := held.Report().ImageBytes == 0; fromFile != damaged {
							t.Errorf("loaded from the file: %v", fromFile)
						}
					}
				})
			}
		}
	}
}

// TestUnprovedWakeKeepsDamage: without a proof nobody sees that the copy in host memory is damaged. This shows that the
// damage of the other test is real.
func TestUnprovedWakeKeepsDamage(t *testing.T) {
	t.Parallel()
	o := Options{RAM: 64 << 20, Spec: plan.Spec{Policy: plan.Raw}, slabBytes: slab}
	h := hold(t, o, soft.Options{Devices: 2}).with(t, "m", sample)
	h.wantState(t, "m", stateResident, true)
	if err := h.Sleep(t.Context(), "m"); err != nil {
		t.Fatal(err)
	}
	h.mu.Lock()
	h.models["m"].image.slabs[0].Bytes()[slab/2] ^= 1
	h.mu.Unlock()
	if err := h.Wake(t.Context(), "m"); err != nil {
		t.Fatal(err)
	}
	held, err := h.Model("m")
	if err != nil {
		t.Fatal(err)
	}
	f, wrong := openFile(t, sample), 0
	want := wanted(t, f, held.Plan())
	for at, b := range contents(t, held) {
		if string(b) != string(want[at]) {
			wrong++
		}
	}
	if m := h.model(t, "m"); wrong != 1 || m.Proved || m.Wakes != 1 {
		t.Errorf("%d tensors are wrong; %+v", wrong, m)
	}
	if all, err := held.Fingerprints(); err != nil || all != nil {
		t.Errorf("%d fingerprints, %v", len(all), err)
	}
}
