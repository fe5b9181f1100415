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
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// readFunc is what Options.readAt holds.
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
func reading(io IO) Options {
	o := rawTight()
	o.IO = io
	return o
}

// countReads is how many reads an undisturbed load makes, and how many arrivals it reports.
func countReads(t *testing.T, dev *amdhip.Device, m *gguf.Model, o Options) (n, arrivals int64) {
	t.Helper()
	var reads atomic.Int64
	o.Progress = func(int64, int64) { arrivals++ }
	o.readAt = func(f *os.File, b []byte, off int64) (int, error) {
		reads.Add(1)
		return f.ReadAt(b, off)
	}
	w, err := Load(t.Context(), dev, m, o)
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

// TestEveryReadFails lets each single read of a load fail, before and after its first bytes. Where a file is mapped instead, a
// failing disk shows as a file that has been truncated does.
func TestEveryReadFails(t *testing.T) {
	m := openModel(t, sample)
	dev, sw := openDevice(t, amdhip.SoftwareOptions{})
	o := reading(IODirect)
	before := measure(sw)
	reads, _ := countReads(t, dev, m, o)
	for n := range reads {
		for _, part := range []int{0, 2} {
			o.readAt = atRead(n+1, func(f *os.File, b []byte, off int64) (got int, _ error) {
				if part > 0 {
					got, _ = f.ReadAt(b[:len(b)/part&^(directAlign-1)], off)
				}
				return got, &fs.PathError{Op: "read", Path: f.Name(), Err: syscall.EIO}
			})
			w, err := Load(t.Context(), dev, m, o)
			wantReadError(t, fmt.Sprintf("read %d of %d", n+1, reads), w, err, syscall.EIO)
			wantBack(t, sw, before)
		}
	}
}

// TestShortReads gives the loader its bytes in odd pieces.
func TestShortReads(t *testing.T) {
	m := openModel(t, sample)
	dev, _ := openDevice(t, amdhip.SoftwareOptions{})
	o := reading(IODirect)
	plain := m.Parts()[0].File() // which reads of any alignment are allowed of
	o.readAt = func(_ *os.File, b []byte, off int64) (int, error) {
		if third := len(b) / 3; third > 100 {
			b = b[:third]
		}
		return plain.ReadAt(b, off)
	}
	w, err := Load(t.Context(), dev, m, o)
	if err != nil {
		t.Fatal(err)
	}
	same(t, w.plan, contents(t, w), wanted(t, m, o))
	mustClose(t, w)
}

// TestCancelAnywhere ends loads at each read and at each arrival. Late in a load everything may be on its way: then it may
// succeed.
func TestCancelAnywhere(t *testing.T) {
	m := openModel(t, sample)
	dev, sw := openDevice(t, amdhip.SoftwareOptions{LinkBytesPerSecond: 4e9})
	before := measure(sw)
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
			w, err := Load(ctx, dev, m, o)
			switch {
			case err == nil && n >= points/2: // everything was on its way already
				err = errors.Join(w.Verify(t.Context()), w.Close())
				if err != nil {
					t.Errorf("after %s %d of %d: %v", at, n+1, points, err)
				}
			case !errors.Is(err, gone) || w != nil:
				t.Errorf("cancelled at %s %d of %d: %v, want the cause", at, n+1, points, err)
			}
			cancel(nil)
			wantBack(t, sw, before)
		}
	}
}

// TestFileChanges truncates the file, or puts another in its place, at each point of a load. A truncated file is an error
// where it is read; a file that has lost its name is loaded to its end.
func TestFileChanges(t *testing.T) {
	data, err := os.ReadFile(sample)
	if err != nil {
		t.Fatal(err)
	}
	if runtime.GOOS == "windows" {
		t.Skip("Windows lets no mapped file be shortened or replaced")
	}
	for _, io := range []IO{IOAuto, IODirect, IOMapped} {
		t.Run(io.String(), func(t *testing.T) {
			dev, sw := openDevice(t, amdhip.SoftwareOptions{LinkBytesPerSecond: 4e9})
			before := measure(sw)
			step := int64(3)
			if testing.Short() {
				step = 10
			}
			for n := int64(1); n <= 30; n += step {
				for _, change := range []string{"truncate", "replace"} {
					changing(t, dev, data, io, n, change)
					wantBack(t, sw, before)
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
		if err := errors.Join(os.WriteFile(other, bytes.Repeat([]byte{0xEE}, len(data)), 0o600), os.Rename(other, path)); err != nil {
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
	w, err := Load(t.Context(), dev, m, o)
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
		if err := w.Verify(t.Context()); err != nil {
			t.Errorf("%s: %v", change, err)
		}
	}
	mustClose(t, w)
}

// fullDisk takes room bytes.
type fullDisk struct {
	mu   sync.Mutex
	room int
}

func (d *fullDisk) WriteAt(b []byte, _ int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := min(d.room, len(b))
	if d.room -= n; n < len(b) {
		return n, &fs.PathError{Op: "write", Path: "out.safetensors", Err: syscall.ENOSPC}
	}
	return n, nil
}

// TestFullDisk reads back onto disks of all sizes that do not suffice.
func TestFullDisk(t *testing.T) {
	m := openModel(t, sample)
	dev, sw := openDevice(t, amdhip.SoftwareOptions{})
	w, err := Load(t.Context(), dev, m, rawTight())
	if err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, w)
	before := measure(sw)
	header, starts, err := w.safetensorsHeader()
	if err != nil {
		t.Fatal(err)
	}
	need := len(header) + int(starts[len(starts)-1]+w.plan.Tensors[len(starts)-1].Bytes)
	for room := 0; room <= need; room += min(chunkOf(w), max(need-room, 1)) {
		err := w.WriteSafetensors(t.Context(), &fullDisk{room: room})
		if full := room < need; full != errors.Is(err, syscall.ENOSPC) || !full && err != nil {
			t.Errorf("room for %d of %d bytes: %v", room, need, err)
		}
		wantBack(t, sw, before)
	}
	if err := w.Verify(t.Context()); err != nil {
		t.Errorf("the model after all that: %v", err)
	}
}

func chunkOf(w *Model) int { return w.plan.opts.Chunk }
