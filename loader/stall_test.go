package loader

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// stallTime is Config.Stall of these tests, on the clock of their bubbles.
const stallTime = 10 * time.Second

// allFaults is the variable of the environment that makes the tests of faults try every call, and every second fault
// with it, where they take a sample otherwise: 'make faults' sets it.
const allFaults = "GGUF2GPU_ALL_FAULTS"

// steps makes the calls of one piece of work, one after the other, and wants each of them to end in time.
type steps struct {
	t    *testing.T
	ctx  context.Context
	devs []*amdhip.Device
	file *gguf.File
	own  *amdhip.Stream // the caller's, on the first device
	late func()         // makes the device faulty, in work that begins with a sound one
	kept resources      // what the caller has until the end
	errs []error
}

// do makes one call.
func (s *steps) do(name string, f func() error) error {
	start := time.Now()
	err := f()
	if took := time.Since(start); took > stallTime+time.Second {
		s.t.Errorf("%s took %v, with Stall %v: %v", name, took, stallTime, err)
	}
	if err != nil {
		s.errs = append(s.errs, fmt.Errorf("%s: %w", name, err))
	}
	return err
}

// err is all that went wrong.
func (s *steps) err() error { return errors.Join(s.errs...) }

// load loads with a Loader of its own, works with the model, and closes both. Every call is a step.
func (s *steps) load(o options, sync bool, work func(*Model)) {
	o.Stall = stallTime
	l, err := New(s.devs, o.config())
	if err != nil {
		s.t.Fatal(err)
	}
	defer func() { _ = s.do("Loader.Close", l.Close) }()
	var p *Plan
	if s.do("Plan", func() (err error) { p, err = l.Plan(s.file, o.spec()); return err }) != nil {
		return
	}
	if s.do("Fits", p.Fits) != nil {
		return
	}
	var w *Model
	if sync {
		_ = s.do("LoadSync", func() (err error) { w, err = l.LoadSync(s.ctx, p, o.request()); return err })
	} else {
		_ = s.do("Start", func() (err error) { w, err = l.Start(s.ctx, p, o.request()); return err })
	}
	if w == nil {
		return
	}
	defer func() { _ = s.do("Model.Close", w.Close) }()
	if s.do("WaitAll", func() error { return w.WaitAll(s.ctx) }) == nil && work != nil {
		work(w)
	}
}

// stallWork is a piece of work whose every HIP call is made to block.
type stallWork struct {
	name    string
	devices int
	late    bool // it calls steps.late
	work    func(s *steps)
}

func layers(o options) options {
	o.Split.By = plan.SplitLayers
	return o
}

func readAll(s *steps) func(*Model) {
	return func(w *Model) {
		s.late()
		_ = s.do("ReadBack", func() error {
			return w.ReadBack(s.ctx, ReadOptions{EveryCopy: true},
				func() func(Piece) error { return func(Piece) error { return nil } })
		})
	}
}

// followAll makes a stream of the caller's wait for tensors while they are being loaded.
func followAll(s *steps) {
	o := rawTight()
	o.Stall = stallTime
	l, err := New(s.devs, o.config())
	if err != nil {
		s.t.Fatal(err)
	}
	defer func() { _ = s.do("Loader.Close", l.Close) }()
	var p *Plan
	if s.do("Plan", func() (err error) { p, err = l.Plan(s.file, o.spec()); return err }) != nil {
		return
	}
	var w *Model
	if s.do("Start", func() (err error) { w, err = l.Start(s.ctx, p, o.request()); return err }) != nil {
		return
	}
	defer func() { _ = s.do("Model.Close", w.Close) }()
	for _, t := range w.Plan().Tensors()[:3] {
		_ = s.do("WaitStream", func() error { return w.WaitStream(s.ctx, s.own, t.Name) })
	}
	_ = s.do("WaitAll", func() error { return w.WaitAll(s.ctx) })
}

// loadImage loads what is in page-locked memory already.
func loadImage(s *steps) {
	o := layers(rawTight().on(2))
	o.Stall = stallTime
	l, err := New(s.devs, o.config())
	if err != nil {
		s.t.Fatal(err)
	}
	defer func() { _ = s.do("Loader.Close", l.Close) }()
	made := mustPlan(s.t, l, s.file, o)
	im := imageOf(s.t, s.devs[0], s.file, made.Plan, 1<<20)
	s.kept.HostAllocations = using(soft.Of(s.devs[0].Runtime())).HostAllocations
	s.late()
	var p *Plan
	if s.do("PlanImage", func() (err error) { p, err = l.PlanImage(made.Plan, im); return err }) != nil {
		return
	}
	var w *Model
	if s.do("Start", func() (err error) { w, err = l.Start(s.ctx, p, Request{}); return err }) != nil {
		return
	}
	defer func() { _ = s.do("Model.Close", w.Close) }()
	_ = s.do("WaitAll", func() error { return w.WaitAll(s.ctx) })
}

var stallWorks = []stallWork{
	{"load onto one device", 1, false, func(s *steps) { s.load(rawTight(), false, nil) }},
	{"load of layers onto two", 2, false, func(s *steps) { s.load(layers(rawTight().on(2)), false, nil) }},
	{"load of two copies", 2, false, func(s *steps) { s.load(rawTight().on(2), false, nil) }},
	{"sync load of layers onto two", 2, false, func(s *steps) { s.load(layers(rawTight().on(2)), true, nil) }},
	{"convert on two devices", 2, false, func(s *steps) {
		o := layers(tight.on(2))
		o.Dequant = DequantGPU
		s.load(o, false, nil)
	}},
	{"read back from two devices", 2, true, func(s *steps) { s.load(layers(rawTight().on(2)), false, readAll(s)) }},
	{"streams that wait", 1, false, followAll},
	{"load from an image onto two", 2, true, loadImage},
}

// stallCase is what is wrong with the device in one case.
type stallCase struct {
	waits  soft.Waits
	faults []soft.Fault
}

func (c stallCase) String() string {
	var words []string
	for _, f := range c.faults {
		what := fmt.Sprintf("%s:%d:%d", f.Func, f.N, f.Code)
		switch {
		case f.Block:
			what += " blocks"
		case f.Stall:
			what += " stalls"
		case f.Async:
			what += " async"
		}
		words = append(words, what)
	}
	return fmt.Sprintf("%s, waits %v", strings.Join(words, " and "), c.waits)
}

// TestEverythingBlocks counts the HIP calls of loads on one device and on two, of reading back, of waiting and of
// closing. Then it repeats the work with each call in turn never returning, or its operation never ending, alone and
// with one or two others that fail. Every call of this package ends within Stall and a second; nothing is freed that a
// device may touch, which shows when the calls go on in the end; and what stays taken is said.
func TestEverythingBlocks(t *testing.T) {
	t.Parallel()
	for _, w := range stallWorks {
		t.Run(w.name, func(t *testing.T) {
			t.Parallel()
			file := openModel(t, sample)
			calls := make(map[string]int)
			synctest.Test(t, func(t *testing.T) { w.run(t, file, stallCase{}, calls) })
			var all, struck [4]int // by the number of faults
			for _, c := range stallCases(calls) {
				all[len(c.faults)]++
				synctest.Test(t, func(t *testing.T) {
					if w.run(t, file, c, nil) {
						struck[len(c.faults)]++
					}
				})
				if t.Failed() {
					t.Fatal(c)
				}
			}
			t.Logf("%d of %d faults struck alone, %d of %d with a second one, %d of %d with a third one",
				struck[1], all[1], struck[2], all[2], struck[3], all[3])
			// Polls are not always as many, second faults end the work earlier.
			if struck[1] < all[1]*9/10 || struck[2] < all[2]/5 {
				t.Error("too few faults struck")
			}
		})
	}
}

// stallCases are the cases for work that makes so many calls of each function.
func stallCases(calls map[string]int) (cases []stallCase) {
	names := slices.Sorted(maps.Keys(calls))
	most, seconds := 16, 4
	switch {
	case os.Getenv(allFaults) != "":
		most, seconds = 1<<20, len(names)
	case testing.Short():
		most = 3
	}
	number := 0
	for _, name := range names {
		for _, n := range spread(calls[name], most) {
			faults := []soft.Fault{{Func: name, N: n, Block: true}}
			if slices.Contains([]string{"hipMemcpyAsync", "hipEventRecord", "hipModuleLaunchKernel", "hipStreamWaitEvent"}, name) {
				faults = append(faults, soft.Fault{Func: name, N: n, Stall: true})
			}
			for _, f := range faults {
				for _, waits := range []soft.Waits{soft.WaitsForNothing, soft.WaitsForAll} {
					cases = append(cases, stallCase{waits, []soft.Fault{f}})
				}
				// The second fault: a call that fails every time, or once. All functions take turns.
				for k := range seconds {
					second := soft.Fault{Func: names[(number+k*5)%len(names)], N: k % 2, Code: amdhip.ErrUnknown}
					if seconds > 4 {
						second.Func, second.N = names[k], (k+number)%2
					}
					if second.Func == "hipGetDeviceCount" || second.Func == name {
						continue
					}
					cases = append(cases, stallCase{soft.Waits(k % 3), []soft.Fault{f, second}})
				}
				number++
			}
		}
	}
	// A copy that stalls, and nobody who can be asked about it.
	for _, code := range []amdhip.Status{amdhip.ErrUnknown, amdhip.ErrInvalidValue, amdhip.ErrIllegalState} {
		for _, n := range spread(calls["hipMemcpyAsync"], 8) {
			copying := soft.Fault{Func: "hipMemcpyAsync", N: n, Stall: true}
			stream, event := soft.Fault{Func: "hipStreamQuery", Code: code}, soft.Fault{Func: "hipEventQuery", Code: code}
			cases = append(cases, stallCase{soft.WaitsForNothing, []soft.Fault{copying, stream}},
				stallCase{soft.WaitsForNothing, []soft.Fault{copying, event}},
				stallCase{soft.WaitsForNothing, []soft.Fault{copying, stream, event}})
		}
	}
	return cases
}

// spread returns at most so many numbers from 1 to n: all of them, or the first, the last, and some between.
func spread(n, most int) (all []int) {
	if n <= most {
		for i := range n {
			all = append(all, i+1)
		}
		return all
	}
	for i := range most {
		all = append(all, 1+i*(n-1)/(most-1))
	}
	return all
}

// run does the work once, and reports whether the first fault struck. With counted it counts the calls, and nothing may
// go wrong.
func (w *stallWork) run(t *testing.T, file *gguf.File, c stallCase, counted map[string]int) (struck bool) {
	// With a link that has a speed, copies are still under way when somebody waits for them.
	devs, sw := leakyDevices(t, w.devices, soft.Options{Waits: c.waits, LinkBytesPerSecond: 1e9})
	own := newStream(t, devs[0])
	var before map[string]int
	arm := func() {
		before = sw.Calls()
		for _, f := range c.faults {
			sw.Inject(f)
		}
	}
	if !w.late {
		arm()
	}
	s := &steps{t: t, ctx: context.Background(), devs: devs, file: file, own: own, late: arm, kept: resources{Streams: 1}}
	w.work(s)
	err := s.err()
	if len(c.faults) > 0 {
		f := c.faults[0]
		struck = sw.Calls()[f.Func]-before[f.Func] >= f.N
	}
	for name, n := range sw.Calls() {
		if n -= before[name]; n > 0 && counted != nil && strings.HasPrefix(name, "hip") && !strings.HasPrefix(name, "hiprtc") &&
			!strings.HasPrefix(name, "hipGetError") {
			counted[name] = n
		}
	}
	if counted != nil {
		if err != nil {
			t.Error(err)
		}
		if left := using(sw); left != s.kept {
			t.Errorf("left on the device: %+v", left)
		}
	}
	left := using(sw)
	left.Streams -= s.kept.Streams
	left.HostAllocations -= s.kept.HostAllocations
	left.Events = 0 // they take nothing worth telling
	if left != (resources{}) && !errors.Is(err, ErrStalled) {
		// A call that frees something and fails says so itself.
		if _, ok := errors.AsType[*amdhip.Error](err); !ok {
			t.Errorf("%v: left on the device: %+v, and nobody says so: %v", c, left, err)
		}
	}
	sw.ClearFaults()
	time.Sleep(10 * stallTime) // for what was left to itself
	if n := sw.Stats().Stray; n > 0 {
		t.Errorf("%v: %d copies found their memory gone: %v", c, n, err)
	}
	return struck
}
