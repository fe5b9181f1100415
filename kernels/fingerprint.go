package kernels

import (
	"encoding/binary"
	"fmt"
	"sync"
	"unsafe"
)

const (
	// FingerprintBlock is how many bytes one fingerprint covers.
	FingerprintBlock = 64 << 10
	// FingerprintWords is the number of 32-bit words in a stripe.
	FingerprintWords = 256
	// FingerprintStripes is the number of stripes, of 1 KiB each, in a block.
	FingerprintStripes = FingerprintBlock / stripeBytes

	stripeBytes = 4 * FingerprintWords
	// fingerprintSeed is "gguf2gpu" in ASCII.
	fingerprintSeed = 0x6767756632677075
)

// FingerprintKeys are the constants of the fingerprint, which FINGERPRINT.md specifies. All of them are odd. The key of
// word i of stripe s is Words[i]·Stripes[s].
type FingerprintKeys struct {
	Words   [FingerprintWords]uint64
	Stripes [FingerprintStripes]uint64
}

// fingerprintKeys makes the keys: the output of splitmix64 with fingerprintSeed, with the lowest bit set.
var fingerprintKeys = sync.OnceValue(func() *FingerprintKeys {
	state := uint64(fingerprintSeed)
	next := func() uint64 {
		state += 0x9e3779b97f4a7c15
		z := state
		z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
		z = (z ^ z>>27) * 0x94d049bb133111eb
		return z ^ z>>31 | 1
	}
	k := new(FingerprintKeys)
	for i := range k.Words {
		k.Words[i] = next()
	}
	for s := range k.Stripes {
		k.Stripes[s] = next()
	}
	return k
})

// KeysOfFingerprint returns the constants of the fingerprint, for code that computes it elsewhere.
func KeysOfFingerprint() FingerprintKeys { return *fingerprintKeys() }

// Fingerprints returns how many fingerprints n bytes have: one for each block of FingerprintBlock bytes and one for a
// shorter rest. It is 0 if n is not positive.
func Fingerprints(n int64) int64 {
	if n <= 0 {
		return 0
	}
	return (n-1)/FingerprintBlock + 1
}

// Fingerprint writes the fingerprint of each block of src, which begin at multiples of FingerprintBlock, to sums. The
// function is published in FINGERPRINT.md: it always sees damage to a single 4-byte word, and misses other damage with
// a chance that is given there. It is no protection against somebody who changes data on purpose.
//
// Fingerprint panics unless len(sums) is Fingerprints(len(src)). It uses the tier that For(Auto) chooses; all tiers and
// the GPU kernel give the same sums.
func Fingerprint(sums []uint64, src []byte) {
	if want := Fingerprints(int64(len(src))); int64(len(sums)) != want {
		panic(fmt.Sprintf("kernels: room for %d fingerprints, but %d bytes have %d", len(sums), len(src), want))
	}
	clear(sums)
	fingerprintTier().add(sums, 0, src)
}

// fingerprinter computes fingerprints with the kernels of one tier.
type fingerprinter struct {
	kernel fingerprintKernel
	tables *fingerprintTables
}

// fingerprintKernel is the assembly of one tier. Without functions it is that of Generic.
type fingerprintKernel struct {
	sum     func(src, words, keys *byte, stripes int) uint64
	copySum func(dst, src, words, keys *byte, stripes int) uint64
}

// fingerprintTables are the keys as the assembly reads them. A vector of words is multiplied by vectors of halves of
// keys: of the low halves for the words with even numbers, of the low halves of the next keys for those with odd
// numbers, and of the high halves. Behind each key of a stripe is that key with its halves swapped.
type fingerprintTables struct {
	low, odd, high [FingerprintWords]uint32
	stripes        [FingerprintStripes][2]uint64
}

// makeFingerprintTables makes the tables. The memory of an object of 4 KiB is aligned to cache lines, which only
// matters for speed.
var makeFingerprintTables = sync.OnceValue(func() *fingerprintTables {
	keys, t := fingerprintKeys(), new(fingerprintTables)
	for i, k := range keys.Words {
		t.low[i], t.high[i] = uint32(k), uint32(k>>32)
		if i%2 == 1 {
			t.odd[i-1] = t.low[i]
		}
	}
	for s, k := range keys.Stripes {
		t.stripes[s] = [2]uint64{k, k<<32 | k>>32}
	}
	return t
})

// fingerprintTier returns the fingerprinter of the tier that For(Auto) chooses. If For fails, it is that of Generic,
// which gives the same sums.
var fingerprintTier = sync.OnceValue(func() *fingerprinter {
	k, err := For(Auto)
	if err != nil {
		return newFingerprinter(Generic)
	}
	return newFingerprinter(k.ISA())
})

// newFingerprinter returns the fingerprinter of a tier, which this CPU must support.
func newFingerprinter(isa ISA) *fingerprinter {
	return &fingerprinter{fingerprintAssembly(isa), makeFingerprintTables()}
}

// add is AddFingerprint.
func (f *fingerprinter) add(sums []uint64, at int64, src []byte) {
	in := int(at % FingerprintBlock)
	for i := 0; len(src) > 0; i++ {
		n := min(FingerprintBlock-in, len(src))
		sums[i] += f.part(in, src[:n])
		src, in = src[n:], 0
	}
}

// copyAdd is CopyAddFingerprint.
func (f *fingerprinter) copyAdd(dst, src []byte, sums []uint64, at int64) int {
	all := min(len(dst), len(src))
	dst, src = dst[:all], src[:all]
	in := int(at % FingerprintBlock)
	for i := 0; len(src) > 0; i++ {
		n := min(FingerprintBlock-in, len(src))
		sums[i] += f.copyPart(in, dst[:n], src[:n])
		dst, src, in = dst[n:], src[n:], 0
	}
	return all
}

// part returns what b contributes to the fingerprint of its block, in which it begins at byte in.
func (f *fingerprinter) part(in int, b []byte) uint64 {
	head, sum := sumHead(in, b)
	return sum + f.stripes((in+head)/stripeBytes, b[head:])
}

// copyPart is part, and copies src to dst.
func (f *fingerprinter) copyPart(in int, dst, src []byte) uint64 {
	head, sum := sumHead(in, src)
	copy(dst, src[:head])
	return sum + f.copyStripes((in+head)/stripeBytes, dst[head:], src[head:])
}

// sumHead returns how many bytes of b, which begins at byte in of its block, there are before the next stripe begins,
// and what they contribute.
func sumHead(in int, b []byte) (n int, sum uint64) {
	off := in % stripeBytes
	if off == 0 || len(b) == 0 {
		return 0, 0
	}
	var stripe [stripeBytes]byte // with zeros for what is not there
	n = copy(stripe[off:], b)
	return n, sumStripes(in/stripeBytes, stripe[:])
}

// copyPiece is how many bytes are copied at a time before they are read again, from the cache, for the fingerprint. It
// is a multiple of stripeBytes.
const copyPiece = 16 << 10

// copyStripes is stripes, and copies src to dst.
func (f *fingerprinter) copyStripes(stripe int, dst, src []byte) (sum uint64) {
	if stripes := len(src) / stripeBytes; stripes > 0 && f.kernel.copySum != nil {
		n := stripes * stripeBytes
		reads(src[:n])
		writes(dst[:n])
		words, keys := f.tables.pointers(stripe)
		sum = f.kernel.copySum(unsafe.SliceData(dst), unsafe.SliceData(src), words, keys, stripes)
		dst, src, stripe = dst[n:], src[n:], stripe+stripes
	}
	for at := 0; at < len(src); at += copyPiece {
		piece := src[at:min(at+copyPiece, len(src))]
		copyBytes(dst[at:at+len(piece)], piece)
		sum += f.stripes(stripe+at/stripeBytes, piece)
	}
	return sum
}

// stripes returns what b contributes to the fingerprint of its block, if its first byte is the first one of a stripe.
func (f *fingerprinter) stripes(stripe int, b []byte) (sum uint64) {
	if stripes := len(b) / stripeBytes; stripes > 0 && f.kernel.sum != nil {
		reads(b[:stripes*stripeBytes])
		words, keys := f.tables.pointers(stripe)
		sum = f.kernel.sum(unsafe.SliceData(b), words, keys, stripes)
		b = b[stripes*stripeBytes:]
		stripe += stripes
	}
	return sum + sumStripes(stripe, b)
}

// pointers returns what the assembly takes for keys, if stripe is the first one.
func (t *fingerprintTables) pointers(stripe int) (words, keys *byte) {
	return (*byte)(unsafe.Pointer(&t.low)), (*byte)(unsafe.Pointer(&t.stripes[stripe]))
}

// sumStripes is the specification of the fingerprint, and the generic tier: the sum of a block that begins with stripe
// number 0, or what the stripes from another one on contribute. Missing bytes at the end count as zeros.
func sumStripes(stripe int, b []byte) (sum uint64) {
	keys := fingerprintKeys()
	for len(b) >= stripeBytes {
		sum += keys.Stripes[stripe] * sumWords(&keys.Words, b[:stripeBytes])
		b = b[stripeBytes:]
		stripe++
	}
	if len(b) > 0 {
		var last [stripeBytes]byte
		n := copy(last[:], b)
		sum += keys.Stripes[stripe] * sumWords(&keys.Words, last[:(n+7)&^7])
	}
	return sum
}

// sumWords returns the sum of the words of a stripe, or of an even number of words from its first one on, each times
// its key.
func sumWords(keys *[FingerprintWords]uint64, b []byte) uint64 {
	var even, odd uint64
	for i := 0; i < FingerprintWords-1 && len(b) >= 8; i += 2 {
		two := binary.LittleEndian.Uint64(b)
		even += keys[i] * (two & 0xffffffff)
		odd += keys[i+1] * (two >> 32)
		b = b[8:]
	}
	return even + odd
}
