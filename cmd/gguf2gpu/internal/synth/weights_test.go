package synth

import (
	"bytes"
	"encoding/binary"
	"math"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels"
)

// sampleBytes is the size of n blocks of type t.
func sampleBytes(t gguf.Type, n int) int { return n * t.BlockBytes() }

// TestWeightsAreSensible decodes random blocks of every type: all numbers are finite, of both signs, and of the size
// that real weights have.
func TestWeightsAreSensible(t *testing.T) {
	t.Parallel()
	k, err := kernels.For(kernels.Generic)
	if err != nil {
		t.Fatal(err)
	}
	for _, typ := range gguf.Types() {
		if typ.Integer() {
			continue
		}
		t.Run(typ.String(), func(t *testing.T) {
			t.Parallel()
			const blocks = 4096
			src := make([]byte, sampleBytes(typ, blocks))
			newWeights(typ, 42).fill(src, 0)
			dst := make([]byte, blocks*typ.BlockElems()*4)
			if err := k.Dequantize(dst, gguf.F32, src, typ); err != nil {
				t.Fatal(err)
			}
			var sum, largest float64
			var positive, negative int
			for i := 0; i < len(dst); i += 4 {
				v := float64(math.Float32frombits(binary.LittleEndian.Uint32(dst[i:])))
				if math.IsNaN(v) || math.IsInf(v, 0) {
					t.Fatalf("element %d is %v", i/4, v)
				}
				if v > 0 {
					positive++
				} else if v < 0 {
					negative++
				}
				sum += v * v
				largest = max(largest, math.Abs(v))
			}
			n := len(dst) / 4
			if rms := math.Sqrt(sum / float64(n)); rms < 0.001 || rms > 0.2 || largest > 2 {
				t.Errorf("root mean square %.4g, largest %.4g; want weights around 0.05", rms, largest)
			}
			if positive < n/10 || negative < n/10 {
				t.Errorf("%d positive, %d negative of %d; want both signs", positive, negative, n)
			}
		})
	}
}

func TestNormWeights(t *testing.T) {
	t.Parallel()
	b := make([]byte, 4*1001)
	newNormWeights(1).fill(b, 0)
	for i := 0; i < len(b); i += 4 {
		if v := math.Float32frombits(binary.LittleEndian.Uint32(b[i:])); v < 1 || v >= 1.125 {
			t.Fatalf("element %d is %v, want 1 to 1.125", i/4, v)
		}
	}
}

// TestWeightsByPart fills a tensor at once and in parts: the bytes depend on seed and place only.
func TestWeightsByPart(t *testing.T) {
	t.Parallel()
	for _, typ := range gguf.Types() {
		if typ.Integer() {
			continue
		}
		t.Run(typ.String(), func(t *testing.T) {
			t.Parallel()
			w := newWeights(typ, 7)
			whole := make([]byte, sampleBytes(typ, 24))
			w.fill(whole, 0)
			parts := make([]byte, len(whole))
			for first := 16; first >= 0; first -= 8 { // eight blocks are a multiple of eight bytes
				at := sampleBytes(typ, first)
				w.fill(parts[at:at+sampleBytes(typ, 8)], int64(at))
			}
			if !bytes.Equal(whole, parts) {
				t.Error("a tensor filled in parts differs from one filled at once")
			}
			other := make([]byte, len(whole))
			newWeights(typ, 8).fill(other, 0)
			if bytes.Equal(whole, other) {
				t.Error("two seeds give the same bytes")
			}
		})
	}
}

func BenchmarkWeights(b *testing.B) {
	for _, typ := range []gguf.Type{gguf.F16, gguf.Q4_0, gguf.Q4_K, gguf.Q6_K, gguf.Q8_0} {
		b.Run("type="+typ.String(), func(b *testing.B) {
			w := newWeights(typ, 1)
			dst := make([]byte, sampleBytes(typ, chunkBytes/typ.BlockBytes()))
			b.SetBytes(int64(len(dst)))
			for b.Loop() {
				w.fill(dst, 0)
			}
		})
	}
}
