package main

import (
	"math"

	. "github.com/mmcloughlin/avo/operand" //nolint:revive // The operands read as assembly does.
	"github.com/mmcloughlin/avo/reg"
)

var iquantFormats = []tensorFormat{
	{"IQ2_XXS", 66, 256, 1, 160, func(k *kernel) {
		k.Comment("The second word of each group, in the order 0 1 4 5 2 3 6 7: signs and a scale.")
		words := k.bytes32(2)
		k.VSHUFPS(U8(0b11_01_11_01), k.at(34), words, words)
		k.spillUpperNibbles(words, 0, 0.125)
		k.spillSigns7(words, 32)
		grid, signs := k.goTable("floatsIQ2XXS"), k.goTable("signs7")
		for slot, g := range [8]int{0, 1, 4, 5, 2, 3, 6, 7} {
			var values, masks [4]piece
			for l := range values {
				values[l] = func() Mem {
					index := k.GP32()
					k.MOVBLZX(k.at(2+8*g+l), index)
					k.SHLL(U8(5), index)
					return Mem{Base: grid, Index: index.As64(), Scale: 1}
				}
				masks[l] = k.entryDword(signs, 32+32*l+4*slot)
			}
			s := scale{mul: k.spilledScale(slot)}
			k.writeSigned(32*g, values[:], masks, s, s)
		}
	}},
	{"IQ2_XS", 74, 256, 1, 192, func(k *kernel) {
		k.spillNibbles16(66, 0, 0.125)
		for i := range 2 {
			k.Comment("Table offsets from 16 words: nine bits of grid index, seven bits of sign index.")
			words, signs := k.bytes32(2+32*i), k.YMM()
			k.VPSRLW(U8(9-5), words, signs)
			k.VPAND(k.words(127<<5), signs, signs)
			k.spill(signs, 128+32*i)
			k.VPAND(k.words(511), words, words)
			k.VPSLLW(U8(5), words, words)
			k.spill(words, 64+32*i)
		}
		grid, signs := k.goTable("floatsIQ2XS"), k.goTable("signs7")
		for g := range 8 {
			var values, masks [4]piece
			for l := range values {
				values[l] = k.entryWord(grid, 64+8*g+2*l)
				masks[l] = k.entryWord(signs, 128+8*g+2*l)
			}
			k.writeSigned(32*g, values[:], masks, scale{mul: k.spilledScale(2 * g)}, scale{mul: k.spilledScale(2*g + 1)})
		}
	}},
	{"IQ2_S", 82, 256, 1, 64, func(k *kernel) {
		k.spillNibbles16(74, 0, 0.125)
		grid := k.grid("gridIQ2S") // as floats it would fill the L1 cache
		for g := range 8 {
			var entries [4]Mem
			upper := k.index8(66 + g)
			for l := range entries {
				index := k.upperIndex(upper, 8-2*l, 0x300)
				k.ORL(k.index8(2+4*g+l), index)
				entries[l] = Mem{Base: grid, Index: index.As64(), Scale: 8}
			}
			codes, negative := k.gather(entries), k.bitMask(k.at(34+4*g))
			k.VPXOR(negative, codes, codes)
			k.VPSUBB(negative, codes, codes)
			k.write32(32*g, codes, scale{mul: k.spilledScale(2 * g)}, scale{mul: k.spilledScale(2*g + 1)})
		}
	}},
	{"IQ3_XXS", 98, 256, 1, 288, func(k *kernel) {
		words := k.bytes32(66)
		k.spillUpperNibbles(words, 0, 0.25)
		k.spillSigns7(words, 32)
		for i := range 4 {
			k.spillBytesAsWords(2+16*i, 4, 160+32*i)
		}
		grid, signs := k.goTable("floatsIQ3XXS"), k.goTable("signs7")
		for g := range 8 {
			var values [8]piece
			var masks [4]piece
			for i := range values {
				values[i] = k.entryWord(grid, 160+16*g+2*i)
			}
			for l := range masks {
				masks[l] = k.entryDword(signs, 32+32*l+4*g)
			}
			s := scale{mul: k.spilledScale(g)}
			k.writeSigned(32*g, values[:], masks, s, s)
		}
	}},
	{"IQ3_S", 110, 256, 1, 224, func(k *kernel) {
		k.spillNibbles(106, 0, k.scaledHalf(0, 1))
		for i := range 4 {
			k.Comment("Grid offsets of 16 entries: a byte of index, and its ninth bit.")
			words, ninth := k.YMM(), k.YMM()
			k.VPMOVZXBW(k.at(2+16*i), words)
			k.VPBROADCASTW(k.at(66+2*i), ninth)
			k.VPSHUFB(k.spreadTwo(), ninth, ninth)
			bits := k.load(k.words(1, 2, 4, 8, 16, 32, 64, 128))
			k.VPAND(bits, ninth, ninth)
			k.VPCMPEQW(bits, ninth, ninth)
			k.VPAND(k.words(0x100), ninth, ninth)
			k.VPOR(ninth, words, words)
			k.VPSLLW(U8(4), words, words)
			k.spill(words, 32+32*i)
		}
		for i := range 2 {
			k.spillBytesAsWords(74+16*i, 5, 160+32*i)
		}
		grid, signs := k.goTable("floatsIQ3S"), k.goTable("signs8")
		for g := range 8 {
			var values [8]piece
			var masks [4]piece
			for i := range values {
				values[i] = k.entryWord(grid, 32+16*g+2*i)
			}
			for l := range masks {
				masks[l] = k.entryWord(signs, 160+8*g+2*l)
			}
			s := scale{mul: k.spilledScale(g)}
			k.writeSigned(32*g, values[:], masks, s, s)
		}
	}},
	{"IQ1_S", 50, 256, 1, 32, func(k *kernel) {
		sc := k.YMM()
		k.VPMOVZXWD(k.at(34), sc)
		k.VPSRLD(U8(12), sc, sc)
		k.VPAND(k.dwords(7), sc, sc)
		k.spillOdd(sc, k.scaledHalf(0, 0.125), 0)
		grid := k.grid("gridIQ1S")
		for g := range 8 {
			var entries [4]Mem
			upper := k.GP32()
			k.MOVWLZX(k.at(34+2*g), upper)
			for l := range entries {
				index := k.upperIndex(upper, 8-3*l, 0x700)
				k.ORL(k.index8(2+4*g+l), index)
				entries[l] = Mem{Base: grid, Index: index.As64(), Scale: 8}
			}
			codes, shift := k.gather(entries), k.YMM()
			k.Comment("The sign bit of the group's word.")
			k.VPBROADCASTW(k.at(34+2*g), shift)
			k.VPSRAW(U8(15), shift, shift)
			k.eighths(codes, shift)
			s := scale{mul: k.spilledScale(g)}
			k.write32(32*g, codes, s, s)
		}
	}},
	{"IQ1_M", 56, 256, 1, 64, func(k *kernel) {
		k.Comment("The scale d: the upper nibbles of four words.")
		words, bits := k.GP64(), k.GP64()
		k.MOVQ(k.at(48), words)
		k.SHRQ(U8(12), words)
		k.MOVQ(words, bits)
		k.ANDL(U32(0x000f), bits.As32())
		for i := 1; i < 4; i++ {
			k.SHRQ(U8(12), words)
			nibble := k.GP32()
			k.MOVL(words.As32(), nibble)
			k.ANDL(U32(0xf<<(4*i)), nibble)
			k.ORL(nibble, bits.As32())
		}
		h, d := k.XMM(), k.YMM()
		k.VMOVD(bits.As32(), h)
		k.VPBROADCASTW(h, h)
		k.VCVTPH2PS(h, d)
		k.quiet(d)
		k.VMULPS(k.floats(0.125), d, d)
		for i := range 2 {
			k.Comment("Eight scales of three bits in two words.")
			sc := k.YMM()
			k.VPBROADCASTD(k.at(48+4*i), sc)
			k.VPSRLVD(k.dwords(0, 3, 6, 9, 16, 19, 22, 25), sc, sc)
			k.VPAND(k.dwords(7), sc, sc)
			k.spillOdd(sc, d, i)
		}
		grid := k.grid("gridIQ1S")
		for g := range 8 {
			var entries [4]Mem
			upper := k.GP32()
			k.MOVWLZX(k.at(32+2*g), upper)
			for l := range entries {
				index := k.upperIndex(upper, 8-4*l, 0x700)
				k.ORL(k.index8(4*g+l), index)
				entries[l] = Mem{Base: grid, Index: index.As64(), Scale: 8}
			}
			codes, shift := k.gather(entries), k.YMM()
			k.Comment("The upper bit of each nibble, in all the 8 outputs that it is for.")
			k.VPBROADCASTW(k.at(32+2*g), shift)
			k.VPSHUFB(k.spreadTwo(), shift, shift)
			upperBits := k.load(k.data(8, 8, 8, 8, 8, 8, 8, 8, 128, 128, 128, 128, 128, 128, 128, 128))
			k.VPAND(upperBits, shift, shift)
			k.VPCMPEQB(upperBits, shift, shift)
			k.eighths(codes, shift)
			k.write32(32*g, codes, scale{mul: k.spilledScale(2 * g)}, scale{mul: k.spilledScale(2*g + 1)})
		}
	}},
	{"IQ4_XS", 136, 256, 1, 32, func(k *kernel) {
		k.Comment("Eight scales: a nibble each at offset 4, and two more bits each at offset 2.")
		sc, upper := k.YMM(), k.YMM()
		k.VPBROADCASTD(k.at(4), sc)
		k.VPSRLVD(k.dwords(0, 4, 8, 12, 16, 20, 24, 28), sc, sc)
		k.VPAND(k.dwords(0x0f), sc, sc)
		k.VPBROADCASTW(k.at(2), upper)
		k.VPSRLVD(k.dwords(0, 2, 4, 6, 8, 10, 12, 14), upper, upper)
		k.VPAND(k.dwords(3), upper, upper)
		k.VPSLLD(U8(4), upper, upper)
		k.VPOR(upper, sc, sc)
		k.VPSUBD(k.dwords(32), sc, sc)
		k.spillScales(sc, k.half(0).AsY(), 0)
		for g := range 8 {
			codes := k.nibbles16(8 + 16*g)
			k.write32Table(32*g, codes, k.table1(kvaluesIQ4NL, scale{mul: k.spilledScale(g)}))
		}
	}},
}

// grid returns the address of a grid. In package kernels that is a string, whose first word is the address of its
// bytes.
func (k *kernel) grid(name string) reg.GPVirtual {
	p := k.GP64()
	k.MOVQ(goVar(name), p)
	return p
}

// goTable returns the address of a Go array.
func (k *kernel) goTable(name string) reg.GPVirtual {
	p := k.GP64()
	k.LEAQ(goVar(name), p)
	return p
}

// piece emits code that computes the address of a part of a vector, and returns the operand. It is called just before
// the part is loaded: there are too few registers for all addresses at once.
type piece func() Mem

// entryWord returns the piece for the entry of a table whose offset is a 16-bit word in the scratch memory.
func (k *kernel) entryWord(table reg.GPVirtual, spilled int) piece {
	return func() Mem {
		offset := k.GP32()
		k.MOVWLZX(k.spilled(spilled), offset)
		return Mem{Base: table, Index: offset.As64(), Scale: 1}
	}
}

// entryDword is entryWord with an offset of 32 bits.
func (k *kernel) entryDword(table reg.GPVirtual, spilled int) piece {
	return func() Mem {
		offset := k.GP32()
		k.MOVL(k.spilled(spilled), offset)
		return Mem{Base: table, Index: offset.As64(), Scale: 1}
	}
}

// spillBytesAsWords stores 16 bytes of the block as 16-bit words, shifted left, in the scratch memory.
func (k *kernel) spillBytesAsWords(offset int, shift uint64, to int) {
	words := k.YMM()
	k.VPMOVZXBW(k.at(offset), words)
	k.VPSLLW(U8(shift), words, words)
	k.spill(words, to)
}

// spreadTwo is the operand of VPSHUFB that fills the lower lane with its first byte and the upper lane with its second
// one.
func (k *kernel) spreadTwo() Mem {
	return k.data(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1)
}

// writeSigned writes outputs out to out+31 of the block. The values are floats of a grid, in four or eight pieces;
// masks flip signs, and low and high scale the first and last 16 outputs.
func (k *kernel) writeSigned(out int, values []piece, masks [4]piece, low, high scale) {
	k.Commentf("Outputs %d to %d.", out, out+31)
	n := k.isa.lanes()
	for first := 0; first < 32; first += 2 * n {
		var pair [2]reg.VecVirtual
		for i := range pair {
			at := first + i*n
			x := k.pieces(values[at*len(values)/32 : (at+n)*len(values)/32])
			if k.isa == avx512 {
				k.VPXORD(k.pieces(masks[at/8:(at+n)/8]), x, x)
			} else {
				k.VXORPS(masks[at/8](), x, x)
			}
			k.VMULPS(k.across(at, n, low, high).mul, x, x)
			pair[i] = x
		}
		k.writePair(out+first, pair)
	}
}

// pieces loads one to four pieces into a wide vector.
func (k *kernel) pieces(p []piece) reg.VecVirtual {
	x := k.wide()
	switch k.isa.lanes() / len(p) {
	case 8:
		if k.isa == avx2 {
			k.VMOVUPS(p[0](), x)
			break
		}
		k.VBROADCASTF64X4(p[0](), x)
		k.VINSERTF64X4(U8(1), p[1](), x, x)
	case 4:
		if k.isa == avx2 {
			k.VBROADCASTF128(p[0](), x)
			k.VINSERTF128(U8(1), p[1](), x, x)
			break
		}
		k.VBROADCASTF32X4(p[0](), x)
		for i := 1; i < 4; i++ {
			k.VINSERTF32X4(U8(i), p[i](), x, x)
		}
	}
	return x
}

// index8 loads a byte of the block as an index.
func (k *kernel) index8(offset int) reg.GPVirtual {
	index := k.GP32()
	k.MOVBLZX(k.at(offset), index)
	return index
}

// upperIndex returns bits, shifted left, AND mask.
func (k *kernel) upperIndex(bits reg.GPVirtual, left int, mask uint32) reg.GPVirtual {
	index := k.GP32()
	k.MOVL(bits, index)
	if left > 0 {
		k.SHLL(U8(left), index)
	} else if left < 0 {
		k.SHRL(U8(-left), index)
	}
	k.ANDL(U32(mask), index)
	return index
}

// gather loads four grid entries of 8 bytes into one vector.
func (k *kernel) gather(entries [4]Mem) reg.VecVirtual {
	y, upper := k.YMM(), k.XMM()
	k.VPBROADCASTQ(entries[0], y)
	k.VPINSRQ(U8(1), entries[1], y.AsX(), y.AsX())
	k.VMOVQ(entries[2], upper)
	k.VPINSRQ(U8(1), entries[3], upper, upper)
	k.VINSERTI128(U8(1), upper, y, y)
	return y
}

// eighths multiplies codes of -1, 0 and 1 by eight, and subtracts 1 where down is set, or adds 1 elsewhere. Their scale
// is an eighth of the block's, which is exact.
func (k *kernel) eighths(codes, down reg.VecVirtual) {
	k.VPOR(k.data(1), down, down)
	k.VPSLLW(U8(3), codes, codes)
	k.VPAND(k.data(0xf8), codes, codes)
	k.VPADDB(down, codes, codes)
}

// floats is data for one float in eight lanes.
func (k *kernel) floats(f float32) Mem { return k.dwords(math.Float32bits(f)) }

// scaledHalf returns a YMM register with the binary16 at an offset in the block, times a power of two, in all lanes.
func (k *kernel) scaledHalf(offset int, factor float32) reg.Register {
	d := k.half(offset).AsY()
	if factor != 1 {
		k.VMULPS(k.floats(factor), d, d)
	}
	return d
}

// spillOdd stores (2y+1)*d as the i-th eight scales. The i-quants scale by y+1/2 or by 2y+1; the factor of two between
// them is exact, so callers multiply d by it.
func (k *kernel) spillOdd(y reg.VecVirtual, d reg.Register, i int) {
	k.VPADDD(y, y, y)
	k.VPOR(k.dwords(1), y, y)
	k.spillScales(y, d, i)
}

// spillNibbles16 stores 16 scales, whose nibbles are at an offset in the block, as the i-th eight scales and the next
// eight.
func (k *kernel) spillNibbles16(offset, i int, factor float32) {
	d := k.scaledHalf(0, factor)
	k.spillNibbles(offset, i, d)
	k.spillNibbles(offset+4, i+1, d)
}

// spillNibbles stores eight scales, whose nibbles are at an offset in the block, times d, as the i-th eight scales.
func (k *kernel) spillNibbles(offset, i int, d reg.Register) {
	sc := k.YMM()
	k.VPBROADCASTD(k.at(offset), sc)
	k.VPSRLVD(k.dwords(0, 4, 8, 12, 16, 20, 24, 28), sc, sc)
	k.VPAND(k.dwords(0x0f), sc, sc)
	k.spillOdd(sc, d, i)
}

// spillUpperNibbles stores eight scales, which are the upper four bits of eight words, as the i-th eight scales.
func (k *kernel) spillUpperNibbles(words reg.VecVirtual, i int, factor float32) {
	sc := k.YMM()
	k.VPSRLD(U8(28), words, sc)
	k.spillOdd(sc, k.scaledHalf(0, factor), i)
}

// spillSigns7 stores offsets in the table signs7. Each of the eight words has four 7-bit indices: first come eight
// offsets for the first indices, then eight for the second ones, and so on.
func (k *kernel) spillSigns7(words reg.VecVirtual, offset int) {
	for l := range 4 {
		y := k.YMM()
		if shift := 7*l - 5; shift < 0 {
			k.VPSLLD(U8(-shift), words, y)
		} else {
			k.VPSRLD(U8(shift), words, y)
		}
		k.VPAND(k.dwords(127<<5), y, y)
		k.spill(y, offset+32*l)
	}
}
