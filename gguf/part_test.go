package gguf

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/edsrzf/mmap-go"
)

// TestPartOpen: a part's file can be opened again, and another file in its place is noticed.
func TestPartOpen(t *testing.T) {
	t.Parallel()
	path := writeFile(t, filepath.Join(t.TempDir(), "m.gguf"), readFile(t, tinyLlama))
	p := openFile(t, path).Parts()[0]
	if p.Info().Size() != p.Size || p.Info().ModTime().IsZero() {
		t.Errorf("Info gives %d bytes, %v", p.Info().Size(), p.Info().ModTime())
	}
	f, err := p.Open(0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if got, err := io.ReadAll(f); err != nil || !bytes.Equal(got, p.Bytes()) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if runtime.GOOS == "windows" {
		t.Skip("Windows does not let a mapped file be replaced")
	}
	other := writeFile(t, filepath.Join(t.TempDir(), "other.gguf"), readFile(t, tinyLlama))
	if err := os.Rename(other, path); err != nil {
		t.Fatal(err)
	}
	if f, err := p.Open(0); f != nil || !errors.Is(err, ErrReplaced) || !strings.Contains(err.Error(), path) {
		t.Errorf("got %v, %v; want %v", f, err, ErrReplaced)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if f, err := p.Open(0); f != nil || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v, %v; want %v", f, err, os.ErrNotExist)
	}
}

// TestPartOpenAfterChdir: a relative path means what it meant when the file was opened.
func TestPartOpenAfterChdir(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "m.gguf"), readFile(t, tinyLlama))
	t.Chdir(dir)
	p := openFile(t, "m.gguf").Parts()[0]
	t.Chdir(t.TempDir())
	f, err := p.Open(0)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	if p.Path != "m.gguf" {
		t.Errorf("the path is %s", p.Path)
	}
}

// TestPartOfSourceCannotBeOpened: what is not on a disk has no descriptor.
func TestPartOfSourceCannotBeOpened(t *testing.T) {
	t.Parallel()
	f, err := OpenSource(t.Context(), "x.gguf", func(context.Context, string) (Source, error) {
		return &memory{path: "far://x", data: readFile(t, tinyLlama)}, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if file, err := f.Parts()[0].Open(0); file != nil || !errors.Is(err, ErrUnsupported) || f.Parts()[0].Info() != nil {
		t.Errorf("got %v, %v", file, err)
	}
}

// noMapping is a mapFile of a file system that does not support mapping.
func noMapping(f *os.File, _ int) (mmap.MMap, error) {
	return nil, os.NewSyscallError("mmap", syscall.ENODEV)
}

// openWith opens the split or whole file at path. Parts for which mapped is false cannot be mapped.
func openWith(t *testing.T, path string, mapped func(name string) bool) *File {
	t.Helper()
	open := func(name string) (*Part, error) {
		path := filepath.Join(filepath.Dir(path), name)
		if mapped(name) {
			return openPart(path)
		}
		return openPartBy(path, noMapping, false)
	}
	f, err := openAll(filepath.Base(path), open, open)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

// TestFileThatCannotBeMapped: it is read instead. If only some parts cannot be mapped, all are read.
func TestFileThatCannotBeMapped(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	parts := threeParts()
	writeParts(t, dir, parts)
	for _, unmapped := range []string{parts[0].name, parts[1].name, parts[2].name, ""} {
		f := openWith(t, filepath.Join(dir, parts[1].name), func(name string) bool {
			return unmapped != "" &&
				name != unmapped
		})
		if !f.Remote() || len(f.Tensors()) != 4 {
			t.Errorf("%s: remote %t, %d tensors", unmapped, f.Remote(), len(f.Tensors()))
		}
		for i := range f.Tensors() {
			x := &f.Tensors()[i]
			r := f.Range(t.Context(), x, 0, x.Size)
			got, err := io.ReadAll(r)
			r.Close()
			if p := f.Parts()[x.Part]; err != nil || string(got) != strings.Repeat(x.Name, 4) || f.Data(x) != nil ||
				p.Bytes() != nil {
				t.Errorf("%s, tensor %s: %q, %v", unmapped, x.Name, got, err)
			}
		}
		file, err := f.Parts()[0].Open(0)
		if err != nil {
			t.Fatal(err)
		}
		file.Close()
	}
	_, err := openPartBy(writeFile(t, filepath.Join(dir, "cut.gguf"), readFile(t, tinyLlama)[:1000]), noMapping, false)
	if !errors.Is(err, ErrTruncated) {
		t.Errorf("a truncated file: got %v", err)
	}
}

// TestRangeOfFile: a reader of a file that is not mapped ends with its context, and notices that the file has shrunk.
func TestRangeOfFile(t *testing.T) {
	t.Parallel()
	path := writeFile(t, filepath.Join(t.TempDir(), "m.gguf"), readFile(t, tinyLlama))
	f := openWith(t, path, func(string) bool { return false })
	x, _ := f.Tensor("token_embd.weight")
	ctx, cancel := context.WithCancelCause(t.Context())
	gone := errors.New("gone")
	r := f.Range(ctx, x, 0, x.Size)
	defer r.Close()
	if _, err := io.ReadFull(r, make([]byte, 100)); err != nil {
		t.Error(err)
	}
	cancel(gone)
	if _, err := r.Read(make([]byte, 1)); !errors.Is(err, gone) {
		t.Errorf("after the end of the context: got %v", err)
	}
	truncate(t, path, x.Offset+100)
	r = f.Range(t.Context(), x, 50, 100)
	defer r.Close()
	got, err := io.ReadAll(r)
	fe, ok := errors.AsType[*FormatError](err)
	if !ok || !errors.Is(err, ErrTruncated) || fe.Offset != x.Offset+100 || len(got) != 50 {
		t.Errorf("after the file has shrunk: %d bytes, %v", len(got), err)
	}
}

// TestHints: errors of the operating system at open say what to do.
func TestHints(t *testing.T) {
	t.Parallel()
	for errno, want := range map[syscall.Errno]string{
		syscall.EMFILE: "ulimit -n", syscall.ENFILE: "the system", syscall.EPERM: "sandbox", syscall.EACCES: "",
	} {
		err := explain(&os.PathError{Op: "open", Path: "m.gguf", Err: errno})
		if !errors.Is(err, errno) || !strings.HasPrefix(err.Error(), "open m.gguf: "+errno.Error()) ||
			!strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want it to say %q", err, want)
		}
	}
}
