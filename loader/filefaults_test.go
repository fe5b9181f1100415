package loader

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// readFunc is what Config.readAt holds.
type readFunc = func(f *os.File, b []byte, off int64) (int, error)

// atRead returns a readFunc that calls do at the nth read, from 1 on, in place of it.
func atRead(n int64, do readFunc) readFunc {
	var reads atomic.Int64
	return func(f *os.File, b []byte, off int64) (int, error) {
		if reads.Add(1) == n {
			return do(f, b, off)
		}
		return f.ReadAt(b, off)
	}
}

// reading are the options for loads that read in that way; only direct reads are system calls that readAt stands for.
func reading(io IO) options {
	o := rawTight()
	o.IO = io
	return o
}

// countReads is how many reads an undisturbed load makes, and how many arrivals it reports.
func countReads(t *testing.T, dev *amdhip.Device, m *gguf.File, o options) (n, arrivals int64) {
	t.Helper()
	var reads atomic.Int64
	o.Progress = func(int64, int64) { arrivals++ }
	o.readAt = func(f *os.File, b []byte, off int64) (int, error) {
		reads.Add(1)
		return f.ReadAt(b, off)
	}
	w, err := load(t.Context(), m, o, dev)
	if err != nil {
		t.Fatal(err)
	}
	mustClose(t, w)
	if reads.Load() < 20 {
		t.Fatalf("%d reads, want some tens", reads.Load())
	}
	return reads.Load(), arrivals
}

// wantReadError wants a *TensorError about a read, which matches target.
func wantReadError(t *testing.T, what string, w *Model, err, target error) {
	t.Helper()
	x, ok := errors.AsType[*TensorError](err)
	if w != nil || !ok || x.Op != "read" || x.Tensor == "" || x.Bytes == 0 || !errors.Is(err, target) {
		t.Errorf("%s: %v, want %v while a tensor is read", what, err, target)
	}
}

// TestEveryReadFails lets each single read of a load fail, before and after its first bytes. Where a file is mapped
// instead, a failing disk shows as a file that has been truncated does.
func TestEveryReadFails(t *testing.T) {
	t.Parallel()
	path := ownCopy(t, sample)
	m := openModel(t, path)
	dev, sw := openDevice(t, soft.Options{})
	o := reading(IODirect)
	before := opened(path)
	reads, _ := countReads(t, dev, m, o)
	for n := range reads {
		for _, part := range []int{0, 2} {
			o.readAt = atRead(n+1, func(f *os.File, b []byte, off int64) (got int, _ error) {
				if part > 0 {
					got, _ = f.ReadAt(b[:len(b)/part&^(4096-1)], off)
				}
				return got, &fs.PathError{Op: "read", Path: f.Name(), Err: syscall.EIO}
			})
			w, err := load(t.Context(), m, o, dev)
			wantReadError(t, fmt.Sprintf("read %d of %d", n+1, reads), w, err, syscall.EIO)
			wantBack(t, sw, resources{})
			closedAgain(t, path, before)
		}
	}
}

// TestShortReads gives the loader its bytes in odd pieces.
func TestShortReads(t *testing.T) {
	t.Parallel()
	m := openModel(t, sample)
	dev, _ := openDevice(t, soft.Options{})
	o := reading(IODirect)
	plain, err := m.Parts()[0].Open(0) // which reads of any alignment are allowed of
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	o.readAt = func(_ *os.File, b []byte, off int64) (int, error) {
		if third := len(b) / 3; third > 100 {
			b = b[:third]
		}
		return plain.ReadAt(b, off)
	}
	w, err := load(t.Context(), m, o, dev)
	if err != nil {
		t.Fatal(err)
	}
	same(t, w.Plan(), contents(t, w), wanted(t, m, o))
	mustClose(t, w)
}

// TestCancelAnywhere ends loads at each read and at each arrival. Late in a load everything may be on its way: then it
// may succeed.
func TestCancelAnywhere(t *testing.T) {
	t.Parallel()
	synctest.Test(t, testCancelAnywhere)
}

func testCancelAnywhere(t *testing.T) {
	path := ownCopy(t, sample)
	m := openModel(t, path)
	dev, sw := openDevice(t, soft.Options{LinkBytesPerSecond: 4e9})
	before := opened(path)
	gone := errors.New("gone")
	reads, all := countReads(t, dev, m, reading(IODirect))
	for at, points := range map[string]int64{"read": reads, "arrival": all} {
		for n := range points {
			ctx, cancel := context.WithCancelCause(t.Context())
			o := reading(IODirect)
			var arrivals int64
			if at == "read" {
				o.readAt = atRead(n+1, func(f *os.File, b []byte, off int64) (int, error) {
					cancel(gone)
					return f.ReadAt(b, off)
				})
			} else {
				o.Progress = func(int64, int64) {
					if arrivals++; arrivals == n+1 {
						cancel(gone)
					}
				}
			}
			w, err := load(ctx, m, o, dev)
			switch {
			case err == nil && n >= points/2: // everything was on its way already
				err = errors.Join(verify(t.Context(), w, m), w.Close())
				if err != nil {
					t.Errorf("after %s %d of %d: %v", at, n+1, points, err)
				}
			case !errors.Is(err, gone) || w != nil:
				t.Errorf("cancelled at %s %d of %d: %v, want the cause", at, n+1, points, err)
			}
			cancel(nil)
			wantBack(t, sw, resources{})
			closedAgain(t, path, before)
		}
	}
}

// TestFileChanges truncates the file, or puts another in its place, at each point of a load. A truncated file is an
// error where it is read; a file that has lost its name is loaded to its end.
func TestFileChanges(t *testing.T) {
	data, err := os.ReadFile(sample)
	if err != nil {
		t.Fatal(err)
	}
	t.Parallel()
	if runtime.GOOS == "windows" {
		t.Skip("Windows lets no mapped file be shortened or replaced")
	}
	for _, io := range []IO{IOAuto, IODirect, IOMapped} {
		t.Run(io.String(), func(t *testing.T) {
			t.Parallel()
			dev, sw := openDevice(t, soft.Options{LinkBytesPerSecond: 4e9})
			step := int64(3)
			if testing.Short() {
				step = 10
			}
			for n := int64(1); n <= 30; n += step {
				for _, change := range []string{"truncate", "replace"} {
					changing(t, dev, data, io, n, change)
					wantBack(t, sw, resources{})
				}
			}
		})
	}
}

// changing is one load of TestFileChanges.
func changing(t *testing.T, dev *amdhip.Device, data []byte, io IO, n int64, change string) {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, "model.gguf")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	m, err := gguf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	before := opened(path)
	var happened bool
	happen := func() {
		happened = true
		if change == "truncate" {
			if err := os.Truncate(path, 4096); err != nil {
				t.Error(err)
			}
			return
		}
		other := filepath.Join(dir, "other")
		if err := errors.Join(os.WriteFile(other, bytes.Repeat([]byte{0xEE}, len(data)), 0o600), os.Rename(other,
			path)); err != nil {
			t.Error(err)
		}
	}
	o := reading(io)
	if io != IODirect { // nothing can be hooked into
		o.Progress = func(done, _ int64) {
			if n--; n == 0 {
				happen()
			}
		}
	} else {
		o.readAt = atRead(n, func(f *os.File, b []byte, off int64) (int, error) {
			happen()
			return f.ReadAt(b, off)
		})
	}
	w, err := load(t.Context(), m, o, dev)
	if change == "truncate" { // else it has another name by now
		closedAgain(t, path, before)
	}
	if !happened {
		t.Errorf("the load ended before it was time to %s", change)
	}
	if change == "truncate" && (err != nil || io == IODirect) { // the workers may have read all by then
		wantReadError(t, change, w, err, gguf.ErrTruncated)
		return
	}
	if err != nil {
		t.Errorf("%s: %v", change, err)
		return
	}
	if change == "replace" {
		if err := verify(t.Context(), w, m); err != nil {
			t.Errorf("%s: %v", change, err)
		}
	}
	mustClose(t, w)
}
