package kernels

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"testing"
)

// noise returns n random bytes, the same for each seed.
func noise(seed byte, n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(b) // never fails
	return b
}

// slowSum is the formula of the fingerprint, word by word, for tests.
func slowSum(block []byte) (sum uint64) {
	keys := KeysOfFingerprint()
	block = append(slices.Clone(block), 0, 0, 0)
	for w := range len(block) / 4 {
		word := binary.LittleEndian.Uint32(block[4*w:])
		sum += keys.Words[w%FingerprintWords] * keys.Stripes[w/FingerprintWords] * uint64(word)
	}
	return sum
}

// slowSums are the fingerprints of src by the formula.
func slowSums(src []byte) (sums []uint64) {
	for block := range slices.Chunk(src, FingerprintBlock) {
		sums = append(sums, slowSum(block))
	}
	return sums
}

// TestFingerprintKeysDiffer proves what FINGERPRINT.md promises of two words: the keys of all words of a block are odd,
// and none is equal to another or to its negative, modulo 2^33.
func TestFingerprintKeysDiffer(t *testing.T) {
	t.Parallel()
	const mask = 1<<33 - 1
	keys := KeysOfFingerprint()
	var all []uint64
	for _, s := range keys.Stripes {
		for _, w := range keys.Words {
			key := s * w
			if key%2 == 0 {
				t.Fatalf("key %#x is even", key)
			}
			all = append(all, min(key&mask, -key&mask))
		}
	}
	slices.Sort(all)
	if n := len(slices.Compact(all)); n != FingerprintBlock/4 {
		t.Errorf("%d different keys up to their sign, want %d", n, FingerprintBlock/4)
	}
}

// TestFingerprints counts blocks.
func TestFingerprints(t *testing.T) {
	t.Parallel()
	for n, want := range map[int64]int64{
		-1: 0, 0: 0, 1: 1, FingerprintBlock: 1, FingerprintBlock + 1: 2, 1<<63 - 1: 1 << 47,
	} {
		if got := Fingerprints(n); got != want {
			t.Errorf("%d bytes have %d fingerprints, want %d", n, got, want)
		}
	}
}

// compareSums compares the fingerprints of src, and those that come with a copy, with the formula. The copy begins
// dstAt bytes behind a multiple of 64.
func compareSums(t *testing.T, k *Kernels, src []byte, dstAt int) {
	t.Helper()
	f, want := newFingerprinter(k.ISA()), slowSums(src)
	sums := make([]uint64, len(want))
	f.add(sums, 0, src)
	if !slices.Equal(sums, want) {
		t.Errorf("%d bytes: fingerprints %#x, want %#x", len(src), sums, want)
	}
	const guard = 64
	all := aligned(guard+dstAt+len(src)+guard, 0)
	dst := all[guard+dstAt:][:len(src)]
	clear(sums)
	f.copyAdd(dst, src, sums, 0)
	if !slices.Equal(sums, want) || !bytes.Equal(dst, src) {
		t.Errorf("%d bytes copied to an address with rest %d: fingerprints %#x, want %#x, or the copy differs",
			len(src), dstAt, sums, want)
	}
	if !allZero(all[:guard+dstAt]) || !allZero(all[guard+dstAt+len(src):]) {
		t.Errorf("%d bytes copied to an address with rest %d: more was written", len(src), dstAt)
	}
}

// TestFingerprintIsTheFormula compares every tier with the formula, word by word: all lengths to a little more than a
// stripe, and some around multiples of a stripe, of a piece and of a block, at several alignments.
func TestFingerprintIsTheFormula(t *testing.T) {
	t.Parallel()
	src := noise(1, 3*FingerprintBlock+100)
	lengths := []int{9*FingerprintBlock/4 + 3}
	for n := range 1101 {
		lengths = append(lengths, n)
	}
	for _, around := range []int{2, 5, 16, 63, 64, 65, 80, 128, 129} {
		for _, off := range []int{-9, -8, -5, -4, -3, -1, 0, 1, 2, 4, 7, 8, 13} {
			lengths = append(lengths, around*stripeBytes+off)
		}
	}
	forEachTier(t, func(t *testing.T, k *Kernels) {
		t.Parallel()
		for i, n := range lengths {
			at := []int{0, 1, 2, 3, 4, 31, 33, 64}[i%8]
			compareSums(t, k, src[at:at+n], 0)
			compareSums(t, k, src[at:at+n], []int{1, 4, 8, 32, 63}[i%5])
		}
	})
}

// TestFingerprintPieces adds up what two parts of a block contribute, with every tier.
func TestFingerprintPieces(t *testing.T) {
	t.Parallel()
	src := noise(2, FingerprintBlock-7)
	want := slowSum(src)
	forEachTier(t, func(t *testing.T, k *Kernels) {
		f := newFingerprinter(k.ISA())
		dst := aligned(FingerprintBlock, 0)
		for at := 1; at < len(src); at += 333 {
			for _, cut := range []int{at, at &^ 1023} {
				var sum, copied [1]uint64
				f.add(sum[:], 0, src[:cut])
				f.add(sum[:], int64(cut), src[cut:])
				clear(dst)
				f.copyAdd(dst[cut:], src[cut:], copied[:], int64(cut))
				f.copyAdd(dst, src[:cut], copied[:], 0)
				if sum[0] != want || copied[0] != want || !bytes.Equal(dst[:len(src)], src) {
					t.Errorf("cut at %d: %#x, %#x while copying, want %#x, or the copy differs", cut, sum, copied, want)
				}
			}
		}
	})
}

// TestFingerprintForAll calls what the package exports, with a dst that is longer than src, and one that is shorter.
func TestFingerprintForAll(t *testing.T) {
	t.Parallel()
	src := noise(3, FingerprintBlock+5)
	sums, want := make([]uint64, 2), slowSums(src)
	if Fingerprint(sums, src); !slices.Equal(sums, want) {
		t.Errorf("fingerprints %#x, want %#x", sums, want)
	}
	dst := make([]byte, len(src)+1)
	clear(sums)
	if n := CopyAddFingerprint(dst, src, sums, 0); n != len(src) || !bytes.Equal(dst[:n], src) || dst[n] != 0 ||
		!slices.Equal(sums, want) {
		t.Errorf("%d bytes of %d copied, fingerprints %#x, want %#x", n, len(src), sums, want)
	}
	clear(dst)
	clear(sums)
	want = slowSums(src[:100])
	if n := CopyAddFingerprint(dst[:100], src, sums[:1], 0); n != 100 || !bytes.Equal(dst[:n], src[:n]) || dst[n] != 0 ||
		!slices.Equal(sums[:1], want) {
		t.Errorf("%d bytes of 100 copied, fingerprints %#x, want %#x", n, sums[:1], want)
	}
}

// TestFingerprintPanics gives no room for a fingerprint, or, where that is told, too much.
func TestFingerprintPanics(t *testing.T) {
	t.Parallel()
	for _, call := range []func(){
		func() { Fingerprint(nil, make([]byte, 1)) },
		func() { Fingerprint(make([]uint64, 2), make([]byte, FingerprintBlock)) },
		func() { AddFingerprint(nil, 0, make([]byte, 1)) },
		func() { CopyAddFingerprint(make([]byte, 1), make([]byte, 2), nil, 0) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Error("no panic")
				}
			}()
			call()
		}()
	}
}

// TestFingerprintSpecification computes the numbers that are in FINGERPRINT.md.
func TestFingerprintSpecification(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("FINGERPRINT.md")
	if err != nil {
		t.Fatal(err)
	}
	keys := KeysOfFingerprint()
	five := []byte("GGUF\x03")
	stripe := keys.Words[0]*uint64(binary.LittleEndian.Uint32(five)) + keys.Words[1]*3
	region := make([]byte, 66_536)
	for j := range region {
		region[j] = byte(j ^ j>>8)
	}
	sums, sum := make([]uint64, 2), make([]uint64, 1)
	Fingerprint(sums, region)
	Fingerprint(sum, five)
	for _, want := range []string{
		fmt.Sprintf("| k[0] | `%#016x` |", keys.Words[0]),
		fmt.Sprintf("| k[1] | `%#016x` |", keys.Words[1]),
		fmt.Sprintf("| k[255] | `%#016x` |", keys.Words[255]),
		fmt.Sprintf("| K[0] | `%#016x` |", keys.Stripes[0]),
		fmt.Sprintf("| K[63] | `%#016x` |", keys.Stripes[63]),
		fmt.Sprintf("%#08x and %#08x", binary.LittleEndian.Uint32(five), five[4]),
		fmt.Sprintf("k[0] · 0x46554747 + k[1] · 3  = %#016x", stripe),
		fmt.Sprintf("F = K[0] · %#016x = %#016x", stripe, sum[0]),
		fmt.Sprintf("`%#016x` and `%#016x`", sums[0], sums[1]),
	} {
		if !bytes.Contains(text, []byte(want)) {
			t.Errorf("FINGERPRINT.md has no %q", want)
		}
	}
}
