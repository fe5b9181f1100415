package kernels

import (
	"encoding/binary"
	"math"
)

// fromF16 widens an IEEE binary16 exactly. Subnormals are kept; a NaN keeps its payload and becomes quiet, as
// VCVTPH2PS does it.
func fromF16(h uint16) float32 {
	// Shifted into the place of a float32, the exponent is 112 too small, as the biases are 15 and 127. The
	// multiplication, which is exact, corrects that for normal and subnormal numbers alike.
	f := math.Float32frombits(uint32(h&0x7fff)<<13) * 0x1p112
	b := math.Float32bits(f)
	if h&0x7c00 == 0x7c00 {
		b = 0x7f800000 | uint32(h&0x3ff)<<13
		if h&0x3ff != 0 {
			b |= 1 << 22
		}
	}
	return math.Float32frombits(b | uint32(h&0x8000)<<16)
}

// toF16 rounds to binary16, to nearest with ties to even, as VCVTPS2PH does it: overflow gives an infinity, subnormals
// are kept, and a NaN becomes quiet and keeps the upper bits of its payload.
func toF16(f float32) uint16 {
	b := math.Float32bits(f)
	sign := uint16(b>>16) & 0x8000
	b &^= 1 << 31
	switch {
	case b > 0x7f800000:
		return sign | 0x7e00 | uint16(b>>13)&0x3ff
	case b >= 0x477ff000: // 65520, halfway between the largest binary16 and the next power of two
		return sign | 0x7c00
	case b < 0x38800000:
		// Below 2^-14 the result is subnormal. Its unit in the last place is that of the float32 0.5, so adding 0.5
		// rounds.
		return sign | uint16(math.Float32bits(math.Float32frombits(b)+0.5)-math.Float32bits(0.5))
	}
	b += 0xfff + b>>13&1
	return sign | uint16(b>>13-112<<10)
}

// fromBF16 widens a bfloat16 exactly, NaN payloads included.
func fromBF16(h uint16) float32 { return math.Float32frombits(uint32(h) << 16) }

// toBF16 rounds to bfloat16, to nearest with ties to even. Overflow gives an infinity, and subnormals are kept. A NaN
// becomes quiet; its bits are not rounded, as that could carry into the exponent and the sign.
func toBF16(f float32) uint16 {
	b := math.Float32bits(f)
	if b&^(1<<31) > 0x7f800000 {
		return uint16(b>>16) | 1<<6
	}
	return uint16((b + 0x7fff + b>>16&1) >> 16)
}

// half reads the binary16 at the start of b.
func half(b []byte) float32 { return fromF16(binary.LittleEndian.Uint16(b)) }
