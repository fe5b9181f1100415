package plan

import (
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// madeUp is a group of made-up tensors, so that sizes can be tried that no test file has. Expand says which of them the
// device converts.
func madeUp(rng *rand.Rand, n int) (g *Group, expand []bool) {
	g = &Group{Devices: []int{0}}
	types := gguf.Types()
	var at int64
	for range n {
		typ := types[rng.IntN(len(types))]
		elems := uint64(typ.BlockElems()) * (1 + rng.Uint64N(1<<rng.IntN(18)))
		size, _ := typ.Bytes(elems)
		x := &gguf.Tensor{Type: typ, Shape: []uint64{elems}, Offset: at, Size: int64(size)}
		at += x.Size
		target := Policies()[rng.IntN(4)].Target(typ)
		bytes, _ := target.Bytes(elems)
		expand = append(expand, target != typ && rng.IntN(2) == 0)
		g.Tensors = append(g.Tensors, Tensor{Tensor: x, Target: target, Bytes: bytes})
	}
	if err := g.layOut(); err != nil {
		panic(err)
	}
	return g, expand
}

// TestCut wants every byte of every tensor in exactly one chunk, in order, in whole blocks, within the limit; what is
// to be expanded apart from the rest, and aligned on both sides; what is to be skipped nowhere.
func TestCut(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		g, expand := madeUp(rng, 1+rng.IntN(60))
		g.DeviceBytes = g.Arenas[0]
		o := CutOptions{Bytes: MinChunk + rng.IntN(1<<20), Ramp: rng.IntN(20), Ordered: rng.IntN(2) == 0}
		if rng.IntN(4) > 0 {
			o.Expand = expand
		}
		if rng.IntN(4) == 0 {
			for range g.Tensors {
				o.Skip = append(o.Skip, rng.IntN(2) == 0)
			}
		}
		checkCut(t, g, o)
	}
}

// checkCut divides g into chunks and checks them.
func checkCut(t *testing.T, g *Group, o CutOptions) {
	t.Helper()
	src, dst := make([]int64, len(g.Tensors)), make([]uint64, len(g.Tensors))
	last := -1
	for i, c := range g.Cut(o) {
		read, end, delivered := 0, 0, 0
		for j, s := range c.Segs {
			x := g.Tensors[s.Tensor]
			blocks := int64(s.SrcBytes)
			out := uint64(s.SrcBytes)
			if !x.Opaque() {
				blocks /= int64(x.Type.BlockBytes())
				out, _ = x.Target.Bytes(uint64(blocks) * uint64(x.Type.BlockElems()))
			}
			want := out
			if c.Expand {
				want = uint64(s.SrcBytes)
			}
			place := x.DeviceOffset + g.TensorOffset(&s)
			switch {
			case s.Tensor < last || s.Tensor == last && j > 0:
				t.Fatalf("tensor %d follows tensor %d", s.Tensor, last)
			case s.SrcBytes%max(1, x.Type.BlockBytes()) != 0 || uint64(s.DstBytes) != want || blocks == 0:
				t.Fatalf("chunk %d, %v to %v: %d bytes become %d", i, x.Type, x.Target, s.SrcBytes, s.DstBytes)
			case s.Src != src[s.Tensor] || g.TensorOffset(&s) != dst[s.Tensor] || !c.Expand && c.Arena != x.Arena:
				t.Fatalf("chunk %d, tensor %d: bytes %d to %d, want %d to %d", i, s.Tensor, s.Src, g.TensorOffset(&s),
					src[s.Tensor], dst[s.Tensor])
			case c.Expand != (o.Expand != nil && o.Expand[s.Tensor]):
				t.Fatalf("chunk %d, tensor %d: expanded %v", i, s.Tensor, c.Expand)
			case c.Expand && (s.Dst%Align != 0 || place%Align != 0):
				t.Fatalf("chunk %d: a kernel reads at %d and writes at %d", i, s.Dst, place)
			case !c.Expand && c.Offset+uint64(s.Dst) != place:
				t.Fatalf("chunk %d, tensor %d: goes to %d, want %d", i, s.Tensor, c.Offset+uint64(s.Dst), place)
			case s.Dst < end:
				t.Fatalf("chunk %d: segments overlap", i)
			case j > 0 && s.Dst-end >= Align: // a copy would write over what is there
				t.Fatalf("chunk %d: %d bytes between segments are not padding", i, s.Dst-end)
			case o.Ordered && j > 0 && s.Src == 0 && int64(s.SrcBytes) < x.Size:
				large := x.Bytes
				if c.Expand {
					large = uint64(x.Size)
				}
				if large > uint64(o.Bytes) {
					t.Fatalf("chunk %d: a tensor of several chunks begins inside of one", i)
				}
			}
			last = s.Tensor
			src[last] += int64(s.SrcBytes)
			dst[last] += out
			delivered += int(out)
			read, end = read+s.SrcBytes, s.Dst+s.DstBytes
		}
		limit := o.Bytes
		if i < o.Ramp {
			limit = min(limit, max(MinChunk, o.Bytes/o.Ramp*(i+1)))
		}
		if end != c.Bytes || c.Bytes > limit || read > limit || delivered != c.Delivered || delivered == 0 {
			t.Fatalf("chunk %d: %d bytes, segments end at %d, %d are read, %d of %d delivered; the limit is %d", i, c.Bytes,
				end, read, c.Delivered, delivered, limit)
		}
	}
	for i, x := range g.Tensors {
		wantSrc, wantDst := x.Size, x.Bytes
		if o.Skip != nil && o.Skip[i] {
			wantSrc, wantDst = 0, 0
		}
		if src[i] != wantSrc || dst[i] != wantDst {
			t.Fatalf("tensor %d: %d of %d bytes become %d of %d", i, src[i], wantSrc, dst[i], wantDst)
		}
	}
}

// TestCutTooSmall: a chunk that may not hold a block would make Cut run forever.
func TestCutTooSmall(t *testing.T) {
	t.Parallel()
	defer func() {
		if s, ok := recover().(string); !ok || !strings.Contains(s, "chunks of 100 bytes; the least is 65536") {
			t.Errorf("panic %q", s)
		}
	}()
	g, _ := madeUp(rand.New(rand.NewPCG(3, 4)), 3)
	g.Cut(CutOptions{Bytes: 100})
}
