package kernels

import "math/bits"

// AddFingerprint adds to sums what src, which begins at byte at of something, contributes to the fingerprints of that.
// sums[0] is that of the block that byte at is in. A fingerprint is a sum over the bytes of its block, so the parts of
// a block may be added in any order: together they give what [Fingerprint] gives for the whole.
//
// It panics if sums is too short.
func AddFingerprint(sums []uint64, at int64, src []byte) { fingerprintTier().add(sums, at, src) }

// CopyAddFingerprint is Copy and AddFingerprint of what is copied, in one pass over memory. It returns the number of
// bytes, min(len(dst), len(src)). dst and src must not overlap. Bytes up to the first stripe of 1 KiB take longer. It
// panics if sums is too short.
func CopyAddFingerprint(dst, src []byte, sums []uint64, at int64) int {
	return fingerprintTier().copyAdd(dst, src, sums, at)
}

// FlippedBit returns which bit of a block was flipped, counted from its beginning, if the fingerprint of the block
// should be want and is got; -1 if that cannot come from one flipped bit.
//
// A flipped bit b of a word changes the sum by the word's key times 2^b, up or down. Keys are odd, so that dividing by
// the key leaves the power of two, and no two bits change the sum by the same. After other damage the answer is -1 but
// for a chance of 2^-44.
func FlippedBit(want, got uint64) int64 {
	if want == got {
		return -1
	}
	keys := fingerprintKeys()
	for s, stripe := range keys.Stripes {
		change := (got - want) * inverse(stripe)
		for i, word := range keys.Words {
			x := change * inverse(word)
			x = min(x, -x)
			if b := bits.TrailingZeros64(x); x&(x-1) == 0 && b < 32 {
				return int64(s*stripeBytes+4*i)*8 + int64(b)
			}
		}
	}
	return -1
}

// inverse returns what x, an odd number, has to be multiplied by to give 1, modulo 2^64. Each step doubles the number
// of bits that are right; x itself has 3.
func inverse(x uint64) uint64 {
	y := x
	for range 5 {
		y *= 2 - x*y
	}
	return y
}
