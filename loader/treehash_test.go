package loader

import (
	"crypto/sha256"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"lukechampine.com/blake3"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// TestTreeHash gives the bytes of a tensor in any order, in pieces of all sizes, by several goroutines, and wants
// BLAKE3 of the whole. The lengths are those at which the tree has another form.
func TestTreeHash(t *testing.T) {
	t.Parallel()
	all := make([]byte, 9*treeGroup+5000)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(all)
	rng := rand.New(rand.NewPCG(1, 2))
	sizes := []int{1, 2, 63, 64, 65, 1023, 1024, 1025, 2047, 2048, 2049, 3 * 1024, 3*1024 + 1, 8*1024 + 1}
	for groups := 1; groups <= 9; groups++ {
		for _, more := range []int{-1025, -1024, -1, 0, 1, 1024, 1025} {
			sizes = append(sizes, groups*treeGroup+more)
		}
	}
	for _, size := range sizes {
		b := all[:size]
		for _, most := range []int{size, 100_000, 3000, 210} {
			var got [32]byte
			h := newTreeHash(int64(size), &got)
			type piece struct{ off, end int }
			var pieces []piece
			for off := 0; off < size; {
				end := min(size, off+1+rng.IntN(most))
				pieces = append(pieces, piece{off, end})
				off = end
			}
			rng.Shuffle(len(pieces), func(i, j int) { pieces[i], pieces[j] = pieces[j], pieces[i] })
			var wg sync.WaitGroup
			for worker := range 3 {
				wg.Go(func() {
					for i := worker; i < len(pieces); i += 3 {
						h.add(int64(pieces[i].off), b[pieces[i].off:pieces[i].end])
					}
				})
			}
			wg.Wait()
			if want := blake3.Sum256(b); got != want {
				t.Errorf("%d bytes in pieces of up to %d: %x, want %x", size, most, got, want)
			}
			if h.groups != nil || len(h.parts) != 0 {
				t.Errorf("%d bytes in pieces of up to %d: something is kept after the end", size, most)
			}
		}
	}
}

// TestHashAlgorithm reads and writes the names of the hashes.
func TestHashAlgorithm(t *testing.T) {
	t.Parallel()
	for a, name := range map[HashAlgorithm]string{SHA256: "sha256", BLAKE3: "blake3"} {
		var got HashAlgorithm
		if err := got.UnmarshalText([]byte(strings.ToUpper(name))); err != nil || got != a || a.String() != name {
			t.Errorf("%q is %v, %v; want %v", name, got, err, a)
		}
		if r := (Request{Hash: true, HashWith: a}); r.hashInOrder() != (a == SHA256) {
			t.Errorf("%v: in order %v", a, r.hashInOrder())
		}
	}
	var a HashAlgorithm
	if err := a.UnmarshalText([]byte("md5")); err == nil || !strings.Contains(err.Error(), "sha256 or blake3") {
		t.Errorf("md5: %v", err)
	}
	if s := HashAlgorithm(9).String(); s != "HashAlgorithm(9)" {
		t.Error(s)
	}
}

// TestHashesOfEmptyTensors wants the hash of nothing for tensors that nobody reads.
func TestHashesOfEmptyTensors(t *testing.T) {
	t.Parallel()
	g := &plan.Group{Tensors: []plan.Tensor{{Tensor: new(gguf.Tensor)}}}
	if got := newHashes(g, Request{Hash: true, HashWith: BLAKE3}).sums[0]; got != blake3.Sum256(nil) {
		t.Errorf("BLAKE3 %x", got)
	}
	if got := newHashes(g, Request{Hash: true}).sums[0]; got != sha256.Sum256(nil) {
		t.Errorf("SHA-256 %x", got)
	}
}
