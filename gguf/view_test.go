package gguf

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// TestOpenView wants the same of OpenView as of Open.
func TestOpenView(t *testing.T) {
	t.Parallel()
	want := openFile(t, tinyLlama)
	got, err := OpenView(tinyLlama)
	if err != nil {
		t.Fatal(err)
	}
	defer got.Close()
	err = got.Guard(func() error {
		if got.Metadata().String() != want.Metadata().String() || len(got.Tensors()) != len(want.Tensors()) {
			t.Error("another header")
		}
		for i, x := range got.Tensors() {
			y := want.Tensors()[i]
			if x.Name != y.Name || x.Offset != y.Offset || x.Size != y.Size {
				t.Errorf("tensor %d is %+v, want %+v", i, x, y)
			}
			if found, ok := got.Tensor(y.Name); !ok || found.Offset != y.Offset {
				t.Errorf("tensor %s is not found", y.Name)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if err := got.Close(); err != nil {
		t.Error(err)
	}
	if _, err := OpenView(filepath.Join(t.TempDir(), "none.gguf")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v for a file that is not there", err)
	}
	damaged := writeFile(t, filepath.Join(t.TempDir(), "m.gguf"), readFile(t, tinyLlama)[:1000])
	if _, err := OpenView(damaged); !errors.Is(err, ErrTruncated) {
		t.Errorf("got %v for a damaged file", err)
	}
}

// TestViewErrors wants the errors of Open from OpenView, in words that do not lie in the mapping, which is gone then.
func TestViewErrors(t *testing.T) {
	t.Parallel()
	for _, h := range hostileFiles() {
		path := writeFile(t, filepath.Join(t.TempDir(), "m.gguf"), h.data)
		a, want := Open(path)
		b, got := OpenView(path)
		if (a == nil) != (b == nil) || fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%s: got %v, want %v", h.name, got, want)
		}
		for _, f := range []*File{a, b} {
			if f != nil {
				f.Close()
			}
		}
	}
}

// TestViewAllocates opens a file with a text of 256 MiB, which is a hole in the file.
func TestViewAllocates(t *testing.T) {
	const size = 256 << 20
	head := raw{keys: [][]byte{encode("general.description", uint32(KindString), uint64(size))}}.bytes()
	path := writeFile(t, filepath.Join(t.TempDir(), "m.gguf"), head)
	if err := os.Truncate(path, int64(len(head)+size)); err != nil {
		t.Fatal(err)
	}
	before := allocated()
	f, err := OpenView(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if text, _ := f.Metadata().Text("general.description"); len(text) != size {
		t.Errorf("a text of %d bytes", len(text))
	}
	if n := allocated() - before; n > 1<<20 {
		t.Errorf("%d bytes allocated", n)
	}
}

// TestViewChanges changes a file under the view's eyes: lengths in its header that point outside of it, or another file
// in its place, or nothing any more. None of that may end the process.
func TestViewChanges(t *testing.T) {
	t.Parallel()
	if runtime.GOOS == "windows" {
		t.Skip("Windows does not let a mapped file be truncated")
	}
	for name, tt := range map[string]struct {
		change func(path string) error
		want   error
	}{
		"bytes": {func(path string) error {
			return os.WriteFile(path, []byte(strings.Repeat("\xff", 1<<20)), 0o644)
		}, errChanged},
		"truncated": {func(path string) error { return os.Truncate(path, 0) }, ErrTruncated},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := writeFile(t, filepath.Join(t.TempDir(), "m.gguf"), readFile(t, tinyLlama))
			f, err := OpenView(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := tt.change(path); err != nil {
				t.Fatal(err)
			}
			err = f.Guard(func() error { _ = f.Metadata().String(); return nil })
			if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), "m.gguf") {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
	f, err := OpenView(tinyLlama)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	defer func() {
		if recover() == nil {
			t.Error("a panic that has nothing to do with the file was swallowed")
		}
	}()
	_ = f.Guard(func() error { _ = f.Tensors()[len(f.Tensors())]; return nil })
}

// TestLargeHeaderOfSource refuses a header that goes on and on, long before its bytes fill the memory.
func TestLargeHeaderOfSource(t *testing.T) {
	head := raw{keys: [][]byte{encode("k", uint32(KindString), uint64(1<<30))}}.bytes()
	s := &memory{path: "x.gguf", data: head, size: 1 << 40}
	_, err := headerOf(s, int64(len(head)))
	if err == nil || !strings.Contains(err.Error(), "limit 67108864") {
		t.Errorf("got %v", err)
	}
	if n := s.read.Load(); n > maxSource {
		t.Errorf("%d bytes were read", n)
	}
}

// TestNestedText prints arrays in arrays: each level has few elements, but all of them together would be many.
func TestNestedText(t *testing.T) {
	t.Parallel()
	value := encode(uint32(KindUint8), uint64(1), uint8(7))
	for range 8 {
		four := encode(uint32(KindArray), uint64(4))
		for range 4 {
			four = append(four, value...)
		}
		value = four
	}
	p, err := parseBytes(raw{keys: [][]byte{encode("k", uint32(KindArray), value)}}.bytes())
	if err != nil {
		t.Fatal(err)
	}
	v, _ := p.Metadata().Get("k")
	const inner = "[[…] (4 arrays), […] (4 arrays), […] (4 arrays), […] (4 arrays)]"
	if got, want := v.String(), "["+strings.Join([]string{inner, inner, inner, inner}, ", ")+"]"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// TestViewOfUnmappable opens parts of which one cannot be mapped.
func TestViewOfUnmappable(t *testing.T) {
	t.Parallel()
	path := writeFile(t, filepath.Join(t.TempDir(), "m.gguf"), readFile(t, tinyLlama))
	p, err := openPartBy(path, mapFile, true)
	if err != nil {
		t.Fatal(err)
	}
	q, err := openPartBy(path, noMapping, true)
	if err != nil {
		t.Fatal(err)
	}
	if err := readAllAlike([]*Part{p, q}); err != nil {
		t.Fatal(err)
	}
	f, err := newFile([]*Part{p})
	if err != nil {
		t.Fatal(err)
	}
	if !f.Remote() || f.Architecture() != "llama" {
		t.Errorf("remote: %t, architecture %q", f.Remote(), f.Architecture())
	}
	x := &f.Tensors()[0]
	b := make([]byte, 16)
	r := f.Range(context.Background(), x, 0, 16)
	if n, err := r.Read(b); n != 16 || err != nil {
		t.Errorf("%d bytes, %v", n, err)
	}
	if err := errors.Join(f.Close(), q.close()); err != nil {
		t.Error(err)
	}
}
