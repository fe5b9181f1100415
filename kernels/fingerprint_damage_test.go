package kernels

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

// damageBlocks is how many blocks are damaged by the tests, and damages how often each of them does.
const damageBlocks, damages = 4, 10_000

// damaged calls damage, which changes bytes of one of the blocks, again and again, and checks that this changes the
// fingerprint of that block. Then it repairs it.
func damaged(t *testing.T, damage func(r *rand.Rand, block []byte)) {
	t.Helper()
	r := rand.New(rand.NewPCG(1, 2))
	src := noise(4, damageBlocks*FingerprintBlock)
	good, sums, damagedSum := bytes.Clone(src), make([]uint64, damageBlocks), make([]uint64, 1)
	Fingerprint(sums, src)
	n := damages
	if testing.Short() {
		n = damages / 10
	}
	same := 0
	for range n {
		b := r.IntN(damageBlocks)
		block, was := src[b*FingerprintBlock:][:FingerprintBlock], good[b*FingerprintBlock:][:FingerprintBlock]
		damage(r, block)
		if bytes.Equal(block, was) { // two equal words were swapped, say
			same++
			continue
		}
		if Fingerprint(damagedSum, block); damagedSum[0] == sums[b] {
			t.Fatal("the fingerprint of a damaged block is that of the block")
		}
		copy(block, was)
	}
	if same > n/10 {
		t.Errorf("%d of %d blocks were not damaged", same, n)
	}
}

// flip flips bit i of b.
func flip(b []byte, i int) { b[i/8] ^= 1 << (i % 8) }

// TestFingerprintFindsDamage damages blocks as bad memory, a bad link and bad software do. In the first group the keys
// see to it that all damage is found; in the second the chance that the test fails is that of FINGERPRINT.md.
func TestFingerprintFindsDamage(t *testing.T) {
	t.Parallel()
	const bits, words = 8 * FingerprintBlock, FingerprintBlock / 4
	word := func(block []byte, i int) []byte { return block[4*i : 4*i+4] }
	swap := func(a, b []byte) {
		was := bytes.Clone(a)
		copy(a, b)
		copy(b, was)
	}
	for name, damage := range map[string]func(r *rand.Rand, block []byte){
		"always: a bit flipped": func(r *rand.Rand, block []byte) { flip(block, r.IntN(bits)) },
		"always: two bits flipped": func(r *rand.Rand, block []byte) {
			flip(block, r.IntN(bits))
			flip(block, r.IntN(bits))
		},
		"always: a bit flipped in two words": func(r *rand.Rand, block []byte) {
			bit := r.IntN(32)
			flip(block, 32*r.IntN(words)+bit)
			flip(block, 32*r.IntN(words)+bit)
		},
		"always: three times the same bit": func(r *rand.Rand, block []byte) {
			bit := r.IntN(32)
			for range 3 {
				flip(block, 32*r.IntN(words)+bit)
			}
		},
		"always: another word": func(r *rand.Rand, block []byte) {
			copy(word(block, r.IntN(words)), []byte{byte(r.Uint32()), byte(r.Uint32()), byte(r.Uint32()), 7})
		},
		"always: a word of zeros": func(r *rand.Rand, block []byte) { clear(word(block, r.IntN(words))) },
		"always: words swapped": func(r *rand.Rand, block []byte) {
			swap(word(block, r.IntN(words)), word(block, r.IntN(words)))
		},
		"a word missing": func(r *rand.Rand, block []byte) {
			i := r.IntN(words - 1)
			copy(block[4*i:], block[4*i+4:])
		},
		"a word twice": func(r *rand.Rand, block []byte) {
			i := r.IntN(words - 1)
			copy(block[4*i+4:], block[4*i:])
		},
		"bytes missing": func(r *rand.Rand, block []byte) {
			i := r.IntN(FingerprintBlock - 100)
			copy(block[i:], block[i+1+r.IntN(90):])
		},
		"shifted": func(r *rand.Rand, block []byte) {
			n := 1 + r.IntN(FingerprintBlock-1)
			copy(block, append(bytes.Clone(block[n:]), block[:n]...))
		},
		"a line of 64 bytes of another place": func(r *rand.Rand, block []byte) {
			copy(block[64*r.IntN(1024):][:64], block[64*r.IntN(1024):][:64])
		},
		"lines of 64 bytes swapped": func(r *rand.Rand, block []byte) {
			swap(block[64*r.IntN(1024):][:64], block[64*r.IntN(1024):][:64])
		},
		"stripes swapped": func(r *rand.Rand, block []byte) {
			swap(block[1024*r.IntN(64):][:1024], block[1024*r.IntN(64):][:1024])
		},
		"pages swapped": func(r *rand.Rand, block []byte) {
			swap(block[4096*r.IntN(16):][:4096], block[4096*r.IntN(16):][:4096])
		},
		"a rest of zeros": func(r *rand.Rand, block []byte) { clear(block[r.IntN(FingerprintBlock):]) },
		"a rest of ones": func(r *rand.Rand, block []byte) {
			for i := r.IntN(FingerprintBlock); i < len(block); i++ {
				block[i] = 0xff
			}
		},
		"the highest bit of many words": func(r *rand.Rand, block []byte) {
			for range 2 + r.IntN(100) {
				flip(block, 32*r.IntN(words)+31)
			}
		},
		"a bit stuck": func(r *rand.Rand, block []byte) {
			for i := r.IntN(64); i < len(block); i += 64 {
				block[i] |= 1
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			damaged(t, damage)
		})
	}
}

// TestFingerprintFindsEveryBit flips bits of a block one after the other: every 53rd, so each place in a word and each
// word of a stripe is among them.
func TestFingerprintFindsEveryBit(t *testing.T) {
	t.Parallel()
	block := noise(5, FingerprintBlock)
	var sum, flipped [1]uint64
	Fingerprint(sum[:], block)
	step := 53
	if testing.Short() {
		step = 1009
	}
	for i := 0; i < 8*FingerprintBlock; i += step {
		flip(block, i)
		if Fingerprint(flipped[:], block); flipped == sum {
			t.Fatalf("bit %d is flipped, and the fingerprint is the same", i)
		}
		flip(block, i)
	}
}

// TestFingerprintFindsOtherBlock has blocks twice, in another order, and one block too few.
func TestFingerprintFindsOtherBlock(t *testing.T) {
	t.Parallel()
	const n = 16
	src := noise(6, n*FingerprintBlock)
	sums, others := make([]uint64, n), make([]uint64, n)
	Fingerprint(sums, src)
	for i := range n {
		for j := range n {
			if i == j {
				continue
			}
			other := bytes.Clone(src)
			copy(other[i*FingerprintBlock:][:FingerprintBlock], src[j*FingerprintBlock:])
			if Fingerprint(others, other); others[i] == sums[i] {
				t.Errorf("block %d in the place of block %d is not found", j, i)
			}
		}
	}
	Fingerprint(others[:n-1], src[FingerprintBlock:])
	for i := range n - 1 {
		if others[i] == sums[i] {
			t.Errorf("the first block is missing, and fingerprint %d is the same", i)
		}
	}
}
