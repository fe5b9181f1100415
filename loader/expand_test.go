package loader

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels/gpu"
)

// onGPU are options with which the device converts whatever it can.
func onGPU(o Options, d DType) Options {
	o.DType, o.Dequant = d, DequantGPU
	return o
}

// TestExpand lets the device convert, in every dtype, and compares the bytes.
func TestExpand(t *testing.T) {
	for _, path := range []string{sample, "../testdata/gguf/all-types.gguf", "../testdata/gguf/align8.gguf"} {
		m := openModel(t, path)
		for _, d := range []DType{F16, F32, BF16} {
			want := wanted(t, m, Options{DType: d})
			for name, o := range map[string]Options{
				"default": {},
				"tight":   tight,
				"one":     {Chunk: 64 << 10, Staging: 64 << 10, Threads: 1, Streams: 1},
				"checked": {Chunk: 100_000, Hash: true},
				"mixed":   {Rules: []Rule{mustRule(t, "attn=raw")}},
			} {
				t.Run(fmt.Sprintf("%s/%v/%s", filepath.Base(path), d, name), func(t *testing.T) {
					dev, sw := openDevice(t, amdhip.SoftwareOptions{Poison: true})
					o, want := onGPU(o, d), want
					if o.Rules != nil {
						want = wanted(t, m, o)
					}
					var done, total int64
					o.Progress = func(d, t int64) { done, total = d, t }
					w, err := Load(t.Context(), dev, m, o)
					if err != nil {
						t.Fatal(err)
					}
					defer mustClose(t, w)
					same(t, w.plan, contents(t, w), want)
					if err := w.Verify(t.Context()); err != nil {
						t.Error(err)
					}
					r := w.Report()
					if n := expandableTensors(w.plan); r.Expanded != n || n == 0 && path == sample {
						t.Errorf("%d tensors were expanded, want %d", r.Expanded, n)
					}
					if int64(r.UploadBytes) != done || done != total {
						t.Errorf("%d bytes uploaded, progress %d of %d", r.UploadBytes, done, total)
					}
					if path == sample && d == F32 && r.UploadBytes*2 > r.DeviceBytes {
						t.Errorf("%d bytes uploaded for %d", r.UploadBytes, r.DeviceBytes)
					}
					if s := sw.Stats(); s.DeviceBytes != r.DeviceBytes || s.Modules != 0 {
						t.Errorf("%d bytes on the device, want %d; %d modules", s.DeviceBytes, r.DeviceBytes, s.Modules)
					}
				})
			}
		}
	}
}

func mustRule(t *testing.T, s string) Rule {
	t.Helper()
	r, err := ParseRule(s)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// expandableTensors counts the tensors that a device could convert, from what is known of types and sizes.
func expandableTensors(p *Plan) (n int) {
	for _, t := range p.Tensors {
		if t.Target != t.Type && t.Type != gguf.F64 && t.Size >= minExpand {
			n++
		}
	}
	return n
}

// TestExpandScratchIsBounded looks at the device's memory while a load runs.
func TestExpandScratchIsBounded(t *testing.T) {
	m := openModel(t, sample)
	dev, sw := openDevice(t, amdhip.SoftwareOptions{})
	o := onGPU(tight, F16)
	o.Streams = 200
	w, err := Load(t.Context(), dev, m, o)
	if err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, w)
	r := w.Report()
	if r.Streams != 3 || r.ScratchBytes == 0 || r.ScratchBytes > uint64(o.Staging)+3*2*deviceAlign {
		t.Errorf("%d streams with %d bytes of scratch memory, the staging memory has %d", r.Streams, r.ScratchBytes, o.Staging)
	}
	if peak := sw.Stats().PeakDeviceBytes; peak > r.DeviceBytes+r.ScratchBytes+1<<20 { // the kernels' check needs some, too
		t.Errorf("%d bytes on the device at most, want %d and %d", peak, r.DeviceBytes, r.ScratchBytes)
	}
}

// TestExpandNeedsMemory wants the scratch memory to be part of what must fit.
func TestExpandNeedsMemory(t *testing.T) {
	m := openModel(t, sample)
	plan, err := NewPlan(m, Options{})
	if err != nil {
		t.Fatal(err)
	}
	dev, _ := openDevice(t, amdhip.SoftwareOptions{Memory: plan.DeviceBytes + 4096})
	_, err = Load(t.Context(), dev, m, onGPU(tight, F16))
	if e, ok := errors.AsType[*InsufficientMemoryError](err); !ok || e.Needed <= plan.DeviceBytes {
		t.Errorf("got %v, want the model's %d bytes and the scratch memory to be too much", err, plan.DeviceBytes)
	}
	o := tight
	o.autoAlways = true
	w, err := Load(t.Context(), dev, m, o)
	if err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, w)
	if n := w.Report().Expanded; n != 0 {
		t.Errorf("%d tensors were expanded in too little memory", n)
	}
}

// TestAutoKeepsToTheCPU where a device has nothing to gain.
func TestAutoKeepsToTheCPU(t *testing.T) {
	m := openModel(t, sample)
	for name, o := range map[string]Options{"software": {}, "nothing to convert": {DType: Raw, autoAlways: true}} {
		t.Run(name, func(t *testing.T) {
			dev, sw := openDevice(t, amdhip.SoftwareOptions{})
			w, err := Load(t.Context(), dev, m, o)
			if err != nil {
				t.Fatal(err)
			}
			defer mustClose(t, w)
			if n := sw.Calls()["hipModuleLoadData"]; n != 0 || w.Report().Expanded != 0 {
				t.Errorf("%d modules were loaded, %d tensors expanded", n, w.Report().Expanded)
			}
		})
	}
}

// TestAutoExpandsWhatShrinks leaves to the CPU what has more bytes in the file than on the device.
func TestAutoExpandsWhatShrinks(t *testing.T) {
	m := openModel(t, sample)
	dev, _ := openDevice(t, amdhip.SoftwareOptions{})
	w, err := Load(t.Context(), dev, m, Options{autoAlways: true})
	if err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, w)
	for _, x := range w.plan.Tensors {
		if want := x.Target != x.Type && x.Bytes >= uint64(x.Size) && x.Size >= minExpand; x.expand != want {
			t.Errorf("%s, %v to %v: expanded on the device: %v", x.Name, x.Type, x.Target, x.expand)
		}
	}
}

// lateLaunch is the number of a launch in the middle of a load of the sample, long after the kernels' check.
const lateLaunch = 30

// expandFaults are ways in which a device fails to convert: before the load, in the middle of it, at once and later.
var expandFaults = []amdhip.Fault{
	{Func: "hiprtcCompileProgram", N: 1, Code: 6},
	{Func: "hipModuleLoadData", Code: amdhip.ErrInvalidImage},
	{Func: "hipModuleGetFunction", N: 2, Code: amdhip.ErrNotFound},
	{Func: "hipModuleLaunchKernel", N: 1, Code: amdhip.ErrLaunchFailure},
	{Func: "hipModuleLaunchKernel", N: lateLaunch, Code: amdhip.ErrLaunchFailure},
	{Func: "hipModuleLaunchKernel", N: lateLaunch, Code: amdhip.ErrLaunchFailure, Async: true},
	{Func: "hipModuleLaunchKernel", N: lateLaunch + 5, Code: amdhip.ErrIllegalAddress, Async: true},
}

// TestAutoFallsBack wants the CPU to take over, whenever the device fails, with one warning.
func TestAutoFallsBack(t *testing.T) {
	m := openModel(t, sample)
	want := wanted(t, m, Options{})
	for _, f := range expandFaults {
		t.Run(faultName(f), func(t *testing.T) {
			dev, sw := openDevice(t, amdhip.SoftwareOptions{Poison: true})
			sw.Inject(f)
			var log bytes.Buffer
			o := tight
			o.autoAlways, o.Logger = true, slog.New(slog.NewTextHandler(&log, nil))
			w, err := Start(t.Context(), dev, m, o)
			if err != nil {
				t.Fatal(err)
			}
			defer mustClose(t, w)
			for _, x := range w.Tensors() {
				if err := w.Wait(t.Context(), x.Name); err != nil {
					t.Fatal(err)
				}
			}
			if err := w.WaitAll(t.Context()); err != nil {
				t.Fatal(err)
			}
			same(t, w.plan, contents(t, w), want)
			if n := strings.Count(log.String(), "level=WARN"); n != 1 || !strings.Contains(log.String(), "CPU") {
				t.Errorf("want one warning that the CPU converts:\n%s", &log)
			}
			if r := w.Report(); r.Expanded != 0 || r.ScratchBytes != 0 || r.UploadBytes < r.DeviceBytes/2 {
				t.Errorf("the report speaks of the attempt that failed: %+v", r)
			}
			sw.ClearFaults()
		})
	}
}

// TestGPUFails wants the same failures to end a load that insists on the device, with nothing left there.
func TestGPUFails(t *testing.T) {
	m := openModel(t, sample)
	for _, f := range expandFaults {
		t.Run(faultName(f), func(t *testing.T) {
			dev, sw := openDevice(t, amdhip.SoftwareOptions{})
			sw.Inject(f)
			w, err := Load(t.Context(), dev, m, onGPU(tight, F16))
			if err == nil {
				mustClose(t, w)
				t.Fatal("no error")
			}
			if f.Func != "hiprtcCompileProgram" && !errors.Is(err, f.Code) {
				t.Errorf("%v is not %v", err, f.Code)
			}
			if s := sw.Stats(); s.Allocations != 0 || s.Modules != 0 {
				t.Errorf("left on the device: %+v", s)
			}
		})
	}
}

func faultName(f amdhip.Fault) string { return fmt.Sprintf("%s_%d_%v", f.Func, f.N, f.Async) }

// TestExpandStalls wants a kernel that never ends to be given up, and the CPU not to try on a device that hangs.
func TestExpandStalls(t *testing.T) {
	m := openModel(t, sample)
	for _, d := range []Dequant{DequantAuto, DequantGPU} {
		t.Run(d.String(), func(t *testing.T) {
			rt, err := amdhip.OpenSoftware(amdhip.SoftwareOptions{})
			if err != nil {
				t.Fatal(err)
			}
			defer rt.Close()
			dev, err := rt.Device(0)
			if err != nil {
				t.Fatal(err)
			}
			sw := rt.Software()
			sw.Inject(amdhip.Fault{Func: "hipModuleLaunchKernel", N: lateLaunch, Stall: true})
			defer sw.ClearFaults()
			w, err := Load(t.Context(), dev, m, Options{
				DType: F16, Dequant: d, autoAlways: true, Stall: 50 * time.Millisecond, Chunk: tight.Chunk, Staging: tight.Staging,
			})
			if !errors.Is(err, ErrStalled) {
				t.Errorf("got %v, want %v", err, ErrStalled)
			}
			if w != nil {
				mustClose(t, w)
			}
		})
	}
}

// TestExpandCompilerIsAsked wants the caller's compiler to be used.
func TestExpandCompilerIsAsked(t *testing.T) {
	m := openModel(t, sample)
	dev, _ := openDevice(t, amdhip.SoftwareOptions{})
	dir := t.TempDir()
	o := onGPU(Options{}, F16)
	o.Compiler = &gpu.Compiler{Dir: dir}
	w, err := Load(t.Context(), dev, m, o)
	if err != nil {
		t.Fatal(err)
	}
	mustClose(t, w)
	if files, err := filepath.Glob(filepath.Join(dir, "*")); len(files) == 0 {
		t.Errorf("nothing was kept in the compiler's directory: %v", err)
	}
}

func TestParseDequant(t *testing.T) {
	for _, d := range []Dequant{DequantAuto, DequantCPU, DequantGPU} {
		if got, err := ParseDequant(d.String()); err != nil || got != d {
			t.Errorf("%v is read as %v, %v", d, got, err)
		}
	}
	if _, err := ParseDequant("tpu"); err == nil || !strings.Contains(err.Error(), "auto, cpu, gpu") {
		t.Errorf("got %v, want what is allowed", err)
	}
}
