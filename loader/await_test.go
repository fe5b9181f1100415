package loader

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// slabsFor makes slabs for an Image of p, of 100,000 bytes, and full of something.
func slabsFor(t *testing.T, dev *amdhip.Device, p *plan.Plan) (slabs []*amdhip.HostMemory, sizes []int64) {
	t.Helper()
	for left := ImageBytes(p); left > 0; left -= 100_000 {
		mem, err := dev.HostMalloc(int(min(left, 100_000)))
		if err != nil {
			t.Fatal(err)
		}
		for b, i := mem.Bytes(), 0; i < len(b); i++ {
			b[i] = 0x5a
		}
		t.Cleanup(func() {
			if err := mem.Close(); err != nil {
				t.Error(err)
			}
		})
		slabs, sizes = append(slabs, mem), append(sizes, int64(mem.Len()))
	}
	return slabs, sizes
}

// TestAwaitImage fills an Image on the way, whatever becomes of the bytes, with slabs that come while the load runs.
// What is loaded from it is what is loaded from the file.
func TestAwaitImage(t *testing.T) {
	t.Parallel()
	columns := plan.Shard{By: plan.ShardTensors, World: 2, Rank: 1, Rules: mustShardRules(t, "^type=columns")}
	for _, path := range []string{sample, allTypes} {
		f := openModel(t, path)
		for name, o := range map[string]options{
			"raw": {Policy: plan.Raw}, "cpu": {Policy: plan.F16, Dequant: DequantCPU}, "tight": tight, "gpu": onGPU(tight, plan.F16),
			"direct": {IO: IODirect, Policy: plan.Raw}, "proved": {Prove: ProveOn}, "two": {Split: plan.Split{By: plan.SplitLayers}},
			"columns": {Shard: columns}, "raw columns": {Shard: columns, Policy: plan.Raw},
		} {
			if o.Shard.World > 0 && path == sample {
				continue
			}
			t.Run(filepath.Base(path)+"/"+name, func(t *testing.T) {
				t.Parallel()
				n := 1
				if name == "two" {
					n = 2
				}
				devs, _ := openDevices(t, n, soft.Options{Poison: true})
				l := newLoader(t, o, devs...)
				p := mustPlan(t, l, f, o)
				slabs, sizes := slabsFor(t, devs[0], p.Plan)
				im, err := AwaitImage(p.Plan, sizes)
				if err != nil {
					t.Fatal(err)
				}
				r := o.request()
				r.Keep = im
				m, err := l.Start(t.Context(), p, r)
				if err != nil {
					t.Fatal(err)
				}
				defer mustClose(t, m)
				if _, err := l.PlanImage(p.Plan, im); !errors.Is(err, ErrBadOption) {
					t.Errorf("before it is filled: %v", err)
				}
				for _, slab := range slices.Backward(slabs) { // the odd one first
					if err := im.Supply(slab); err != nil {
						t.Fatal(err)
					}
				}
				if err := im.Supply(slabs[0]); !errors.Is(err, ErrBadOption) {
					t.Errorf("one too many: %v", err)
				}
				if err := m.WaitAll(t.Context()); err != nil {
					t.Fatal(err)
				}
				want := contents(t, m)
				if err := im.Seal(t.Context(), p.Plan); err != nil {
					t.Fatal(err)
				}
				if _, bytes, err := im.Check(p.Plan, 0); err != nil || bytes == 0 {
					t.Errorf("looked at %d bytes: %v", bytes, err)
				}
				from, err := l.PlanImage(p.Plan, im)
				if err != nil {
					t.Fatal(err)
				}
				woken, err := l.Load(t.Context(), from, Request{Prove: o.Prove})
				if err != nil {
					t.Fatal(err)
				}
				same(t, p.Plan, contents(t, woken), want)
				mustClose(t, woken)
			})
		}
	}
}

// TestAwaitImageGivenUp: a load goes on without an Image that is given up, also when it waits for it, and ends when it
// is cancelled meanwhile. Nobody writes to slabs after that.
func TestAwaitImageGivenUp(t *testing.T) {
	t.Parallel()
	f := openModel(t, sample)
	for _, cancelled := range []bool{false, true} {
		t.Run(fmt.Sprint(cancelled), func(t *testing.T) {
			t.Parallel()
			dev, _ := openDevice(t, soft.Options{})
			l := newLoader(t, tight, dev)
			p := mustPlan(t, l, f, tight)
			slabs, sizes := slabsFor(t, dev, p.Plan)
			im, err := AwaitImage(p.Plan, sizes)
			if err == nil {
				err = im.Supply(slabs[0])
			}
			if err != nil {
				t.Fatal(err)
			}
			why := errors.New("enough")
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			m, err := l.Start(ctx, p, Request{Keep: im})
			if err != nil {
				t.Fatal(err)
			}
			defer mustClose(t, m)
			for im.way.put.Load() == 0 { // it waits for the second slab by then, or will
				time.Sleep(time.Millisecond)
			}
			if cancelled {
				cancel(why)
			} else {
				im.GiveUp()
			}
			if err := m.WaitAll(t.Context()); cancelled && !errors.Is(err, why) || !cancelled && err != nil {
				t.Errorf("the load ends with %v", err)
			}
			im.GiveUp()
			clear(slabs[0].Bytes())
			if err := im.Seal(t.Context(), p.Plan); !errors.Is(err, ErrGivenUp) {
				t.Errorf("sealing it: %v", err)
			}
			if !cancelled {
				same(t, p.Plan, contents(t, m), wanted(t, f, tight))
			}
		})
	}
}

// TestAwaitImageRefused: an Image that does not fit, and loads that cannot fill one.
func TestAwaitImageRefused(t *testing.T) {
	t.Parallel()
	f := openModel(t, sample)
	dev, _ := openDevice(t, soft.Options{})
	l := newLoader(t, options{}, dev)
	p := mustPlan(t, l, f, options{})
	if _, err := AwaitImage(p.Plan, []int64{1000}); !errors.Is(err, ErrBadOption) {
		t.Errorf("too small: %v", err)
	}
	im, err := AwaitImage(p.Plan, []int64{ImageBytes(p.Plan)})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.LoadSync(t.Context(), p, Request{Keep: im}); !errors.Is(err, ErrBadOption) {
		t.Errorf("LoadSync: %v", err)
	}
	filled := imageOf(t, dev, f, p.Plan, 1<<20)
	if _, err := l.Load(t.Context(), p, Request{Keep: filled}); !errors.Is(err, ErrBadOption) {
		t.Errorf("an image of NewImage: %v", err)
	}
	from, err := l.PlanImage(p.Plan, filled)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Load(t.Context(), from, Request{Keep: im}); !errors.Is(err, ErrBadOption) {
		t.Errorf("from an image: %v", err)
	}
	other := mustPlan(t, l, openModel(t, allTypes), options{})
	if _, err := l.Load(t.Context(), other, Request{Keep: im}); !errors.Is(err, ErrBadOption) {
		t.Errorf("another model: %v", err)
	}
}
