package main

import (
	. "github.com/mmcloughlin/avo/operand" //nolint:revive // The operands read as assembly does.
	"github.com/mmcloughlin/avo/reg"
)

var ternaryFormats = []tensorFormat{
	{"TQ1_0", 54, 256, 1, 0, func(k *kernel) {
		t := k.table1(linear(-1), scale{mul: k.half(52)})
		write := func(out int, fractions reg.VecVirtual) { k.write32Table(out, k.trits(fractions), t) }
		q := k.bytes32(0)
		for n := range 5 {
			if n > 0 {
				next := k.YMM()
				k.triple(q, next)
				q = next
			}
			write(32*n, q)
		}
		k.Comment("Runs of 16 outputs, two at a time.")
		x := k.YMM()
		k.VBROADCASTI128(k.at(32), x)
		for n := range 2 {
			odd, pair := k.YMM(), k.YMM()
			k.triple(x, odd)
			k.VPBLENDD(U8(0xf0), odd, x, pair)
			write(160+32*n, pair)
			x = k.YMM()
			k.triple(odd, x)
		}
		k.Comment("The fifth trits of the 16 bytes; then four trits of each of the last 4 bytes, multiplied as words.")
		words, last := k.YMM(), k.XMM()
		k.VPBROADCASTD(k.at(48), last)
		k.VPMOVZXBW(last, words)
		k.VPMULLW(k.data(1, 0, 1, 0, 1, 0, 1, 0, 3, 0, 3, 0, 3, 0, 3, 0, 9, 0, 9, 0, 9, 0, 9, 0, 27, 0, 27, 0, 27, 0, 27, 0),
			words, words)
		k.VPAND(k.data(0xff, 0), words, words)
		k.VEXTRACTI128(U8(1), words, last)
		k.VPACKUSWB(last, words.AsX(), last)
		k.VINSERTI128(U8(1), last, x, x)
		write(224, x)
	}},
	{"TQ2_0", 66, 256, 1, 0, func(k *kernel) {
		t := k.table1(linear(-1), scale{mul: k.half(64)})
		for h := range 2 {
			q := k.bytes32(32 * h)
			for j := range 4 {
				k.write32Table(128*h+32*j, k.field(q, 2*j, 0, 3), t)
			}
		}
	}},
}

// triple multiplies bytes by three, which drops the leading trit: the next one becomes the leading one.
func (k *kernel) triple(x, y reg.VecVirtual) {
	k.VPADDB(x, x, y)
	k.VPADDB(x, y, y)
}

// trits returns the leading trits of bytes, which are fractions of 256: 0 below 86, 1 below 171, else 2.
func (k *kernel) trits(fractions reg.VecVirtual) reg.VecVirtual {
	one, two := k.YMM(), k.YMM()
	k.VPMAXUB(k.data(86), fractions, one)
	k.VPCMPEQB(fractions, one, one)
	k.VPMAXUB(k.data(171), fractions, two)
	k.VPCMPEQB(fractions, two, two)
	k.VPADDB(one, two, one)
	k.VPABSB(one, one)
	return one
}
