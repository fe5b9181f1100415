package gguf

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// golden is what ggml itself says of a file: the .gguf.json files in testdata/gguf, which its own reader and writer
// made.
type golden struct {
	File       string `json:"file"`
	FileBytes  int64  `json:"file_bytes"`
	FileSHA256 string `json:"file_sha256"`
	Version    uint32 `json:"version"`
	Alignment  uint32 `json:"alignment"`
	DataOffset int64  `json:"data_offset"`
	KV         []struct {
		Key      string `json:"key"`
		Type     string `json:"type"`
		ElemType string `json:"elem_type"`
		N        int    `json:"n"`
		Value    any    `json:"value"`
		Bits     any    `json:"bits"` // of floats, as hexadecimal numbers
	} `json:"kv"`
	Tensors []goldenTensor `json:"tensors"`
}

type goldenTensor struct {
	Name       string   `json:"name"`
	Type       string   `json:"type"`
	TypeID     uint32   `json:"type_id"`
	NDims      int      `json:"n_dims"`
	NE         []uint64 `json:"ne"`
	Elems      uint64   `json:"n_elems"`
	AbsOffset  int64    `json:"abs_offset"`
	Bytes      int64    `json:"nbytes"`
	DataSHA256 string   `json:"data_sha256"`
}

const (
	goldenDir = "../testdata/gguf"
	tinyLlama = "../testdata/tiny-llama.gguf"
)

func readGolden(t testing.TB, name string) golden {
	t.Helper()
	d := json.NewDecoder(bytes.NewReader(readFile(t, filepath.Join(goldenDir, name+".json"))))
	d.UseNumber()
	var g golden
	if err := d.Decode(&g); err != nil {
		t.Fatal(err)
	}
	return g
}

func readFile(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func writeFile(t testing.TB, path string, b []byte) string {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func openFile(t testing.TB, path string) *File {
	t.Helper()
	m, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

func hash(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

func splitFile(i int) string { return fmt.Sprintf("tiny-llama-%05d-of-00003.gguf", i) }

// rebuildSplit makes the three parts of tiny-llama in a new directory from their headers in testdata and the tensors of
// the whole model, since testdata has no room for the same weights twice.
func rebuildSplit(t testing.TB) (dir string) {
	t.Helper()
	dir = t.TempDir()
	whole := openFile(t, tinyLlama)
	for i := 1; i <= 3; i++ {
		g := readGolden(t, splitFile(i))
		part := make([]byte, g.FileBytes)
		header := readFile(t, filepath.Join(goldenDir, splitFile(i)[:len("tiny-llama-00001-of-00003")]+".header"))
		copy(part, header)
		for _, want := range g.Tensors {
			tensor, ok := whole.Tensor(want.Name)
			if !ok {
				t.Fatalf("tiny-llama.gguf has no tensor %q", want.Name)
			}
			copy(part[want.AbsOffset:], whole.Data(tensor))
		}
		if got := hash(part); got != g.FileSHA256 {
			t.Fatalf("rebuilt %s has sha256 %s, want %s", g.File, got, g.FileSHA256)
		}
		writeFile(t, filepath.Join(dir, g.File), part)
	}
	return dir
}

func TestGoldenFiles(t *testing.T) {
	t.Parallel()
	paths := map[string]string{"tiny-llama.gguf": tinyLlama}
	for _, name := range []string{"all-types.gguf", "align8.gguf", "align64.gguf", "align4096.gguf", "v2.gguf"} {
		paths[name] = filepath.Join(goldenDir, name)
	}
	for name, path := range paths {
		t.Run(name, func(t *testing.T) {
			g := readGolden(t, name)
			m := openFile(t, path)
			if len(m.Parts()) != 1 || m.Size() != uint64(g.FileBytes) {
				t.Errorf("%d parts of %d bytes, want 1 of %d", len(m.Parts()), m.Size(), g.FileBytes)
			}
			checkPart(t, m, 0, g)
			if got := len(m.Tensors()); got != len(g.Tensors) {
				t.Errorf("%d tensors, want %d", got, len(g.Tensors))
			}
		})
	}
}

func TestGoldenSplit(t *testing.T) {
	t.Parallel()
	dir := rebuildSplit(t)
	for opened := 1; opened <= 3; opened++ {
		t.Run(splitFile(opened), func(t *testing.T) {
			m := openFile(t, filepath.Join(dir, splitFile(opened)))
			if len(m.Parts()) != 3 || m.Architecture() != "llama" {
				t.Fatalf("%d parts of architecture %q, want 3 of llama", len(m.Parts()), m.Architecture())
			}
			n := 0
			for i := range m.Parts() {
				g := readGolden(t, splitFile(i+1))
				checkPart(t, m, i, g)
				n += len(g.Tensors)
			}
			if got := len(m.Tensors()); got != n {
				t.Errorf("%d tensors, want %d", got, n)
			}
		})
	}
}

// checkPart compares a part and its tensors with what ggml says.
func checkPart(t *testing.T, m *File, i int, g golden) {
	t.Helper()
	p := m.Parts()[i]
	want := Part{Path: p.Path, Version: g.Version, Size: g.FileBytes, Alignment: g.Alignment, DataOffset: g.DataOffset}
	got := Part{Path: p.Path, Version: p.Version, Size: p.Size, Alignment: p.Alignment, DataOffset: p.DataOffset}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(Part{})); diff != "" {
		t.Errorf("part (-want +got):\n%s", diff)
	}
	if filepath.Base(p.Path) != g.File || hash(p.Bytes()) != g.FileSHA256 {
		t.Errorf("%s: path or mapped bytes differ from %s", p.Path, g.File)
	}
	if p.Info().Size() != g.FileBytes {
		t.Errorf("%s: Info says %d bytes, want %d", p.Path, p.Info().Size(), g.FileBytes)
	}
	checkMetadata(t, p.Metadata(), g)
	for _, want := range g.Tensors {
		got, ok := m.Tensor(want.Name)
		if !ok {
			t.Errorf("tensor %q is missing", want.Name)
			continue
		}
		if err := compareTensor(m, got, want, i); err != nil {
			t.Errorf("tensor %q: %v", want.Name, err)
		}
	}
}

func compareTensor(m *File, got *Tensor, want goldenTensor, part int) error {
	wantTensor := &Tensor{
		Name: want.Name, Type: Type(want.TypeID), Shape: want.NE[:want.NDims],
		Part: part, Offset: want.AbsOffset, Size: want.Bytes,
	}
	if diff := cmp.Diff(wantTensor, got); diff != "" {
		return fmt.Errorf("(-want +got):\n%s", diff)
	}
	if got.Elems() != want.Elems || got.Type.String() != want.Type {
		return fmt.Errorf("%d elements of %v, want %d of %s", got.Elems(), got.Type, want.Elems, want.Type)
	}
	return m.Guard(func() error {
		if sum := hash(m.Data(got)); sum != want.DataSHA256 {
			return fmt.Errorf("data has sha256 %s, want %s", sum, want.DataSHA256)
		}
		return nil
	})
}

func checkMetadata(t *testing.T, md *Metadata, g golden) {
	t.Helper()
	var order []string
	for key := range md.Keys() {
		order = append(order, key)
	}
	if md.Len() != len(g.KV) || len(order) != len(g.KV) {
		t.Fatalf("%d keys (Len %d), want %d", len(order), md.Len(), len(g.KV))
	}
	for i, want := range g.KV {
		if order[i] != want.Key {
			t.Errorf("key %d is %q, want %q", i, order[i], want.Key)
		}
		v, _ := md.Get(want.Key)
		if v.Kind().String() != want.Type {
			t.Errorf("%s: kind %v, want %s", want.Key, v.Kind(), want.Type)
		}
		var got, expect []string
		if v.Kind() == KindArray {
			if k, _ := v.ElemKind(); k.String() != want.ElemType || v.Len() != want.N {
				t.Errorf("%s: %d elements of %v, want %d of %s", want.Key, v.Len(), k, want.N, want.ElemType)
			}
			got, expect = arrayTexts(v), jsonTexts(want.Value, want.Bits)
		} else {
			got, expect = []string{bitsText(v)}, jsonTexts([]any{want.Value}, []any{want.Bits})
		}
		if diff := cmp.Diff(expect, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", want.Key, diff)
		}
	}
}

// jsonTexts gives floats as their bits and all else as text.
func jsonTexts(values, bits any) []string {
	b, _ := bits.([]any)
	texts := []string{}
	for i, v := range values.([]any) {
		if i < len(b) && b[i] != nil {
			v = b[i]
		}
		texts = append(texts, fmt.Sprint(v))
	}
	return texts
}

func bitsText(v Value) string {
	if f, ok := v.Float(); ok {
		return floatBits(v.Kind(), f)
	}
	if s, ok := v.Text(); ok {
		return s
	}
	return v.String()
}

func floatBits(k ValueKind, f float64) string {
	if k == KindFloat32 {
		return fmt.Sprintf("0x%08x", math.Float32bits(float32(f)))
	}
	return fmt.Sprintf("0x%016x", math.Float64bits(f))
}

// arrayTexts decodes an array with the iterators that its kind has.
func arrayTexts(v Value) []string {
	texts := []string{}
	for _, s := range v.Strings() {
		texts = append(texts, s)
	}
	for _, b := range v.Bools() {
		texts = append(texts, strconv.FormatBool(b))
	}
	k, _ := v.ElemKind()
	for _, f := range v.Floats() {
		texts = append(texts, floatBits(k, f))
	}
	for _, u := range v.Uints() {
		texts = append(texts, strconv.FormatUint(u, 10))
	}
	if k.signed() {
		for _, i := range v.Ints() {
			texts = append(texts, strconv.FormatInt(i, 10))
		}
	}
	return texts
}
