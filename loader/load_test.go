package loader

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels"
)

type loadFunc = func(context.Context, *amdhip.Device, *gguf.Model, Options) (*Model, error)

// tight is a pipeline with as little staging memory as there can be, so that every buffer is used again and again.
var tight = Options{Chunk: 64 << 10, Staging: 3 * 64 << 10, Threads: 4, Streams: 3}

// openDevice opens a software device and fails the test when anything is left on it, or running, at the end.
func openDevice(t *testing.T, o amdhip.SoftwareOptions) (*amdhip.Device, *amdhip.Software) {
	t.Helper()
	before := runtime.NumGoroutine()
	rt, err := amdhip.OpenSoftware(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if s := rt.Software().Stats(); s.Allocations+s.HostAllocations+s.Registrations+s.Streams+s.Events != 0 {
			t.Errorf("left on the device: %+v", s)
		}
		if err := rt.Close(); err != nil {
			t.Error(err)
		}
		for range 100 { // goroutines that have been told to end need a moment
			if runtime.NumGoroutine() <= before {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		buf := make([]byte, 1<<16)
		t.Errorf("%d goroutines, %d before:\n%s", runtime.NumGoroutine(), before, buf[:runtime.Stack(buf, true)])
	})
	dev, err := rt.Device(0)
	if err != nil {
		t.Fatal(err)
	}
	return dev, rt.Software()
}

// contents reads all tensors back from the device.
func contents(t *testing.T, w *Model) map[string][]byte {
	t.Helper()
	got := make(map[string][]byte)
	for _, x := range w.Tensors() {
		got[x.Name] = make([]byte, x.Bytes)
	}
	err := w.readBack(t.Context(), func() visitor {
		return func(c *chunk, s *segment, b []byte) error {
			copy(got[w.plan.Tensors[s.tensor].Name][w.plan.tensorOffset(s):], b)
			return nil
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// wanted is what the device should hold: the generic kernels' output, or the file's own bytes.
func wanted(t *testing.T, m *gguf.Model, o Options) map[string][]byte {
	t.Helper()
	p, err := NewPlan(m, o)
	if err != nil {
		t.Fatal(err)
	}
	k, err := kernels.For(kernels.Generic)
	if err != nil {
		t.Fatal(err)
	}
	want := make(map[string][]byte)
	for _, x := range p.Tensors {
		want[x.Name] = bytes.Clone(m.Data(x.Tensor))
		if x.Target == x.Type {
			continue
		}
		want[x.Name] = make([]byte, x.Bytes)
		if err := k.Dequantize(want[x.Name], x.Target, m.Data(x.Tensor), x.Type); err != nil {
			t.Fatal(err)
		}
	}
	return want
}

// same compares what two maps of tensors hold; NaNs may differ.
func same(t *testing.T, p *Plan, got, want map[string][]byte) {
	t.Helper()
	if len(got) != len(want) {
		t.Errorf("%d tensors, want %d", len(got), len(want))
	}
	for _, x := range p.Tensors {
		if len(got[x.Name]) != len(want[x.Name]) {
			t.Errorf("%s: %d bytes, want %d", x.Name, len(got[x.Name]), len(want[x.Name]))
		} else if i := firstDifference(got[x.Name], want[x.Name], x.Target); i >= 0 {
			t.Errorf("%s differs at byte %d", x.Name, i)
		}
	}
}

func mustClose(t *testing.T, w *Model) {
	t.Helper()
	if err := w.Close(); err != nil {
		t.Error(err)
	}
}

// TestLoad loads in every way, in every dtype, and compares the bytes.
func TestLoad(t *testing.T) {
	models := []string{sample, "../testdata/gguf/all-types.gguf", "../testdata/gguf/align8.gguf", "../testdata/gguf/align4096.gguf", "../testdata/gguf/v2.gguf"}
	for _, path := range models {
		m := openModel(t, path)
		for _, d := range DTypes() {
			want := wanted(t, m, Options{DType: d})
			for _, way := range []struct {
				name string
				load loadFunc
				o    Options
			}{
				{"default", Load, Options{}},
				{"tight", Load, tight},
				{"one of each", Load, Options{Chunk: 64 << 10, Staging: 64 << 10, Threads: 1, Streams: 1}},
				{"direct", Load, Options{IO: IODirect, Chunk: 100_000}},
				{"mmap", Load, Options{IO: IOMapped, Chunk: 100_000}},
				{"generic", Load, Options{ISA: kernels.Generic}},
				{"sync", LoadSync, Options{}},
				{"sync tight", LoadSync, tight},
			} {
				t.Run(fmt.Sprintf("%s/%v/%s", filepath.Base(path), d, way.name), func(t *testing.T) {
					dev, sw := openDevice(t, amdhip.SoftwareOptions{Poison: true})
					o := way.o
					o.DType = d
					var done, total int64
					o.Progress = func(d, t int64) { done, total = d, t }
					w, err := way.load(t.Context(), dev, m, o)
					if err != nil {
						t.Fatal(err)
					}
					defer mustClose(t, w)
					same(t, w.plan, contents(t, w), want)
					if err := w.Verify(t.Context()); err != nil {
						t.Error(err)
					}
					r := w.Report()
					if r.UploadBytes > r.DeviceBytes || int64(r.UploadBytes) != done || done != total {
						t.Errorf("%d bytes uploaded, progress %d of %d, on the device %d", r.UploadBytes, done, total, r.DeviceBytes)
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
	m := openModel(t, sample)
	dev, sw := openDevice(t, amdhip.SoftwareOptions{LinkBytesPerSecond: 400e6, LinkLatency: 50 * time.Microsecond, Poison: true})
	var loads sync.WaitGroup
	for i := range 6 {
		loads.Go(func() {
			o := tight
			o.DType = DTypes()[i%4]
			w, err := Load(t.Context(), dev, m, o)
			if err != nil {
				t.Error(err)
				return
			}
			defer mustClose(t, w)
			same(t, w.plan, contents(t, w), wanted(t, m, o))
		})
	}
	loads.Wait()
	if n := sw.Stats().Copies; n < 400 {
		t.Errorf("%d copies, want each buffer used some hundred times", n)
	}
}

// TestBounded wants pinned memory within the budget however large the model.
func TestBounded(t *testing.T) {
	m := openModel(t, sample)
	dev, sw := openDevice(t, amdhip.SoftwareOptions{LinkBytesPerSecond: 1e9})
	o := tight
	o.DType = F32
	w, err := Load(t.Context(), dev, m, o)
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
}

// TestReadiness waits for single tensors while the load runs, on the host and on a stream.
func TestReadiness(t *testing.T) {
	m := openModel(t, sample)
	dev, _ := openDevice(t, amdhip.SoftwareOptions{LinkBytesPerSecond: 50e6, Poison: true})
	o := tight
	o.DType = F32
	want := wanted(t, m, o)
	w, err := Start(t.Context(), dev, m, o)
	if err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, w)
	s, err := dev.NewStream()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	host, err := dev.HostMalloc(8 << 20)
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	first, last := w.plan.Tensors[0].Name, w.plan.Tensors[len(w.plan.Tensors)-1].Name
	for i := range w.plan.Tensors {
		name := w.plan.Tensors[i].Name
		if i%2 == 0 {
			err = w.Wait(t.Context(), name)
		} else {
			err = w.WaitStream(t.Context(), s, name)
		}
		if err != nil {
			t.Fatal(err)
		}
		x, err := w.Tensor(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.CopyToHost(host, 0, x.Ptr, int(x.Bytes)); err != nil {
			t.Fatal(err)
		}
		if err := s.Synchronize(); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(host.Bytes()[:x.Bytes], want[name]) {
			t.Errorf("%s was said to be ready and is not", name)
		}
		if name == first {
			select {
			case <-w.ready.done(w.index[last]):
				t.Error("the last tensor was ready with the first: the test shows nothing")
			default:
			}
		}
	}
	if err := w.WaitAll(t.Context()); err != nil {
		t.Error(err)
	}
	if err := w.Wait(t.Context(), "no such tensor"); err == nil {
		t.Error("waiting for an unknown tensor: no error")
	}
	if err := w.WaitStream(t.Context(), s, last); err != nil {
		t.Errorf("WaitStream after the load: %v", err)
	}
}

// TestCancel ends loads at many points. openDevice checks that nothing is left.
func TestCancel(t *testing.T) {
	m := openModel(t, sample)
	dev, _ := openDevice(t, amdhip.SoftwareOptions{LinkBytesPerSecond: 200e6})
	gone := errors.New("gone")
	for n := range 40 {
		ctx, cancel := context.WithCancelCause(t.Context())
		o := tight
		o.DType = F32
		calls := 0
		o.Progress = func(int64, int64) {
			if calls++; calls == n {
				cancel(gone)
			}
		}
		if n == 0 {
			cancel(gone)
		}
		w, err := Load(ctx, dev, m, o)
		if !errors.Is(err, gone) || w != nil {
			t.Errorf("cancelled after chunk %d: %v, want the cause", n, err)
		}
		cancel(nil)
	}
}

// TestCloseWhileLoading ends a load by closing the model.
func TestCloseWhileLoading(t *testing.T) {
	m := openModel(t, sample)
	dev, _ := openDevice(t, amdhip.SoftwareOptions{LinkBytesPerSecond: 50e6})
	w, err := Start(t.Context(), dev, m, tight)
	if err != nil {
		t.Fatal(err)
	}
	name := w.plan.Tensors[len(w.plan.Tensors)-1].Name
	waiting := make(chan error)
	go func() { waiting <- w.Wait(t.Context(), name) }()
	mustClose(t, w)
	mustClose(t, w)
	if err := <-waiting; !errors.Is(err, ErrClosed) {
		t.Errorf("Wait during Close: %v, want ErrClosed", err)
	}
	if _, err := w.Tensor(name); !errors.Is(err, ErrClosed) {
		t.Errorf("Tensor after Close: %v, want ErrClosed", err)
	}
	if got := w.Tensors(); got != nil {
		t.Errorf("%d tensors after Close", len(got))
	}
	if err := w.Verify(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("Verify after Close: %v, want ErrClosed", err)
	}
}

// TestFaults lets single HIP calls of a load fail, at once and asynchronously. openDevice checks that nothing is left.
func TestFaults(t *testing.T) {
	m := openModel(t, sample)
	for _, f := range []amdhip.Fault{
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
			dev, sw := openDevice(t, amdhip.SoftwareOptions{})
			sw.Inject(f)
			w, err := Load(t.Context(), dev, m, tight)
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
			if x, ok := errors.AsType[*TensorError](err); strings.HasPrefix(f.Func, "hipMemcpy") && (!ok || x.Op != "copy" || x.Bytes == 0) {
				t.Errorf("%v does not say which tensor's bytes", err)
			}
			w, err = Load(t.Context(), dev, m, tight) // the fault is over
			if err != nil {
				t.Fatalf("the load after the fault: %v", err)
			}
			mustClose(t, w)
		})
	}
}

// TestUnpinnable loads although nothing can be pinned.
func TestUnpinnable(t *testing.T) {
	m := openModel(t, sample)
	dev, sw := openDevice(t, amdhip.SoftwareOptions{})
	sw.Inject(amdhip.Fault{Func: "hipHostMalloc", Code: amdhip.ErrOutOfMemory})
	sw.Inject(amdhip.Fault{Func: "hipHostRegister", Code: amdhip.ErrInvalidValue})
	for name, load := range map[string]loadFunc{"Load": Load, "LoadSync": LoadSync} {
		w, err := load(t.Context(), dev, m, tight)
		if err != nil {
			t.Fatal(err)
		}
		if r := w.Report(); r.UnpinnedCopies == 0 || r.PinnedBytes != 0 {
			t.Errorf("%s: %d unpinned copies, %d bytes pinned", name, r.UnpinnedCopies, r.PinnedBytes)
		}
		same(t, w.plan, contents(t, w), wanted(t, m, tight))
		mustClose(t, w)
	}
}

// TestStall gives up on a copy that never ends, and leaves alone what the device may still use.
func TestStall(t *testing.T) {
	m := openModel(t, sample)
	rt, err := amdhip.OpenSoftware(amdhip.SoftwareOptions{})
	if err != nil {
		t.Fatal(err)
	}
	dev, err := rt.Device(0)
	if err != nil {
		t.Fatal(err)
	}
	rt.Software().Inject(amdhip.Fault{Func: "hipMemcpyAsync", N: 9, Stall: true})
	o := tight
	o.Stall = time.Second
	_, err = Load(t.Context(), dev, m, o)
	if !errors.Is(err, ErrStalled) || !strings.Contains(err.Error(), "copies in flight, the first for tensor \"") {
		t.Errorf("%v, want ErrStalled, what is waited for, and the tensor", err)
	}
	if s := rt.Software().Stats(); s.HostAllocations+s.Registrations == 0 {
		t.Error("staging buffers were freed although the device may still read them")
	}
	if err := rt.Close(); err != nil {
		t.Error(err)
	}
}

// TestStalledReadBack is the same for Verify.
func TestStalledReadBack(t *testing.T) {
	m := openModel(t, sample)
	rt, err := amdhip.OpenSoftware(amdhip.SoftwareOptions{})
	if err != nil {
		t.Fatal(err)
	}
	dev, err := rt.Device(0)
	if err != nil {
		t.Fatal(err)
	}
	o := tight
	o.Stall = time.Second
	w, err := Load(t.Context(), dev, m, o)
	if err != nil {
		t.Fatal(err)
	}
	rt.Software().Inject(amdhip.Fault{Func: "hipMemcpyAsync", N: 5, Stall: true})
	if err := w.Verify(t.Context()); !errors.Is(err, ErrStalled) {
		t.Errorf("%v, want ErrStalled", err)
	}
	mustClose(t, w)
	if s := rt.Software().Stats(); s.Allocations == 0 || s.HostAllocations+s.Registrations == 0 {
		t.Error("memory was freed although the device may still use it")
	}
	if err := rt.Close(); err != nil {
		t.Error(err)
	}
}

// TestTruncated shortens the file while it is being loaded.
func TestTruncated(t *testing.T) {
	data, err := os.ReadFile(sample)
	if err != nil {
		t.Fatal(err)
	}
	for _, io := range []IO{IOMapped, IODirect, IOAuto} {
		t.Run(io.String(), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "model.gguf")
			if err := os.WriteFile(path, data, 0o600); err != nil {
				t.Fatal(err)
			}
			m := openModel(t, path)
			if err := os.Truncate(path, int64(len(data))/2&^4095); err != nil {
				if runtime.GOOS == "windows" {
					t.Skip("Windows does not let a mapped file be shortened")
				}
				t.Fatal(err)
			}
			dev, _ := openDevice(t, amdhip.SoftwareOptions{})
			o := tight
			o.IO = io
			_, err := Load(t.Context(), dev, m, o)
			x, ok := errors.AsType[*TensorError](err)
			if !ok || x.Op != "read" || !errors.Is(err, gguf.ErrTruncated) || !strings.Contains(err.Error(), path) {
				t.Errorf("%v, want a read error with tensor and file", err)
			}
		})
	}
}

// TestMismatch flips a bit of device memory and wants Verify to find it.
func TestMismatch(t *testing.T) {
	m := openModel(t, sample)
	for _, d := range DTypes() {
		dev, sw := openDevice(t, amdhip.SoftwareOptions{})
		o := tight
		o.DType = d
		w, err := Load(t.Context(), dev, m, o)
		if err != nil {
			t.Fatal(err)
		}
		x := w.Tensors()[len(w.Tensors())/2]
		at := x.Bytes - 3
		if err := sw.FlipBit(x.Ptr+amdhip.DevicePtr(at), 5); err != nil {
			t.Fatal(err)
		}
		err = w.Verify(t.Context())
		e, ok := errors.AsType[*MismatchError](err)
		if !ok || !errors.Is(err, ErrMismatch) || e.Tensor != x.Name || uint64(e.Offset) > at || uint64(e.Offset)+4 <= at || bytes.Equal(e.Got, e.Want) {
			t.Errorf("%v: %v, want byte %d of %s", d, err, at, x.Name)
		}
		mustClose(t, w)
	}
}

// TestSafetensors reads the header back with a decoder of its own.
func TestSafetensors(t *testing.T) {
	m := openModel(t, "../testdata/gguf/all-types.gguf")
	dev, _ := openDevice(t, amdhip.SoftwareOptions{})
	w, err := Load(t.Context(), dev, m, Options{DType: Raw, Rules: []Rule{{regexp.MustCompile("q4_K|Q4_K"), F16}}})
	if err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, w)
	path := filepath.Join(t.TempDir(), "x.safetensors")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.WriteSafetensors(t.Context(), f); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	n := int(b[0]) | int(b[1])<<8 | int(b[2])<<16
	var header map[string]struct {
		DType       string   `json:"dtype"`
		Shape       []uint64 `json:"shape"`
		DataOffsets [2]int   `json:"data_offsets"`
	}
	if err := json.Unmarshal(bytes.Replace(b[8:8+n], []byte(`"__metadata__":{"format":"gguf2gpu"},`), nil, 1), &header); err != nil {
		t.Fatal(err)
	}
	if n%8 != 0 {
		t.Errorf("the data begins at %d, which is not aligned", 8+n)
	}
	want := contents(t, w)
	for _, x := range w.Tensors() {
		h := header[x.Name]
		if !bytes.Equal(b[8+n+h.DataOffsets[0]:8+n+h.DataOffsets[1]], want[x.Name]) {
			t.Errorf("%s: other bytes", x.Name)
		}
		elems := uint64(1)
		for _, d := range h.Shape {
			elems *= d
		}
		if x.DType.Quantized() {
			if h.DType != "U8" || len(h.Shape) != 1 || elems != x.Bytes {
				t.Errorf("%s: %s %v", x.Name, h.DType, h.Shape)
			}
		} else if h.DType != x.DType.String() || elems*uint64(x.DType.BlockBytes()) != x.Bytes || h.Shape[0] != x.Shape[len(x.Shape)-1] {
			t.Errorf("%s: %s %v, want %v %v reversed", x.Name, h.DType, h.Shape, x.DType, x.Shape)
		}
	}
	if len(header) != len(want) {
		t.Errorf("%d entries, want %d", len(header), len(want))
	}
}

// TestTrace wants every stage on the timeline, and stages that overlap.
func TestTrace(t *testing.T) {
	m := openModel(t, sample)
	dev, _ := openDevice(t, amdhip.SoftwareOptions{LinkBytesPerSecond: 200e6})
	o := tight
	o.IO, o.Trace = IODirect, new(Trace)
	w, err := Load(t.Context(), dev, m, o)
	if err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, w)
	var out bytes.Buffer
	if _, err := o.Trace.WriteTo(&out); err != nil {
		t.Fatal(err)
	}
	type event struct {
		Name, Ph string
		Ts, Dur  float64
		Tid      int
		Args     struct{ Tensor, Name string }
	}
	var got struct{ TraceEvents []event }
	if err := json.Unmarshal(out.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	spans := make(map[string][]event)
	tracks := make(map[string]bool)
	for _, e := range got.TraceEvents {
		if e.Ph == "M" {
			tracks[strings.Fields(e.Args.Name)[0]] = true
			continue
		}
		spans[e.Name] = append(spans[e.Name], e)
		if e.Args.Tensor == "" || e.Ts < 0 || e.Dur < 0 {
			t.Errorf("event %+v", e)
		}
	}
	for _, name := range []string{"wait", "issue", "copy"} {
		if len(spans[name]) != len(w.chunks) {
			t.Errorf("%d events %q, want %d", len(spans[name]), name, len(w.chunks))
		}
	}
	if n := len(spans["dequantize"]) + len(spans["stage"]); n != len(w.chunks) || len(spans["read"]) == 0 {
		t.Errorf("%d chunks filled, %d reads; want %d chunks", n, len(spans["read"]), len(w.chunks))
	}
	for _, track := range []string{"worker", "reader", "stream"} {
		if !tracks[track] {
			t.Errorf("no track of a %s", track)
		}
	}
	overlap := 0
	for _, c := range spans["copy"] {
		for _, d := range spans["dequantize"] {
			if c.Ts < d.Ts+d.Dur && d.Ts < c.Ts+c.Dur {
				overlap++
			}
		}
	}
	if overlap < len(w.chunks)/4 {
		t.Errorf("%d of %d chunks were copied while another was dequantized", overlap, len(w.chunks))
	}
}

// TestEmptySelection of zero tensors in the file itself is a load of nothing.
func TestNoTensors(t *testing.T) {
	path := filepath.Join(t.TempDir(), "empty.gguf")
	// Magic, version 3, no tensors, no metadata.
	if err := os.WriteFile(path, append([]byte("GGUF\x03\x00\x00\x00"), make([]byte, 16)...), 0o600); err != nil {
		t.Fatal(err)
	}
	m := openModel(t, path)
	dev, _ := openDevice(t, amdhip.SoftwareOptions{})
	for name, load := range map[string]loadFunc{"Load": Load, "LoadSync": LoadSync} {
		w, err := load(t.Context(), dev, m, Options{})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if err := w.Verify(t.Context()); err != nil {
			t.Error(err)
		}
		mustClose(t, w)
	}
}

// TestIntegrated loads onto a device that shares the host's memory: weights are written once, and nothing is copied.
func TestIntegrated(t *testing.T) {
	m := openModel(t, sample)
	for _, d := range DTypes() {
		dev, sw := openDevice(t, amdhip.SoftwareOptions{Integrated: true, Poison: true})
		o := tight
		o.DType = d
		var done int64
		o.Progress = func(d, _ int64) { done = d }
		w, err := Load(t.Context(), dev, m, o)
		if err != nil {
			t.Fatal(err)
		}
		r := w.Report()
		if s := sw.Stats(); s.Copies != 0 || s.PeakPinnedBytes != r.DeviceBytes || sw.Calls()["hipMalloc"] != 0 {
			t.Errorf("%v: %d copies, %d bytes pinned, %d allocations of device memory; want the %d bytes of the model, in place", d,
				s.Copies, s.PeakPinnedBytes, sw.Calls()["hipMalloc"], r.DeviceBytes)
		}
		if done != int64(r.UploadBytes) || r.PinnedBytes != 0 || r.Streams != 0 {
			t.Errorf("%v: progress ended at %d, report %+v", d, done, r)
		}
		x := w.Tensors()[3]
		if err := w.Wait(t.Context(), x.Name); err != nil {
			t.Error(err)
		}
		if err := w.Verify(t.Context()); err != nil {
			t.Error(err)
		}
		same(t, w.plan, contents(t, w), wanted(t, m, o))
		mustClose(t, w)
		ctx, cancel := context.WithCancel(t.Context())
		o.Progress = func(int64, int64) { cancel() }
		if w, err := Load(ctx, dev, m, o); !errors.Is(err, context.Canceled) {
			t.Errorf("%v: a cancelled load: %v, %v", d, w, err)
		}
		w, err = LoadSync(t.Context(), dev, m, o)
		if err != nil {
			t.Fatal(err)
		}
		same(t, w.plan, contents(t, w), wanted(t, m, o))
		mustClose(t, w)
	}
}
