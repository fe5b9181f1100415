package kernels

import (
	"os"
	"slices"
	"strings"
	"testing"
)

// forEachTier runs f as a subtest for each tier above Auto. A tier that this CPU lacks is skipped, unless the
// environment variable KERNELS_REQUIRE lists it ("avx2,avx512"): then it fails, so that a machine meant to test a tier
// cannot miss it silently.
func forEachTier(t *testing.T, f func(t *testing.T, k *Kernels)) {
	t.Helper()
	required := strings.Split(os.Getenv("KERNELS_REQUIRE"), ",")
	for isa := Generic; isa < numISAs; isa++ {
		t.Run(isa.String(), func(t *testing.T) {
			k, err := For(isa)
			if err != nil {
				if slices.Contains(required, isa.String()) {
					t.Fatalf("required by KERNELS_REQUIRE: %v", err)
				}
				t.Skip(err)
			}
			f(t, k)
		})
	}
}
