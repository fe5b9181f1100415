package kernels

import (
	"math"
	"testing"
)

// smallFloat describes a floating-point format of 16 bits. Its methods convert with ordinary arithmetic, to be compared
// with the bit operations of the package.
type smallFloat struct {
	fraction int // bits
	bias     int
}

var (
	binary16 = smallFloat{fraction: 10, bias: 15}
	bfloat16 = smallFloat{fraction: 7, bias: 127}
)

// value returns the number that h stands for.
func (s smallFloat) value(h uint16) float64 {
	magnitude := h &^ 0x8000
	exp, frac := int(magnitude>>s.fraction), float64(magnitude&(1<<s.fraction-1))
	var v float64
	switch {
	case exp == 2*s.bias+1 && frac != 0:
		return math.NaN()
	case exp == 2*s.bias+1:
		v = math.Inf(1)
	case exp == 0:
		v = math.Ldexp(frac, 1-s.bias-s.fraction)
	default:
		v = math.Ldexp(1+frac/float64(int(1)<<s.fraction), exp-s.bias)
	}
	if h&0x8000 != 0 {
		v = math.Copysign(v, -1)
	}
	return v
}

// round returns f rounded to nearest, ties to even, computed with float64 arithmetic, which holds every step exactly.
// NaNs come out as 0x7fff.
func (s smallFloat) round(f float32) uint16 {
	if f != f {
		return 0x7fff
	}
	var sign uint16
	if math.Signbit(float64(f)) {
		sign = 0x8000
	}
	infinity := uint16(2*s.bias+1) << s.fraction
	v := math.Abs(float64(f))
	if math.IsInf(v, 0) {
		return sign | infinity
	}
	// In units of the last place of v's binade (or of the subnormals), the nearest integer is the answer.
	exp := 1 - s.bias
	if v > 0 {
		exp = max(exp, math.Ilogb(v))
	}
	ulps := math.RoundToEven(math.Ldexp(v, s.fraction-exp))
	// Counting from the start of the subnormals, each binade is 1<<fraction patterns; a carry lands in the next one.
	magnitude := int(ulps) + (exp-(1-s.bias))<<s.fraction
	return sign | uint16(min(magnitude, int(infinity)))
}

func TestRoundToSmallFloat(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		format smallFloat
		round  func(float32) uint16
		widen  func(uint16) float32
	}{
		{"f16", binary16, toF16, fromF16},
		{"bf16", bfloat16, toBF16, fromBF16},
	} {
		t.Run(c.name, func(t *testing.T) {
			failures := 0
			check := func(f float32) {
				got, want := c.round(f), c.format.round(f)
				if f != f {
					// Which NaN it is does not matter; that it is one, quiet and of the same sign, does.
					quiet := uint16(1) << (c.format.fraction - 1)
					infinity := uint16(2*c.format.bias+1) << c.format.fraction
					want = got | quiet | infinity
					if neg := math.Float32bits(f)>>31 != 0; neg != (got&0x8000 != 0) {
						want ^= 0x8000
					}
				}
				if got != want && failures < 10 {
					failures++
					t.Errorf("%g (%#08x): got %#04x, want %#04x", f, math.Float32bits(f), got, want)
				}
			}
			// Every value of the small format, and the float32s on either side; every midpoint between it and the next
			// one away from zero, and the float32s on either side: rounding changes nowhere else.
			for h := range 1 << 16 {
				v, want := c.widen(uint16(h)), c.format.value(uint16(h))
				if float64(v) != want && v == v || (v != v) != (want != want) || math.Signbit(float64(v)) != (h >= 1<<15) {
					t.Fatalf("widen %#04x: got %g, want %g", h, v, want)
				}
				next := c.format.value(uint16(h + 1))
				if math.IsInf(next, 0) && !math.IsInf(want, 0) {
					next = math.Copysign(math.Ldexp(1, c.format.bias+1), want) // rounding takes infinity for this
				}
				mid := float32((want + next) / 2)
				for _, f := range []float32{v, mid} {
					check(f)
					check(math.Nextafter32(f, float32(math.Inf(1))))
					check(math.Nextafter32(f, float32(math.Inf(-1))))
				}
			}
			// And a sweep over all of float32 in steps of a prime.
			for b := uint64(0); b < 1<<32; b += 1021 {
				check(math.Float32frombits(uint32(b)))
			}
		})
	}
}
