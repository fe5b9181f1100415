package main

import (
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// TestWalkConverts takes the steps of every conversion: each is whole blocks that decode to just the step's output, and in
// the L2 working set the input is used up evenly, so that each element is decoded as often as any other.
func TestWalkConverts(t *testing.T) {
	for _, from := range floatTypes() {
		source := l2Elems / from.BlockElems() * from.BlockBytes()
		if source > minBuffer {
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
	w := walk{dst: []byte("abcdef"), src: []byte("0123456789"), dstStep: 3, srcStep: 4}
	want := []string{"abc 0123", "def 4567", "abc 0123", "def 4567"}
	for i, want := range want {
		dst, src := w.next()
		if got := string(dst) + " " + string(src); got != want {
			t.Errorf("step %d is %q, want %q", i, got, want)
		}
	}
}
