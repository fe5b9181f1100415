package loader

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels/gpu"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// onGPU returns options with which the device converts whatever it can.
func onGPU(o options, d plan.Policy) options {
	o.Policy, o.Dequant = d, DequantGPU
	return o
}

// TestExpand lets the device convert, with every policy, and compares the bytes.
func TestExpand(t *testing.T) {
	t.Parallel()
	for _, path := range []string{sample, allTypes, small} {
		m := openModel(t, path)
		for _, d := range []plan.Policy{plan.F16, plan.F32, plan.BF16} {
			want := wanted(t, m, options{Policy: d})
			for name, o := range map[string]options{
				"default": {},
				"tight":   tight,
				"one":     {Chunk: 64 << 10, Staging: 64 << 10, Threads: 1, Streams: 1},
				"checked": {Chunk: 100_000, Hash: true},
				"mixed":   {Rules: []plan.Rule{mustRule(t, "attn=raw")}},
			} {
				t.Run(fmt.Sprintf("%s/%v/%s", filepath.Base(path), d, name), func(t *testing.T) {
					t.Parallel()
					dev, sw := openDevice(t, soft.Options{Poison: true})
					o, want := onGPU(o, d), want
					if o.Rules != nil {
						want = wanted(t, m, o)
					}
					var done, total int64
					o.Progress = func(d, t int64) { done, total = d, t }
					w, err := load(t.Context(), m, o, dev)
					if err != nil {
						t.Fatal(err)
					}
					defer mustClose(t, w)
					same(t, w.Plan(), contents(t, w), want)
					if err := verify(t.Context(), w, m); err != nil {
						t.Error(err)
					}
					r := w.Report()
					if n := expandableTensors(w.Plan()); r.Expanded != n || n == 0 && path == sample {
						t.Errorf("%d tensors were expanded, want %d", r.Expanded, n)
					}
					if done != total || uint64(done) != w.Plan().TensorBytes() {
						t.Errorf("progress %d of %d, want %d", done, total, w.Plan().TensorBytes())
					}
					if path == sample && d == plan.F32 && r.UploadBytes*2 > r.DeviceBytes {
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

func mustRule(t *testing.T, s string) (r plan.Rule) {
	t.Helper()
	if err := r.UnmarshalText([]byte(s)); err != nil {
		t.Fatal(err)
	}
	return r
}

// expandableTensors counts the tensors that a device could convert, from what is known of types and sizes.
func expandableTensors(p *plan.Plan) (n int) {
	for _, t := range p.Tensors() {
		if t.Target != t.Type && t.Type != gguf.F64 && t.Size >= minExpand {
			n++
		}
	}
	return n
}

// TestExpandScratchIsBounded looks at the device's memory while a load runs.
func TestExpandScratchIsBounded(t *testing.T) {
	t.Parallel()
	m := openModel(t, sample)
	dev, sw := openDevice(t, soft.Options{})
	o := onGPU(tight, plan.F16)
	o.Streams = 200
	w, err := load(t.Context(), m, o, dev)
	if err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, w)
	r := w.Report()
	if r.Streams != 3 || r.ScratchBytes == 0 || r.ScratchBytes > uint64(o.Staging)+3*2*plan.Align {
		t.Errorf("%d streams with %d bytes of scratch memory, the staging memory has %d", r.Streams, r.ScratchBytes, o.Staging)
	}
	// The kernels' check needs some, too.
	if peak := sw.Stats().PeakDeviceBytes; peak > r.DeviceBytes+r.ScratchBytes+1<<20 {
		t.Errorf("%d bytes on the device at most, want %d and %d", peak, r.DeviceBytes, r.ScratchBytes)
	}
}

// TestExpandNeedsMemory wants the scratch memory to be part of what must fit.
func TestExpandNeedsMemory(t *testing.T) {
	t.Parallel()
	m := openModel(t, sample)
	bytes := planned(t, m, options{}).DeviceBytes()
	dev, _ := openDevice(t, soft.Options{Memory: bytes + 4096})
	_, err := load(t.Context(), m, onGPU(tight, plan.F16), dev)
	if e, ok := errors.AsType[*plan.MemoryError](err); !ok || e.Needed <= bytes {
		t.Errorf("got %v, want the model's %d bytes and the scratch memory to be too much", err, bytes)
	}
	o := tight
	o.autoAlways = true
	w, err := load(t.Context(), m, o, dev)
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
	t.Parallel()
	m := openModel(t, sample)
	for name, o := range map[string]options{"software": {}, "nothing to convert": {Policy: plan.Raw, autoAlways: true}} {
		t.Run(name, func(t *testing.T) {
			dev, sw := openDevice(t, soft.Options{})
			w, err := load(t.Context(), m, o, dev)
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
	t.Parallel()
	m := openModel(t, sample)
	dev, _ := openDevice(t, soft.Options{})
	w, err := load(t.Context(), m, options{autoAlways: true}, dev)
	if err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, w)
	g := &w.Plan().Groups[0]
	got, _, _ := expandable(g, true, false)
	for i, x := range g.Tensors {
		if want := x.Target != x.Type && x.Bytes >= uint64(x.Size) && x.Size >= minExpand; got[i] != want {
			t.Errorf("%s, %v to %v: expanded on the device: %v", x.Name, x.Type, x.Target, got[i])
		}
	}
	if n := w.Report().Expanded; n != count(got) || n == 0 {
		t.Errorf("%d tensors were expanded, want %d", n, count(got))
	}
}

// lateLaunch is the number of a launch in the middle of a load of the sample, long after the kernels' check.
const lateLaunch = 30

// expandFaults are ways in which a device fails to convert: before the load, in the middle of it, at once and later.
var expandFaults = []soft.Fault{
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
	t.Parallel()
	for _, f := range expandFaults {
		t.Run(faultName(f), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				m := openModel(t, sample)
				dev, sw := openDevice(t, soft.Options{Poison: true})
				sw.Inject(f)
				var log bytes.Buffer
				o := tight
				o.autoAlways, o.Logger = true, slog.New(slog.NewTextHandler(&log, nil))
				w := start(t.Context(), t, m, o, dev)
				defer mustClose(t, w)
				for _, x := range w.Tensors() {
					if err := w.Wait(t.Context(), x.Name); err != nil {
						t.Fatal(err)
					}
				}
				if err := w.WaitAll(t.Context()); err != nil {
					t.Fatal(err)
				}
				same(t, w.Plan(), contents(t, w), wanted(t, m, options{}))
				if n := strings.Count(log.String(), "level=WARN"); n != 1 || !strings.Contains(log.String(), "CPU") {
					t.Errorf("want one warning that the CPU converts:\n%s", &log)
				}
				r := w.Report()
				if late := f.N >= lateLaunch; r.Expanded > 0 && !late || r.Expanded == expandableTensors(w.Plan()) ||
					r.ScratchBytes != 0 || r.UploadBytes < r.DeviceBytes/3 {
					t.Errorf("the report speaks of the attempt that failed: %+v", r)
				}
				sw.ClearFaults()
			})
		})
	}
}

// TestStartingOver: when the CPU takes over, tensors that were reported ready stay as they are, and progress goes on
// from there.
func TestStartingOver(t *testing.T) {
	t.Parallel()
	for _, async := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			m := openModel(t, sample)
			dev, sw := openDevice(t, soft.Options{LinkBytesPerSecond: 50e6})
			o := tight
			o.autoAlways = true
			var seen []int64
			o.Progress = func(done, total int64) { seen = append(seen, done) }
			w := start(t.Context(), t, m, o, dev)
			defer mustClose(t, w)
			first := w.Tensors()[0]
			if err := w.Wait(t.Context(), first.Name); err != nil {
				t.Fatal(err)
			}
			if err := sw.FlipBit(first.Ptr, 0); err != nil { // what uses the tensor may write to it
				t.Fatal(err)
			}
			early := len(seen)
			sw.Inject(soft.Fault{Func: "hipModuleLaunchKernel", N: 1, Code: amdhip.ErrLaunchFailure, Async: async})
			if err := w.WaitAll(t.Context()); err != nil {
				t.Fatal(err)
			}
			for i := range seen[1:] {
				if seen[i+1] <= seen[i] {
					t.Errorf("progress went from %d to %d", seen[i], seen[i+1])
				}
			}
			if last := seen[len(seen)-1]; uint64(last) != w.Plan().TensorBytes() || len(seen) == early {
				t.Errorf("progress ended at %d of %d", last, w.Plan().TensorBytes())
			}
			if e, ok := errors.AsType[*unequal](verify(t.Context(), w, m)); !ok || e.tensor != first.Name || e.at >= 2 {
				t.Errorf("the flipped bit of a tensor that was ready: %v", e)
			}
			if err := sw.FlipBit(first.Ptr, 0); err != nil {
				t.Fatal(err)
			}
			if err := verify(t.Context(), w, m); err != nil {
				t.Error(err)
			}
			if r := w.Report(); r.Expanded == 0 || r.Expanded >= expandableTensors(w.Plan()) {
				t.Errorf("%d tensors were expanded, want those that had arrived", r.Expanded)
			}
		})
	}
}

// TestGPUFails wants the same failures to end a load that insists on the device, with nothing left there.
func TestGPUFails(t *testing.T) {
	t.Parallel()
	for _, f := range expandFaults {
		t.Run(faultName(f), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				m := openModel(t, sample)
				dev, sw := openDevice(t, soft.Options{})
				sw.Inject(f)
				w, err := load(t.Context(), m, onGPU(tight, plan.F16), dev)
				if err == nil {
					mustClose(t, w)
					t.Fatal("no error")
				}
				if f.Func != "hiprtcCompileProgram" && !errors.Is(err, f.Code) {
					t.Errorf("%v is not %v", err, f.Code)
				}
				wantBack(t, sw, resources{})
			})
		})
	}
}

func faultName(f soft.Fault) string { return fmt.Sprintf("%s_%d_%v", f.Func, f.N, f.Async) }

// TestExpandStalls wants a kernel that never ends to be given up, and the CPU not to try on a device that hangs.
func TestExpandStalls(t *testing.T) {
	t.Parallel()
	for _, d := range []Dequant{DequantAuto, DequantGPU} {
		synctest.Test(t, func(t *testing.T) {
			m := openModel(t, sample)
			devs, sw := leakyDevices(t, 1, soft.Options{})
			sw.Inject(soft.Fault{Func: "hipModuleLaunchKernel", N: lateLaunch, Stall: true})
			w, err := load(t.Context(), m, options{
				Dequant: d, autoAlways: true, Stall: 50 * time.Millisecond, Chunk: tight.Chunk, Staging: tight.Staging,
			}, devs...)
			if !errors.Is(err, ErrStalled) {
				t.Errorf("%v: got %v, want %v", d, err, ErrStalled)
			}
			if w != nil {
				mustClose(t, w)
			}
		})
	}
}

// TestExpandCompilerIsAsked wants the caller's compiler to be used.
func TestExpandCompilerIsAsked(t *testing.T) {
	t.Parallel()
	m := openModel(t, sample)
	dev, _ := openDevice(t, soft.Options{})
	dir := t.TempDir()
	o := onGPU(options{}, plan.F16)
	o.Compiler = &gpu.Compiler{Dir: dir}
	w, err := load(t.Context(), m, o, dev)
	if err != nil {
		t.Fatal(err)
	}
	mustClose(t, w)
	if files, err := filepath.Glob(filepath.Join(dir, "*")); len(files) == 0 {
		t.Errorf("nothing was kept in the compiler's directory: %v", err)
	}
}
