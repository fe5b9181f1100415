package kernels

import (
	"encoding/binary"
	"errors"
	"math"
	"math/rand/v2"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// checkedTargets returns the types as which elements of type from can be checked.
func checkedTargets(from gguf.Type) []gguf.Type {
	if from.Integer() {
		return []gguf.Type{from}
	}
	return append([]gguf.Type{from}, outputs[:]...)
}

// TestFirstNonFinite compares it with decoding everything: on random bytes of every type, as every target, on blocks
// whose scales are near every limit, and on sound ones.
func TestFirstNonFinite(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(1, 2))
	for _, from := range gguf.Types() {
		for _, to := range checkedTargets(from) {
			bad, good := 0, 0
			for range 150 {
				src := randomBytes(rng, 8*from.BlockBytes())
				setExponents(rng, src, from)
				want, wantValue := decodedNonFinite(src, from, to)
				elem, value, found, err := FirstNonFinite(src, from, to)
				switch {
				case err != nil:
					t.Fatalf("%v as %v: %v", from, to, err)
				case found != (want >= 0) || found && elem != want:
					t.Fatalf("%v as %v: element %d, %v, but the first bad element is %d", from, to, elem, found, want)
				case !found:
					good++
				default:
					bad++
					if value != wantValue && !(math.IsNaN(value) && math.IsNaN(wantValue)) {
						t.Fatalf("%v as %v: element %d has the value %v, want %v", from, to, elem, value, wantValue)
					}
				}
			}
			never := from.Integer() || from == gguf.NVFP4
			if good == 0 || (bad == 0) != never {
				t.Errorf("%v as %v: %d bad and %d good samples", from, to, bad, good)
			}
		}
	}
}

// TestFirstNonFiniteRefuses calls it with types and lengths that it does not take.
func TestFirstNonFiniteRefuses(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		bytes    int
		from, to gguf.Type
		want     error
	}{
		{17, gguf.Q4_0, gguf.F16, ErrLength},
		{3, gguf.F32, gguf.F32, ErrLength},
		{18, gguf.Q4_0, gguf.Q8_0, ErrUnsupported},
		{18, gguf.Type(4), gguf.F32, ErrUnsupported},
		{18, gguf.NumTypes, gguf.NumTypes, ErrUnsupported},
	} {
		if _, _, found, err := FirstNonFinite(make([]byte, c.bytes), c.from, c.to); !errors.Is(err, c.want) || found {
			t.Errorf("%d bytes of %v as %v: %v, want %v", c.bytes, c.from, c.to, err, c.want)
		}
	}
	if _, _, found, err := FirstNonFinite(nil, gguf.Q4_0, gguf.F16); found || err != nil {
		t.Errorf("no blocks: %v, %v", found, err)
	}
}

// TestScales decodes random blocks and compares every element with the bound that the scales of its block and their
// factors give: that holds only if the places and the factors are right.
func TestScales(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(3, 4))
	for _, typ := range gguf.Types() {
		all := Scales(typ)
		if typ.Quantized() != (len(all) > 0) {
			t.Errorf("%v has the scales %v", typ, all)
		}
		for range 2000 {
			block := randomBytes(rng, typ.BlockBytes())
			setExponents(rng, block, typ)
			bound := 0.0
			for _, s := range all {
				if s.Factor != 0 {
					bound += math.Abs(scaleValue(block, s)) * s.Factor
				}
			}
			x := decodeF32s(block, typ)
			for i, v := range x {
				if len(all) > 0 && math.Abs(v) > bound*(1+0x1p-23) && bound <= math.MaxFloat32 { // rounded to float32
					t.Fatalf("%v: element %d is %v, but the scales allow %v", typ, i, v, bound)
				}
			}
			// With scales of zero every element is zero: there is no scale elsewhere.
			for _, s := range all {
				zeroScale(block, s)
			}
			if len(all) > 0 && all[0].Format != ScaleE8M0 {
				for i, v := range decodeF32s(block, typ) {
					if v != 0 {
						t.Fatalf("%v: element %d is %v with scales of zero", typ, i, v)
					}
				}
			}
		}
	}
	if got := Scales(gguf.Type(4)); len(got) != 0 {
		t.Errorf("a type that does not exist has the scales %v", got)
	}
	Scales(gguf.Q4_0)[0].Offset = 99
	if Scales(gguf.Q4_0)[0].Offset != 0 {
		t.Error("a caller has changed the table")
	}
}

// scaleValue reads a scale of a block.
func scaleValue(block []byte, s Scale) float64 {
	b := block[s.Offset:]
	switch s.Format {
	case ScaleF32:
		return float64(math.Float32frombits(binary.LittleEndian.Uint32(b)))
	case ScaleSplitF16:
		return float64(fromF16(splitF16(b)))
	case ScaleE8M0:
		return math.Ldexp(1, int(b[0])-128)
	case ScaleUE4M3:
		return float64(scaleUE4M3(b[0]))
	default:
		return float64(half(b))
	}
}

// zeroScale sets a scale to zero.
func zeroScale(block []byte, s Scale) {
	b := block[s.Offset:]
	switch s.Format {
	case ScaleF32:
		clear(b[:4])
	case ScaleSplitF16:
		for i := range 4 {
			b[2*i+1] &= 0x0f
		}
	case ScaleUE4M3:
		b[0] = 0
	default:
		clear(b[:2])
	}
}

// randomBytes returns n random bytes.
func randomBytes(rng *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return b
}

// setExponents makes most samples sound, and puts the exponents of the others around the limits. Random bytes as they
// are would nearly always be bad somewhere.
func setExponents(rng *rand.Rand, src []byte, typ gguf.Type) {
	sound := rng.IntN(2) == 0
	exponent := func(bias, end int) int {
		if sound {
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
		switch typ {
		case gguf.F16:
			put16(0, 10, biasF16, endF16)
		case gguf.BF16:
			put16(0, 7, biasF32, endF32)
		case gguf.F32:
			put16(2, 7, biasF32, endF32)
		case gguf.F64:
			e := exponent(biasF64, endF64)
			if !sound && rng.IntN(2) == 0 {
				e = biasF64 + 120 + rng.IntN(12)
			}
			binary.LittleEndian.PutUint16(b[6:], uint16(e)<<4|7)
		}
		for _, s := range scales[typ] {
			switch s.Format {
			case ScaleF16:
				put16(s.Offset, 10, biasF16, endF16)
			case ScaleF32:
				put16(s.Offset+2, 7, biasF32, endF32)
			case ScaleE8M0:
				b[s.Offset] = byte(exponent(biasF32, endF32))
			case ScaleSplitF16:
				e := exponent(biasF16, endF16) << 10
				b[s.Offset+7] = b[s.Offset+7]&0x8f | byte(e>>12)<<4
				b[s.Offset+5] = b[s.Offset+5]&0x3f | byte(e>>8)<<4
			case ScaleUE4M3: // random bytes are good ones
			}
		}
	}
}

// decodeF32s returns the elements of src as they are before they are converted.
func decodeF32s(src []byte, from gguf.Type) []float64 {
	x := make([]float64, len(src)/from.BlockBytes()*from.BlockElems())
	b := make([]byte, 4*len(x))
	generic(b, outF32, src, from)
	for i := range x {
		x[i] = float64(math.Float32frombits(binary.LittleEndian.Uint32(b[4*i:])))
	}
	return x
}

// decodedNonFinite is what FirstNonFinite should find, by decoding and converting every element; -1 for nothing.
func decodedNonFinite(src []byte, from, to gguf.Type) (elem int, value float64) {
	if from.Integer() {
		return -1, 0
	}
	for i, x := range decodeF32s(src, from) {
		y := x
		switch {
		case from == gguf.F64:
			x = math.Float64frombits(binary.LittleEndian.Uint64(src[8*i:]))
			if to == gguf.F64 {
				y = x
			}
		case from == gguf.MXFP4 && src[i/32*17] == 255:
			return i, math.NaN()
		}
		switch to {
		case gguf.F16:
			y = binary16.value(binary16.round(float32(y)))
		case gguf.BF16:
			y = bfloat16.value(bfloat16.round(float32(y)))
		}
		if math.IsNaN(y) || math.IsInf(y, 0) {
			return i, x
		}
	}
	return -1, 0
}
