package kernels

import (
	"encoding/binary"
	"math"
)

// The k-quants: super-blocks of 256 outputs whose scales are themselves quantized. Most store the codes of four (or
// two) runs of 32 outputs in the same 32 bytes, each run in bits of its own. h counts the halves of 128 outputs, j the
// runs of 32 in a half.

// decodeQ2_K: 16 bytes that hold a 4-bit scale and a 4-bit minimum for 16 outputs each, 64 bytes of 2-bit codes, d,
// dmin; (d*scale)*code - dmin*min.
func decodeQ2_K(x *[maxBlock]float32, b []byte) {
	sc, q, d, dmin := b[:16], b[16:80], half(b[80:]), half(b[82:])
	for h := range 2 {
		for j := range 4 {
			for l := range 32 {
				s := sc[8*h+2*j+l/16]
				code := q[32*h+l] >> (2 * j) & 3
				x[128*h+32*j+l] = d*float32(s&15)*float32(code) - dmin*float32(s>>4)
			}
		}
	}
}

// decodeQ3_K: 32 bytes of third bits (bit 4h+j of byte l), 64 bytes of 2-bit codes, 12 bytes of 6-bit scales for 16
// outputs each, d; (d*(scale-32))*code, where a clear third bit subtracts 4 from the code.
func decodeQ3_K(x *[maxBlock]float32, b []byte) {
	hm, q, sc, d := b[:32], b[32:96], b[96:108], half(b[108:])
	for h := range 2 {
		for j := range 4 {
			for l := range 32 {
				scale := d * float32(scaleQ3_K(sc, 8*h+2*j+l/16)-32)
				code := int(q[32*h+l]>>(2*j)&3 | hm[l]>>(4*h+j)&1<<2)
				x[128*h+32*j+l] = scale * float32(code-4)
			}
		}
	}
}

// scaleQ3_K returns the k-th 6-bit scale: the low nibbles, then the high nibbles of the first eight bytes, with two
// more bits each from the last four.
func scaleQ3_K(sc []byte, k int) int {
	low := sc[k%8] >> (4 * (k / 8)) & 15
	high := sc[8+k%4] >> (2 * (k / 4)) & 3
	return int(low | high<<4)
}

// decodeQ4_K: d, dmin, 12 bytes of 6-bit scales and minima for 32 outputs each, 128 bytes of nibbles; d*scale*code -
// dmin*min. Two runs of 32 outputs share 32 bytes: low nibbles, then high nibbles.
func decodeQ4_K(x *[maxBlock]float32, b []byte) {
	d, dmin, s, q := half(b), half(b[2:]), b[4:16], b[16:144]
	for g := range 8 {
		scale, minimum := scaleQ4_K(s, g)
		for l := range 32 {
			code := q[32*(g/2)+l] >> (4 * (g % 2)) & 15
			x[32*g+l] = d*float32(scale)*float32(code) - dmin*float32(minimum)
		}
	}
}

// scaleQ4_K returns the 6-bit scale and minimum of run g: the low six bits of the first eight bytes for the first four
// runs; nibbles of the last four bytes, and the two bits left over in the first eight, for the others.
func scaleQ4_K(s []byte, g int) (scale, minimum byte) {
	if g < 4 {
		return s[g] & 63, s[g+4] & 63
	}
	return s[g+4]&15 | s[g-4]>>6<<4, s[g+4]>>4 | s[g]>>6<<4
}

// decodeQ5_K: as Q4_K with 32 bytes before the nibbles whose bit g is the fifth bit of the codes of run g.
func decodeQ5_K(x *[maxBlock]float32, b []byte) {
	d, dmin, s, qh, q := half(b), half(b[2:]), b[4:16], b[16:48], b[48:176]
	for g := range 8 {
		scale, minimum := scaleQ4_K(s, g)
		for l := range 32 {
			code := q[32*(g/2)+l]>>(4*(g%2))&15 | qh[l]>>g&1<<4
			x[32*g+l] = d*float32(scale)*float32(code) - dmin*float32(minimum)
		}
	}
}

// decodeQ6_K: 128 bytes of low nibbles, 64 bytes of upper 2 bits, 16 signed scales for 16 outputs each, d;
// (d*scale)*(code-32).
func decodeQ6_K(x *[maxBlock]float32, b []byte) {
	ql, qh, sc, d := b[:128], b[128:192], b[192:208], half(b[208:])
	for h := range 2 {
		for j := range 4 {
			for l := range 32 {
				low := ql[64*h+32*(j%2)+l] >> (4 * (j / 2)) & 15
				high := qh[32*h+l] >> (2 * j) & 3
				scale := d * float32(int8(sc[8*h+2*j+l/16]))
				x[128*h+32*j+l] = scale * float32(int(low|high<<4)-32)
			}
		}
	}
}

// decodeQ8_K: a float32 d, 256 signed codes, sums that only dot products use; d*code.
func decodeQ8_K(x *[maxBlock]float32, b []byte) {
	scaleBytes(x, b[4:260], math.Float32frombits(binary.LittleEndian.Uint32(b)))
}
