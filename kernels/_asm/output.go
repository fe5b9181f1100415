package main

import (
	"math"

	. "github.com/mmcloughlin/avo/operand" //nolint:revive // The operands read as assembly does.
	"github.com/mmcloughlin/avo/reg"
)

// scale says how an output comes from a code: code*mul, code*mul+add or code*mul-sub. Each operand is a register with
// the float in all lanes, or one float in memory.
type scale struct{ mul, add, sub Op }

// write32 writes outputs out to out+31 of the block. codes is a register or memory with 32 signed bytes; low scales the
// first 16 of them, high the others.
func (k *kernel) write32(out int, codes Op, low, high scale) {
	k.Commentf("Outputs %d to %d.", out, out+31)
	n := k.isa.lanes()
	if k.out == bf16 {
		for first := 0; first < 32; first += 2 * n {
			k.writeBF16(out+first, k.part(codes, first, 2*n), k.across(first, 2*n, low, high))
		}
		return
	}
	for first := 0; first < 32; first += n {
		x := k.wide()
		k.VPMOVSXBD(k.part(codes, first, n), x)
		k.scaled(x, k.across(first, n, low, high))
		k.write(out+first, x)
	}
}

// part returns an operand with n bytes of codes from offset on: memory, or a register that begins with them.
func (k *kernel) part(codes Op, offset, n int) Op {
	if m, ok := codes.(Mem); ok {
		return m.Offset(offset)
	}
	if n == 32 {
		return codes
	}
	x := codes.(reg.VecVirtual).AsX()
	if offset >= 16 {
		upper := k.XMM()
		k.VEXTRACTI128(U8(1), codes, upper)
		x, offset = upper, offset-16
	}
	if offset == 8 {
		upper := k.XMM()
		k.VPSHUFD(U8(0b1110), x, upper)
		x = upper
	}
	return x
}

// across returns the scale, in registers, for a vector of outputs first to first+n-1 of 32: low in the lanes of outputs
// below 16, high in the others.
func (k *kernel) across(first, n int, low, high scale) scale {
	if first >= 16 {
		low = high
	}
	if first+n <= 16 {
		high = low
	}
	return scale{k.lanes(low.mul, high.mul), k.lanes(low.add, high.add), k.lanes(low.sub, high.sub)}
}

// lanes returns a wide vector with low in its lower and high in its upper lanes.
func (k *kernel) lanes(low, high Op) Op {
	m, ok := low.(Mem)
	if !ok {
		return low
	}
	x := k.wide()
	k.VBROADCASTSS(m, x)
	if high != low {
		k.VBROADCASTSS(high, k.round.upperLanes, x)
	}
	return x
}

// scaled turns integer codes into outputs, in place.
func (k *kernel) scaled(x reg.VecVirtual, s scale) {
	k.VCVTDQ2PS(x, x)
	switch {
	case s.add != nil:
		k.VFMADD213PS(s.add, s.mul, x)
	case s.sub != nil:
		k.VFMSUB213PS(s.sub, s.mul, x)
	default:
		k.VMULPS(s.mul, x, x)
	}
}

// write writes a vector of floats as f32 or f16 outputs, from output out on.
func (k *kernel) write(out int, x reg.VecVirtual) {
	dst := Mem{Base: k.dst, Disp: out * k.out.size()}
	switch {
	case k.out == f32:
		k.store(x, dst)
	case k.nt:
		h := k.halfWide()
		k.VCVTPS2PH(U8(toNearest), x, h)
		k.store(h, dst)
	default:
		k.VCVTPS2PH(U8(toNearest), x, dst)
	}
}

// toNearest is the operand of VCVTPS2PH that rounds to nearest, ties to even.
const toNearest = 0

// store writes a vector to memory.
func (k *kernel) store(x reg.VecVirtual, m Mem) {
	if k.nt {
		k.VMOVNTPS(x, m)
	} else {
		k.VMOVUPS(x, m)
	}
}

// writeBF16 writes a vector of bf16 outputs, from output out on; codes are as many signed bytes. It makes even and odd
// outputs in two vectors, so that it only has to blend them in the end.
func (k *kernel) writeBF16(out int, codes Op, s scale) {
	even, odd := k.wide(), k.wide()
	k.VPMOVSXWD(codes, odd)
	k.VPSLLD(U8(24), odd, even)
	k.VPSRAD(U8(24), even, even)
	k.VPSRAD(U8(8), odd, odd)
	k.scaled(even, s)
	k.scaled(odd, s)
	k.Comment("Upper and lower halves of the floats.")
	upper, lower, carry := k.wide(), k.wide(), k.wide()
	k.VPSRLD(U8(16), even, upper)
	k.VPSLLD(U8(16), odd, lower)
	if k.isa == avx512 {
		k.VPTERNLOGD(U8(orAnd), k.round.upperHalf, odd, upper)
		k.VPTERNLOGD(U8(orAnd), k.round.lowerHalf, even, lower)
		k.VMOVDQA64(k.round.half, carry)
		k.VPTERNLOGD(U8(orAnd), k.round.one, upper, carry)
	} else {
		k.VPBLENDW(U8(0b10101010), odd, upper, upper)
		k.VPBLENDW(U8(0b01010101), even, lower, lower)
		k.VPAND(k.round.one, upper, carry)
		k.VPOR(k.round.half, carry, carry)
	}
	k.Comment("The carry of lower + 0x7fff + (upper & 1) is the top bit of the average.")
	k.VPAVGW(lower, carry, carry)
	k.VPSRLW(U8(15), carry, carry)
	k.VPADDW(carry, upper, upper)
	k.store(upper, Mem{Base: k.dst, Disp: out * k.out.size()})
}

// roundConstants are the constants that the output stage keeps in registers.
type roundConstants struct {
	// In each 16-bit word: 1, and 0x7ffe, which is one less than the largest lower half that is always rounded down.
	one, half reg.VecVirtual
	// AVX-512 only: masks for the halves of each 32-bit lane, and for the upper half of the lanes.
	upperHalf, lowerHalf reg.VecVirtual
	upperLanes           reg.OpmaskVirtual
}

// loadRoundConstants emits code, to go before the loop, that loads them.
func (k *kernel) loadRoundConstants() {
	r := &k.round
	if k.isa == avx512 && k.out != f32 {
		mask := k.GP32()
		r.upperLanes = k.K()
		k.MOVL(U32(0xff00), mask)
		k.KMOVW(mask, r.upperLanes)
	}
	if k.out != bf16 {
		return
	}
	r.one, r.half = k.wide(), k.wide()
	k.VPBROADCASTD(k.dwords(0x00010001), r.one)
	k.VPBROADCASTD(k.dwords(0x7ffe7ffe), r.half)
	if k.isa == avx512 {
		r.upperHalf, r.lowerHalf = k.wide(), k.wide()
		k.VPBROADCASTD(k.dwords(0xffff0000), r.upperHalf)
		k.VPBROADCASTD(k.dwords(0x0000ffff), r.lowerHalf)
	}
}

// writePair writes two vectors of floats as outputs, from output out on. It overwrites the vectors.
func (k *kernel) writePair(out int, x [2]reg.VecVirtual) {
	if k.out != bf16 {
		k.write(out, x[0])
		k.write(out+k.isa.lanes(), x[1])
		return
	}
	for i := range x {
		k.roundBF16(x[i])
		k.VPSRLD(U8(16), x[i], x[i])
	}
	k.Comment("Packing works in each 128-bit lane and leaves the 64-bit words in the order 0 2 1 3 or 0 2 4 6 1 3 5 7.")
	k.VPACKUSDW(x[1], x[0], x[0])
	if k.isa == avx512 {
		order := k.ZMM()
		k.VPMOVZXBQ(k.data(0, 2, 4, 6, 1, 3, 5, 7), order)
		k.VPERMQ(x[0], order, x[0])
	} else {
		k.VPERMQ(U8(0b11_01_10_00), x[0], x[0])
	}
	k.store(x[0], Mem{Base: k.dst, Disp: out * k.out.size()})
}

// roundBF16 rounds floats to bfloat16s, which are then in the upper halves of the lanes. To round to nearest, ties to
// even, it adds half a unit where the last bit that is kept is set, and one less than that elsewhere. The carry must
// not turn a NaN into a number, so the lower half of a NaN must be zero: quiet has seen to that when the float was
// loaded.
func (k *kernel) roundBF16(x reg.VecVirtual) {
	odd := k.wide()
	k.VPSLLD(U8(15), x, odd)
	k.VPSRLD(U8(31), odd, odd)
	k.VPADDD(k.dwordsWide(0x7fff), x, x)
	k.VPADDD(odd, x, x)
}

// quiet replaces NaNs in x by NaNs that are safe for rounding to bfloat16: quiet ones with zeros in the lower 16 bits.
// Scales go through it, once in each block; outputs need not, as arithmetic only passes on the NaNs of its operands, or
// makes the default NaN, which is safe.
func (k *kernel) quiet(x reg.VecVirtual) {
	if k.out != bf16 {
		return
	}
	if k.isa == avx512 {
		const defaultNaN = 0x33 // quiet and signalling NaNs become the default one; everything else stays
		k.VFIXUPIMMPS_BCST(U8(0), k.dwords(defaultNaN), x, x)
		return
	}
	const unordered = 3
	nan, safe := k.YMM(), k.YMM()
	k.VCMPPS(U8(unordered), x, x, nan)
	k.VANDPS(k.dwords(0xffff0000), x, safe)
	k.VORPS(k.dwords(0x00400000), safe, safe)
	k.VBLENDVPS(nan, safe, x, x)
}

// half returns a wide vector with the binary16 at an offset in the block, as a float, in all lanes.
func (k *kernel) half(offset int) reg.VecVirtual {
	h, d := k.halfWide(), k.wide()
	k.VPBROADCASTW(k.at(offset), h)
	k.VCVTPH2PS(h, d)
	k.quiet(d)
	return d
}

// table maps codes to outputs: 16 codes with one scale, or eight codes with one scale for the first 16 outputs of a run
// and another for the rest.
type table struct {
	values    [16]int8
	low, high scale
	// words has all 16 outputs, where looking them up is worth it: f16 and bf16 with AVX-512, which can look up words.
	// With bf16 the first word of each 32-bit lane is an output, with f16 every word.
	words reg.VecVirtual
}

// linear returns the values of codes that stand for themselves plus an offset.
func linear(offset int8) (values [16]int8) {
	for i := range values {
		values[i] = int8(i) + offset
	}
	return values
}

// table returns the table for values: all 16 with one scale if low and high are equal, else the first eight with both.
func (k *kernel) table(values [16]int8, low, high scale) table {
	t := table{values: values, low: low, high: high}
	if k.isa != avx512 || k.out == f32 {
		return t
	}
	k.Comment("The outputs of all codes.")
	var b []uint32
	for i := range values {
		if t.split() {
			i %= 8
		}
		b = append(b, math.Float32bits(float32(values[i])))
	}
	x := k.ZMM()
	k.VMOVUPS(k.dwordsWide(b...), x)
	s := k.across(0, 32, low, high)
	switch {
	case s.add != nil:
		k.VFMADD213PS(s.add, s.mul, x)
	case s.sub != nil:
		k.VFMSUB213PS(s.sub, s.mul, x)
	default:
		k.VMULPS(s.mul, x, x)
	}
	if k.out == f16 {
		k.VCVTPS2PH(U8(toNearest), x, x.AsY())
	} else {
		k.roundBF16(x)
		k.VPSRLD(U8(16), x, x)
	}
	t.words = x
	return t
}

// table1 returns the table of 16 values with one scale.
func (k *kernel) table1(values [16]int8, s scale) table { return k.table(values, s, s) }

// split reports whether the table has two scales.
func (t *table) split() bool { return t.low != t.high }

// write32Table writes outputs out to out+31 of the block: t of 32 codes. It overwrites the codes.
func (k *kernel) write32Table(out int, codes reg.VecVirtual, t table) {
	if t.words == nil {
		k.lookup(codes, t.values)
		k.write32(out, codes, t.low, t.high)
		return
	}
	k.Commentf("Outputs %d to %d.", out, out+31)
	if t.split() {
		k.VPOR(k.data(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8),
			codes, codes)
	}
	index := k.ZMM()
	if k.out == bf16 {
		k.VPADDB(codes, codes, codes)
	}
	k.VPMOVZXBW(codes, index)
	k.VPERMW(t.words, index, index)
	k.store(index, Mem{Base: k.dst, Disp: out * k.out.size()})
}

// lookup replaces codes, which are 0 to 15, by their values.
func (k *kernel) lookup(codes reg.VecVirtual, values [16]int8) {
	switch values {
	case linear(0):
	case linear(values[0]):
		k.VPADDB(k.data(byte(values[0])), codes, codes)
	default:
		var b []byte
		for _, v := range values {
			b = append(b, byte(v))
		}
		k.VPSHUFB(codes, k.load(k.data(b...)), codes)
	}
}
