package peers

import (
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
)

// seedOf returns the seed of a test's random choices: a new one each time, or that of GGUF2GPU_SEED, which repeats what
// was found. Tests print it.
func seedOf(t *testing.T) uint64 {
	t.Helper()
	text := os.Getenv("GGUF2GPU_SEED")
	if text == "" {
		return rand.Uint64()
	}
	seed, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		t.Fatalf("GGUF2GPU_SEED: %v", err)
	}
	return seed
}
