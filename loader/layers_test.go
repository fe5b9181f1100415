package loader

import (
	"cmp"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// TestLayerAssignment compares the greatest load with the least that there can be, and wants runs of layers.
func TestLayerAssignment(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 6))
	for range 400 {
		n := 1 + rng.IntN(7)
		parts := 1 + rng.IntN(n)
		s := &stack{bytes: make([]uint64, n)}
		for i := range s.bytes {
			s.bytes[i] = uint64(1 + rng.IntN(20))
		}
		if rng.IntN(2) == 0 {
			s.head, s.tail = uint64(rng.IntN(40)), uint64(rng.IntN(40))
		}
		weights := slices.Repeat([]float64{1}, parts)
		if rng.IntN(2) == 0 {
			for i := range weights {
				weights[i] = float64(1 + rng.IntN(5))
			}
		}
		load := func(ends []int) (most float64) {
			at := 0
			for p, end := range ends {
				sum := uint64(0)
				for _, b := range s.bytes[at:end] {
					sum += b
				}
				if p == 0 {
					sum += s.head
				}
				if p == parts-1 {
					sum += s.tail
				}
				most, at = max(most, float64(sum)/weights[p]), end
			}
			return most
		}
		best := math.Inf(1)
		var try func(ends []int)
		try = func(ends []int) {
			if len(ends) == parts-1 {
				best = min(best, load(append(slices.Clone(ends), n)))
				return
			}
			at := 0
			if len(ends) > 0 {
				at = ends[len(ends)-1]
			}
			for end := at + 1; end < n; end++ {
				try(append(slices.Clone(ends), end))
			}
		}
		try(nil)
		got := s.divide(weights)
		if !slices.IsSortedFunc(got, func(a, b int) int { return cmp.Or(cmp.Compare(a, b), 1) }) || got[0] < 1 || got[parts-1] != n {
			t.Fatalf("%+v by %v: ends %v", s, weights, got)
		}
		if l := load(got); l > best*(1+1e-9) {
			t.Errorf("%+v by %v: ends %v, load %v, want %v", s, weights, got, l, best)
		}
	}
}

// TestLayersByName wants layers to be told apart by number and not by text, and what is around them to go with the ends.
func TestLayersByName(t *testing.T) {
	var tensors []PlannedTensor
	for _, name := range []string{
		"output.weight", "output_norm.weight", "token_embd.weight", "blk.10.x", "blk.2.x", "blk.2.y", "rope_freqs.weight", "blk.0.output.weight",
		"blk.99999999999999999999.x", "cls.output.weight",
	} {
		tensors = append(tensors, PlannedTensor{Tensor: &gguf.Tensor{Name: name}, Bytes: 100})
	}
	owners, err := assignLayers(tensors, []float64{1, 1, 1})
	if err != nil {
		t.Fatal(err)
	}
	if want := []int{2, 2, 0, 2, 1, 1, 0, 0, 0, 2}; !slices.Equal(owners, want) {
		t.Errorf("parts %v, want %v", owners, want)
	}
}

// TestTooManyLayers: a file with absurdly many layers is refused rather than pondered over.
func TestTooManyLayers(t *testing.T) {
	tensors := make([]PlannedTensor, 300_000)
	for i := range tensors {
		tensors[i] = PlannedTensor{Tensor: &gguf.Tensor{Name: fmt.Sprintf("blk.%d.x", i)}, Bytes: 1}
	}
	if _, err := assignLayers(tensors, slices.Repeat([]float64{1}, 1000)); err == nil || !strings.Contains(err.Error(), "300000 layers are too many") {
		t.Error(err)
	}
}
