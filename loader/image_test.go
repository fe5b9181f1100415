package loader

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// imageOf fills an Image with the tensors of p, in slabs of so many bytes.
func imageOf(t *testing.T, dev *amdhip.Device, f *gguf.File, p *plan.Plan, slab int64) *Image {
	t.Helper()
	var slabs []*amdhip.HostMemory
	for left := ImageBytes(p); left > 0; left -= slab {
		mem, err := dev.HostMalloc(int(min(left, slab)))
		if err != nil {
			t.Fatal(err)
		}
		bytes := mem.Bytes()
		for i := range bytes {
			bytes[i] = 0x5a
		}
		slabs = append(slabs, mem)
		t.Cleanup(func() {
			if err := mem.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	im, err := NewImage(p, slabs)
	if err == nil {
		err = im.Fill(t.Context(), f, p)
	}
	if err != nil {
		t.Fatal(err)
	}
	return im
}

// TestImage loads from an Image that was made for another policy, whoever converts, and wants the bytes of a load from
// the file. What the devices take as it is, the CPU does not touch.
func TestImage(t *testing.T) {
	t.Parallel()
	for _, path := range []string{sample, allTypes} {
		f := openModel(t, path)
		for _, policy := range plan.Policies() {
			for name, o := range map[string]options{
				"cpu": {Policy: policy, Dequant: DequantCPU}, "tight": onGPU(tight, policy), "gpu": onGPU(options{}, policy),
				"two": onGPU(options{Split: plan.Split{By: plan.SplitLayers}}, policy),
			} {
				t.Run(fmt.Sprintf("%s/%v/%s", filepath.Base(path), policy, name), func(t *testing.T) {
					t.Parallel()
					n := 1
					if name == "two" {
						n = 2
					}
					devs, sw := openDevices(t, n, soft.Options{Poison: true})
					l := newLoader(t, o, devs...)
					made := mustPlan(t, l, f, options{Policy: plan.Raw, Split: o.Split})
					im := imageOf(t, devs[0], f, made.Plan, 100_000)
					p, err := l.PlanImage(mustPlan(t, l, f, o).Plan, im)
					if err != nil {
						t.Fatal(err)
					}
					for range 2 {
						m, err := l.Load(t.Context(), p, Request{})
						if err != nil {
							t.Fatal(err)
						}
						same(t, m.Plan(), contents(t, m), wanted(t, f, o))
						r := m.Report()
						if r.ImageBytes != r.ReadBytes || r.MappedBytes+r.DirectBytes != 0 {
							t.Errorf("report %+v", r)
						}
						if policy == plan.Raw && r.PinnedBytes != 0 {
							t.Errorf("%d bytes of staging memory", r.PinnedBytes)
						}
						mustClose(t, m)
					}
					if s := sw.Stats(); s.UnpinnedCopies != 0 {
						t.Errorf("%d copies from memory that is not page-locked", s.UnpinnedCopies)
					}
				})
			}
		}
	}
}

// TestImageRefused: an Image that is not filled, or has other tensors, or a request for what only a file can give.
func TestImageRefused(t *testing.T) {
	t.Parallel()
	f := openModel(t, sample)
	dev, _ := openDevice(t, soft.Options{})
	l := newLoader(t, options{}, dev)
	p := mustPlan(t, l, f, options{})
	if _, err := NewImage(p.Plan, nil); !errors.Is(err, ErrBadOption) {
		t.Errorf("no slabs: %v", err)
	}
	im := imageOf(t, dev, f, p.Plan, 1<<20)
	empty, err := NewImage(p.Plan, im.slabs)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.PlanImage(p.Plan, empty); !errors.Is(err, ErrBadOption) {
		t.Errorf("not filled: %v", err)
	}
	other := openModel(t, allTypes)
	if _, err := l.PlanImage(mustPlan(t, l, other, options{}).Plan, im); !errors.Is(err, ErrBadOption) {
		t.Errorf("another model: %v", err)
	}
	if err := empty.Fill(t.Context(), other, mustPlan(t, l, other, options{}).Plan); !errors.Is(err, ErrBadOption) {
		t.Errorf("filled from another model: %v", err)
	}
	ended, cancel := context.WithCancelCause(t.Context())
	why := errors.New("enough")
	cancel(why)
	if err := empty.Fill(ended, f, p.Plan); !errors.Is(err, why) {
		t.Errorf("cancelled: %v", err)
	}
	from, err := l.PlanImage(p.Plan, im)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range []Request{{Check: true}, {Hash: true}} {
		if _, err := l.Load(t.Context(), from, r); !errors.Is(err, ErrBadOption) {
			t.Errorf("%+v: %v", r, err)
		}
	}
	if _, err := l.LoadSync(t.Context(), from, Request{}); !errors.Is(err, ErrBadOption) {
		t.Errorf("LoadSync: %v", err)
	}
}

// TestImageFaults lets every call of HIP fail once, in a load from an Image: nothing is left, and the next load works.
func TestImageFaults(t *testing.T) {
	t.Parallel()
	f := openModel(t, sample)
	for name, o := range map[string]options{
		"raw": {Policy: plan.Raw, Chunk: 64 << 10, Staging: 128 << 10}, "gpu": onGPU(tight, plan.F16),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dev, sw := openDevice(t, soft.Options{})
			prepare := newLoader(t, o, dev)
			base := mustPlan(t, prepare, f, o)
			im := imageOf(t, dev, f, base.Plan, 300_000)
			for _, fault := range []soft.Fault{
				{Func: "hipMalloc"},
				{Func: "hipMemGetInfo"},
				{Func: "hipStreamCreateWithFlags"},
				{Func: "hipEventCreateWithFlags"},
				{Func: "hipMemcpyAsync"},
				{Func: "hipMemcpyAsync", Async: true},
				{Func: "hipEventRecord"},
				{Func: "hipEventQuery"},
				{Func: "hipModuleLoadData"},
				{Func: "hipModuleLaunchKernel"},
				{Func: "hipModuleLaunchKernel", Async: true},
			} {
				for n := 1; n <= 4; n++ {
					if fault.N, fault.Code = n, amdhip.ErrUnknown; fault.Async { // a code that ends a stream's work for good
						fault.Code = amdhip.ErrIllegalAddress
					}
					l, err := New([]*amdhip.Device{dev}, o.config())
					if err != nil {
						t.Fatal(err)
					}
					p, err := l.PlanImage(base.Plan, im)
					if err != nil {
						t.Fatal(err)
					}
					sw.Inject(fault)
					m, err := l.Load(t.Context(), p, Request{})
					sw.ClearFaults()
					if err == nil { // there is no such call, or somebody else could do it
						mustClose(t, m)
					}
					if m, err = l.Load(t.Context(), p, Request{}); err != nil {
						t.Fatalf("after %+v: %v", fault, err)
					}
					same(t, m.Plan(), contents(t, m), wanted(t, f, o))
					mustClose(t, m)
					if err := l.Close(); err != nil {
						t.Errorf("%+v: %v", fault, err)
					}
				}
			}
		})
	}
}

// TestImageStuck: an Image that a device may go on reading says so, and is not loaded from any more.
func TestImageStuck(t *testing.T) {
	t.Parallel()
	f := openModel(t, sample)
	devs, sw := leakyDevices(t, 1, soft.Options{})
	o := options{Policy: plan.Raw, Stall: 50 * time.Millisecond}
	l, err := New(devs, o.config())
	if err != nil {
		t.Fatal(err)
	}
	base := mustPlan(t, l, f, o)
	mem, err := devs[0].HostMalloc(int(ImageBytes(base.Plan)))
	if err != nil {
		t.Fatal(err)
	}
	im, err := NewImage(base.Plan, []*amdhip.HostMemory{mem})
	if err == nil {
		err = im.Fill(t.Context(), f, base.Plan)
	}
	if err != nil {
		t.Fatal(err)
	}
	p, err := l.PlanImage(base.Plan, im)
	if err != nil {
		t.Fatal(err)
	}
	sw.Inject(soft.Fault{Func: "hipMemcpyAsync", N: 1, Stall: true})
	if _, err := l.Load(t.Context(), p, Request{}); !errors.Is(err, ErrStalled) {
		t.Errorf("%v, want ErrStalled", err)
	}
	if _, err := l.PlanImage(base.Plan, im); !im.Stuck() || !errors.Is(err, ErrStalled) {
		t.Errorf("stuck %v, %v", im.Stuck(), err)
	}
	if _, left := errors.AsType[*LeftError](l.Close()); !left {
		t.Error("the Loader left nothing")
	}
	sw.ClearFaults()
}
