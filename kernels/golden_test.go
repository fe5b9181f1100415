package kernels

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// goldenDir has blocks and hashes of what ggml decodes them to. Its README says how they were made.
const goldenDir = "../testdata/golden"

// goldenCase is one entry of golden.json.
type goldenCase struct {
	Type      string `json:"type"`
	Kind      string `json:"kind"`
	Elems     int    `json:"elems"`
	Blocks    string `json:"blocks"`
	F32SHA256 string `json:"f32_sha256"`
}

func (c goldenCase) name() string { return c.Type + "/" + c.Kind }

// read returns the type and the blocks of a case.
func (c goldenCase) read(t testing.TB) (gguf.Type, []byte) {
	t.Helper()
	from, ok := typeNamed(c.Type)
	if !ok {
		t.Fatalf("there is no type %q", c.Type)
	}
	blocks, err := os.ReadFile(filepath.Join(goldenDir, c.Blocks))
	if err != nil {
		t.Fatal(err)
	}
	return from, blocks
}

// typeNamed returns the type whose name is name, in upper or lower case.
func typeNamed(name string) (t gguf.Type, ok bool) {
	types := gguf.Types()
	i := slices.IndexFunc(types, func(t gguf.Type) bool { return strings.EqualFold(t.String(), name) })
	if i < 0 {
		return 0, false
	}
	return types[i], true
}

// goldenCases returns all cases.
func goldenCases(t testing.TB) []goldenCase {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(goldenDir, "golden.json"))
	if err != nil {
		t.Fatal(err)
	}
	var cases []goldenCase
	if err := json.Unmarshal(b, &cases); err != nil {
		t.Fatal(err)
	}
	return cases
}

// outputs are the types that can be written.
var outputs = [numOutputs]gguf.Type{gguf.F32, gguf.F16, gguf.BF16}

// dequantize returns src decoded by k to fresh memory.
func dequantize(t testing.TB, k *Kernels, to gguf.Type, src []byte, from gguf.Type) []byte {
	t.Helper()
	dst := make([]byte, len(src)/from.BlockBytes()*from.BlockElems()*to.BlockBytes())
	if err := k.Dequantize(dst, to, src, from); err != nil {
		t.Fatal(err)
	}
	return dst
}

// canonical replaces every NaN in b, elements of type to, by one NaN, in place: they alone may differ between tiers.
func canonical(b []byte, to gguf.Type) []byte {
	switch to {
	case gguf.F32:
		for i := 0; i < len(b); i += 4 {
			if binary.LittleEndian.Uint32(b[i:])&0x7fffffff > 0x7f800000 {
				binary.LittleEndian.PutUint32(b[i:], 0x7fc00000)
			}
		}
	case gguf.F16:
		canonical16(b, 0x7c00)
	case gguf.BF16:
		canonical16(b, 0x7f80)
	}
	return b
}

func canonical16(b []byte, infinity uint16) {
	for i := 0; i < len(b); i += 2 {
		if binary.LittleEndian.Uint16(b[i:])&0x7fff > infinity {
			binary.LittleEndian.PutUint16(b[i:], 0x7fff)
		}
	}
}

// TestGolden compares every tier with ggml: float32 by its hash, f16 and bf16 with that float32 rounded by the
// independent rounding of the float tests.
func TestGolden(t *testing.T) {
	t.Parallel()
	cases := goldenCases(t)
	seen := map[string]bool{}
	for _, c := range cases {
		seen[c.Type] = true
	}
	for _, typ := range gguf.Types() {
		if !seen[typ.String()] {
			t.Errorf("no golden vector for %v", typ)
		}
	}
	forEachTier(t, func(t *testing.T, k *Kernels) {
		for _, c := range cases {
			t.Run(c.name(), func(t *testing.T) {
				from, blocks := c.read(t)
				f32 := canonical(dequantize(t, k, gguf.F32, blocks, from), gguf.F32)
				if len(f32) != 4*c.Elems {
					t.Fatalf("got %d elements, want %d", len(f32)/4, c.Elems)
				}
				sum := sha256.Sum256(f32)
				if got := hex.EncodeToString(sum[:]); got != c.F32SHA256 {
					t.Fatalf("f32: got sha256 %s, want %s", got, c.F32SHA256)
				}
				for to, format := range map[gguf.Type]smallFloat{gguf.F16: binary16, gguf.BF16: bfloat16} {
					got := canonical(dequantize(t, k, to, blocks, from), to)
					for i := range c.Elems {
						f := math.Float32frombits(binary.LittleEndian.Uint32(f32[4*i:]))
						if g, w := binary.LittleEndian.Uint16(got[2*i:]), format.round(f); g != w {
							t.Fatalf("%v: element %d = %g: got %#04x, want %#04x", to, i, f, g, w)
						}
					}
				}
			})
		}
	})
}
