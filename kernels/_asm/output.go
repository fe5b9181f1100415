package main

import (
	. "github.com/mmcloughlin/avo/operand" //nolint:revive // The operands read as assembly does.
	"github.com/mmcloughlin/avo/reg"
)

// scale is what a code is turned into an output with: code*mul, code*mul+add or code*mul-sub. Each is a float in all lanes
// of a wide vector.
type scale struct{ mul, add, sub reg.Register }

// write32 writes outputs out to out+31 of the block from codes, which is a register or memory with 32 signed bytes. low
// scales the first 16, high the others.
func (k *kernel) write32(out int, codes Op, low, high scale) {
	k.Commentf("Outputs %d to %d.", out, out+31)
	n := k.isa.lanes()
	for first := 0; first < 32; first += 2 * n {
		var pair [2]reg.VecVirtual
		for i := range pair {
			at := first + i*n
			s := low
			if at >= 16 {
				s = high
			}
			x := k.wide()
			k.VPMOVSXBD(k.part(codes, at, n), x)
			k.VCVTDQ2PS(x, x)
			switch {
			case s.add != nil:
				k.VFMADD213PS(s.add, s.mul, x)
			case s.sub != nil:
				k.VFMSUB213PS(s.sub, s.mul, x)
			default:
				k.VMULPS(s.mul, x, x)
			}
			pair[i] = x
		}
		k.storePair(out+first, pair)
	}
}

// part returns n bytes of codes from offset on, where VPMOVSXBD finds them: in memory or at the start of a register.
func (k *kernel) part(codes Op, offset, n int) Op {
	if m, ok := codes.(Mem); ok {
		return m.Offset(offset)
	}
	x := codes.(reg.VecVirtual).AsX()
	if offset >= 16 {
		upper := k.XMM()
		k.VEXTRACTI128(I8(1), codes, upper)
		x, offset = upper, offset-16
	}
	if offset == 8 {
		upper := k.XMM()
		k.VPSHUFD(U8(0b1110), x, upper)
		x = upper
	}
	return x
}

// storePair writes two vectors of floats, which it overwrites, as outputs out and following.
func (k *kernel) storePair(out int, x [2]reg.VecVirtual) {
	dst := Mem{Base: k.dst, Disp: out * k.out.size()}
	switch k.out {
	case f32:
		k.store(x[0], dst)
		k.store(x[1], dst.Offset(4*k.isa.lanes()))
	case f16:
		var h [2]reg.VecVirtual
		for i := range x {
			h[i] = k.halfWide()
			k.VCVTPS2PH(U8(0), x[i], h[i]) // 0: to nearest, ties to even
		}
		k.store(k.join(h[0], h[1]), dst)
	case bf16:
		for i := range x {
			k.roundBF16(x[i])
		}
		// Packing works within 128-bit lanes and leaves the 64-bit words in the order 0 2 1 3 (0 2 4 6 1 3 5 7).
		k.VPACKUSDW(x[1], x[0], x[0])
		if k.isa == avx512 {
			k.VPERMQ(x[0], k.round.order, x[0])
		} else {
			k.VPERMQ(U8(0b11_01_10_00), x[0], x[0])
		}
		k.store(x[0], dst)
	}
}

// join returns a wide vector of two halves.
func (k *kernel) join(low, high reg.VecVirtual) reg.VecVirtual {
	x := k.wide()
	if k.isa == avx512 {
		k.VINSERTI64X4(U8(1), high, low.AsZ(), x)
	} else {
		k.VINSERTI128(U8(1), high, low.AsY(), x)
	}
	return x
}

// store writes a wide vector.
func (k *kernel) store(x reg.VecVirtual, m Mem) {
	if k.nt {
		k.VMOVNTPS(x, m)
	} else {
		k.VMOVUPS(x, m)
	}
}

// roundConstants are what rounding to bfloat16 needs in registers.
type roundConstants struct{ one, half, order reg.VecVirtual }

// loadRoundConstants emits the code before the loop that the output stage needs.
func (k *kernel) loadRoundConstants() {
	if k.out != bf16 {
		return
	}
	k.round.one, k.round.half = k.wide(), k.wide()
	k.VPBROADCASTD(k.dwords(1), k.round.one)
	k.VPBROADCASTD(k.dwords(0x7fff), k.round.half)
	if k.isa == avx512 {
		k.round.order = k.ZMM()
		k.VPMOVZXBQ(k.data(0, 2, 4, 6, 1, 3, 5, 7), k.round.order)
	}
}

// roundBF16 turns floats into bfloat16s in the low halves of the lanes: adding one less than half a unit, or half a unit
// where the last bit kept is set, carries as rounding to nearest, ties to even, does. A NaN must have zeros in the bits
// that go, else the carry could turn it into a number: quiet sees to that where floats come from.
func (k *kernel) roundBF16(x reg.VecVirtual) {
	odd := k.wide()
	k.VPSRLD(U8(16), x, odd)
	if k.isa == avx512 {
		k.VPANDD(k.round.one, odd, odd)
	} else {
		k.VPAND(k.round.one, odd, odd)
	}
	k.VPADDD(k.round.half, x, x)
	k.VPADDD(odd, x, x)
	k.VPSRLD(U8(16), x, x)
}

// quiet makes NaNs in x safe for roundBF16: it sets the quiet bit and clears the lower 16. It is applied to scales, once a
// block, and not to outputs: arithmetic only passes on the NaNs of its operands, or makes the default one, which is safe.
func (k *kernel) quiet(x reg.VecVirtual) {
	if k.out != bf16 {
		return
	}
	const unordered = 3
	upper, quietBit := k.dwords(0xffff0000), k.dwords(0x00400000)
	if k.isa == avx512 {
		nan := k.K()
		k.VCMPPS(U8(unordered), x, x, nan)
		k.VPANDD_BCST(upper, x, nan, x)
		k.VPORD_BCST(quietBit, x, nan, x)
		return
	}
	nan, safe := k.YMM(), k.YMM()
	k.VCMPPS(U8(unordered), x, x, nan)
	k.VANDPS(upper, x, safe)
	k.VORPS(quietBit, safe, safe)
	k.VBLENDVPS(nan, safe, x, x)
}

// half returns the binary16 at an offset in the block as a float in all lanes.
func (k *kernel) half(offset int) reg.VecVirtual {
	h, d := k.halfWide(), k.wide()
	k.VPBROADCASTW(k.at(offset), h)
	k.VCVTPH2PS(h, d)
	k.quiet(d)
	return d
}

// single returns the float in memory in all lanes.
func (k *kernel) single(m Mem) reg.VecVirtual {
	d := k.wide()
	k.VBROADCASTSS(m, d)
	return d
}
