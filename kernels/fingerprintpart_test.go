package kernels

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"testing"
)

// TestFingerprintOfParts cuts something into parts at any bytes, adds them in any order, and wants the fingerprints of
// the whole.
func TestFingerprintOfParts(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(1, 2))
	whole := make([]byte, 3*FingerprintBlock+4321)
	_, _ = rand.NewChaCha8([32]byte{7}).Read(whole)
	want := make([]uint64, Fingerprints(int64(len(whole))))
	Fingerprint(want, whole)
	for range 50 {
		cuts := []int{0, len(whole)}
		for range rng.IntN(40) {
			cut := rng.IntN(len(whole))
			if rng.IntN(2) == 0 { // near to where a word, a stripe or a block begins
				cut = min(len(whole), max(0, cut&^(stripeBytes<<rng.IntN(7)-1)+rng.IntN(11)-5))
			}
			cuts = append(cuts, cut)
		}
		slices.Sort(cuts)
		added, copied := make([]uint64, len(want)), make([]uint64, len(want))
		to := make([]byte, len(whole))
		for _, i := range rng.Perm(len(cuts) - 1) {
			at, part := cuts[i], whole[cuts[i]:cuts[i+1]]
			if len(part) == 0 {
				continue
			}
			AddFingerprint(added[at/FingerprintBlock:], int64(at), part)
			if n := CopyAddFingerprint(to[at:], part, copied[at/FingerprintBlock:], int64(at)); n != len(part) {
				t.Fatalf("%d bytes copied of %d", n, len(part))
			}
		}
		if !slices.Equal(added, want) || !slices.Equal(copied, want) || !bytes.Equal(to, whole) {
			t.Fatalf("cut at %d: %x and %x, want %x; copied well: %t", cuts, added, copied, want, bytes.Equal(to, whole))
		}
	}
}

// TestFlippedBit flips single bits, up and down, and wants to be told which; and damages more, for which there is no
// answer.
func TestFlippedBit(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(3, 4))
	block := make([]byte, FingerprintBlock)
	_, _ = rand.NewChaCha8([32]byte{8}).Read(block)
	sum := func() uint64 {
		var s [1]uint64
		Fingerprint(s[:], block)
		return s[0]
	}
	want := sum()
	bits := []int64{0, 1, 31, 32, 8191, 8192, 8*FingerprintBlock - 1, 8*FingerprintBlock - 32}
	for range 200 {
		bits = append(bits, rng.Int64N(8*FingerprintBlock))
	}
	for _, bit := range bits {
		block[bit/8] ^= 1 << (bit % 8)
		if got := FlippedBit(want, sum()); got != bit {
			t.Errorf("bit %d was flipped, the answer is %d", bit, got)
		}
		block[bit/8] ^= 1 << (bit % 8)
	}
	if got := FlippedBit(want, want); got != -1 {
		t.Errorf("nothing was flipped, the answer is %d", got)
	}
	for range 20 {
		a := rng.IntN(FingerprintBlock - 8)
		block[a] ^= 1
		block[a+7] ^= 0x10
		if got := FlippedBit(want, sum()); got != -1 {
			t.Errorf("two bits were flipped, the answer is %d", got)
		}
		block[a] ^= 1
		block[a+7] ^= 0x10
	}
}
