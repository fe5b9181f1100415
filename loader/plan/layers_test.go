package plan

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// checkDivide divides s and compares the greatest load with the least that any division has. It wants runs of layers
// that lose nothing, with at least one layer each where there are enough.
func checkDivide(t *testing.T, s *stack, weights []float64) {
	t.Helper()
	n, parts := len(s.bytes), len(weights)
	least := 0
	if n >= parts {
		least = 1
	}
	load := func(part, first, end int) float64 {
		var sum uint64
		for _, b := range s.bytes[first:end] {
			sum += b
		}
		if part == 0 {
			sum += s.head
		}
		if part == parts-1 {
			sum += s.tail
		}
		return float64(sum) / weights[part]
	}
	var best func(part, first int) float64 // the least greatest load of part and those after it
	best = func(part, first int) float64 {
		if part == parts-1 {
			return load(part, first, n)
		}
		found := math.Inf(1)
		for end := first + least; end <= n-least*(parts-1-part); end++ {
			found = min(found, max(load(part, first, end), best(part+1, end)))
		}
		return found
	}
	ends := s.divide(weights)
	if len(ends) != parts || ends[parts-1] != n {
		t.Fatalf("%+v by %v: ends %v of %d layers", s, weights, ends, n)
	}
	first, greatest := 0, 0.0
	for part, end := range ends {
		if end < first+least {
			t.Fatalf("%+v by %v: ends %v", s, weights, ends)
		}
		greatest = max(greatest, load(part, first, end))
		first = end
	}
	if want := best(0, 0); greatest != want {
		t.Errorf("%+v by %v: ends %v, the greatest load is %v, want %v", s, weights, ends, greatest, want)
	}
}

func TestDivide(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(5, 6))
	for range 1000 {
		s := &stack{bytes: make([]uint64, rng.IntN(8))}
		for i := range s.bytes {
			s.bytes[i] = rng.Uint64N(20)
		}
		if rng.IntN(2) == 0 {
			s.head, s.tail = rng.Uint64N(40), rng.Uint64N(40)
		}
		weights := slices.Repeat([]float64{1}, 1+rng.IntN(9))
		if rng.IntN(2) == 0 {
			for i := range weights {
				weights[i] = float64(1 + rng.IntN(5))
			}
		}
		checkDivide(t, s, weights)
	}
}

// TestEvenEnds: where one part has the greatest load anyway, the others still end as near to even shares as can be.
func TestEvenEnds(t *testing.T) {
	t.Parallel()
	for _, x := range []struct {
		s    stack
		want []int
	}{
		{stack{bytes: []uint64{12, 1, 1, 1, 1, 1, 1}}, []int{1, 4, 7}},
		{stack{bytes: []uint64{1, 1, 1, 1, 1, 1, 1}, head: 9}, []int{1, 4, 7}},
		{stack{bytes: []uint64{1, 1, 1, 1, 1, 1, 1, 1, 1}}, []int{3, 6, 9}},
		{stack{bytes: []uint64{1, 1, 1, 1, 1, 1}, tail: 3}, []int{3, 5, 6}},
	} {
		if got := x.s.divide([]float64{1, 1, 1}); !slices.Equal(got, x.want) {
			t.Errorf("%+v: ends %v, want %v", x.s, got, x.want)
		}
	}
}

// FuzzDivide divides up to eight layers among up to nine parts of any weight, subnormal and huge ones too. Spec.check
// refuses weights that are not above 0 or not finite.
func FuzzDivide(f *testing.F) {
	weigh := func(weights ...float64) (b []byte) {
		for _, w := range weights {
			b = binary.LittleEndian.AppendUint64(b, math.Float64bits(w))
		}
		return b
	}
	tiny, huge := math.SmallestNonzeroFloat64, math.MaxFloat64
	third := 1.0 / 3
	f.Add(weigh(1, 1, 1), []byte{5, 5, 5, 5, 5, 5}, uint32(0), uint32(0), uint8(0))
	f.Add(weigh(third, third, third), []byte{1, 1, 1, 1, 1, 1}, uint32(3), uint32(3), uint8(50))
	f.Add(weigh(0.1, 0.2, 0.3, 0.4), []byte{3, 1, 4, 1, 5, 9, 2, 6}, uint32(1), uint32(2), uint8(40))
	f.Add(weigh(tiny, huge, 1), []byte{9, 9, 9}, uint32(7), uint32(7), uint8(0))
	f.Add(weigh(tiny, tiny, tiny, tiny, tiny, tiny, tiny, tiny, tiny), []byte{1, 2}, uint32(0), uint32(0), uint8(54))
	f.Add(weigh(huge, huge, huge, huge), []byte{1, 2, 3, 4, 5}, uint32(9), uint32(0), uint8(0))
	f.Add(weigh(1, 1+1e-16, 1-1e-16, 1), []byte{255, 255, 255, 255, 254}, uint32(0), uint32(255), uint8(53))
	f.Add(weigh(1), []byte{}, uint32(1), uint32(1), uint8(0))
	f.Fuzz(func(t *testing.T, b, layers []byte, head, tail uint32, shift uint8) {
		var weights []float64
		for ; len(b) >= 8 && len(weights) < 9; b = b[8:] {
			w := math.Float64frombits(binary.LittleEndian.Uint64(b))
			if !(w > 0) || math.IsInf(w, 1) {
				return
			}
			weights = append(weights, w)
		}
		if len(weights) == 0 || len(layers) > 8 {
			return
		}
		s := &stack{head: uint64(head), tail: uint64(tail)}
		for _, n := range layers {
			s.bytes = append(s.bytes, uint64(n)<<(shift%52)) // sums stay below 2^63, and have more bits than a float64
		}
		checkDivide(t, s, weights)
	})
}

// TestLayersByName wants layers in the order of their numbers and not of their names, what comes before the layers on
// the first part, and what comes after them on the last.
func TestLayersByName(t *testing.T) {
	t.Parallel()
	var tensors []Tensor
	for _, name := range []string{
		"output.weight", "output_norm.weight", "token_embd.weight", "blk.10.x", "blk.2.x", "blk.2.y", "rope_freqs.weight",
		"blk.0.output.weight", "blk.99999999999999999999.x", "cls.output.weight",
	} {
		tensors = append(tensors, Tensor{Tensor: &gguf.Tensor{Name: name}, Bytes: 100})
	}
	owners, err := assignLayers(tensors, []float64{1, 1, 1})
	if err != nil {
		t.Fatal(err)
	}
	if want := []int{2, 2, 0, 2, 1, 1, 0, 0, 0, 2}; !slices.Equal(owners, want) {
		t.Errorf("parts %v, want %v", owners, want)
	}
	g := Group{Tensors: tensors}
	if first, last, ok := g.Layers(); first != 0 || last != 10 || !ok {
		t.Errorf("layers %d to %d, %v", first, last, ok)
	}
	g.Tensors = tensors[:3]
	if _, _, ok := g.Layers(); ok {
		t.Error("a group without layers has some")
	}
}

// TestStacks: the layers of an encoder and those of a decoder are different ones, though they have the same numbers.
func TestStacks(t *testing.T) {
	t.Parallel()
	var all []made
	for _, name := range []string{"enc.blk.0.x", "enc.blk.1.x", "dec.blk.0.x", "dec.blk.1.x"} {
		all = append(all, made{name, gguf.F32, []uint64{64}})
	}
	p, err := New(described(t, nil, all), Spec{}, []uint64{1, 1, 1, 1})
	if err != nil {
		t.Fatal(err)
	}
	for i := range p.Groups {
		if g := p.Groups[i]; len(g.Tensors) != 1 || g.Tensors[0].Name != all[i].name {
			t.Errorf("device %d gets %d tensors", i, len(g.Tensors))
		}
	}
}

// TestWithoutLayers: the whole tensors of a model that has no layers are divided.
func TestWithoutLayers(t *testing.T) {
	t.Parallel()
	var all []made
	for _, name := range []string{"mm.0.weight", "mm.1.weight", "output.weight", "token_embd.weight"} {
		all = append(all, made{name, gguf.F32, []uint64{64, 64}})
	}
	p, err := New(described(t, nil, all), Spec{Split: Split{Ratio: []float64{3, 1}}}, []uint64{1, 1})
	if err != nil {
		t.Fatal(err)
	}
	if a, b := len(p.Groups[0].Tensors), len(p.Groups[1].Tensors); a != 3 || b != 1 {
		t.Errorf("%d and %d tensors, want 3 and 1", a, b)
	}
}

// TestZeroShares: devices without a share get nothing, and the others what they would get without these.
func TestZeroShares(t *testing.T) {
	t.Parallel()
	var all []made
	for _, name := range []string{"token_embd.weight", "blk.0.x", "blk.1.x", "blk.2.x", "blk.3.x", "output.weight"} {
		all = append(all, made{name, gguf.F32, []uint64{64, 64}})
	}
	f := described(t, nil, all)
	for _, ratio := range [][]float64{{0, 1}, {1, 0, 0}, {0, 3, 0, 1, 0}} {
		var without []float64
		for _, r := range ratio {
			if r > 0 {
				without = append(without, r)
			}
		}
		p, err := New(f, Spec{Split: Split{Ratio: ratio}}, make([]uint64, len(ratio)))
		if err != nil {
			t.Fatal(err)
		}
		want, err := New(f, Spec{Split: Split{Ratio: without}}, make([]uint64, len(without)))
		if err != nil {
			t.Fatal(err)
		}
		among := p.Spec.Split.Among(len(ratio))
		for d := range p.Groups {
			i := slices.Index(among, d)
			switch g := &p.Groups[d]; {
			case i < 0 && (len(g.Tensors) > 0 || len(g.Arenas) > 0):
				t.Errorf("%v: device %d has %d tensors", ratio, d, len(g.Tensors))
			case i >= 0 && (len(g.Tensors) == 0 || len(g.Tensors) != len(want.Groups[i].Tensors)):
				t.Errorf("%v: device %d has %d tensors, want %d", ratio, d, len(g.Tensors), len(want.Groups[i].Tensors))
			}
		}
	}
}

// TestEmptyParts: more devices or ranks than layers leave some with nothing, and that is a plan like another.
func TestEmptyParts(t *testing.T) {
	t.Parallel()
	f := described(t, nil, []made{{"blk.0.x", gguf.F32, []uint64{64}}, {"blk.1.x", gguf.F32, []uint64{64}}})
	p, err := New(f, Spec{}, slices.Repeat([]uint64{1 << 30}, 5))
	if err != nil {
		t.Fatal(err)
	}
	empty := 0
	for i := range p.Groups {
		g := &p.Groups[i]
		if len(g.Tensors) > 0 {
			continue
		}
		empty++
		if g.DeviceBytes != 0 || len(g.Arenas) != 0 || len(g.Cut(CutOptions{Bytes: MinChunk})) != 0 {
			t.Errorf("device %d has no tensors and %d bytes", i, g.DeviceBytes)
		}
		if err := p.Fits(i, 0, 0); err != nil {
			t.Error(err)
		}
	}
	if empty != 3 || p.Len() != 2 {
		t.Errorf("%d of 5 devices get nothing, %d tensors", empty, p.Len())
	}
	got := 0
	for rank := range 5 {
		p, err := New(f, Spec{Shard: Shard{Rank: rank, World: 5, By: ShardLayers}}, []uint64{1, 1})
		if err != nil {
			t.Fatal(err)
		}
		got += p.Len()
	}
	if got != 2 {
		t.Errorf("5 ranks have %d tensors, want 2", got)
	}
}

// TestTooManyLayers: a file with absurdly many layers is refused at once.
func TestTooManyLayers(t *testing.T) {
	t.Parallel()
	tensors := make([]Tensor, 300_000)
	for i := range tensors {
		tensors[i] = Tensor{Tensor: &gguf.Tensor{Name: fmt.Sprintf("blk.%d.x", i)}, Bytes: 1}
	}
	_, err := assignLayers(tensors, slices.Repeat([]float64{1}, 1000))
	if err == nil || !strings.Contains(err.Error(), "300000 layers are too many") {
		t.Error(err)
	}
}
