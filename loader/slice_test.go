package loader

import (
	"encoding/binary"
	"errors"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// TestComb compares where the bytes of slices are with what dimensions and ranges say.
func TestComb(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	for range 300 {
		typ := []gguf.Type{gguf.F32, gguf.Q8_0, gguf.Q4_K, gguf.I8}[rng.IntN(4)]
		shape := []uint64{uint64(typ.BlockElems() * (1 + rng.IntN(5)))}
		for range rng.IntN(3) {
			shape = append(shape, uint64(1+rng.IntN(6)))
		}
		whole := gguf.Tensor{Name: "x", Type: typ, Shape: shape, Offset: 4096}
		n, _ := typ.Bytes(whole.Elems())
		whole.Size = int64(n)
		dim := rng.IntN(len(shape))
		unit := uint64(1)
		if dim == 0 {
			unit = uint64(typ.BlockElems())
		}
		var ranges [][2]uint64
		for at := uint64(0); at < shape[dim]; { // some of the units, in runs
			next := at + unit*uint64(1+rng.IntN(3))
			next = min(next, shape[dim])
			if rng.IntN(2) == 0 && (len(ranges) == 0 || ranges[len(ranges)-1][1] < at) {
				ranges = append(ranges, [2]uint64{at, next})
			}
			at = next
		}
		if ranges == nil {
			continue
		}
		x := PlannedTensor{Tensor: &whole, Target: typ, Bytes: n}
		x.cut(dim, ranges)

		var want []int64 // offset in the file of every byte of the slice
		block := uint64(typ.BlockElems())
		for b := range n / uint64(typ.BlockBytes()) { // blocks in order: is it in?
			index := b * block
			for _, d := range shape[:dim] {
				index /= d
			}
			index %= shape[dim]
			if slices.ContainsFunc(ranges, func(r [2]uint64) bool { return r[0] <= index && index < r[1] }) {
				for i := range uint64(typ.BlockBytes()) {
					want = append(want, 4096+int64(b*uint64(typ.BlockBytes())+i))
				}
			}
		}
		if int64(len(want)) != x.Size || x.Bytes != uint64(x.Size) {
			t.Fatalf("%v %v, %v of dimension %d: %d bytes, want %d", typ, shape, ranges, dim, x.Size, len(want))
		}
		for off := range x.Size {
			at, run := x.inFile(off)
			if at != want[off] || run < 1 || off+run > x.Size || want[off+run-1]-want[off] != run-1 {
				t.Fatalf("%v %v, %v of dimension %d: byte %d is at %d for %d, want %d", typ, shape, ranges, dim, off, at, run, want[off])
			}
			if x.inWhole(off) != want[off]-4096 {
				t.Fatalf("byte %d is at %d of the whole, want %d", off, x.inWhole(off), want[off]-4096)
			}
			if lo, hi := x.span(off, x.Size-off); lo != want[off] || hi != want[x.Size-1]+1 {
				t.Fatalf("from byte %d on it reaches over %d to %d", off, lo, hi)
			}
		}
	}
}

// TestShardCheck wants a bad value in a slice to be told by where it is in the whole tensor.
func TestShardCheck(t *testing.T) {
	m := makeModel(t, map[string]any{"general.architecture": "llama"}, []made{{"blk.0.ffn_down.weight", gguf.F32, []uint64{64, 8}}})
	path := m.Parts()[0].Path
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	data := make([]byte, 64*8*4)
	binary.LittleEndian.PutUint32(data[4*(5*64+40):], math.Float32bits(float32(math.Inf(-1))))
	_, err = f.WriteAt(data, m.Tensors()[0].Offset)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	dev, _ := openDevice(t, amdhip.SoftwareOptions{})
	for _, load := range []loadFunc{Load, LoadSync} {
		for rank := range 4 {
			w, err := load(t.Context(), dev, m, Options{DType: F32, Check: true, Shard: Shard{Rank: rank, World: 4, By: ShardTensors}})
			if rank != 2 {
				if err != nil {
					t.Fatal(err)
				}
				mustClose(t, w)
				continue
			}
			if e, ok := errors.AsType[*ValueError](err); !ok || e.Element != 5*64+40 || e.Offset != 4*(5*64+40) {
				t.Errorf("%v, want element %d", err, 5*64+40)
			}
		}
	}
}
