package gguf

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// vocabulary writes a model like Llama 3's: a header of 9 MB, of which 128,256 tokens and 280,147 merges are the most.
func vocabulary(t testing.TB) (path string, headerBytes int64) {
	t.Helper()
	tokens, merges := make([]string, 128_256), make([]string, 280_147)
	kinds, scores := make([]int32, len(tokens)), make([]float32, len(tokens))
	for i := range tokens {
		tokens[i] = fmt.Sprintf("Ġt%d", i)
	}
	for i := range merges {
		merges[i] = fmt.Sprintf("Ġm%d %d", i%999, i)
	}
	var b bytes.Buffer
	w := NewWriter(&b, WriterOptions{})
	w.Set("general.architecture", "llama")
	w.Set("tokenizer.ggml.tokens", tokens)
	w.Set("tokenizer.ggml.merges", merges)
	w.Set("tokenizer.ggml.token_type", kinds)
	w.Set("tokenizer.ggml.scores", scores)
	for i := range 291 {
		w.AddTensor(fmt.Sprintf("blk.%d.weight", i), I8, 1)
	}
	w.WriteHeader()
	for i := range 291 {
		w.WriteTensor(fmt.Sprintf("blk.%d.weight", i), []byte{1})
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return writeFile(t, filepath.Join(t.TempDir(), "vocabulary.gguf"), b.Bytes()), int64(b.Len())
}

// TestOpenDoesNotAllocatePerEntry: a model with 400,000 strings costs one copy of its header and a few objects per
// tensor.
func TestOpenDoesNotAllocatePerEntry(t *testing.T) {
	path, size := vocabulary(t)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	m := openFile(t, path)
	runtime.ReadMemStats(&after)
	if n := after.Mallocs - before.Mallocs; n > 2000 {
		t.Errorf("%d allocations, want no more than 2000", n)
	}
	if n := after.TotalAlloc - before.TotalAlloc; n > uint64(size)+1<<20 {
		t.Errorf("%d bytes allocated for a header of %d", n, size)
	}
	merges, _ := m.Metadata().Get("tokenizer.ggml.merges")
	last := ""
	perPass := testing.AllocsPerRun(1, func() {
		for _, s := range merges.Strings() {
			last = s
		}
	})
	if want := fmt.Sprintf("Ġm%d %d", 280_146%999, 280_146); last != want {
		t.Errorf("the last merge is %q, want %q", last, want)
	}
	if perPass > 10 {
		t.Errorf("a pass over the merges allocates %v times", perPass)
	}
}

func BenchmarkOpenVocabulary(b *testing.B) {
	path, size := vocabulary(b)
	b.SetBytes(size)
	b.ReportAllocs()
	for b.Loop() {
		m, err := Open(path)
		if err != nil {
			b.Fatal(err)
		}
		m.Close()
	}
}

func BenchmarkGuard(b *testing.B) {
	m := openFile(b, tinyLlama)
	for b.Loop() {
		if err := m.Guard(func() error { return nil }); err != nil {
			b.Fatal(err)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	tests := []struct {
		name, path string
		is         error
	}{
		{"directory", dir, ErrNotGGUF},
		{"missing file", filepath.Join(dir, "none.gguf"), fs.ErrNotExist},
		{"empty file", writeFile(t, filepath.Join(dir, "empty.gguf"), nil), ErrTruncated},
		{"another file", "open_test.go", ErrNotGGUF},
		{"truncated file", writeFile(t, filepath.Join(dir, "cut.gguf"), readFile(t, tinyLlama)[:99_999]), ErrTruncated},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m, err := Open(tt.path)
			if m != nil || !errors.Is(err, tt.is) {
				t.Errorf("got %v, %v; want an error that matches %v", m, err, tt.is)
			}
		})
	}
}

// TestHeaderIsBounded: a file full of holes takes no disk, and no memory either.
func TestHeaderIsBounded(t *testing.T) {
	r := raw{keys: [][]byte{key("k", KindString, uint64(maxText)), {}}, nkeys: uint64(1)}
	path := writeFile(t, filepath.Join(t.TempDir(), "holes.gguf"), r.bytes())
	if err := os.Truncate(path, maxText+1<<20); err != nil {
		t.Fatal(err)
	}
	before := allocated()
	_, err := Open(path)
	if err == nil || !strings.Contains(err.Error(), "a header of") {
		t.Errorf("got %v, want an error about the header's size", err)
	}
	if n := allocated() - before; n > 1<<20 {
		t.Errorf("%d bytes allocated", n)
	}
}

// TestOpenLeavesNothingOpen: a refused file, and every part of a refused split, is closed and unmapped.
func TestOpenLeavesNothingOpen(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" {
		t.Skip("counts descriptors and mappings in /proc, which only Linux has")
	}
	dir := t.TempDir()
	parts := threeParts()
	parts[2].keys[splitTensorsKey] = int32(9)
	writeParts(t, dir, parts)
	cut := writeFile(t, filepath.Join(dir, "cut.gguf"), readFile(t, tinyLlama)[:99_999])
	for _, path := range []string{cut, filepath.Join(dir, parts[0].name), filepath.Join(dir, parts[2].name)} {
		if _, err := Open(path); err == nil {
			t.Errorf("%s opens", path)
		}
	}
	links, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if target, err := os.Readlink("/proc/self/fd/" + l.Name()); err == nil && filepath.Dir(target) == dir {
			t.Errorf("%s is still open", target)
		}
	}
	if bytes.Contains(readFile(t, "/proc/self/maps"), []byte(dir)) {
		t.Error("a file is still mapped")
	}
}

// TestOpenThroughLinks: download caches keep models as links to files named by their hash.
func TestOpenThroughLinks(t *testing.T) {
	t.Parallel()
	blobs, dir := t.TempDir(), t.TempDir()
	parts := threeParts()
	names := []string{parts[0].name, parts[1].name, parts[2].name}
	for i, p := range parts {
		p.name = fmt.Sprintf("%064x", i)
	}
	writeParts(t, blobs, parts)
	for i, name := range names {
		if err := os.Symlink(filepath.Join(blobs, parts[i].name), filepath.Join(dir, name)); err != nil {
			t.Skipf("this system does not let symbolic links be made: %v", err)
		}
	}
	if m := openFile(t, filepath.Join(dir, names[1])); len(m.Parts()) != 3 || len(m.Tensors()) != 4 {
		t.Errorf("%d parts, %d tensors; want 3, 4", len(m.Parts()), len(m.Tensors()))
	}
}
