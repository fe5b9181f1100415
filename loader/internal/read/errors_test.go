package read

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// first reads the first chunks until one fails.
func first(t *testing.T, src *Source, chunks []plan.Chunk, s *sink) error {
	t.Helper()
	r := src.Reader(s, "worker 0")
	defer r.Close()
	for i := range chunks {
		if err := r.Read(t.Context(), chunks[i].Segs, nil); err != nil {
			return err
		}
	}
	return nil
}

// TestRefused: what the sink returns reaches the caller as it is, whatever brings the bytes and whichever call it is.
func TestRefused(t *testing.T) {
	t.Parallel()
	path := written(t, 1<<20)
	refused := errors.New("refused")
	near := open(t, path)
	far, _ := openServed(t, path)
	for _, x := range []struct {
		f      *gguf.File
		mode   Mode
		failIn string
	}{
		{near, Mapped, "Put"},
		{near, Mapped, "Flush"},
		{near, Direct, "Put"},
		{near, Direct, "Flush"},
		{far, Auto, "PutPart"},
		{far, Auto, "Flush"},
	} {
		g := group(t, x.f, plan.Spec{Policy: plan.F16})
		chunks := g.Cut(plan.CutOptions{Bytes: plan.MinChunk})
		src, err := Open(x.f, g, chunks, Options{Mode: x.mode, Threads: 1, Connections: 1})
		if err != nil {
			t.Fatal(err)
		}
		s := newSink(newTaken(g))
		s.failIn, s.fail = x.failIn, refused
		if err := first(t, src, chunks, s); err != refused { // as it is, not wrapped
			t.Errorf("mode %d, %s: %v, want what the sink returned", x.mode, x.failIn, err)
		}
		if s.calls[x.failIn] != 1 {
			t.Errorf("mode %d, %s: %d calls, want none after the one that failed", x.mode, x.failIn, s.calls[x.failIn])
		}
		src.Close()
	}
}

// TestShortReads: reads that bring less than was asked for are gone on with.
func TestShortReads(t *testing.T) {
	t.Parallel()
	f := open(t, written(t, 1<<20))
	for _, most := range []int{1000, 4096, 5000, 100_000} {
		g := group(t, f, specs["slice 3"])
		chunks := g.Cut(plan.CutOptions{Bytes: 1 << 20})
		var src *Source
		var err error
		short := func(f *os.File, b []byte, off int64) (int, error) {
			if f == src.parts[0].direct.file && off%directAlign != 0 {
				return 0, errors.New("invalid argument") // as a disk says that has direct reads
			}
			n, err := f.ReadAt(b, off)
			if n <= most {
				return n, err
			}
			return most, nil
		}
		if src, err = Open(f, g, chunks, Options{Mode: Direct, ReadAt: short}); err != nil {
			t.Fatal(err)
		}
		readAll(t, src, chunks, newTaken(g), 1)
		src.Close()
	}
}

// TestFailedReads: an error says which tensor, which bytes of it, and where in the file.
func TestFailedReads(t *testing.T) {
	t.Parallel()
	f := open(t, written(t, 1<<20))
	g := group(t, f, plan.Spec{Policy: plan.Raw})
	chunks := g.Cut(plan.CutOptions{Bytes: plan.MinChunk})
	broken := errors.New("input/output error")
	for _, x := range []struct {
		name      string
		err, want error
		text      string
	}{
		{"a disk that fails", broken, broken, "at offset 0x"},
		{"the end of the file", io.EOF, gguf.ErrTruncated, "the file has become shorter"},
	} {
		const bad = 500_000 // offset in the file
		src, err := Open(f, g, chunks, Options{Mode: Direct, ReadAt: func(f *os.File, b []byte, off int64) (int, error) {
			if off+int64(len(b)) > bad {
				return 0, x.err
			}
			return f.ReadAt(b, off)
		}})
		if err != nil {
			t.Fatal(err)
		}
		err = first(t, src, chunks, newSink(newTaken(g)))
		e, ok := errors.AsType[*Error](err)
		if !ok || !errors.Is(err, x.want) || !strings.Contains(err.Error(), x.text) {
			t.Fatalf("%s: %v", x.name, err)
		}
		tensor, _ := f.Tensor(e.Tensor)
		if at := tensor.Offset + e.Offset; at > bad || at+int64(e.Bytes)+directAlign <= bad {
			t.Errorf("%s: %v, at %d of the file", x.name, err, at)
		}
		src.Close()
	}
}

// TestTruncated: a file that becomes shorter after it was opened is an error that says so, and no fault.
func TestTruncated(t *testing.T) {
	t.Parallel()
	if runtime.GOOS == "windows" {
		t.Skip("a file that is mapped cannot be truncated here")
	}
	for _, mode := range []Mode{Auto, Mapped, Direct} {
		path := written(t, 1<<20)
		f := open(t, path)
		g := group(t, f, plan.Spec{Policy: plan.Raw})
		chunks := g.Cut(plan.CutOptions{Bytes: plan.MinChunk})
		src, err := Open(f, g, chunks, Options{Mode: mode})
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, 400_000); err != nil {
			t.Fatal(err)
		}
		err = first(t, src, chunks, newSink(newTaken(g)))
		e, ok := errors.AsType[*Error](err)
		if !ok || !errors.Is(err, gguf.ErrTruncated) || e.Tensor != "blk.0.ffn_up.weight" {
			t.Errorf("mode %d: %v", mode, err)
		}
		src.Close()
	}
}

// TestReplaced: direct reads open the file again. Another one that has taken its place is not read.
func TestReplaced(t *testing.T) {
	t.Parallel()
	if runtime.GOOS == "windows" {
		t.Skip("a file that is mapped cannot be replaced here")
	}
	path, other := written(t, 1<<20), written(t, 2<<20)
	f := open(t, path)
	if err := os.Rename(other, filepath.Clean(path)); err != nil {
		t.Fatal(err)
	}
	g := group(t, f, plan.Spec{Policy: plan.Raw})
	chunks := g.Cut(plan.CutOptions{Bytes: plan.MinChunk})
	src, err := Open(f, g, chunks, Options{Mode: Direct})
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	if err := first(t, src, chunks, newSink(newTaken(g))); !errors.Is(err, gguf.ErrReplaced) {
		t.Error(err)
	}
}
