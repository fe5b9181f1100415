package loader

import (
	"errors"
	"fmt"
	"math"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// bothSplits are the ways to spread a model over devices.
var bothSplits = []plan.SplitBy{plan.SplitLayers, plan.SplitNone}

// TestSplit loads onto several devices in every way, and compares what is on each of them. With six, some get nothing.
func TestSplit(t *testing.T) {
	t.Parallel()
	m := llama(t)
	for _, n := range []int{1, 2, 4, 6} {
		for _, split := range []plan.Split{{}, {By: plan.SplitNone}, {Ratio: []float64{3, 1, 1, 1, 1, 1}[:n]}} {
			for _, d := range plan.Policies() {
				for name, o := range map[string]options{
					"default": {},
					"tight":   tight.on(n),
					"one":     {Chunk: 64 << 10, Staging: int64(n) * 64 << 10, Threads: 1, Streams: 1},
					"direct":  {IO: IODirect, Hash: true},
					"gpu":     {Dequant: DequantGPU, Threads: 3},
				} {
					if n == 1 && name != "default" || n != 4 && d != plan.Raw && d != plan.F16 {
						continue
					}
					o.Policy, o.Split = d, split
					t.Run(fmt.Sprintf("%d/%v %v/%v/%s", n, split.By, split.Ratio, d, name), func(t *testing.T) {
						t.Parallel()
						devs, sw := openDevices(t, n, soft.Options{Poison: true})
						var done, total int64
						o.Progress = func(d, t int64) { done, total = d, t }
						w, err := load(t.Context(), m, o, devs...)
						if err != nil {
							t.Fatal(err)
						}
						defer mustClose(t, w)
						want := wanted(t, m, o)
						got := make(map[string][]byte)
						for _, dev := range devs {
							held := contentsOn(t, w, dev)
							if split.By == plan.SplitNone {
								same(t, w.Plan(), held, want)
							}
							for name, b := range held {
								if _, twice := got[name]; twice && split.By == plan.SplitLayers {
									t.Errorf("%s is on two devices", name)
								}
								got[name] = b
								if x, err := w.TensorOn(dev, name); err != nil || x.Device != dev || x.Name != name {
									t.Errorf("%s on device %d: %+v, %v", name, dev.Index(), x, err)
								}
							}
						}
						same(t, w.Plan(), got, want)
						if err := verify(t.Context(), w, m); err != nil {
							t.Error(err)
						}
						r, whole := w.Report(), planned(t, m, o)
						if r.ReadBytes != whole.ReadBytes() || r.MappedBytes+r.DirectBytes != whole.ReadBytes() ||
							r.Tensors != whole.Len() ||
							r.ModelTensors != len(m.Tensors()) {
							t.Errorf("%d bytes of %d tensors read, %d mapped and %d direct, want %d of %d", r.ReadBytes, r.Tensors,
								r.MappedBytes, r.DirectBytes, whole.ReadBytes(), whole.Len())
						}
						copies := uint64(1)
						if split.By == plan.SplitNone {
							copies = uint64(n)
						}
						if bytes := whole.TensorBytes(); done != total || uint64(total) != bytes ||
							r.UploadBytes < copies*bytes && name != "gpu" || r.UploadBytes > r.DeviceBytes {
							t.Errorf("progress %d of %d, %d bytes uploaded; want %d on %d devices", done, total, r.UploadBytes, bytes, copies)
						}
						if s := sw.Stats(); s.DeviceBytes != r.DeviceBytes || s.PeakPinnedBytes > 128<<20 {
							t.Errorf("%d bytes on the devices, want %d; %d bytes pinned", s.DeviceBytes, r.DeviceBytes, s.PeakPinnedBytes)
						}
						if hashes := w.Hashes(); o.Hash && len(hashes) != whole.Len() {
							t.Errorf("%d hashes, want %d", len(hashes), whole.Len())
						}
					})
				}
			}
		}
	}
}

// TestSplitRefused wants what cannot be to be refused before anything is allocated.
func TestSplitRefused(t *testing.T) {
	t.Parallel()
	m := llama(t)
	devs, sw := openDevices(t, 5, soft.Options{Memory: 300 << 10})
	others, _ := openDevices(t, 2, soft.Options{})
	for _, x := range []struct {
		devs []*amdhip.Device
		o    options
		want error
		text string
	}{
		{nil, options{}, ErrBadOption, "no devices"},
		{[]*amdhip.Device{devs[0], nil}, options{}, ErrBadOption, "device 1 of the list is nil"},
		{[]*amdhip.Device{devs[0], others[1]}, options{}, ErrBadOption, "devices of several runtimes"},
		{[]*amdhip.Device{devs[1], devs[1]}, options{}, ErrBadOption, "device 1 is there twice"},
		{devs[:2], options{Split: plan.Split{Ratio: []float64{1}}}, ErrBadOption, "a ratio of 1 numbers for 2 devices"},
		{devs[:2], options{Split: plan.Split{Ratio: []float64{0, 0}}}, ErrBadOption, "no device has a share above 0"},
		{devs[:2], options{Split: plan.Split{Ratio: []float64{1, math.NaN()}}}, ErrBadOption, "a share of NaN"},
		{devs[:2], options{Split: plan.Split{By: plan.SplitNone, Ratio: []float64{1, 1}}}, ErrBadOption, "nothing to share"},
		{devs[:2], options{Split: plan.Split{By: 7}}, ErrBadOption, "split number 7"},
		{devs[:2], options{Staging: 64 << 10}, ErrBadOption, "65536 bytes: 32768 for each of 2 devices"},
		{devs[:2], options{Chunk: 1 << 20, Staging: 1 << 20}, ErrBadOption, "do not hold a chunk of 1048576"},
		{devs[:2], options{Policy: plan.F32}, ErrInsufficientMemory, "device 1: not enough device memory on"},
		{
			devs[:2],
			options{Policy: plan.F32, Split: plan.Split{By: plan.SplitNone}},
			ErrInsufficientMemory,
			"device 0: not enough device memory on",
		},
	} {
		before := sw.Calls()["hipMalloc"]
		for name, load := range map[string]loadFunc{"Load": load, "LoadSync": loadSync} {
			w, err := load(t.Context(), m, x.o, x.devs...)
			if w != nil || !errors.Is(err, x.want) || !strings.Contains(err.Error(), x.text) {
				t.Errorf("%s on %d devices, %+v: %v, want %q", name, len(x.devs), x.o.Split, err, x.text)
			}
		}
		if sw.Calls()["hipMalloc"] != before {
			t.Errorf("%+v: something was allocated", x.o.Split)
		}
	}
}

// TestSplitFollowsMemory wants layers where there is room for them.
func TestSplitFollowsMemory(t *testing.T) {
	t.Parallel()
	m := llama(t)
	devs, _ := openDevices(t, 2, soft.Options{Memory: 16 << 20})
	taken, err := devs[1].Malloc(12 << 20)
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	l := newLoader(t, options{}, devs...)
	p := mustPlan(t, l, m, options{})
	if a, b := p.GroupOf(0).DeviceBytes, p.GroupOf(1).DeviceBytes; a < 2*b {
		t.Errorf("%d and %d bytes, but the first device has four times the memory", a, b)
	}
	p = mustPlan(t, l, m, options{Split: plan.Split{Ratio: []float64{1, 3}}})
	if a, b := p.GroupOf(0).DeviceBytes, p.GroupOf(1).DeviceBytes; b < 2*a {
		t.Errorf("%d and %d bytes for a ratio of 1 to 3", a, b)
	}
}

// BenchmarkSplit loads layers onto software devices, each behind a modelled link of its own, and copies onto as many.
// The bytes are those that arrive on all of them: with two links, twice as many per second as with one.
func BenchmarkSplit(b *testing.B) {
	m := flatModel(b, 16)
	for _, by := range bothSplits {
		for _, n := range []int{1, 2, 4} {
			b.Run(fmt.Sprintf("split=%v/devices=%d", by, n), func(b *testing.B) {
				devs, _ := openDevices(b, n, soft.Options{LinkBytesPerSecond: 200e6})
				for b.Loop() {
					o := options{Policy: plan.Raw, Chunk: 1 << 20, Staging: 16 << 20, Split: plan.Split{By: by}}
					w, err := load(b.Context(), m, o, devs...)
					if err != nil {
						b.Fatal(err)
					}
					b.SetBytes(int64(w.Report().UploadBytes))
					if err := w.Close(); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
