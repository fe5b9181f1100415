package bench

import (
	"context"
	"errors"
	"slices"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels"
)

// TestWalkConverts takes the steps of every conversion: each is whole blocks that decode to just the step's output, and
// in the L2 working set the input is used up evenly, so that each element is decoded as often as any other.
func TestWalkConverts(t *testing.T) {
	t.Parallel()
	for _, from := range slices.DeleteFunc(gguf.Types(), gguf.Type.Integer) {
		source := l2Elems / from.BlockElems() * from.BlockBytes()
		if source > MinBuffer {
			t.Errorf("%v: the L2 working set has %d bytes, more than the smallest buffer", from, source)
		}
		for _, to := range []gguf.Type{gguf.F32, gguf.F16, gguf.BF16} {
			for _, bytes := range []int{l2Output, memoryCall} {
				var w walk
				w.convert(to, from, bytes)
				if n, ok := from.Bytes(uint64(w.dstStep / to.BlockBytes())); !ok || n != uint64(w.srcStep) || w.dstStep != bytes {
					t.Errorf("%v to %v: %d bytes for %d, want %d for %d", from, to, w.srcStep, w.dstStep, n, bytes)
				}
			}
			var w walk
			w.convert(to, from, l2Output)
			if source%w.srcStep != 0 || source == w.srcStep {
				t.Errorf("%v to %v: steps of %d bytes through %d", from, to, w.srcStep, source)
			}
		}
	}
}

func TestWalkBeginsAgain(t *testing.T) {
	t.Parallel()
	w := walk{dst: []byte("abcdef"), src: []byte("0123456789"), dstStep: 3, srcStep: 4}
	want := []string{"abc 0123", "def 4567", "abc 0123", "def 4567"}
	for i, want := range want {
		dst, src := w.next()
		if got := string(dst) + " " + string(src); got != want {
			t.Errorf("step %d is %q, want %q", i, got, want)
		}
	}
}

// TestCPUKernels measures a conversion in both working sets, and stops when its context is canceled.
func TestCPUKernels(t *testing.T) {
	t.Parallel()
	o := CPUOptions{
		Types: []gguf.Type{gguf.Q4_0}, DTypes: []gguf.Type{gguf.F16}, ISAs: []kernels.ISA{kernels.Generic}, Runs: 1,
		Buffer: MinBuffer,
	}
	r, err := CPUKernels(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	var sets []string
	for _, k := range r.Kernels {
		sets = append(sets, k.WorkingSet)
		if k.Type != "q4_0" || k.DType != "f16" || k.ISA != "generic" || k.GBps <= 0 {
			t.Errorf("%+v, want q4_0 to f16 by generic code", k)
		}
	}
	if !slices.Equal(sets, []string{SetL2, SetMemory}) || r.Device != nil {
		t.Errorf("working sets %v on %v, want both on the CPU", sets, r.Device)
	}
	if c := r.Ceilings; c.L2.Memcpy <= 0 || c.Memory.Memcpy <= 0 || c.Memory.Fill <= 0 {
		t.Errorf("ceilings %+v, want all", c)
	}
	stop := errors.New("stop")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(stop)
	if r, err := CPUKernels(ctx, o); !errors.Is(err, stop) {
		t.Errorf("got %v, %v; want %v", r, err, stop)
	}
}
