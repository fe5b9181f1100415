package main

import (
	. "github.com/mmcloughlin/avo/operand" //nolint:revive // The operands read as assembly does.
)

var fp4Formats = []tensorFormat{
	{"MXFP4", 17, 32, 1, 0, func(k *kernel) {
		codes := k.nibbles16(1)
		k.write32Table(0, codes, k.table1(kvaluesFP4, scale{mul: k.tableScale("scalesE8M0", 0)}))
	}},
	{"NVFP4", 36, 64, 1, 0, func(k *kernel) {
		for i := range 2 {
			k.Comment("Two runs of 16 outputs: 8 bytes of low and high nibbles each.")
			low, high, codes := k.YMM(), k.YMM(), k.YMM()
			k.VBROADCASTI128(k.at(4+16*i), low)
			k.VPSRLW(U8(4), low, high)
			k.VPUNPCKLQDQ(high, low, codes)
			k.VPUNPCKHQDQ(high, low, high)
			k.VPBLENDD(U8(0xf0), high, codes, codes)
			k.VPAND(k.data(0x0f), codes, codes)
			k.lookup(codes, kvaluesFP4)
			k.write32(32*i, codes,
				scale{mul: k.tableScale("scalesUE4M3", 2*i)}, scale{mul: k.tableScale("scalesUE4M3", 2*i+1)})
		}
	}},
}

// kvaluesFP4 are the values of E2M1, doubled so that they are integers.
var kvaluesFP4 = [16]int8{0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12}

// tableScale returns the operand for the float with index b in a Go array of 256 floats, where b is the byte at an
// offset in the block.
func (k *kernel) tableScale(table string, offset int) Op {
	base, index := k.GP64(), k.GP64()
	k.LEAQ(goVar(table), base)
	k.MOVBQZX(k.at(offset), index)
	return Mem{Base: base, Index: index, Scale: 4}
}
