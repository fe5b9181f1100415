package loader

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// openDevices opens n software devices; see openDevice.
func openDevices(t *testing.T, n int, o amdhip.SoftwareOptions) (devs []*amdhip.Device, sw *amdhip.Software) {
	t.Helper()
	o.Devices = n
	first, sw := openDevice(t, o)
	for i := range n {
		dev, err := first.Runtime().Device(i)
		if err != nil {
			t.Fatal(err)
		}
		devs = append(devs, dev)
	}
	return devs, sw
}

// TestSplit loads onto several devices in every way, and compares what is on each of them, and what is read back from all.
func TestSplit(t *testing.T) {
	m := llama(t)
	for _, n := range []int{1, 2, 4} {
		for _, split := range []Split{{}, {By: SplitNone}, {Ratio: []float64{3, 1, 1, 1}[:n]}} {
			for _, d := range DTypes() {
				for name, o := range map[string]Options{
					"default": {},
					"tight":   {Chunk: 64 << 10, Staging: int64(n) * 3 * 64 << 10, Threads: 4, Streams: 3},
					"one":     {Chunk: 64 << 10, Staging: int64(n) * 64 << 10, Threads: 1, Streams: 1},
					"direct":  {IO: IODirect, Hash: true},
					"gpu":     {Dequant: DequantGPU, Threads: 3},
				} {
					if n == 1 && name != "default" || n == 2 && d != Raw && d != F16 {
						continue
					}
					t.Run(fmt.Sprintf("%d/%v %v/%v/%s", n, split.By, split.Ratio, d, name), func(t *testing.T) {
						devs, sw := openDevices(t, n, amdhip.SoftwareOptions{Poison: true})
						o.DType = d
						var done, total int64
						o.Progress = func(d, t int64) { done, total = d, t }
						w, err := LoadSplit(t.Context(), devs, m, o, split)
						if err != nil {
							t.Fatal(err)
						}
						defer func() {
							if err := w.Close(); err != nil {
								t.Error(err)
							}
						}()
						want := wanted(t, m, o)
						got := make(map[string][]byte)
						for _, one := range w.Models() {
							held := contents(t, one)
							if split.By == SplitNone {
								same(t, one.plan, held, want)
							}
							for name, b := range held {
								if _, twice := got[name]; twice && split.By == SplitLayers {
									t.Errorf("%s is on two devices", name)
								}
								got[name] = b
							}
						}
						whole, err := NewPlan(m, o)
						if err != nil {
							t.Fatal(err)
						}
						same(t, whole, got, want)
						if err := w.Verify(t.Context()); err != nil {
							t.Error(err)
						}
						r := w.Report()
						if r.ReadBytes != whole.ReadBytes || r.MappedBytes+r.DirectBytes != whole.ReadBytes || r.Tensors != len(whole.Tensors) {
							t.Errorf("%d bytes of %d tensors read, %d mapped and %d direct, want %d of %d", r.ReadBytes, r.Tensors,
								r.MappedBytes, r.DirectBytes, whole.ReadBytes, len(whole.Tensors))
						}
						copies := 1
						if split.By == SplitNone {
							copies = n
						}
						if done*int64(copies) != int64(r.UploadBytes) || total < done && name != "gpu" {
							t.Errorf("progress %d of %d, %d bytes uploaded", done, total, r.UploadBytes)
						}
						if s := sw.Stats(); s.DeviceBytes != r.DeviceBytes || s.PeakPinnedBytes > 128<<20 {
							t.Errorf("%d bytes on the devices, want %d; %d bytes pinned", s.DeviceBytes, r.DeviceBytes, s.PeakPinnedBytes)
						}
						sameFile(t, m, o, w)
						if hashes := w.Hashes(); o.Hash && len(hashes) != len(whole.Tensors) {
							t.Errorf("%d hashes, want %d", len(hashes), len(whole.Tensors))
						}
					})
				}
			}
		}
	}
}

// sameFile compares the file read back from w with that of the model on one device.
func sameFile(t *testing.T, m *gguf.Model, o Options, w *SplitModel) {
	t.Helper()
	dev, _ := openDevice(t, amdhip.SoftwareOptions{})
	o.Progress, o.Dequant = nil, DequantCPU
	one, err := LoadSync(t.Context(), dev, m, o)
	if err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, one)
	var files [2][]byte
	for i, write := range []func(context.Context, *os.File) error{
		func(ctx context.Context, f *os.File) error { return one.WriteSafetensors(ctx, f) },
		func(ctx context.Context, f *os.File) error { return w.WriteSafetensors(ctx, f) },
	} {
		f, err := os.Create(filepath.Join(t.TempDir(), "x.safetensors"))
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(write(t.Context(), f), f.Close()); err != nil {
			t.Fatal(err)
		}
		if files[i], err = os.ReadFile(f.Name()); err != nil {
			t.Fatal(err)
		}
	}
	if a, b := decodeSafetensors(t, files[0]), decodeSafetensors(t, files[1]); !bytes.Equal(files[0], files[1]) {
		p, err := NewPlan(m, o)
		if err != nil {
			t.Fatal(err)
		}
		got, want := make(map[string][]byte), make(map[string][]byte)
		for name := range a.tensors {
			want[name], got[name] = a.bytes(name), b.bytes(name)
		}
		same(t, p, got, want) // NaNs may differ
	}
}

// TestSplitShard spreads a rank's shard over two devices.
func TestSplitShard(t *testing.T) {
	m := llama(t)
	for _, by := range []SplitBy{SplitLayers, SplitNone} {
		var files []safetensorsFile
		for rank := range 2 {
			devs, _ := openDevices(t, 2, amdhip.SoftwareOptions{Poison: true})
			o := tight
			o.Staging *= 2
			o.Shard = Shard{Rank: rank, World: 2, By: ShardTensors}
			w, err := LoadSplit(t.Context(), devs, m, o, Split{By: by})
			if err != nil {
				t.Fatal(err)
			}
			f, err := os.Create(filepath.Join(t.TempDir(), "x.safetensors"))
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(w.Verify(t.Context()), w.WriteSafetensors(t.Context(), f), f.Close(), w.Close()); err != nil {
				t.Fatal(err)
			}
			b, err := os.ReadFile(f.Name())
			if err != nil {
				t.Fatal(err)
			}
			files = append(files, decodeSafetensors(t, b))
		}
		p, err := NewPlan(m, Options{})
		if err != nil {
			t.Fatal(err)
		}
		same(t, p, together(t, files), wanted(t, m, Options{}))
	}
}

// TestSplitRefused wants what cannot be to be refused before anything is allocated.
func TestSplitRefused(t *testing.T) {
	m := llama(t)
	devs, sw := openDevices(t, 5, amdhip.SoftwareOptions{Memory: 300 << 10})
	for _, x := range []struct {
		devs  []*amdhip.Device
		o     Options
		split Split
		want  error
		text  string
	}{
		{nil, Options{}, Split{}, ErrBadOption, "no devices"},
		{devs, Options{}, Split{}, ErrBadOption, "4 layers cannot be divided among 5"},
		{[]*amdhip.Device{devs[1], devs[1]}, Options{}, Split{}, ErrBadOption, "device 1 is there twice"},
		{devs[:2], Options{}, Split{Ratio: []float64{1}}, ErrBadOption, "a ratio of 1 numbers for 2 devices"},
		{devs[:2], Options{}, Split{Ratio: []float64{1, 0}}, ErrBadOption, "a share of 0"},
		{devs[:2], Options{}, Split{Ratio: []float64{1, math.NaN()}}, ErrBadOption, "a share of NaN"},
		{devs[:2], Options{}, Split{By: SplitNone, Ratio: []float64{1, 1}}, ErrBadOption, "nothing to share"},
		{devs[:2], Options{}, Split{By: 7}, ErrBadOption, "split 7"},
		{devs[:2], Options{Staging: 64 << 10}, Split{}, ErrBadOption, "32768 bytes of staging memory for each of 2 devices"},
		{devs[:2], Options{Chunk: 1 << 20, Staging: 1 << 20}, Split{}, ErrBadOption, "do not hold a chunk of 1048576"},
		{devs[:2], Options{DType: F32}, Split{}, ErrInsufficientMemory, "device 1: not enough device memory on"},
		{devs[:2], Options{DType: F32}, Split{By: SplitNone}, ErrInsufficientMemory, "device 0: not enough device memory on"},
	} {
		before := sw.Calls()["hipMalloc"]
		w, err := LoadSplit(t.Context(), x.devs, m, x.o, x.split)
		if w != nil || !errors.Is(err, x.want) || !strings.Contains(err.Error(), x.text) {
			t.Errorf("%d devices, %+v: %v, want %q", len(x.devs), x.split, err, x.text)
		}
		if sw.Calls()["hipMalloc"] != before {
			t.Errorf("%+v: something was allocated", x.split)
		}
	}
}

// TestSplitFollowsMemory wants layers where there is room for them.
func TestSplitFollowsMemory(t *testing.T) {
	m := llama(t)
	devs, _ := openDevices(t, 2, amdhip.SoftwareOptions{Memory: 16 << 20})
	taken, err := devs[1].Malloc(12 << 20)
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	plans, err := Split{}.Plans(devs, m, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if plans[0].DeviceBytes < 2*plans[1].DeviceBytes {
		t.Errorf("%d and %d bytes, but the first device has four times the memory", plans[0].DeviceBytes, plans[1].DeviceBytes)
	}
	if plans, err = (Split{Ratio: []float64{1, 3}}).Plans(devs, m, Options{}); err != nil {
		t.Fatal(err)
	}
	if plans[1].DeviceBytes < 2*plans[0].DeviceBytes {
		t.Errorf("%d and %d bytes for a ratio of 1 to 3", plans[0].DeviceBytes, plans[1].DeviceBytes)
	}
}

// TestSplitReadiness waits for single tensors while the load runs, on the host and on streams, and finds them.
func TestSplitReadiness(t *testing.T) {
	m := llama(t)
	for _, by := range []SplitBy{SplitLayers, SplitNone} {
		devs, _ := openDevices(t, 2, amdhip.SoftwareOptions{LinkBytesPerSecond: 20e6})
		o := tight
		o.Staging *= 2
		w, err := StartSplit(t.Context(), devs, m, o, Split{By: by})
		if err != nil {
			t.Fatal(err)
		}
		for _, x := range m.Tensors() {
			if err := w.Wait(t.Context(), x.Name); err != nil {
				t.Fatal(err)
			}
			one, got, err := w.Find(x.Name)
			if err != nil || got.Name != x.Name || !slices.Contains(w.Models(), one) {
				t.Errorf("%s: %v, %v", x.Name, got, err)
			}
			s, err := one.Device().NewStream()
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(one.WaitStream(t.Context(), s, x.Name), s.Synchronize(), s.Close()); err != nil {
				t.Error(err)
			}
		}
		if err := w.WaitAll(t.Context()); err != nil {
			t.Error(err)
		}
		if len(w.Tensors()) != len(m.Tensors()) {
			t.Errorf("%d tensors, want %d", len(w.Tensors()), len(m.Tensors()))
		}
		if _, _, err := w.Find("x"); err == nil || w.Wait(t.Context(), "x") == nil {
			t.Error("a tensor that is not there was found")
		}
		if err := w.Close(); err != nil {
			t.Error(err)
		}
		if _, _, err := w.Find("output.weight"); !errors.Is(err, ErrClosed) {
			t.Errorf("after Close: %v", err)
		}
	}
}

// TestSplitEnds cancels loads, closes them, and closes one device's model, all while they run: nothing is left.
func TestSplitEnds(t *testing.T) {
	m := llama(t)
	for _, by := range []SplitBy{SplitLayers, SplitNone} {
		for name, end := range map[string]func(w *SplitModel, cancel func()) error{
			"cancel": func(w *SplitModel, cancel func()) error {
				cancel()
				err := w.WaitAll(t.Context())
				if !errors.Is(err, context.Canceled) || strings.Contains(err.Error(), "device") {
					t.Errorf("%v, want %v", err, context.Canceled)
				}
				return w.Close()
			},
			"close": func(w *SplitModel, _ func()) error { return w.Close() },
			"close one": func(w *SplitModel, _ func()) error {
				err := w.Models()[1].Close()
				if err := w.WaitAll(t.Context()); !errors.Is(err, ErrClosed) {
					t.Errorf("%v, want %v", err, ErrClosed)
				}
				return errors.Join(err, w.Close())
			},
		} {
			t.Run(fmt.Sprint(by, name), func(t *testing.T) {
				devs, _ := openDevices(t, 3, amdhip.SoftwareOptions{LinkBytesPerSecond: 1e6})
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				o := tight
				o.Staging *= 3
				w, err := StartSplit(ctx, devs, m, o, Split{By: by})
				if err != nil {
					t.Fatal(err)
				}
				if err := w.Wait(t.Context(), "token_embd.weight"); err != nil {
					t.Fatal(err)
				}
				if err := end(w, cancel); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// TestSplitStall: a copy to one device never ends. The others' memory is free afterwards.
func TestSplitStall(t *testing.T) {
	m := llama(t)
	for _, by := range []SplitBy{SplitLayers, SplitNone} {
		rt, err := amdhip.OpenSoftware(amdhip.SoftwareOptions{Devices: 2})
		if err != nil {
			t.Fatal(err)
		}
		devs := make([]*amdhip.Device, 2)
		for i := range devs {
			if devs[i], err = rt.Device(i); err != nil {
				t.Fatal(err)
			}
		}
		rt.Software().Inject(amdhip.Fault{Func: "hipMemcpyAsync", N: 9, Stall: true})
		o := tight
		o.Staging, o.Stall = 2*o.Staging, time.Second
		_, err = LoadSplit(t.Context(), devs, m, o, Split{By: by})
		if !errors.Is(err, ErrStalled) {
			t.Errorf("%v, want %v", err, ErrStalled)
		}
		if by == SplitLayers && !strings.Contains(err.Error(), "device ") {
			t.Errorf("%v does not say which device", err)
		}
		s := rt.Software().Stats()
		if s.HostAllocations+s.Registrations == 0 || s.Allocations == 0 {
			t.Errorf("memory was freed although the device may still use it: %+v", s)
		}
		if want := map[SplitBy]int{SplitLayers: 1, SplitNone: 2}[by]; s.Allocations != want {
			t.Errorf("%d allocations are left, want %d", s.Allocations, want)
		}
		if err := rt.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestSplitMismatch flips a bit on the second device: Verify says so.
func TestSplitMismatch(t *testing.T) {
	m := llama(t)
	for _, by := range []SplitBy{SplitLayers, SplitNone} {
		devs, _ := openDevices(t, 2, amdhip.SoftwareOptions{})
		w, err := LoadSplit(t.Context(), devs, m, Options{DType: Raw}, Split{By: by})
		if err != nil {
			t.Fatal(err)
		}
		x, err := w.Models()[1].Tensor("output.weight")
		if err != nil {
			t.Fatal(err)
		}
		s, err := devs[1].NewStream()
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(s.Memset(x.Ptr, 0xa5, 16), s.Synchronize(), s.Close()); err != nil {
			t.Fatal(err)
		}
		err = w.Verify(t.Context())
		if !errors.Is(err, ErrMismatch) || !strings.Contains(err.Error(), "device 1: ") {
			t.Errorf("%v, want %v on device 1", err, ErrMismatch)
		}
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestSplitCancelAnywhere cancels after each arrival in turn: nothing is left on any device, or all is there.
func TestSplitCancelAnywhere(t *testing.T) {
	m := openModel(t, sample)
	for _, by := range []SplitBy{SplitLayers, SplitNone} {
		devs, sw := openDevices(t, 2, amdhip.SoftwareOptions{})
		before := measure(sw)
		for at, arrivals := 1, 1; at <= arrivals; at++ {
			ctx, cancel := context.WithCancel(t.Context())
			o := rawTight()
			o.Staging *= 2
			calls := 0
			o.Progress = func(done, total int64) {
				if calls++; calls == at {
					cancel()
				}
				arrivals = max(arrivals, calls+1)
			}
			w, err := LoadSplit(ctx, devs, m, o, Split{By: by})
			cancel()
			switch {
			case err == nil:
				if at < calls-8 { // the last copies may be on their way when the first of them arrives
					t.Errorf("%v: no error although it was cancelled at arrival %d of %d", by, at, calls)
				}
				if err := errors.Join(w.Verify(t.Context()), w.Close()); err != nil {
					t.Error(err)
				}
				arrivals = calls
			case !errors.Is(err, context.Canceled):
				t.Errorf("%v: %v, want %v", by, err, context.Canceled)
			}
			wantBack(t, sw, before)
		}
	}
}

// TestSplitIntegrated spreads a model over devices that share the host's memory.
func TestSplitIntegrated(t *testing.T) {
	m := llama(t)
	for _, by := range []SplitBy{SplitLayers, SplitNone} {
		for _, d := range []Dequant{DequantCPU, DequantGPU} {
			devs, _ := openDevices(t, 2, amdhip.SoftwareOptions{Integrated: true})
			w, err := LoadSplit(t.Context(), devs, m, Options{Dequant: d}, Split{By: by})
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(w.Verify(t.Context()), w.Close()); err != nil {
				t.Error(err)
			}
		}
	}
}
