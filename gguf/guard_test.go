package gguf

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"sync"
	"testing"

	"github.com/edsrzf/mmap-go"
)

// shrinkable writes a model with a tensor "a" of 1 MiB.
func shrinkable(t *testing.T) string {
	t.Helper()
	if runtime.GOOS == "windows" {
		t.Skip("Windows does not let a mapped file shrink")
	}
	var b bytes.Buffer
	w := NewWriter(&b, WriterOptions{})
	w.AddTensor("a", I8, 1<<20)
	w.WriteHeader()
	w.WriteTensor("a", make([]byte, 1<<20))
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return writeFile(t, filepath.Join(t.TempDir(), "m.gguf"), b.Bytes())
}

func truncate(t *testing.T, path string, n int64) {
	t.Helper()
	if err := os.Truncate(path, n); err != nil {
		t.Fatal(err)
	}
}

func TestGuardTurnsFaultsIntoErrors(t *testing.T) {
	t.Parallel()
	path := shrinkable(t)
	m := openFile(t, path)
	tensor, _ := m.Tensor("a")
	const left = 512 << 10
	truncate(t, path, left)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			sum := 0
			err := m.Guard(func() error {
				for _, b := range m.Data(tensor) {
					sum += int(b)
				}
				return nil
			})
			fe, ok := errors.AsType[*FormatError](err)
			if !ok || !errors.Is(err, ErrTruncated) || fe.Path != path || fe.Offset != left {
				t.Errorf("got %v, want %v at offset %d of %s", err, ErrTruncated, left, path)
			}
		})
	}
	wg.Wait()
	// What is still there can still be read.
	if err := m.Guard(func() error { _ = bytes.Count(m.Data(tensor)[:1000], []byte{1}); return nil }); err != nil {
		t.Error(err)
	}
}

func TestFileShrinksWhileHeaderIsRead(t *testing.T) {
	t.Parallel()
	path := shrinkable(t)
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	data, err := mmap.Map(f, mmap.RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	p := &Part{Path: path, data: data}
	t.Cleanup(func() { errors.Join(p.close(), f.Close()) })
	truncate(t, path, 0)
	err = guard([]*Part{p}, func() error { return p.parse(p.data) })
	if !errors.Is(err, ErrTruncated) {
		t.Errorf("got %v, want %v", err, ErrTruncated)
	}
}

func TestGuardPassesTheRest(t *testing.T) {
	t.Parallel()
	path := shrinkable(t)
	m := openFile(t, path)
	want := errors.New("of the function")
	if err := m.Guard(func() error { return want }); !errors.Is(err, want) {
		t.Errorf("got error %v, want the function's", err)
	}
	for name, f := range map[string]func(){
		"value":         func() { panic("mine") },
		"nil pointer":   func() { var p *Part; _ = p.Path },
		"out of range":  func() { var b []byte; _ = b[len(path)] },
		"other mapping": faultElsewhere(t),
	} {
		t.Run(name, func(t *testing.T) {
			defer func() {
				if recover() == nil {
					t.Error("the panic was swallowed")
				}
			}()
			err := m.Guard(func() error { f(); return nil })
			t.Errorf("got error %v, want a panic", err)
		})
	}
	for _, before := range []bool{true, false} {
		debug.SetPanicOnFault(before)
		if err := m.Guard(func() error { return nil }); err != nil {
			t.Error(err)
		}
		if after := debug.SetPanicOnFault(false); after != before {
			t.Errorf("SetPanicOnFault is %v after Guard, want %v", after, before)
		}
	}
}

// faultElsewhere reads a mapping that belongs to no model and has lost its file.
func faultElsewhere(t *testing.T) func() {
	t.Helper()
	path := shrinkable(t)
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	data, err := mmap.Map(f, mmap.RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { errors.Join(data.Unmap(), f.Close()) })
	truncate(t, path, 0)
	return func() { sink = data[0] }
}

var sink byte

// TestAfterClose: what outlives the mapping, and what does not.
func TestAfterClose(t *testing.T) {
	t.Parallel()
	m, err := Open(tinyLlama)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}
	tensor, ok := m.Tensor("token_embd.weight")
	if !ok || tensor.Name != "token_embd.weight" || m.Architecture() != "llama" {
		t.Errorf("after Close: tensor %+v, architecture %q", tensor, m.Architecture())
	}
	tokens, _ := m.Metadata().Get("tokenizer.ggml.tokens")
	n := 0
	for _, s := range tokens.Strings() {
		n += len(s)
	}
	if n == 0 {
		t.Error("after Close: no tokens")
	}
	if m.Data(tensor) != nil || m.Parts()[0].Bytes() != nil {
		t.Error("after Close: Data or Bytes still gives memory")
	}
}
