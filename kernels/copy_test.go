package kernels

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

// TestCopy copies numbers of bytes around those at which Copy changes its method, at several alignments, and checks
// that nothing else is written.
func TestCopy(t *testing.T) {
	t.Parallel()
	src, dst := make([]byte, 3<<20), make([]byte, 3<<20)
	random := rand.NewChaCha8([32]byte{})
	_, _ = random.Read(src)
	for _, n := range []int{0, 1, 63, 4095, 4096, 4097, 70_001, 1 << 20, 1<<20 + 1, 2<<20 + 4097} {
		for _, at := range []int{0, 1, 31, 64} {
			clear(dst)
			from := src[2*at : 2*at+n]
			if got := Copy(dst[at:at+n:at+n], src[2*at:2*at+n+1]); got != n { // the shorter one counts
				t.Fatalf("%d bytes of %d were copied", got, n)
			}
			if !bytes.Equal(dst[at:at+n], from) || !allZero(dst[:at]) || !allZero(dst[at+n:]) {
				t.Errorf("%d bytes at %d: not copied, or more than that", n, at)
			}
		}
	}
	if n := Copy(dst[:5], src[:2]); n != 2 {
		t.Errorf("%d bytes of 2 were copied", n)
	}
}

func allZero(b []byte) bool { return len(bytes.Trim(b, "\x00")) == 0 }
