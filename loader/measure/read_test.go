package measure

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"io"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// written is a model of so many bytes.
func written(t *testing.T, n uint64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "made.gguf")
	out, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	w := gguf.NewWriter(out, gguf.WriterOptions{})
	err = errors.Join(w.AddTensor("x", gguf.I8, n), w.WriteHeader(), w.WriteTensor("x", make([]byte, n)), w.Close())
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// served is a file that a server has. It notes what was asked for.
type served struct {
	data []byte
	fail error // of everything behind the header

	mu    sync.Mutex
	asked [][2]int64
}

func (s *served) Path() string { return "served.gguf" }
func (s *served) Size() int64  { return int64(len(s.data)) }
func (s *served) Close() error { return nil }

func (s *served) Range(_ context.Context, off, n int64) io.ReadCloser {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked = append(s.asked, [2]int64{off, off + n})
	if s.fail != nil && off > 0 {
		return io.NopCloser(iotest.ErrReader(s.fail))
	}
	return io.NopCloser(bytes.NewReader(s.data[off : off+n]))
}

func openServed(t *testing.T, n uint64) (*gguf.File, *served) {
	t.Helper()
	data, err := os.ReadFile(written(t, n))
	if err != nil {
		t.Fatal(err)
	}
	s := &served{data: data}
	f, err := gguf.OpenSource(t.Context(), "served.gguf", func(context.Context, string) (gguf.Source, error) {
		return s, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	s.asked = nil // what the header took
	return f, s
}

func TestRead(t *testing.T) {
	t.Parallel()
	f, err := gguf.Open(written(t, 9<<20))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	far, _ := openServed(t, 9<<20)
	for _, direct := range []bool{false, true} {
		for _, m := range []*gguf.File{f, far} {
			for _, threads := range []int{1, 3, 100} {
				speed, err := Read(t.Context(), m, threads, direct)
				if err != nil || !(speed > 0) || math.IsInf(speed, 0) {
					t.Errorf("%v, direct %v, %d threads: %g bytes per second, %v", m, direct, threads, speed, err)
				}
			}
			if _, err := Read(t.Context(), m, 0, direct); err == nil {
				t.Error("0 threads read something")
			}
		}
	}
}

// TestReadOnce: every byte of a model is read once.
func TestReadOnce(t *testing.T) {
	t.Parallel()
	f, s := openServed(t, 9<<20)
	if _, err := Read(t.Context(), f, 3, false); err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(s.asked, func(a, b [2]int64) int { return cmp.Compare(a[0], b[0]) })
	at := int64(0)
	for _, r := range s.asked {
		if r[0] != at || r[1] > at+readBytes {
			t.Fatalf("%v after byte %d", r, at)
		}
		at = r[1]
	}
	if at != s.Size() {
		t.Errorf("%d of %d bytes were read", at, s.Size())
	}
}

// TestReadFails: what cannot be read is an error and no speed.
func TestReadFails(t *testing.T) {
	t.Parallel()
	broken := errors.New("broken")
	f, s := openServed(t, 9<<20)
	s.fail = broken
	if speed, err := Read(t.Context(), f, 2, false); !errors.Is(err, broken) || speed != 0 {
		t.Errorf("%g, %v", speed, err)
	}
	stopped := errors.New("stopped")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(stopped)
	if speed, err := Read(ctx, f, 2, false); !errors.Is(err, stopped) || speed != 0 {
		t.Errorf("%g, %v", speed, err)
	}
	if runtime.GOOS == "windows" {
		return // a file that is mapped cannot be renamed there
	}
	path := written(t, 1<<20)
	gone, err := gguf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer gone.Close()
	if err := os.Rename(path, path+".old"); err != nil {
		t.Fatal(err)
	}
	for _, direct := range []bool{false, true} {
		_, err := Read(t.Context(), gone, 2, direct)
		if !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), path) {
			t.Errorf("a file that is gone: %v", err)
		}
	}
}

// counted is a file of which it is known whether it is open.
type counted struct {
	*bytes.Reader
	open *atomic.Int64
}

func (c counted) Close() error { c.open.Add(-1); return nil }

// TestInputs: of hundreds of parts, one is open that is being read.
func TestInputs(t *testing.T) {
	t.Parallel()
	var open, most atomic.Int64
	var pieces []piece
	for range 300 {
		in := &input{left: 3, open: func() (file, error) {
			most.Store(max(most.Load(), open.Add(1)))
			return counted{bytes.NewReader(make([]byte, 30)), &open}, nil
		}}
		pieces = append(pieces, piece{in, 0}, piece{in, 10}, piece{in, 20})
	}
	for _, p := range pieces {
		if n, err := p.read(make([]byte, 12)); n != min(12, 30-int(p.off)) || err != nil {
			t.Fatal(n, err)
		}
	}
	if open.Load() != 0 || most.Load() != 1 {
		t.Errorf("%d are open, %d were at once", open.Load(), most.Load())
	}
}
