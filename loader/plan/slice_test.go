package plan

import (
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// randomSlice is a tensor of a random shape and a slice of it; nil if the slice came out empty.
func randomSlice(rng *rand.Rand) (whole *gguf.Tensor, s *Slice) {
	typ := []gguf.Type{gguf.F32, gguf.Q8_0, gguf.Q4_K, gguf.I8}[rng.IntN(4)]
	shape := []uint64{uint64(typ.BlockElems() * (1 + rng.IntN(5)))}
	for range rng.IntN(4) {
		shape = append(shape, uint64(1+rng.IntN(6)))
	}
	whole = &gguf.Tensor{Name: "x", Type: typ, Shape: shape, Offset: 4096}
	n, _ := typ.Bytes(whole.Elems())
	whole.Size = int64(n)
	s = &Slice{Dim: rng.IntN(len(shape)), Shape: shape}
	unit := uint64(1)
	if s.Dim == 0 {
		unit = uint64(typ.BlockElems())
	}
	for at := uint64(0); at < shape[s.Dim]; { // some of the units, in runs
		next := min(at+unit*uint64(1+rng.IntN(3)), shape[s.Dim])
		if k := len(s.Ranges); rng.IntN(2) == 0 && (k == 0 || s.Ranges[k-1][1] < at) {
			s.Ranges = append(s.Ranges, [2]uint64{at, next})
		}
		at = next
	}
	if s.Ranges == nil {
		return whole, nil
	}
	return whole, s
}

// bytesOf is where in the file every byte of the slice is, block by block as dimensions and ranges say.
func bytesOf(whole *gguf.Tensor, s *Slice) (all []int64) {
	block, size := uint64(whole.Type.BlockElems()), uint64(whole.Type.BlockBytes())
	for b := range uint64(whole.Size) / size {
		index := b * block
		for _, d := range whole.Shape[:s.Dim] {
			index /= d
		}
		index %= whole.Shape[s.Dim]
		if slices.ContainsFunc(s.Ranges, func(r [2]uint64) bool { return r[0] <= index && index < r[1] }) {
			for i := range size {
				all = append(all, whole.Offset+int64(b*size+i))
			}
		}
	}
	return all
}

// TestSlices compares where the bytes of slices are with what dimensions and ranges say.
func TestSlices(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(3, 4))
	for range 400 {
		whole, s := randomSlice(rng)
		if s == nil {
			continue
		}
		x := Tensor{Tensor: whole, Target: Policies()[rng.IntN(4)].Target(whole.Type)}
		x.slice(s.Dim, s.Ranges)
		x.Bytes, _ = x.bytes()
		want := bytesOf(whole, s)
		if int64(len(want)) != x.Size {
			t.Fatalf("%v %+v: %d bytes, want %d", whole.Type, s, x.Size, len(want))
		}
		pieces := false
		for off := range x.Size {
			at, run := x.InFile(off)
			if at != want[off] || run < 1 || off+run > x.Size || want[off+run-1]-want[off] != run-1 {
				t.Fatalf("%v %+v: byte %d is at %d for %d, want %d", whole.Type, s, off, at, run, want[off])
			}
			pieces = pieces || off+run < x.Size
			if x.InWhole(off) != want[off]-whole.Offset {
				t.Fatalf("byte %d is at %d of the whole, want %d", off, x.InWhole(off), want[off]-whole.Offset)
			}
			if lo, hi := x.Span(off, x.Size-off); lo != want[off] || hi != want[x.Size-1]+1 {
				t.Fatalf("from byte %d on it reaches over %d to %d", off, lo, hi)
			}
		}
		if pieces != x.Pieces() {
			t.Fatalf("%v %+v: in pieces: %v, want %v", whole.Type, s, x.Pieces(), pieces)
		}
		checkSpread(t, &x, want)
		if err := x.check(); err != nil {
			t.Fatalf("%v %+v: %v", whole.Type, s, err)
		}
	}
}

// checkSpread cuts x, and wants every segment that Spread makes of the chunks to be one run in the file.
func checkSpread(t *testing.T, x *Tensor, want []int64) {
	t.Helper()
	g := &Group{Devices: []int{0}, Tensors: []Tensor{*x}}
	if err := g.layOut(); err != nil {
		t.Fatal(err)
	}
	off, dst := int64(0), 0
	for _, c := range g.Cut(CutOptions{Bytes: MinChunk}) {
		segs := g.Spread(nil, c.Segs)
		for _, s := range segs {
			at, run := g.Tensors[0].InFile(s.Src)
			blocks := s.SrcBytes / x.Type.BlockBytes()
			if s.Src != off || s.Dst != dst || at != want[off] || run < int64(s.SrcBytes) ||
				s.SrcBytes%x.Type.BlockBytes() != 0 || s.DstBytes != blocks*int(x.Bytes)/int(x.Size/int64(x.Type.BlockBytes())) {
				t.Fatalf("%v %+v: segment %+v, %d are neighbours; want byte %d", x.Type, x.Slice, s, run, off)
			}
			off, dst = off+int64(s.SrcBytes), dst+s.DstBytes
		}
		dst = 0 // in the next chunk
	}
	for _, c := range g.Cut(CutOptions{Bytes: MinChunk, Expand: []bool{true}}) { // blocks stay as they are in the chunk
		for _, s := range g.Spread(nil, c.Segs) {
			if s.SrcBytes != s.DstBytes {
				t.Fatalf("%v %+v: segment %+v of an expanded chunk", x.Type, x.Slice, s)
			}
		}
	}
	if off != x.Size {
		t.Fatalf("%d of %d bytes are spread", off, x.Size)
	}
}

// TestIn: a tensor of a plan that another process described is found in the file, as the same slice.
func TestIn(t *testing.T) {
	t.Parallel()
	for _, f := range []*gguf.File{llama(t), fused(t)} {
		for _, shard := range []Shard{{}, {Rank: 1, World: 4, By: ShardTensors}} {
			for _, x := range one(t, f, Spec{Shard: shard}).Tensors() {
				told := *x
				told.Tensor = &gguf.Tensor{Name: x.Name, Type: x.Type, Shape: x.Shape, Size: x.Size}
				told.Slice, told.whole, told.comb = x.Slice.Clone(), nil, nil
				got, err := told.In(f)
				if err != nil {
					t.Fatal(err)
				}
				if got.Offset != x.Offset || got.Size != x.Size || got.Pieces() != x.Pieces() || !slices.Equal(got.Shape, x.Shape) {
					t.Errorf("%s is %+v, want %+v", x.Name, got.Tensor, x.Tensor)
				}
				for off := int64(0); off < x.Size; {
					at, run := x.InFile(off)
					if gotAt, gotRun := got.InFile(off); gotAt != at || gotRun != run || got.InWhole(off) != x.InWhole(off) {
						t.Fatalf("%s: byte %d is at %d for %d, want %d for %d", x.Name, off, gotAt, gotRun, at, run)
					}
					off += run
				}
			}
		}
	}
}

// TestNotIn: what the file does not have as the plan says is refused before anything is read.
func TestNotIn(t *testing.T) {
	t.Parallel()
	f := described(t, nil, []made{{"x", gguf.Q8_0, []uint64{128, 8}}})
	told := func(name string, typ gguf.Type, shape []uint64, s *Slice) *Tensor {
		return &Tensor{Tensor: &gguf.Tensor{Name: name, Type: typ, Shape: shape}, Slice: s}
	}
	whole := []uint64{128, 8}
	for _, x := range []struct {
		t    *Tensor
		want string
	}{
		{told("y", gguf.Q8_0, whole, nil), `no tensor "y"`},
		{told("x", gguf.F16, whole, nil), "has the type Q8_0 and not F16"},
		{told("x", gguf.Q8_0, []uint64{128, 7}, nil), "has the shape [128 8] and not [128 7]"},
		{told("x", gguf.Q8_0, []uint64{64, 8}, &Slice{0, [][2]uint64{{0, 64}}, []uint64{128, 7}}), "and not [128 7]"},
		{told("x", gguf.Q8_0, []uint64{64, 8}, &Slice{0, nil, whole}), "without a range"},
		{told("x", gguf.Q8_0, []uint64{64, 8}, &Slice{2, [][2]uint64{{0, 64}}, whole}), "along dimension"},
		{told("x", gguf.Q8_0, []uint64{64, 8}, &Slice{-1, [][2]uint64{{0, 64}}, whole}), "along dimension"},
		{told("x", gguf.Q8_0, []uint64{64, 8}, &Slice{0, [][2]uint64{{16, 80}}, whole}), "of a slice: ranges are"},
		{told("x", gguf.Q8_0, []uint64{64, 8}, &Slice{0, [][2]uint64{{64, 128}, {0, 32}}, whole}), "of a slice: ranges are"},
		{told("x", gguf.Q8_0, []uint64{128, 2}, &Slice{1, [][2]uint64{{7, 9}}, whole}), "of a slice: ranges are"},
		{told("x", gguf.Q8_0, []uint64{128, 2}, &Slice{1, [][2]uint64{{3, 3}}, whole}), "of a slice: ranges are"},
		{told("x", gguf.Q8_0, []uint64{128, 3}, &Slice{1, [][2]uint64{{2, 4}}, whole}), "[128 2] and not [128 3]"},
	} {
		if got, err := x.t.In(f); got != nil || err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%+v, %+v: %v, want %q", x.t.Tensor, x.t.Slice, err, x.want)
		}
	}
}

// TestClone: a clone shares nothing.
func TestClone(t *testing.T) {
	t.Parallel()
	var none *Slice
	if none.Clone() != nil {
		t.Error("a clone of nil")
	}
	s := &Slice{1, [][2]uint64{{0, 4}}, []uint64{8, 8}}
	c := s.Clone()
	c.Ranges[0][0], c.Shape[0] = 9, 9
	if s.Ranges[0][0] != 0 || s.Shape[0] != 8 || c.Dim != 1 {
		t.Errorf("%+v became %+v", c, s)
	}
}
