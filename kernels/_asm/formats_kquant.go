package main

import (
	. "github.com/mmcloughlin/avo/operand" //nolint:revive // The operands read as assembly does.
	"github.com/mmcloughlin/avo/reg"
)

var kquantFormats = []tensorFormat{
	{"Q2_K", 84, 256, 1, 128, func(k *kernel) {
		sc, low, high := k.XMM(), k.XMM(), k.XMM()
		k.Comment("Scratch memory: 16 scales, then 16 minima.")
		k.VMOVDQU(k.at(0), sc)
		k.VPAND(k.data(0x0f), sc, low)
		k.VPSRLW(U8(4), sc, high)
		k.VPAND(k.data(0x0f), high, high)
		k.spillBytes(low, k.half(80), 0)
		k.spillBytes(high, k.half(82), 2)
		for h := range 2 {
			q := k.bytes32(16 + 32*h)
			for j := range 4 {
				first := 8*h + 2*j
				t := k.table(linear(0),
					scale{mul: k.spilledScale(first), sub: k.spilledScale(16 + first)},
					scale{mul: k.spilledScale(first + 1), sub: k.spilledScale(17 + first)})
				k.write32Table(128*h+32*j, k.field(q, 2*j, 0, 3), t)
			}
		}
	}},
	{"Q3_K", 110, 256, 1, 64, func(k *kernel) {
		k.Comment("16 scales in two registers: low nibbles and their upper bits, high nibbles and theirs.")
		low, high, upper, nibbles := k.GP64(), k.GP64(), k.GP64(), k.GP64()
		k.MOVQ(k.at(96), low)
		k.MOVL(k.at(104), upper.As32())
		k.MOVQ(upper, high)
		k.SHRQ(U8(2), high)
		k.SHLQ(U8(32), high)
		k.ORQ(high, upper)
		k.MOVQ(U64(0x0f0f0f0f0f0f0f0f), nibbles)
		k.MOVQ(low, high)
		k.SHRQ(U8(4), high)
		k.ANDQ(nibbles, low)
		k.ANDQ(nibbles, high)
		two := k.GP64()
		k.MOVQ(U64(0x3030303030303030), two)
		for i, nibble := range []reg.GPVirtual{low, high} {
			bits := k.GP64()
			k.MOVQ(upper, bits)
			if i == 0 {
				k.SHLQ(U8(4), bits)
			}
			k.ANDQ(two, bits)
			k.ORQ(bits, nibble)
		}
		sc := k.pair64(low, high)
		k.VPSUBB(k.data(32), sc, sc)
		k.spillBytes(sc, k.half(108), 0)
		third := k.bytes32(0)
		for h := range 2 {
			q := k.bytes32(32 + 32*h)
			for j := range 4 {
				codes := k.field(q, 2*j, 0, 3)
				k.orField(codes, third, 4*h+j, 2, 4)
				t := k.table(linear(-4),
					scale{mul: k.spilledScale(8*h + 2*j)}, scale{mul: k.spilledScale(8*h + 2*j + 1)})
				k.write32Table(128*h+32*j, codes, t)
			}
		}
	}},
	{"Q4_K", 144, 256, 1, 64, func(k *kernel) {
		k.spillScalesQ4K()
		for p := range 4 {
			q := k.bytes32(16 + 32*p)
			for i := range 2 {
				s := k.spilledScaleQ4K(2*p + i)
				k.write32Table(64*p+32*i, k.field(q, 4*i, 0, 0x0f), k.table1(linear(0), s))
			}
		}
	}},
	{"Q5_K", 176, 256, 1, 64, func(k *kernel) {
		k.spillScalesQ4K()
		fifth := k.bytes32(16)
		for p := range 4 {
			q := k.bytes32(48 + 32*p)
			for i := range 2 {
				codes := k.field(q, 4*i, 0, 0x0f)
				k.orField(codes, fifth, 2*p+i, 4, 0x10)
				s := k.spilledScaleQ4K(2*p + i)
				k.write32(64*p+32*i, codes, s, s)
			}
		}
	}},
	{"Q6_K", 210, 256, 1, 64, func(k *kernel) {
		d := k.half(208)
		for i := range 2 {
			sc := k.YMM()
			k.VPMOVSXBD(k.at(192+8*i), sc)
			k.spillScales(sc, d.AsY(), i)
		}
		for h := range 2 {
			ql := [2]reg.VecVirtual{k.bytes32(64 * h), k.bytes32(64*h + 32)}
			qh := k.bytes32(128 + 32*h)
			for j := range 4 {
				codes := k.field(ql[j%2], 4*(j/2), 0, 0x0f)
				k.orField(codes, qh, 2*j, 4, 0x30)
				k.VPSUBB(k.data(32), codes, codes)
				k.write32(128*h+32*j, codes,
					scale{mul: k.spilledScale(8*h + 2*j)}, scale{mul: k.spilledScale(8*h + 2*j + 1)})
			}
		}
	}},
	{"Q8_K", 292, 256, 1, 0, func(k *kernel) {
		d := k.wide()
		k.VBROADCASTSS(k.at(0), d)
		k.quiet(d)
		for i := range 8 {
			k.write32(32*i, k.at(4+32*i), scale{mul: d}, scale{mul: d})
		}
	}},
}

// spillBytes converts 16 signed bytes to floats, multiplies them by d, and stores them as 16 floats of the scratch
// memory, from the float 8*i on. It overwrites x.
func (k *kernel) spillBytes(x, d reg.VecVirtual, i int) {
	for half := range 2 {
		y := k.YMM()
		if half == 1 {
			k.VPSRLDQ(U8(8), x, x)
		}
		k.VPMOVSXBD(x, y)
		k.spillScales(y, d.AsY(), i+half)
	}
}

// pair64 returns a vector of two 64-bit words.
func (k *kernel) pair64(low, high reg.GPVirtual) reg.VecVirtual {
	x := k.XMM()
	k.VMOVQ(low, x)
	k.VPINSRQ(U8(1), high, x, x)
	return x
}

// spillScalesQ4K unpacks the 6-bit scales and minima of Q4_K and Q5_K and multiplies them by d and dmin. In the scratch
// memory there are then four scales and four minima of the first four runs, and the same of the last four.
func (k *kernel) spillScalesQ4K() {
	k.Comment("Runs 0 to 3: six bits of bytes 4 to 11. Others: nibbles of bytes 12 to 15, two bits of 4 to 11.")
	first, last, high, mask := k.GP64(), k.GP64(), k.GP64(), k.GP64()
	k.MOVL(k.at(12), last.As32())
	k.MOVQ(last, high)
	k.SHLQ(U8(28), high)
	k.ORQ(high, last)
	k.MOVQ(U64(0x0f0f0f0f0f0f0f0f), mask)
	k.ANDQ(mask, last)
	k.MOVQ(k.at(4), first)
	k.MOVQ(first, high)
	k.SHRQ(U8(2), high)
	mask = k.GP64()
	k.MOVQ(U64(0x3030303030303030), mask)
	k.ANDQ(mask, high)
	k.ORQ(high, last)
	mask = k.GP64()
	k.MOVQ(U64(0x3f3f3f3f3f3f3f3f), mask)
	k.ANDQ(mask, first)
	k.Comment("d in four lanes, dmin in the other four.")
	h, d := k.XMM(), k.YMM()
	k.VPBROADCASTD(k.at(0), h)
	k.VPSHUFB(k.data(0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 2, 3), h, h)
	k.VCVTPH2PS(h, d)
	k.quiet(d)
	k.spillBytes(k.pair64(first, last), d, 0)
}

// spilledScaleQ4K returns the scale of run g, as spillScalesQ4K stores it.
func (k *kernel) spilledScaleQ4K(g int) scale {
	at := g%4 + 8*(g/4)
	return scale{mul: k.spilledScale(at), sub: k.spilledScale(at + 4)}
}
