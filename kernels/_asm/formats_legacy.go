package main

import (
	. "github.com/mmcloughlin/avo/operand" //nolint:revive // The operands read as assembly does.
)

var legacyFormats = []tensorFormat{
	{"Q4_0", 18, 32, 1, 0, func(k *kernel) {
		k.write32Table(0, k.nibbles16(2), k.table1(linear(-8), scale{mul: k.half(0)}))
	}},
	{"Q4_1", 20, 32, 1, 0, func(k *kernel) {
		k.write32Table(0, k.nibbles16(4), k.table1(linear(0), scale{mul: k.half(0), add: k.half(2)}))
	}},
	{"Q5_0", 22, 32, 1, 0, func(k *kernel) {
		codes, fifth := k.nibbles16(6), k.bitMask(k.at(2))
		k.Comment("Without its fifth bit a code is 16 less than its nibble.")
		k.VPANDN(k.data(0xf0), fifth, fifth)
		k.VPOR(fifth, codes, codes)
		k.write32Scaled(codes, scale{mul: k.half(0)})
	}},
	{"Q5_1", 24, 32, 1, 0, func(k *kernel) {
		codes, fifth := k.nibbles16(8), k.bitMask(k.at(4))
		k.VPAND(k.data(0x10), fifth, fifth)
		k.VPOR(fifth, codes, codes)
		k.write32Scaled(codes, scale{mul: k.half(0), add: k.half(2)})
	}},
	{"Q8_0", 34, 32, 1, 0, func(k *kernel) { k.write32Scaled(k.at(2), scale{mul: k.half(0)}) }},
	{"Q8_1", 36, 32, 1, 0, func(k *kernel) { k.write32Scaled(k.at(4), scale{mul: k.half(0)}) }},
	{"Q1_0", 18, 128, 1, 0, func(k *kernel) {
		t := k.table1([16]int8{-1, 1}, scale{mul: k.half(0)})
		for i := range 4 {
			codes := k.bitMask(k.at(2 + 4*i))
			k.VPAND(k.data(1), codes, codes)
			k.write32Table(32*i, codes, t)
		}
	}},
	{"Q2_0", 18, 64, 1, 0, func(k *kernel) {
		t := k.table1(linear(-1), scale{mul: k.half(0)})
		for i := range 2 {
			codes, upper := k.YMM(), k.YMM()
			k.Comment("Each 32-bit lane gets a byte, each of its words a nibble of that, each byte of these one code.")
			k.VPMOVZXBD(k.at(2+8*i), codes)
			k.VPSLLD(U8(12), codes, upper)
			k.VPOR(upper, codes, codes)
			k.VPAND(k.data(0x0f, 0), codes, codes)
			k.VPSLLW(U8(6), codes, upper)
			k.VPOR(upper, codes, codes)
			k.VPAND(k.data(3), codes, codes)
			k.write32Table(32*i, codes, t)
		}
	}},
	{"IQ4_NL", 18, 32, 1, 0, func(k *kernel) {
		k.write32Table(0, k.nibbles16(2), k.table1(kvaluesIQ4NL, scale{mul: k.half(0)}))
	}},
}

// write32Scaled writes the only 32 outputs of a block with one scale.
func (k *kernel) write32Scaled(codes Op, s scale) { k.write32(0, codes, s, s) }

// kvaluesIQ4NL are the values of the non-linear 4-bit codes.
var kvaluesIQ4NL = [16]int8{-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113}
