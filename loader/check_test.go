package loader

import (
	"encoding/binary"
	"errors"
	"math"
	"math/rand/v2"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels"
)

// TestCheckValues compares the shortcut with decoding everything: on random bytes of every type, as every target, on blocks
// whose scales are near every limit, and on sound ones.
func TestCheckValues(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for _, typ := range gguf.Types() {
		for _, d := range DTypes() {
			target := d.Target(typ)
			bad, good := 0, 0
			for range 150 {
				src := make([]byte, 8*typ.BlockBytes())
				for i := range src {
					src[i] = byte(rng.Uint32())
				}
				tame(rng, src, typ)
				p := &PlannedTensor{Tensor: &gguf.Tensor{Name: "x", Type: typ}, Target: target}
				off := int64(rng.IntN(5)) * int64(typ.BlockBytes())
				want, err := firstBad(src, typ, target)
				if err != nil {
					t.Fatal(err)
				}
				got := checkValues(p, off, src)
				e, found := errors.AsType[*ValueError](got)
				switch {
				case found != (want >= 0) || !found && got != nil:
					t.Fatalf("%v as %v: %v, but the first bad element is %d", typ, target, got, want)
				case !found:
					good++
				default:
					bad++
					blocks := uint64(off) / uint64(typ.BlockBytes())
					if elem := blocks*uint64(typ.BlockElems()) + uint64(want); e.Element != elem || e.Tensor != "x" {
						t.Fatalf("%v as %v: %v, want element %d", typ, target, e, elem)
					}
				}
			}
			never := typ.Integer() || typ == gguf.NVFP4
			if good == 0 || (bad == 0) != never {
				t.Errorf("%v as %v: %d bad and %d good samples", typ, target, bad, good)
			}
		}
	}
}

// tame makes most samples sound, and puts the exponents of the others around the limits: random bytes are nearly always bad
// somewhere.
func tame(rng *rand.Rand, src []byte, typ gguf.Type) {
	soft := rng.IntN(2) == 0
	exponent := func(bias, end int) int {
		if soft {
			return rng.IntN(bias)
		}
		if rng.IntN(3) == 0 {
			return end - rng.IntN(3)
		}
		return min(end, bias+rng.IntN(18))
	}
	for b := src; len(b) > 0; b = b[typ.BlockBytes():] {
		put16 := func(at, shift, bias, end int) {
			v := binary.LittleEndian.Uint16(b[at:])&(0x8000|(1<<shift-1)) | uint16(exponent(bias, end))<<shift
			binary.LittleEndian.PutUint16(b[at:], v)
		}
		switch s, ok := scaledTypes[typ]; {
		case ok:
			put16(s.at[0], 10, biasF16, endF16)
			put16(s.at[1], 10, biasF16, endF16)
		case typ == gguf.F16:
			put16(0, 10, biasF16, endF16)
		case typ == gguf.BF16:
			put16(0, 7, biasF32, endF32)
		case typ == gguf.F32, typ == gguf.Q8_K:
			put16(2, 7, biasF32, endF32)
		case typ == gguf.F64:
			e := exponent(biasF64, endF64)
			if !soft && rng.IntN(2) == 0 {
				e = biasF64 + 120 + rng.IntN(12)
			}
			binary.LittleEndian.PutUint16(b[6:], uint16(e)<<4|7)
		case typ == gguf.MXFP4:
			b[0] = byte(exponent(biasF32, endF32))
		case typ == gguf.IQ1_M:
			e := exponent(biasF16, endF16) << 10
			b[55] = b[55]&0x8f | byte(e>>12)<<4
			b[53] = b[53]&0x3f | byte(e>>8)<<4
		}
	}
}

// firstBad decodes every element.
func firstBad(src []byte, typ, target gguf.Type) (int, error) {
	if typ.Integer() {
		return -1, nil
	}
	k, err := kernels.For(kernels.Generic)
	if err != nil {
		return 0, err
	}
	as := target
	if typ == target && typ != gguf.F16 && typ != gguf.BF16 {
		as = gguf.F32
	}
	elems := len(src) / typ.BlockBytes() * typ.BlockElems()
	dst := make([]byte, elems*as.BlockBytes())
	if err := k.Dequantize(dst, as, src, typ); err != nil {
		return 0, err
	}
	for i := range elems {
		var x float64
		switch {
		case typ == gguf.F64 && target == gguf.F64:
			x = math.Float64frombits(binary.LittleEndian.Uint64(src[8*i:]))
		case typ == gguf.MXFP4 && src[i/32*17] == 255:
			return i, nil
		case as == gguf.F32:
			x = float64(math.Float32frombits(binary.LittleEndian.Uint32(dst[4*i:])))
		case as == gguf.BF16:
			x = float64(math.Float32frombits(uint32(binary.LittleEndian.Uint16(dst[2*i:])) << 16))
		case binary.LittleEndian.Uint16(dst[2*i:])&0x7c00 == 0x7c00:
			return i, nil
		}
		if math.IsNaN(x) || math.IsInf(x, 0) {
			return i, nil
		}
	}
	return -1, nil
}
