package main

import (
	. "github.com/mmcloughlin/avo/operand" //nolint:revive // The operands read as assembly does.
	"github.com/mmcloughlin/avo/reg"
)

// The functions here make codes: 32 bytes in a YMM register, in the order of the outputs.

// bytes32 loads 32 bytes of the block.
func (k *kernel) bytes32(offset int) reg.VecVirtual {
	y := k.YMM()
	k.VMOVDQU(k.at(offset), y)
	return y
}

// field returns a bit field of every byte of x: it shifts bit from to bit to and ANDs with mask. It does not change x.
func (k *kernel) field(x reg.VecVirtual, from, to int, mask byte) reg.VecVirtual {
	y := k.YMM()
	k.VPAND(k.data(mask), k.moved(x, from, to), y)
	return y
}

// orField ORs a field of x into codes, in which the bits of mask are zero.
func (k *kernel) orField(codes, x reg.VecVirtual, from, to int, mask byte) {
	if k.isa == avx512 {
		k.VPTERNLOGD(U8(orAnd), k.data(mask), k.moved(x, from, to), codes)
		return
	}
	k.VPOR(k.field(x, from, to, mask), codes, codes)
}

// orAnd is the truth table for VPTERNLOGD that gives destination | (second operand & third operand).
const orAnd = 0xf8

// moved shifts bit from of every byte to bit to. It shifts words, so bits move into neighbouring bytes, but only to
// where the mask of a field drops them.
func (k *kernel) moved(x reg.VecVirtual, from, to int) reg.VecVirtual {
	if from == to {
		return x
	}
	y := k.YMM()
	if from > to {
		k.VPSRLW(U8(from-to), x, y)
	} else {
		k.VPSLLW(U8(to-from), x, y)
	}
	return y
}

// nibbles16 returns the nibbles of 16 bytes of the block: 16 low nibbles, then 16 high nibbles.
func (k *kernel) nibbles16(offset int) reg.VecVirtual {
	y := k.YMM()
	k.VBROADCASTI128(k.at(offset), y)
	k.VPSRLVD(k.dwords(0, 0, 0, 0, 4, 4, 4, 4), y, y)
	k.VPAND(k.data(0x0f), y, y)
	return y
}

// bitMask returns a byte for each of 32 bits in memory: 0xff where the bit is set, else 0.
func (k *kernel) bitMask(m Mem) reg.VecVirtual {
	y := k.YMM()
	k.VPBROADCASTD(m, y)
	k.VPSHUFB(k.data(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3), y, y)
	bits := k.load(k.data(1, 2, 4, 8, 16, 32, 64, 128))
	k.VPAND(bits, y, y)
	k.VPCMPEQB(bits, y, y)
	return y
}

// spillScales converts the eight integers in y to floats, multiplies them by those in d, and stores them as the i-th
// eight floats of the scratch memory. It overwrites y.
func (k *kernel) spillScales(y, d reg.Register, i int) {
	k.VCVTDQ2PS(y, y)
	k.VMULPS(d, y, y)
	k.spill(y, 32*i)
}

// spilledScale returns the operand for the i-th float of the scratch memory.
func (k *kernel) spilledScale(i int) Op { return k.spilled(4 * i) }
