package loader

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// TestCancel ends loads at many points. openDevice checks that nothing is left.
func TestCancel(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := openModel(t, sample)
		dev, _ := openDevice(t, soft.Options{LinkBytesPerSecond: 200e6})
		gone := errors.New("gone")
		for n := range 40 {
			ctx, cancel := context.WithCancelCause(t.Context())
			o := tight
			o.Policy = plan.F32
			calls := 0
			o.Progress = func(int64, int64) {
				if calls++; calls == n {
					cancel(gone)
				}
			}
			if n == 0 {
				cancel(gone)
			}
			w, err := load(ctx, m, o, dev)
			if !errors.Is(err, gone) || w != nil {
				t.Errorf("cancelled after chunk %d: %v, want the cause", n, err)
			}
			cancel(nil)
		}
	})
}

// TestCloseWhileLoading ends a load by closing the model.
func TestCloseWhileLoading(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := openModel(t, sample)
		dev, _ := openDevice(t, soft.Options{LinkBytesPerSecond: 50e6})
		w := start(t.Context(), t, m, tight, dev)
		tensors := w.Plan().Tensors()
		name := tensors[len(tensors)-1].Name
		waiting := make(chan error)
		go func() { waiting <- w.Wait(t.Context(), name) }()
		mustClose(t, w)
		mustClose(t, w)
		if err := <-waiting; !errors.Is(err, ErrClosed) {
			t.Errorf("Wait during Close: %v, want ErrClosed", err)
		}
		wantClosed(t, w, newStream(t, dev), name)
	})
}

// wantClosed wants every method to say that w is closed.
func wantClosed(t *testing.T, w *Model, s *amdhip.Stream, name string) {
	t.Helper()
	_, tensor := w.Tensor(name)
	_, tensorOn := w.TensorOn(s.Device(), name)
	_, allocations := w.Allocations()
	for what, err := range map[string]error{
		"Wait": w.Wait(t.Context(), name), "WaitAll": w.WaitAll(t.Context()), "WaitStream": w.WaitStream(t.Context(), s, name),
		"Tensor": tensor, "TensorOn": tensorOn, "Allocations": allocations,
		"ReadBack": w.ReadBack(t.Context(), ReadOptions{}, func() func(Piece) error { return func(Piece) error { return nil } }),
	} {
		if !errors.Is(err, ErrClosed) {
			t.Errorf("%s after Close: %v, want ErrClosed", what, err)
		}
	}
	if got := w.Tensors(); got != nil {
		t.Errorf("%d tensors after Close", len(got))
	}
	if got := w.Hashes(); got != nil {
		t.Errorf("%d hashes after Close", len(got))
	}
}

// TestFaults lets single HIP calls of a load fail, at once and asynchronously. openDevice checks that nothing is left.
func TestFaults(t *testing.T) {
	t.Parallel()
	for _, f := range []soft.Fault{
		{Func: "hipMemGetInfo", N: 1, Code: amdhip.ErrUnknown},
		{Func: "hipMalloc", N: 1, Code: amdhip.ErrOutOfMemory},
		{Func: "hipStreamCreateWithFlags", N: 1, Code: amdhip.ErrOutOfMemory},
		{Func: "hipStreamCreateWithFlags", N: 3, Code: amdhip.ErrUnknown},
		{Func: "hipEventCreateWithFlags", N: 1, Code: amdhip.ErrOutOfMemory},
		{Func: "hipMemcpyAsync", N: 1, Code: amdhip.ErrInvalidValue},
		{Func: "hipMemcpyAsync", N: 17, Code: amdhip.ErrUnknown},
		{Func: "hipMemcpyAsync", N: 1, Code: amdhip.ErrIllegalAddress, Async: true},
		{Func: "hipMemcpyAsync", N: 23, Code: amdhip.ErrIllegalAddress, Async: true},
		{Func: "hipEventRecord", N: 5, Code: amdhip.ErrInvalidHandle},
		{Func: "hipEventQuery", N: 4, Code: amdhip.ErrLaunchFailure},
	} {
		t.Run(fmt.Sprintf("%s %d async=%v", f.Func, f.N, f.Async), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				m := openModel(t, sample)
				dev, sw := openDevice(t, soft.Options{})
				sw.Inject(f)
				w, err := load(t.Context(), m, tight, dev)
				if w != nil || !errors.Is(err, f.Code) {
					t.Fatalf("%v, want %v", err, f.Code)
				}
				call := f.Func
				if f.Async { // it is the event behind the copy that tells
					call = "hipEventQuery"
				}
				if !strings.Contains(err.Error(), call) {
					t.Errorf("%v does not name %s", err, call)
				}
				x, ok := errors.AsType[*TensorError](err)
				if strings.HasPrefix(f.Func, "hipMemcpy") && (!ok || x.Op != "copy" || x.Bytes == 0) {
					t.Errorf("%v does not say which tensor's bytes", err)
				}
				w, err = load(t.Context(), m, tight, dev) // the fault is over
				if err != nil {
					t.Fatalf("the load after the fault: %v", err)
				}
				mustClose(t, w)
			})
		})
	}
}

// TestUnpinnable loads although nothing can be pinned.
func TestUnpinnable(t *testing.T) {
	t.Parallel()
	m := openModel(t, sample)
	dev, sw := openDevice(t, soft.Options{})
	sw.Inject(soft.Fault{Func: "hipHostMalloc", Code: amdhip.ErrOutOfMemory})
	sw.Inject(soft.Fault{Func: "hipHostRegister", Code: amdhip.ErrInvalidValue})
	for name, load := range map[string]loadFunc{"Load": load, "LoadSync": loadSync} {
		w, err := load(t.Context(), m, tight, dev)
		if err != nil {
			t.Fatal(err)
		}
		if r := w.Report(); r.UnpinnedCopies == 0 || r.PinnedBytes != 0 {
			t.Errorf("%s: %d unpinned copies, %d bytes pinned", name, r.UnpinnedCopies, r.PinnedBytes)
		}
		same(t, w.Plan(), contents(t, w), wanted(t, m, tight))
		mustClose(t, w)
	}
}

// TestStall gives up on a copy that never ends, and leaves alone what the device may still use. Both the model's Close
// and the Loader's say how much that is.
func TestStall(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := openModel(t, sample)
		devs, sw := leakyDevices(t, 1, soft.Options{})
		sw.Inject(soft.Fault{Func: "hipMemcpyAsync", N: 9, Stall: true})
		l, err := New(devs, tight.config())
		if err != nil {
			t.Fatal(err)
		}
		w, err := l.Start(t.Context(), mustPlan(t, l, m, tight), tight.request())
		if err != nil {
			t.Fatal(err)
		}
		err = w.WaitAll(t.Context())
		if !errors.Is(err, ErrStalled) || !strings.Contains(err.Error(), "copies in flight, the first for tensor \"") {
			t.Errorf("%v, want ErrStalled, what is waited for, and the tensor", err)
		}
		bytes := w.Report().DeviceBytes
		for range 2 { // the second call says so, too
			if e, ok := errors.AsType[*LeftError](w.Close()); !ok || e.DeviceBytes != bytes || !errors.Is(e, ErrStalled) {
				t.Errorf("the model's Close: %v, want that %d bytes are left", e, bytes)
			}
			if e, ok := errors.AsType[*LeftError](l.Close()); !ok || e.HostBytes != sw.Stats().PinnedBytes || e.HostBytes == 0 {
				t.Errorf("the Loader's Close: %v, want that %d bytes are left", e, sw.Stats().PinnedBytes)
			}
		}
		if s := sw.Stats(); s.HostAllocations+s.Registrations == 0 || s.Allocations == 0 {
			t.Errorf("memory was freed although the device may still use it: %+v", s)
		}
		wantClosed(t, w, newStream(t, devs[0]), w.Plan().Tensors()[0].Name)
	})
}

// TestStalledReadBack is the same for reading back.
func TestStalledReadBack(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := openModel(t, sample)
		devs, sw := leakyDevices(t, 1, soft.Options{})
		w, err := load(t.Context(), m, tight, devs[0])
		if err != nil {
			t.Fatal(err)
		}
		sw.Inject(soft.Fault{Func: "hipMemcpyAsync", N: 2, Stall: true})
		if err := verify(t.Context(), w, m); !errors.Is(err, ErrStalled) {
			t.Errorf("%v, want ErrStalled", err)
		}
		if e, ok := errors.AsType[*LeftError](w.Close()); !ok || e.DeviceBytes != w.Report().DeviceBytes {
			t.Errorf("Close: %v, want that %d bytes are left", e, w.Report().DeviceBytes)
		}
		if s := sw.Stats(); s.Allocations == 0 || s.HostAllocations+s.Registrations == 0 {
			t.Error("memory was freed although the device may still use it")
		}
	})
}

// TestTruncated shortens the file while it is being loaded.
func TestTruncated(t *testing.T) {
	t.Parallel()
	for _, io := range []IO{IOMapped, IODirect, IOAuto} {
		t.Run(io.String(), func(t *testing.T) {
			t.Parallel()
			path := ownCopy(t, sample)
			m := openModel(t, path)
			if err := os.Truncate(path, int64(m.Size())/2&^4095); err != nil {
				if runtime.GOOS == "windows" {
					t.Skip("Windows does not let a mapped file be shortened")
				}
				t.Fatal(err)
			}
			dev, _ := openDevice(t, soft.Options{})
			o := tight
			o.IO = io
			_, err := load(t.Context(), m, o, dev)
			x, ok := errors.AsType[*TensorError](err)
			if !ok || x.Op != "read" || !errors.Is(err, gguf.ErrTruncated) || !strings.Contains(err.Error(), filepath.Base(path)) {
				t.Errorf("%v, want a read error with tensor and file", err)
			}
		})
	}
}
