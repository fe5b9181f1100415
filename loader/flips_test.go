package loader

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// TestFlips lets one bit be wrong in what single copies deliver, and loads twice: without a proof, to see what is wrong
// in device memory then, and with one, which must find just that. A bit between two tensors damages nothing, and is not
// found.
func TestFlips(t *testing.T) {
	t.Parallel()
	for name, o := range map[string]options{
		"raw": {Policy: plan.Raw}, "f16": {Dequant: DequantCPU}, "slices": withShard(options{Policy: plan.Raw}),
		"copies": {Policy: plan.Raw, Split: plan.Split{By: plan.SplitNone}}, "layers": {Policy: plan.Raw},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := 1
			if name == "copies" || name == "layers" {
				n = 2
			}
			f := llama(t)
			devs, sw := openDevices(t, n, soft.Options{})
			o.Chunk, o.Staging, o.Threads, o.Streams = 64<<10, int64(n)*64<<10, n, 1
			l := newLoader(t, o, devs...)
			p := mustPlan(t, l, f, o)
			intact := func(prove Prove) (*Model, error) { return l.Load(t.Context(), p, Request{Prove: prove}) }
			w, err := intact(ProveOn) // the kernel is ready from here on
			if err != nil {
				t.Fatal(err)
			}
			want := make([]map[string][]byte, n)
			for i, dev := range devs {
				want[i] = contentsOn(t, w, dev)
			}
			mustClose(t, w)
			before := sw.Stats().Copies
			if w, err = intact(ProveOff); err != nil {
				t.Fatal(err)
			}
			mustClose(t, w)
			copies := int(sw.Stats().Copies - before)
			rng, found := rand.New(rand.NewPCG(1, 2)), 0
			for i := range 14 {
				copy := i%copies + 1
				flip := soft.Flip{Copy: copy, Byte: rng.Uint64N(1 << 20), Bit: uint8(rng.UintN(8))}
				if err := sw.Flip(flip); err != nil {
					t.Fatal(err)
				}
				if w, err = intact(ProveOff); err != nil {
					t.Fatal(err)
				}
				wrong := -1
				var damage ProveError
				for i, dev := range devs {
					got := contentsOn(t, w, dev)
					for _, x := range slices.Sorted(maps.Keys(got)) {
						for at := range got[x] {
							if bits := got[x][at] ^ want[i][x][at]; bits != 0 {
								wrong = at
								damage = ProveError{Device: dev, Tensor: x, Offset: int64(at), Bit: int64(flip.Bit), Blocks: 1}
							}
						}
					}
				}
				mustClose(t, w)
				if err := sw.Flip(flip); err != nil {
					t.Fatal(err)
				}
				w, err = intact(ProveOn)
				switch {
				case wrong < 0 && n == 1 && err != nil:
					t.Errorf("%v: nothing is wrong: %v", flip, err)
				case wrong >= 0 && n == 1:
					found++
					wantDamage(t, err, damage)
				case err != nil: // which of several devices gets the copy of that number is open
					found++
					if e, ok := errors.AsType[*ProveError](err); !ok || e.Blocks != 1 || e.Bit%8 != int64(flip.Bit) {
						t.Errorf("%v: %v", flip, err)
					}
				}
				if err == nil {
					mustClose(t, w)
				}
			}
			if found < 5 {
				t.Errorf("%d flips were found", found)
			}
			if w, err = intact(ProveOn); err != nil {
				t.Fatal(fmt.Errorf("after all flips: %w", err))
			}
			mustClose(t, w)
		})
	}
}
