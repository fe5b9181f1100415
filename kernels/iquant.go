package kernels

import (
	_ "embed" // for the grids
	"encoding/binary"
	"math/bits"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// The i-quants: super-blocks of 256 outputs whose codes are indices into a grid of 8 or 4 outputs at a time. g counts
// the groups of 32 outputs, l the runs of 8 in a group.

// The grids of ggml (see NOTICE.md): entry i of a grid of 8 outputs is bytes 8i to 8i+7, of a grid of 4 outputs bytes
// 4i to 4i+3. They are strings so that they stay in read-only memory and need no initialisation.
var (
	//go:embed tables/iq2xxs_grid.bin
	gridIQ2XXS string
	//go:embed tables/iq2xs_grid.bin
	gridIQ2XS string
	//go:embed tables/iq2s_grid.bin
	gridIQ2S string
	//go:embed tables/iq3xxs_grid.bin
	gridIQ3XXS string
	//go:embed tables/iq3s_grid.bin
	gridIQ3S string
	//go:embed tables/iq1s_grid.bin
	gridIQ1S string // signed: -1, 0 and 1
)

// signed writes the outputs of grid entries: each byte of the grid times d, negated where the output's bit in signs is
// set.
func signed(x []float32, grid string, signs byte, d float32) {
	for j := range x {
		x[j] = d * float32(grid[j])
		if signs>>j&1 != 0 {
			x[j] = -x[j]
		}
	}
}

// evenSigns expands seven stored sign bits to eight: the number of set bits is always even.
func evenSigns(index uint32) byte {
	s := byte(index & 127)
	return s | byte(bits.OnesCount8(s)&1)<<7
}

// decodeIQ2_XXS: d, then for each group four grid indices and a word of four 7-bit signs and a 4-bit scale;
// d*(0.5+scale)/4.
func decodeIQ2_XXS(x *[maxBlock]float32, b []byte) {
	d := half(b)
	for g := range 8 {
		q, s := b[2+8*g:6+8*g], binary.LittleEndian.Uint32(b[6+8*g:])
		scale := d * (0.5 + float32(s>>28)) * 0.25
		for l, index := range q {
			signed(run8(x, g, l), gridIQ2XXS[8*int(index):], evenSigns(s>>(7*l)), scale)
		}
	}
}

// run8 returns the l-th 8 outputs of group g.
func run8(x *[maxBlock]float32, g, l int) []float32 { return x[32*g+8*l:][:8] }

// decodeIQ2_XS: d, 32 words of a 9-bit grid index and 7-bit signs, 4-bit scales for 16 outputs each.
func decodeIQ2_XS(x *[maxBlock]float32, b []byte) {
	d, w, sc := half(b), b[2:66], b[66:74]
	for g := range 8 {
		for l := range 4 {
			u := binary.LittleEndian.Uint16(w[8*g+2*l:])
			signed(run8(x, g, l), gridIQ2XS[8*int(u&511):], evenSigns(uint32(u>>9)), d*scaleIQ2(sc[g], l))
		}
	}
}

// scaleIQ2 is the factor of run l from a byte of two 4-bit scales.
func scaleIQ2(sc byte, l int) float32 { return (0.5 + float32(sc>>(4*(l/2))&15)) * 0.25 }

// decodeIQ2_S: d, low bytes of 10-bit grid indices, eight signs for each, the upper bits of the indices, scales as
// IQ2_XS.
func decodeIQ2_S(x *[maxBlock]float32, b []byte) {
	d, q, signs, qh, sc := half(b), b[2:34], b[34:66], b[66:74], b[74:82]
	for g := range 8 {
		for l := range 4 {
			index := int(q[4*g+l]) | int(qh[g]>>(2*l)&3)<<8
			signed(run8(x, g, l), gridIQ2S[8*index:], signs[4*g+l], d*scaleIQ2(sc[g], l))
		}
	}
}

// decodeIQ3_XXS: d, grid indices for 4 outputs each, then for each group a word of four 7-bit signs and a 4-bit scale;
// d*(0.5+scale)/2.
func decodeIQ3_XXS(x *[maxBlock]float32, b []byte) {
	d, q := half(b), b[2:66]
	for g := range 8 {
		s := binary.LittleEndian.Uint32(b[66+4*g:])
		scale := d * (0.5 + float32(s>>28)) * 0.5
		for l := range 4 {
			run, signs := run8(x, g, l), evenSigns(s>>(7*l))
			signed(run[:4], gridIQ3XXS[4*int(q[8*g+2*l]):], signs, scale)
			signed(run[4:], gridIQ3XXS[4*int(q[8*g+2*l+1]):], signs>>4, scale)
		}
	}
}

// decodeIQ3_S: d, low bytes of 9-bit grid indices for 4 outputs each, their upper bits, eight signs for each two, 4-bit
// scales for 32 outputs each; d*(1+2*scale).
func decodeIQ3_S(x *[maxBlock]float32, b []byte) {
	d, q, qh, signs, sc := half(b), b[2:66], b[66:74], b[74:106], b[106:110]
	for g := range 8 {
		scale := d * float32(1+2*int(sc[g/2]>>(4*(g%2))&15))
		entry := func(k int) string { return gridIQ3S[4*(int(q[8*g+k])|int(qh[g]>>k&1)<<8):] }
		for l := range 4 {
			run, s := run8(x, g, l), signs[4*g+l]
			signed(run[:4], entry(2*l), s, scale)
			signed(run[4:], entry(2*l+1), s>>4, scale)
		}
	}
}

// decodeIQ1_S: d, low bytes of 11-bit grid indices, then for each group a word of their upper bits, a 3-bit scale and
// the sign of a shift of 1/8; d*(2*scale+1) * (grid+shift).
func decodeIQ1_S(x *[maxBlock]float32, b []byte) {
	d, q := half(b), b[2:34]
	for g := range 8 {
		h := int(binary.LittleEndian.Uint16(b[34+2*g:]))
		scale := d * float32(2*(h>>12&7)+1)
		for l := range 4 {
			shifted(run8(x, g, l), int(q[4*g+l])|h>>(3*l)&7<<8, h>>15 != 0, scale)
		}
	}
}

// shifted writes the outputs of an entry of gridIQ1S, moved up or down by 1/8.
func shifted(x []float32, index int, down bool, d float32) {
	shift := float32(0.125)
	if down {
		shift = -shift
	}
	for j := range x {
		x[j] = d * (float32(int8(gridIQ1S[8*index+j])) + shift)
	}
}

// decodeIQ1_M: low bytes of 11-bit grid indices, a nibble for each with its upper bits and the sign of its shift, and
// four words of four 3-bit scales, for 16 outputs each, whose upper nibbles together are d.
func decodeIQ1_M(x *[maxBlock]float32, b []byte) {
	q, qh, w := b[:32], b[32:48], [4]uint16{}
	var dBits uint16
	for i := range w {
		w[i] = binary.LittleEndian.Uint16(b[48+2*i:])
		dBits |= w[i] >> 12 << (4 * i)
	}
	d := fromF16(dBits)
	for g := range 8 {
		for l := range 4 {
			h := int(qh[2*g+l/2] >> (4 * (l % 2)))
			scale := d * float32(2*(w[g/2]>>(6*(g%2)+3*(l/2))&7)+1)
			shifted(run8(x, g, l), int(q[4*g+l])|h&7<<8, h&8 != 0, scale)
		}
	}
}

// decodeIQ4_XS: d, upper bits and low nibbles of 6-bit scales for 32 outputs each, nibbles as IQ4_NL; d*(scale-32).
func decodeIQ4_XS(x *[maxBlock]float32, b []byte) {
	d, high, low, q := half(b), binary.LittleEndian.Uint16(b[2:]), b[4:8], b[8:136]
	for g := range 8 {
		scale := int(low[g/2]>>(4*(g%2))&15) | int(high>>(2*g)&3)<<4
		lookupNibbles(x[32*g:32*g+32], q[16*g:16*g+16], &kvaluesIQ4NL, d*float32(scale-32))
	}
}

// Grid returns ggml's grid for an i-quant type: entries of 8 bytes (of 4 for IQ3), each byte one output before scaling.
// The bytes for IQ1 are signed. It returns "" for types without a grid.
func Grid(t gguf.Type) string {
	switch t {
	case gguf.IQ2_XXS:
		return gridIQ2XXS
	case gguf.IQ2_XS:
		return gridIQ2XS
	case gguf.IQ2_S:
		return gridIQ2S
	case gguf.IQ3_XXS:
		return gridIQ3XXS
	case gguf.IQ3_S:
		return gridIQ3S
	case gguf.IQ1_S, gguf.IQ1_M:
		return gridIQ1S
	}
	return ""
}
