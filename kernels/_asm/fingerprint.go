package main

import (
	"strings"

	"github.com/mmcloughlin/avo/attr"
	. "github.com/mmcloughlin/avo/operand" //nolint:revive // The operands read as assembly does.
	"github.com/mmcloughlin/avo/reg"
)

// fingerprint is a function that computes the fingerprint of whole stripes. The second one also copies them to dst,
// with ordinary stores: a device reads the copy from the last-level cache, and non-temporal stores made loads slower.
//
//	func(src, words, keys *byte, stripes int) uint64
//	func(dst, src, words, keys *byte, stripes int) uint64
//
// A product of a word and a key of 64 bits is that of the word and the key's low half, plus that of the word and the
// high half shifted by 32 bits. So the sum is one of 64-bit products and one of 32-bit products, which stay apart to
// the end. The same goes for the sum of a stripe and the key of the stripe.
type fingerprint struct {
	*file
	isa    isa
	copies bool

	dst, src, words reg.Register
}

// fingerprints are all of these functions.
var fingerprints = []*fingerprint{
	{isa: avx2},
	{isa: avx2, copies: true},
	{isa: avx512},
	{isa: avx512, copies: true},
}

// Offsets in the table of word keys: the low halves; the low halves of odd words, each in the place of the word before
// it; the high halves.
const (
	keysLow, keysOdd, keysHigh = 0, stripe, 2 * stripe
	stripe                     = 1024
)

// Offsets in the keys of a stripe: the key, the key with its halves swapped.
const (
	keyOfStripe, keySwapped, stripeKeyBytes = 0, 8, 16
)

// name is the function's name: avx2CopyFingerprint.
func (f *fingerprint) name() string {
	if f.copies {
		return strings.ToLower(f.isa.String()) + "CopyFingerprint"
	}
	return strings.ToLower(f.isa.String()) + "Fingerprint"
}

// vec returns a fresh vector.
func (f *fingerprint) vec() reg.VecVirtual { return (&kernel{file: f.file, isa: f.isa}).wide() }

// build emits the function.
func (f *fingerprint) build(to *file) {
	f.file = to
	f.Function(f.name())
	signature := "func(src, words, keys *byte, stripes int) uint64"
	if f.copies {
		signature = strings.Replace(signature, "src", "dst, src", 1)
	}
	f.SignatureExpr(signature)
	f.Attributes(attr.NOSPLIT)
	if f.copies {
		f.dst = f.Load(f.Param("dst"), f.GP64())
	}
	f.src = f.Load(f.Param("src"), f.GP64())
	f.words = f.Load(f.Param("words"), f.GP64())
	keys := f.Load(f.Param("keys"), f.GP64())
	stripes := f.Load(f.Param("stripes"), f.GP64())
	low, high := f.vec(), f.vec()
	f.VPXOR(low.AsX(), low.AsX(), low.AsX())
	f.VPXOR(high.AsX(), high.AsX(), high.AsX())

	f.Label("loop")
	sum, sumHigh := f.stripe()
	f.Comment("The stripe's sum times the key of the stripe.")
	key, swapped, keyLow := f.vec(), f.vec(), f.vec()
	f.VPBROADCASTQ(Mem{Base: keys, Disp: keyOfStripe}, key)
	f.VPBROADCASTQ(Mem{Base: keys, Disp: keySwapped}, swapped)
	f.VPBROADCASTD(Mem{Base: keys, Disp: keyOfStripe}, keyLow)
	f.VPMULUDQ(sum, key, key)
	f.VPADDQ(key, low, low)
	f.VPMULLD(sum, swapped, swapped)
	f.VPMULLD(sumHigh, keyLow, keyLow)
	f.VPADDD(swapped, high, high)
	f.VPADDD(keyLow, high, high)
	f.ADDQ(I32(stripe), f.src)
	if f.copies {
		f.ADDQ(I32(stripe), f.dst)
	}
	f.ADDQ(I8(stripeKeyBytes), keys)
	f.DECQ(stripes)
	f.JNZ(LabelRef("loop"))
	f.Store(f.total(low, high), f.ReturnIndex(0))
	f.VZEROUPPER()
	f.RET()
}

// stripe emits the code for a stripe. It returns the lanes of its sum: 64-bit products with low halves of keys, and
// 32-bit products with high halves.
func (f *fingerprint) stripe() (sum, high reg.VecVirtual) {
	var even, odd reg.VecVirtual
	bytes := 4 * f.isa.lanes()
	add := func(to *reg.VecVirtual, x reg.VecVirtual, plus func(ops ...Op)) {
		if *to == nil {
			*to = x
		} else {
			plus(x, *to, *to)
		}
	}
	addQ := func(ops ...Op) { f.VPADDQ(ops...) }
	addD := func(ops ...Op) { f.VPADDD(ops...) }
	for at := 0; at < stripe; at += bytes {
		words, shifted, products := f.vec(), f.vec(), f.vec()
		f.VMOVUPS(Mem{Base: f.src, Disp: at}, words)
		f.copy(at, words)
		f.VPSRLQ(U8(32), words, shifted)
		f.VPMULUDQ(f.wordKeys(keysLow+at), words, products)
		f.VPMULUDQ(f.wordKeys(keysOdd+at), shifted, shifted)
		f.VPMULLD(f.wordKeys(keysHigh+at), words, words)
		add(&even, products, addQ)
		add(&odd, shifted, addQ)
		add(&high, words, addD)
	}
	f.VPADDQ(odd, even, even)
	return even, high
}

// wordKeys returns the operand for the keys at an offset in their table.
func (f *fingerprint) wordKeys(offset int) Mem { return Mem{Base: f.words, Disp: offset} }

// copy stores the vector x that was loaded from an offset at that offset of dst.
func (f *fingerprint) copy(at int, x reg.VecVirtual) {
	if !f.copies {
		return
	}
	if at%64 == 0 {
		f.PREFETCHT0(Mem{Base: f.src, Disp: at + prefetchAhead})
	}
	f.VMOVUPS(x, Mem{Base: f.dst, Disp: at})
}

// total emits the sum of the lanes of low, and of those of high shifted by 32 bits.
func (f *fingerprint) total(low, high reg.VecVirtual) reg.Register {
	f.Comment("The sum of all lanes.")
	shifted := f.vec()
	f.VPSRLQ(U8(32), high, shifted)
	f.VPADDD(shifted, high, high)
	f.VPSLLQ(U8(32), high, high)
	f.VPADDQ(high, low, low)
	y := f.YMM()
	if f.isa == avx512 {
		f.VEXTRACTI64X4(U8(1), low, y)
		f.VPADDQ(y, low.AsY(), low.AsY())
	}
	x := f.XMM()
	f.VEXTRACTI128(U8(1), low.AsY(), x)
	f.VPADDQ(x, low.AsX(), low.AsX())
	f.VPSRLDQ(U8(8), low.AsX(), x)
	f.VPADDQ(x, low.AsX(), low.AsX())
	sum := f.GP64()
	f.VMOVQ(low.AsX(), sum)
	return sum
}
