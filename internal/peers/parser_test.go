package peers

import (
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// mutants is how many files TestParserAsGGUFPy makes.
const mutants = 5000

// stricter are the rules that this module has and gguf-py does not, by what the errors say: a file that breaks one is
// refused here and read there.
var stricter = []string{
	"is not a multiple of the alignment", "its data overlaps that of tensor", "file is truncated", "a bool is",
	"contains a NUL byte", "key is empty", "tensor name is empty", "dimensions; 0 to 8 are allowed", "of array elements",
	"bytes of text, limit", ", limit ", "is not a power of two from 1 to 1073741824",
}

// looser are the reasons for which gguf-py refuses a file that this module reads.
var looser = []string{
	"is not a valid GGMLQuantizationType", // such tensors are inspected, and loaded as they are
}

// TestParserAsGGUFPy makes files by a grammar, most of them broken, and reads each here and with gguf-py. What both
// read is the same: version, keys, kinds and values, tensors with types, shapes and places. What one of them refuses,
// it refuses for a reason that is known to be only its own.
func TestParserAsGGUFPy(t *testing.T) {
	t.Parallel()
	p := startPeer(t)
	seed := seedOf(t)
	g := &grammar{rng: rand.New(rand.NewPCG(seed, 1))}
	n := mutants
	if testing.Short() {
		n = 500
	}
	path := filepath.Join(t.TempDir(), "m.gguf")
	var both, neither, here, there int
	for i := range n {
		data := g.mutant()
		if err := os.WriteFile(path, data, 0o644); err != nil {
			t.Fatal(err)
		}
		file, err := gguf.Open(path)
		theirs := p.model(t, data)
		switch {
		case err == nil && theirs.Error == "":
			both++
			if err := same(file, &theirs); err != nil {
				t.Errorf("mutant %d of seed %d: %v", i, seed, err)
			}
		case err != nil && theirs.Error != "":
			neither++
		case err == nil:
			here++
			known := func(s string) bool { return strings.Contains(theirs.Error, s) }
			if !slices.ContainsFunc(looser, known) && !(hasQ81(file) && known("cannot reshape")) {
				t.Errorf("mutant %d of seed %d is read here, and gguf-py says: %s", i, seed, theirs.Error)
			}
		default:
			there++
			if !slices.ContainsFunc(stricter, func(s string) bool { return strings.Contains(err.Error(), s) }) {
				t.Errorf("mutant %d of seed %d is read by gguf-py, and here: %v", i, seed, err)
			}
		}
		if file != nil {
			if err := file.Close(); err != nil {
				t.Fatal(err)
			}
		}
		if t.Failed() && os.Getenv("GGUF2GPU_SEED") == "" {
			t.Fatalf("GGUF2GPU_SEED=%d repeats this", seed)
		}
	}
	t.Logf("seed %d: %d files read by both, %d by neither, %d here alone, %d by gguf-py alone", seed, both, neither, here, there)
	if both < n/10 || neither < n/10 {
		t.Error("too few of a kind")
	}
}

// hasQ81 reports whether a tensor is of the type whose blocks gguf-py takes to have 40 bytes, as they had before 2024;
// ggml's have 36.
func hasQ81(f *gguf.File) bool {
	return slices.ContainsFunc(f.Tensors(), func(t gguf.Tensor) bool { return t.Type == gguf.Q8_1 })
}

// same compares what both have read.
func same(f *gguf.File, s *said) error {
	part := f.Parts()[0]
	if part.Version != s.Version {
		return fmt.Errorf("version %d, gguf-py has %d", part.Version, s.Version)
	}
	i := 0
	for key, v := range part.Metadata().All() {
		if i >= len(s.Keys) {
			return fmt.Errorf("%d keys, gguf-py has %d", part.Metadata().Len(), len(s.Keys))
		}
		kinds, values := flatten(v)
		want := []any{hex.EncodeToString([]byte(key)), kinds, values}
		have := slices.Clone(s.Keys[i])
		if k := kinds[len(kinds)-1]; k == gguf.KindFloat32 || k == gguf.KindFloat64 {
			size := sizes[k]
			var texts []string
			if err := json.Unmarshal(have[2], &texts); err != nil {
				return err
			}
			have[2], _ = json.Marshal(quiet(texts, size)) // of texts it never fails
			want[2] = quiet(values, size)
		}
		if err := equal(want, have); err != nil {
			return fmt.Errorf("key %q: %w", key, err)
		}
		i++
	}
	if i != len(s.Keys) {
		return fmt.Errorf("%d keys, gguf-py has %d", i, len(s.Keys))
	}
	if len(f.Tensors()) != len(s.Tensors) {
		return fmt.Errorf("%d tensors, gguf-py has %d", len(f.Tensors()), len(s.Tensors))
	}
	theirs := make(map[string][]json.RawMessage) // by name: here they are in the order of their places
	for _, t := range s.Tensors {
		theirs[string(t[0])] = t
	}
	for _, t := range f.Tensors() {
		want := []any{hex.EncodeToString([]byte(t.Name)), uint32(t.Type), slices.Clone(t.Shape), t.Offset, t.Size, t.Size}
		if t.Type == gguf.Q8_1 {
			want = want[:4]
		}
		x := theirs[fmt.Sprintf("%q", want[0])]
		if x == nil {
			return fmt.Errorf("gguf-py has no tensor %q", t.Name)
		}
		if err := equal(want, x); err != nil {
			return fmt.Errorf("tensor %q: %w", t.Name, err)
		}
	}
	return nil
}

// quiet makes NaNs quiet ones, as the conversion to another width does: their bytes are in hexadecimal.
func quiet(texts []string, size int) []string {
	all := slices.Clone(texts)
	for i, text := range all {
		b, err := hex.DecodeString(text)
		if err != nil || len(b) != size {
			continue
		}
		if size == 4 && math.IsNaN(float64(math.Float32frombits(binary.LittleEndian.Uint32(b)))) {
			b[2] |= 0x40
		} else if size == 8 && math.IsNaN(math.Float64frombits(binary.LittleEndian.Uint64(b))) {
			b[6] |= 8
		}
		all[i] = hex.EncodeToString(b)
	}
	return all
}

// equal compares values with what gguf-py says of them.
func equal(have []any, want []json.RawMessage) error {
	for i, x := range have {
		b, err := json.Marshal(x)
		if err != nil {
			return err
		}
		var a, c any
		if err := errors.Join(json.Unmarshal(b, &a), json.Unmarshal(want[i], &c)); err != nil {
			return err
		}
		if fmt.Sprint(a) != fmt.Sprint(c) {
			return fmt.Errorf("%s, gguf-py has %s", b, want[i])
		}
	}
	return nil
}

// flatten returns the kinds of a value, from the outer to the inner one, and the bytes of its elements as gguf-py lists
// them: those of arrays in arrays one after the other.
func flatten(v gguf.Value) (kinds []gguf.ValueKind, values []string) {
	values = []string{}
	kinds = []gguf.ValueKind{v.Kind()}
	elem, array := v.ElemKind()
	if !array {
		return kinds, []string{bytesOf(v)}
	}
	if v.Len() == 0 {
		return kinds, values // gguf-py does not say of what it would be
	}
	switch elem {
	case gguf.KindString:
		for _, s := range v.Strings() {
			values = append(values, hex.EncodeToString([]byte(s)))
		}
	case gguf.KindArray:
		for i, a := range v.Arrays() {
			inner, more := flatten(a)
			if values = append(values, more...); i == 0 {
				kinds = append(kinds, inner...)
			}
		}
		return kinds, values
	default:
		values = append(values, elements(v, elem)...)
	}
	return append(kinds, elem), values
}

// elements are those of an array of numbers or bools.
func elements(v gguf.Value, elem gguf.ValueKind) (all []string) {
	for _, x := range v.Uints() {
		all = append(all, number(x, sizes[elem]))
	}
	if len(all) == 0 {
		for _, x := range v.Ints() {
			all = append(all, number(uint64(x), sizes[elem]))
		}
	}
	for _, x := range v.Floats() {
		all = append(all, float(x, sizes[elem]))
	}
	for _, x := range v.Bools() {
		all = append(all, map[bool]string{false: "00", true: "01"}[x])
	}
	return all
}

// bytesOf is the encoding of a scalar or a text.
func bytesOf(v gguf.Value) string {
	size := sizes[v.Kind()]
	if s, ok := v.Text(); ok {
		return hex.EncodeToString([]byte(s))
	}
	if u, ok := v.Uint(); ok {
		return number(u, size)
	}
	if i, ok := v.Int(); ok {
		return number(uint64(i), size)
	}
	if f, ok := v.Float(); ok {
		return float(f, size)
	}
	b, _ := v.Bool()
	return map[bool]string{false: "00", true: "01"}[b]
}

func number(u uint64, size int) string {
	b := make([]byte, size)
	for i := range b {
		b[i] = byte(u >> (8 * i))
	}
	return hex.EncodeToString(b)
}

func float(f float64, size int) string {
	if size == 4 {
		return number(uint64(math.Float32bits(float32(f))), 4)
	}
	return number(math.Float64bits(f), 8)
}
