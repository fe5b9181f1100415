package main

import (
	"math"

	. "github.com/mmcloughlin/avo/operand" //nolint:revive // The operands read as assembly does.
	"github.com/mmcloughlin/avo/reg"
)

var iquantFormats = []tensorFormat{
	{"IQ2_XXS", 66, 256, 1, 64, func(k *kernel) {
		k.Comment("The second word of each group, in the order 0 1 4 5 2 3 6 7: signs and a scale.")
		order := [8]int{0, 1, 4, 5, 2, 3, 6, 7}
		words := k.bytes32(2)
		k.VSHUFPS(U8(0b11_01_11_01), k.at(34), words, words)
		k.spillSigns7(words, 32)
		k.spillUpperNibbles(words, 0, 0.125)
		grid := k.grid("gridIQ2XXS")
		for slot, g := range order {
			var entries [4]Mem
			for l := range entries {
				entries[l] = k.entry(grid, 8, k.index8(2+8*g+l))
			}
			codes := k.gather8(entries)
			k.negate(codes, k.bitMask(k.spilled(32+4*slot)))
			s := scale{mul: k.spilledScale(slot)}
			k.write32(32*g, codes, s, s)
		}
	}},
	{"IQ2_XS", 74, 256, 1, 96, func(k *kernel) {
		k.spillNibbles16(66, 0, 0.125)
		k.Comment("Seven sign bits from the top of each word.")
		signs, last := k.bytes32(2), k.bytes32(34)
		k.VPSRLW(U8(9), signs, signs)
		k.VPSRLW(U8(9), last, last)
		k.VPACKUSWB(last, signs, signs)
		k.VPERMQ(U8(0b11_01_10_00), signs, signs)
		k.addParity(signs)
		k.spill(signs, 64)
		grid := k.grid("gridIQ2XS")
		for g := range 8 {
			var entries [4]Mem
			for l := range entries {
				index := k.GP32()
				k.MOVWLZX(k.at(2+8*g+2*l), index)
				k.ANDL(U32(511), index)
				entries[l] = k.entry(grid, 8, index)
			}
			codes := k.gather8(entries)
			k.negate(codes, k.bitMask(k.spilled(64+4*g)))
			k.write32(32*g, codes, scale{mul: k.spilledScale(2 * g)}, scale{mul: k.spilledScale(2*g + 1)})
		}
	}},
	{"IQ2_S", 82, 256, 1, 64, func(k *kernel) {
		k.spillNibbles16(74, 0, 0.125)
		grid := k.grid("gridIQ2S")
		for g := range 8 {
			var entries [4]Mem
			upper := k.index8(66 + g)
			for l := range entries {
				index := k.upperIndex(upper, 8-2*l, 0x300)
				k.ORL(k.index8(2+4*g+l), index)
				entries[l] = k.entry(grid, 8, index)
			}
			codes := k.gather8(entries)
			k.negate(codes, k.bitMask(k.at(34+4*g)))
			k.write32(32*g, codes, scale{mul: k.spilledScale(2 * g)}, scale{mul: k.spilledScale(2*g + 1)})
		}
	}},
	{"IQ3_XXS", 98, 256, 1, 64, func(k *kernel) {
		words := k.bytes32(66)
		k.spillSigns7(words, 32)
		k.spillUpperNibbles(words, 0, 0.25)
		grid := k.grid("gridIQ3XXS")
		for g := range 8 {
			var entries [8]Mem
			for i := range entries {
				entries[i] = k.entry(grid, 4, k.index8(2+8*g+i))
			}
			codes := k.gather4(entries)
			k.negate(codes, k.bitMask(k.spilled(32+4*g)))
			s := scale{mul: k.spilledScale(g)}
			k.write32(32*g, codes, s, s)
		}
	}},
	{"IQ3_S", 110, 256, 1, 160, func(k *kernel) {
		k.spillNibbles8(106, 0, 1)
		k.Comment("64 words that are grid indices: a byte each, and a ninth bit.")
		for i := range 4 {
			index, ninth := k.YMM(), k.YMM()
			k.VPMOVZXBW(k.at(2+16*i), index)
			k.VPBROADCASTW(k.at(66+2*i), ninth)
			k.VPSHUFB(k.data(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1),
				ninth, ninth)
			bits := k.load(k.data(1, 0, 2, 0, 4, 0, 8, 0, 16, 0, 32, 0, 64, 0, 128, 0))
			k.VPAND(bits, ninth, ninth)
			k.VPCMPEQW(bits, ninth, ninth)
			k.VPAND(k.data(0, 1), ninth, ninth)
			k.VPOR(ninth, index, index)
			k.spill(index, 32+32*i)
		}
		grid := k.grid("gridIQ3S")
		for g := range 8 {
			var entries [8]Mem
			for i := range entries {
				index := k.GP32()
				k.MOVWLZX(k.spilled(32+16*g+2*i), index)
				entries[i] = k.entry(grid, 4, index)
			}
			codes := k.gather4(entries)
			k.negate(codes, k.bitMask(k.at(74+4*g)))
			s := scale{mul: k.spilledScale(g)}
			k.write32(32*g, codes, s, s)
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
				entries[l] = k.entry(grid, 8, index)
			}
			codes, shift := k.gather8(entries), k.YMM()
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
				entries[l] = k.entry(grid, 8, index)
			}
			codes, shift := k.gather8(entries), k.YMM()
			k.Comment("The upper bit of each nibble, over the 8 outputs that it belongs to.")
			k.VPBROADCASTW(k.at(32+2*g), shift)
			k.VPSHUFB(k.data(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1),
				shift, shift)
			upperBits := k.load(k.data(8, 8, 8, 8, 8, 8, 8, 8, 128, 128, 128, 128, 128, 128, 128, 128))
			k.VPAND(upperBits, shift, shift)
			k.VPCMPEQB(upperBits, shift, shift)
			k.eighths(codes, shift)
			k.write32(32*g, codes, scale{mul: k.spilledScale(2 * g)}, scale{mul: k.spilledScale(2*g + 1)})
		}
	}},
	{"IQ4_XS", 136, 256, 1, 32, func(k *kernel) {
		k.Comment("Eight scales: nibbles of the word at 4, and two bits each of the one at 2.")
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

// grid returns the address of a grid: package kernels has it as a string, whose first word is the address.
func (k *kernel) grid(name string) reg.GPVirtual {
	p := k.GP64()
	k.MOVQ(goVar(name), p)
	return p
}

// entry is an entry of a grid whose entries have size bytes.
func (k *kernel) entry(grid reg.GPVirtual, size uint8, index reg.GPVirtual) Mem {
	return Mem{Base: grid, Index: index.As64(), Scale: size}
}

// index8 returns a byte of the block as an index.
func (k *kernel) index8(offset int) reg.GPVirtual {
	index := k.GP32()
	k.MOVBLZX(k.at(offset), index)
	return index
}

// upperIndex returns the bits of mask in bits shifted left.
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

// gather8 returns four grid entries of 8 bytes.
func (k *kernel) gather8(entries [4]Mem) reg.VecVirtual {
	var halves [2]reg.VecVirtual
	for i := range halves {
		halves[i] = k.XMM()
		k.VMOVQ(entries[2*i], halves[i])
		k.VPINSRQ(U8(1), entries[2*i+1], halves[i], halves[i])
	}
	return k.concat(halves)
}

// gather4 returns eight grid entries of 4 bytes.
func (k *kernel) gather4(entries [8]Mem) reg.VecVirtual {
	var halves [2]reg.VecVirtual
	for i := range halves {
		halves[i] = k.XMM()
		k.VMOVD(entries[4*i], halves[i])
		for j := 1; j < 4; j++ {
			k.VPINSRD(U8(j), entries[4*i+j], halves[i], halves[i])
		}
	}
	return k.concat(halves)
}

// concat returns 32 codes of two halves.
func (k *kernel) concat(halves [2]reg.VecVirtual) reg.VecVirtual {
	y := k.YMM()
	k.VINSERTI128(U8(1), halves[1], halves[0].AsY(), y)
	return y
}

// negate changes the sign of the codes where mask is set.
func (k *kernel) negate(codes, mask reg.VecVirtual) {
	k.VPXOR(mask, codes, codes)
	k.VPSUBB(mask, codes, codes)
}

// eighths turns codes of -1, 0 and 1 into eighths, less one where down is set, plus one elsewhere. They are scaled by an
// eighth of the scale, which is exact.
func (k *kernel) eighths(codes, down reg.VecVirtual) {
	k.VPOR(k.data(1), down, down)
	k.VPSLLW(U8(3), codes, codes)
	k.VPAND(k.data(0xf8), codes, codes)
	k.VPADDB(down, codes, codes)
}

// floats is data of one float in eight lanes.
func (k *kernel) floats(f float32) Mem { return k.dwords(math.Float32bits(f)) }

// scaledHalf is the binary16 at an offset in the block times a power of two, in the lanes of a YMM register.
func (k *kernel) scaledHalf(offset int, factor float32) reg.Register {
	d := k.half(offset).AsY()
	if factor != 1 {
		k.VMULPS(k.floats(factor), d, d)
	}
	return d
}

// spillOdd stores 2y+1 times d as the i-th eight scales. The i-quants scale by a half and an integer, or by an odd number:
// as the factor of two is exact, it can be moved to d.
func (k *kernel) spillOdd(y reg.VecVirtual, d reg.Register, i int) {
	k.VPADDD(y, y, y)
	k.VPOR(k.dwords(1), y, y)
	k.spillScales(y, d, i)
}

// spillNibbles8 stores the scales that the eight nibbles at an offset stand for.
func (k *kernel) spillNibbles8(offset, i int, factor float32) {
	k.spillNibbles(offset, i, k.scaledHalf(0, factor))
}

// spillNibbles16 stores the scales that the 16 nibbles at an offset stand for.
func (k *kernel) spillNibbles16(offset, i int, factor float32) {
	d := k.scaledHalf(0, factor)
	k.spillNibbles(offset, i, d)
	k.spillNibbles(offset+4, i+1, d)
}

func (k *kernel) spillNibbles(offset, i int, d reg.Register) {
	sc := k.YMM()
	k.VPBROADCASTD(k.at(offset), sc)
	k.VPSRLVD(k.dwords(0, 4, 8, 12, 16, 20, 24, 28), sc, sc)
	k.VPAND(k.dwords(0x0f), sc, sc)
	k.spillOdd(sc, d, i)
}

// spillUpperNibbles stores the scales that the upper four bits of eight words stand for.
func (k *kernel) spillUpperNibbles(words reg.VecVirtual, i int, factor float32) {
	sc := k.YMM()
	k.VPSRLD(U8(28), words, sc)
	k.spillOdd(sc, k.scaledHalf(0, factor), i)
}

// spillSigns7 stores, for each of eight words, the 32 signs that its lower 28 bits stand for: four times seven signs and
// their parity.
func (k *kernel) spillSigns7(words reg.VecVirtual, offset int) {
	k.Comment("Seven bits to each byte, and their parity to its upper bit.")
	signs, t := k.YMM(), k.YMM()
	k.VPAND(k.dwords(0x7f), words, signs)
	for i := 1; i < 4; i++ {
		k.VPSLLD(U8(i), words, t)
		k.VPAND(k.dwords(0x7f<<(8*i)), t, t)
		k.VPOR(t, signs, signs)
	}
	k.addParity(signs)
	k.spill(signs, offset)
}

// addParity sets the upper bit of each byte to the parity of the others.
func (k *kernel) addParity(x reg.VecVirtual) {
	parity, t := k.YMM(), k.YMM()
	k.VPSRLW(U8(4), x, parity)
	k.VPXOR(x, parity, parity)
	for _, shift := range []uint64{2, 1} {
		k.VPSRLW(U8(shift), parity, t)
		k.VPXOR(t, parity, parity)
	}
	k.VPSLLW(U8(7), parity, parity)
	k.VPAND(k.data(0x80), parity, parity)
	k.VPOR(parity, x, x)
}
