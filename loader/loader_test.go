package loader

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
)

// makingCalls are those that make what a Loader keeps: staging memory, streams, events and kernels.
var makingCalls = []string{
	"hipHostMalloc", "hipHostRegister", "hipStreamCreateWithFlags", "hipEventCreateWithFlags", "hiprtcCreateProgram",
	"hiprtcCompileProgram", "hipModuleLoadData", "hipModuleGetFunction",
}

// makings counts makingCalls.
func makings(sw *soft.Software) string {
	var counts []int
	calls := sw.Calls()
	for _, call := range makingCalls {
		counts = append(counts, calls[call])
	}
	return fmt.Sprint(counts)
}

// TestOneLoader: the second load by a Loader and those after it pin nothing and compile nothing, in turn and at once.
// What they take together is what one takes.
func TestOneLoader(t *testing.T) {
	t.Parallel()
	for _, n := range []int{1, 3} {
		for _, by := range bothSplits {
			for _, d := range []Dequant{DequantCPU, DequantGPU} {
				t.Run(fmt.Sprintf("%d/%v/%v", n, by, d), func(t *testing.T) {
					t.Parallel()
					synctest.Test(t, func(t *testing.T) {
						o := tight.on(n)
						o.Split.By, o.Dequant = by, d
						testOneLoader(t, n, o)
					})
				})
			}
		}
	}
}

func testOneLoader(t *testing.T, n int, o options) {
	m := llama(t)
	devs, sw := openDevices(t, n, soft.Options{LinkBytesPerSecond: 100e6, Poison: true})
	want := wanted(t, m, o)
	l, err := New(devs, o.config())
	if err != nil {
		t.Fatal(err)
	}
	var pinned uint64
	var before string
	for i, atOnce := range []int{1, 1, 1, 4} {
		var loads sync.WaitGroup
		all := make([]*Model, atOnce)
		for k := range all {
			loads.Go(func() {
				w, err := l.Load(t.Context(), mustPlan(t, l, m, o), o.request())
				if err != nil {
					t.Error(err)
				}
				all[k] = w
			})
		}
		loads.Wait()
		if t.Failed() {
			return
		}
		if i == 0 {
			before, pinned = makings(sw), sw.Stats().PinnedBytes
			if int64(pinned) > o.Staging+int64(n)<<20 || pinned == 0 {
				t.Errorf("%d bytes are pinned, the budget is %d", pinned, o.Staging)
			}
		}
		if now := makings(sw); now != before || sw.Stats().PinnedBytes != pinned {
			t.Errorf("%d loads, number %d and on, made something: %s, %s before; %d bytes are pinned", atOnce, i+1, now, before,
				sw.Stats().PinnedBytes)
		}
		for _, w := range all {
			if r := w.Report(); o.Dequant == DequantGPU && r.Expanded == 0 || i > 0 && r.Pin+r.Kernels != 0 {
				t.Errorf("load %d: %+v", i+1, r)
			}
			same(t, w.Plan(), contents(t, w), want)
			if err := verify(t.Context(), w, m); err != nil {
				t.Error(err)
			}
			mustClose(t, w)
		}
		before = makings(sw) // reading back made something, too
	}
	p := mustPlan(t, l, m, o)
	if err := errors.Join(l.Close(), l.Close()); err != nil {
		t.Error(err)
	}
	wantBack(t, sw, resources{})
	for name, load := range map[string]func(context.Context, *Plan, Request) (*Model, error){
		"Start": l.Start, "Load": l.Load, "LoadSync": l.LoadSync,
	} {
		if w, err := load(t.Context(), p, Request{}); w != nil || !errors.Is(err, ErrClosed) {
			t.Errorf("%s after Close: %v, want ErrClosed", name, err)
		}
	}
}

// TestLargerLoad: what an earlier load needed does not suffice for a larger one, whether it is over or not.
func TestLargerLoad(t *testing.T) {
	t.Parallel()
	for _, over := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			few, many := openModel(t, small), openModel(t, sample)
			dev, sw := openDevice(t, soft.Options{LinkBytesPerSecond: 1e6})
			var o options
			l := newLoader(t, o, dev)
			a, err := l.Start(t.Context(), mustPlan(t, l, few, o), Request{})
			if err != nil {
				t.Fatal(err)
			}
			if over {
				if err := a.WaitAll(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			b, err := l.Load(t.Context(), mustPlan(t, l, many, o), Request{})
			if err != nil {
				t.Fatal(err)
			}
			before := makings(sw)
			c, err := l.Load(t.Context(), mustPlan(t, l, few, o), Request{}) // what is large enough for many is for few
			if err != nil {
				t.Fatal(err)
			}
			if now := makings(sw); now != before {
				t.Errorf("the smaller load made something: %s, %s before", now, before)
			}
			err = errors.Join(verify(t.Context(), a, few), verify(t.Context(), b, many), verify(t.Context(), c, few))
			if err := errors.Join(err, a.Close(), b.Close(), c.Close()); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestLoadsApart: a load that fails or is cancelled takes no other with it that the same Loader runs, nor the next one.
func TestLoadsApart(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]*soft.Fault{
		"fails":     {Func: "hipMemcpyAsync", N: 1, Code: amdhip.ErrUnknown},
		"not freed": {Func: "hipEventRecord", N: 1, Code: amdhip.ErrUnknown},
		"cancelled": nil,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) { testLoadsApart(t, fault) })
		})
	}
}

func testLoadsApart(t *testing.T, fault *soft.Fault) {
	m := openModel(t, sample)
	dev, sw := openDevice(t, soft.Options{LinkBytesPerSecond: 10e6})
	o := tight
	l := newLoader(t, o, dev)
	gone := errors.New("gone")
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	var all [2]*Model
	for i := range all {
		var err error
		if all[i], err = l.Start(ctx, mustPlan(t, l, m, o), Request{}); err != nil {
			t.Fatal(err)
		}
		ctx = t.Context() // cancel is for the first one
	}
	last := all[0].Plan().Tensors()[5].Name
	if err := errors.Join(all[0].Wait(t.Context(), last), all[1].Wait(t.Context(), last)); err != nil {
		t.Fatal(err)
	}
	want := gone
	if fault == nil {
		cancel(gone)
	} else {
		sw.Inject(*fault)
		want = fault.Code
	}
	errs := []error{all[0].WaitAll(t.Context()), all[1].WaitAll(t.Context())}
	bad := slices.IndexFunc(errs, func(err error) bool { return err != nil })
	if bad < 0 || !errors.Is(errs[bad], want) || errs[1-bad] != nil || fault == nil && bad != 0 {
		t.Fatalf("the loads end with %v, want one error %v", errs, want)
	}
	if err := verify(t.Context(), all[1-bad], m); err != nil {
		t.Error(err)
	}
	next, err := l.Load(t.Context(), mustPlan(t, l, m, o), Request{})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(verify(t.Context(), next, m), next.Close(), all[0].Close(), all[1].Close()); err != nil {
		t.Error(err)
	}
}

// TestAfterAStall: when a device hangs, whatever is done with it ends in time, and Close says what is left.
func TestAfterAStall(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := openModel(t, sample)
		devs, sw := leakyDevices(t, 1, soft.Options{})
		l, err := New(devs, tight.config())
		if err != nil {
			t.Fatal(err)
		}
		sw.Inject(soft.Fault{Func: "hipMemcpyAsync", N: 20, Stall: true})
		p := mustPlan(t, l, m, tight)
		if w, err := l.Load(t.Context(), p, Request{}); w != nil || !errors.Is(err, ErrStalled) {
			t.Errorf("%v, want ErrStalled", err)
		}
		w, err := l.Load(t.Context(), p, Request{}) // other streams of the software device go on
		if err != nil {
			t.Fatal(err)
		}
		err = verify(t.Context(), w, m)
		if err != nil && !errors.Is(err, ErrStalled) { // to free something waits for the device
			t.Error(err)
		}
		if e, ok := errors.AsType[*LeftError](w.Close()); !ok || e.DeviceBytes != w.Report().DeviceBytes {
			t.Errorf("the model's Close: %v, want what is left", e)
		}
		if e, ok := errors.AsType[*LeftError](l.Close()); !ok || e.HostBytes == 0 {
			t.Errorf("the Loader's Close: %v, want what is left", e)
		}
	})
}

// TestLoaderWaits: Close of a Loader waits for its loads.
func TestLoaderWaits(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := openModel(t, sample)
		dev, _ := openDevice(t, soft.Options{LinkBytesPerSecond: 1e6})
		l, err := New([]*amdhip.Device{dev}, tight.config())
		if err != nil {
			t.Fatal(err)
		}
		w, err := l.Start(t.Context(), mustPlan(t, l, m, tight), Request{})
		if err != nil {
			t.Fatal(err)
		}
		closed := make(chan error, 1)
		go func() { closed <- l.Close() }()
		synctest.Wait()
		select {
		case <-closed:
			t.Error("Close has returned while a load runs")
		default:
		}
		if err := errors.Join(w.WaitAll(t.Context()), <-closed, verify(t.Context(), w, m), w.Close()); err != nil {
			t.Error(err)
		}
	})
}

// TestOthersPlans: a plan is for the devices that it was made for.
func TestOthersPlans(t *testing.T) {
	t.Parallel()
	m := openModel(t, small)
	devs, _ := openDevices(t, 2, soft.Options{})
	both, first, again := newLoader(t, tight.on(2), devs...), newLoader(t, tight, devs[0]), newLoader(t, tight, devs[0])
	p := mustPlan(t, first, m, tight)
	w, err := again.Load(t.Context(), p, Request{})
	if err != nil {
		t.Fatal(err)
	}
	mustClose(t, w)
	for _, p := range []*Plan{p, nil, {}} {
		if w, err := both.Load(t.Context(), p, Request{}); w != nil || !errors.Is(err, ErrBadOption) {
			t.Errorf("a foreign plan: %v, want ErrBadOption", err)
		}
	}
}
