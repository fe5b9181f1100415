package loader

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/kernels"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// TestLoad loads in every way, with every policy, and compares the bytes.
func TestLoad(t *testing.T) {
	t.Parallel()
	for _, path := range []string{
		sample, allTypes, small, "../testdata/gguf/align4096.gguf", "../testdata/gguf/v2.gguf",
	} {
		m := openModel(t, path)
		for _, d := range plan.Policies() {
			want := wanted(t, m, options{Policy: d})
			for _, way := range []struct {
				name string
				load loadFunc
				o    options
			}{
				{"default", load, options{}},
				{"tight", load, tight},
				{"one of each", load, options{Chunk: 64 << 10, Staging: 64 << 10, Threads: 1, Streams: 1}},
				{"direct", load, options{IO: IODirect, Chunk: 100_000}},
				{"direct, large chunks", load, options{IO: IODirect}},
				{"mmap", load, options{IO: IOMapped, Chunk: 100_000}},
				{"generic", load, options{ISA: kernels.Generic}},
				{"sync", loadSync, options{}},
				{"sync tight", loadSync, tight},
			} {
				t.Run(fmt.Sprintf("%s/%v/%s", filepath.Base(path), d, way.name), func(t *testing.T) {
					t.Parallel()
					dev, sw := openDevice(t, soft.Options{Poison: true})
					o := way.o
					o.Policy = d
					var done, total int64
					o.Progress = func(d, t int64) { done, total = d, t }
					w, err := way.load(t.Context(), m, o, dev)
					if err != nil {
						t.Fatal(err)
					}
					defer mustClose(t, w)
					same(t, w.Plan(), contents(t, w), want)
					if err := verify(t.Context(), w, m); err != nil {
						t.Error(err)
					}
					r := w.Report()
					if n := int64(w.Plan().TensorBytes()); done != n || total != n {
						t.Errorf("progress %d of %d, want %d", done, total, n)
					}
					if r.UploadBytes > r.DeviceBytes || r.UploadBytes < w.Plan().TensorBytes() {
						t.Errorf("%d bytes uploaded, on the device %d", r.UploadBytes, r.DeviceBytes)
					}
					if r.MappedBytes+r.DirectBytes != r.ReadBytes {
						t.Errorf("%d bytes mapped and %d direct are not %d", r.MappedBytes, r.DirectBytes, r.ReadBytes)
					}
					if n := sw.Stats().UnpinnedCopies; n != 0 || r.UnpinnedCopies != 0 {
						t.Errorf("%d unpinned copies, reported %d", n, r.UnpinnedCopies)
					}
					if o.IO == IODirect && r.DirectBytes != r.ReadBytes || o.IO == IOMapped && r.MappedBytes != r.ReadBytes {
						t.Errorf("%v: %d bytes mapped, %d direct of %d", o.IO, r.MappedBytes, r.DirectBytes, r.ReadBytes)
					}
				})
			}
		}
	}
}

// TestConcurrentLoads runs several loads at once on one slow device whose copies read late, with staging memory far
// smaller than the model.
func TestConcurrentLoads(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := openModel(t, sample)
		dev, sw := openDevice(t, soft.Options{LinkBytesPerSecond: 400e6, LinkLatency: 50 * time.Microsecond, Poison: true})
		var loads sync.WaitGroup
		for i := range 6 {
			loads.Go(func() {
				o := tight
				o.Policy = plan.Policies()[i%4]
				w, err := load(t.Context(), m, o, dev)
				if err != nil {
					t.Error(err)
					return
				}
				defer mustClose(t, w)
				same(t, w.Plan(), contents(t, w), wanted(t, m, o))
			})
		}
		loads.Wait()
		if n := sw.Stats().Copies; n < 400 {
			t.Errorf("%d copies, want each buffer used some hundred times", n)
		}
	})
}

// TestBounded wants pinned memory within the budget however large the model.
func TestBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := openModel(t, sample)
		dev, sw := openDevice(t, soft.Options{LinkBytesPerSecond: 1e9})
		o := tight
		o.Policy = plan.F32
		w, err := load(t.Context(), m, o, dev)
		if err != nil {
			t.Fatal(err)
		}
		defer mustClose(t, w)
		if got := sw.Stats().PeakPinnedBytes; int64(got) > o.Staging {
			t.Errorf("%d bytes were pinned, the budget is %d", got, o.Staging)
		}
		if r := w.Report(); r.DeviceBytes < 20*uint64(o.Staging) {
			t.Errorf("the model of %d bytes is too small for this test", r.DeviceBytes)
		}
	})
}

// TestReadiness waits for single tensors while the load runs, on the host and on a stream.
func TestReadiness(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := openModel(t, sample)
		dev, _ := openDevice(t, soft.Options{LinkBytesPerSecond: 50e6, Poison: true})
		o := tight
		o.Policy = plan.F32
		want := wanted(t, m, o)
		w := start(t.Context(), t, m, o, dev)
		defer mustClose(t, w)
		s := newStream(t, dev)
		host, err := dev.HostMalloc(8 << 20)
		if err != nil {
			t.Fatal(err)
		}
		defer host.Close()
		tensors := w.Plan().Tensors()
		last := len(tensors) - 1
		for i, x := range tensors {
			if i%2 == 0 {
				err = w.Wait(t.Context(), x.Name)
			} else {
				err = w.WaitStream(t.Context(), s, x.Name)
			}
			if err != nil {
				t.Fatal(err)
			}
			got, err := w.Tensor(x.Name)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(s.CopyToHost(host, 0, got.Ptr, int(got.Bytes)), s.Synchronize()); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(host.Bytes()[:got.Bytes], want[x.Name]) {
				t.Errorf("%s was said to be ready and is not", x.Name)
			}
			if i == 0 && w.parts[0].ready.has(last) {
				t.Error("the last tensor was ready with the first: the test shows nothing")
			}
		}
		if err := w.WaitAll(t.Context()); err != nil {
			t.Error(err)
		}
		if err := w.Wait(t.Context(), "no such tensor"); err == nil {
			t.Error("waiting for an unknown tensor: no error")
		}
		if err := w.WaitStream(t.Context(), s, tensors[last].Name); err != nil {
			t.Errorf("WaitStream after the load: %v", err)
		}
	})
}

// newStream returns a stream that is closed at the end of the test.
func newStream(t *testing.T, dev *amdhip.Device) *amdhip.Stream {
	t.Helper()
	s, err := dev.NewStream()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// TestNoTensors: a file without tensors is a load of nothing.
func TestNoTensors(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "empty.gguf")
	// Magic, version 3, no tensors, no metadata.
	if err := os.WriteFile(path, append([]byte("GGUF\x03\x00\x00\x00"), make([]byte, 16)...), 0o600); err != nil {
		t.Fatal(err)
	}
	m := openModel(t, path)
	for n := 1; n <= 2; n++ {
		devs, sw := openDevices(t, n, soft.Options{})
		for name, load := range map[string]loadFunc{"Load": load, "LoadSync": loadSync} {
			w, err := load(t.Context(), m, options{}, devs...)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if err := verify(t.Context(), w, m); err != nil {
				t.Error(err)
			}
			mustClose(t, w)
		}
		if n := sw.Calls()["hipMalloc"]; n != 0 {
			t.Errorf("%d allocations for nothing", n)
		}
	}
}

// TestIntegrated loads onto a device that shares the host's memory: weights are written once, and nothing is copied.
func TestIntegrated(t *testing.T) {
	t.Parallel()
	m := openModel(t, sample)
	for _, d := range plan.Policies() {
		dev, sw := openDevice(t, soft.Options{Integrated: true, Poison: true})
		o := tight
		o.Policy = d
		var done int64
		o.Progress = func(d, _ int64) { done = d }
		w, err := load(t.Context(), m, o, dev)
		if err != nil {
			t.Fatal(err)
		}
		r := w.Report()
		if s := sw.Stats(); s.Copies != 0 || s.PeakPinnedBytes != r.DeviceBytes || sw.Calls()["hipMalloc"] != 0 {
			t.Errorf("%v: %d copies, %d bytes pinned, %d allocations of device memory; want the %d bytes of the model, in place", d,
				s.Copies, s.PeakPinnedBytes, sw.Calls()["hipMalloc"], r.DeviceBytes)
		}
		if done != int64(w.Plan().TensorBytes()) || r.PinnedBytes != 0 || r.Streams != 0 {
			t.Errorf("%v: progress ended at %d, report %+v", d, done, r)
		}
		x := w.Tensors()[3]
		if err := w.Wait(t.Context(), x.Name); err != nil {
			t.Error(err)
		}
		if err := verify(t.Context(), w, m); err != nil {
			t.Error(err)
		}
		same(t, w.Plan(), contents(t, w), wanted(t, m, o))
		mustClose(t, w)
		ctx, cancel := context.WithCancel(t.Context())
		o.Progress = func(int64, int64) { cancel() }
		if w, err := load(ctx, m, o, dev); !errors.Is(err, context.Canceled) {
			t.Errorf("%v: a cancelled load: %v, %v", d, w, err)
		}
		w, err = loadSync(t.Context(), m, o, dev)
		if err != nil {
			t.Fatal(err)
		}
		same(t, w.Plan(), contents(t, w), wanted(t, m, o))
		mustClose(t, w)
	}
}
