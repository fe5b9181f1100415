package loader

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// sweep is a piece of work whose every HIP call is made to fail.
type sweep struct {
	name string
	base []soft.Fault // in force all the time
	prep bool         // work gets a model that is loaded already
	apu  bool         // the device shares the host's memory
	work func(j *job) error
}

// job is what a sweep's work is given.
type job struct {
	ctx    context.Context
	dev    *amdhip.Device
	other  *amdhip.Device
	file   *gguf.File
	loaded *Model      // with sweep.prep
	struck func() bool // whether the fault has come
}

// loading is the work of a load onto one device that is closed again. If it succeeds in spite of a fault, what has
// arrived is compared.
func loading(load loadFunc) func(*job) error {
	return func(j *job) error { return j.load(load, rawTight(), j.dev) }
}

// splitting is loading onto both devices.
func splitting(by plan.SplitBy) func(*job) error {
	return func(j *job) error {
		o := rawTight().on(2)
		o.Split.By = by
		return j.load(load, o, j.other, j.dev)
	}
}

func (j *job) load(load loadFunc, o options, devs ...*amdhip.Device) error {
	w, err := load(j.ctx, j.file, o, devs...)
	if err != nil {
		if w != nil {
			return errors.Join(err, errors.New("a model in spite of an error"), w.Close())
		}
		return err
	}
	if j.struck() {
		err = verify(j.ctx, w, j.file)
	}
	return errors.Join(err, w.Close())
}

// twice is two loads by one Loader, of which the second finds what the first made.
func twice(j *job) error {
	o := rawTight()
	l, err := New([]*amdhip.Device{j.dev}, o.config())
	if err != nil {
		return err
	}
	once := func(context.Context, *gguf.File, options, ...*amdhip.Device) (*Model, error) {
		p, err := l.Plan(j.file, o.spec())
		if err != nil {
			return nil, err
		}
		return l.Load(j.ctx, p, o.request())
	}
	err = j.load(once, o)
	return errors.Join(err, j.load(once, o), l.Close())
}

// readingBack is reading every tensor back and looking at nothing.
func readingBack(j *job) error {
	return j.loaded.ReadBack(j.ctx, ReadOptions{}, func() func(Piece) error { return func(Piece) error { return nil } })
}

// noRegister and noMalloc make the pool take the other ways to staging memory.
var (
	noRegister = soft.Fault{Func: "hipHostRegister", Code: amdhip.ErrNotSupported}
	noMalloc   = soft.Fault{Func: "hipHostMalloc", Code: amdhip.ErrNotSupported}
)

var sweeps = []sweep{
	{name: "load", work: loading(load)},
	{name: "load with hipHostMalloc", base: []soft.Fault{noRegister}, work: loading(load)},
	{name: "load without pinning", base: []soft.Fault{noRegister, noMalloc}, work: loading(load)},
	{name: "load on an APU", apu: true, work: loading(load)},
	{name: "sync load", work: loading(loadSync)},
	{name: "load of layers on two devices", work: splitting(plan.SplitLayers)},
	{name: "load of two copies", work: splitting(plan.SplitNone)},
	{name: "two loads in turn", work: twice},
	{name: "verify", prep: true, work: func(j *job) error { return verify(j.ctx, j.loaded, j.file) }},
	{name: "read back", prep: true, work: readingBack},
}

// mayComplete are the calls that work can do without: pinning has other ways, buffers of a pool may be fewer, and which
// device is current is put right before every call that depends on it.
var mayComplete = []string{
	"hipHostRegister", "hipHostMalloc", "hipEventCreateWithFlags", "hipSetDevice", "hipGetDevice",
	"hipStreamQuery",
}

// polls are asked until they say yes: how often is a matter of timing.
var polls = []string{"hipEventQuery", "hipStreamQuery"}

// keeps says what a clean-up call that fails leaves behind: the one thing that the device did not give back.
func keeps(call string, r resources) resources {
	switch call {
	case "hipFree":
		r.Allocations++
	case "hipHostFree":
		r.HostAllocations++
	case "hipHostUnregister":
		r.Registrations++
	case "hipStreamDestroy":
		r.Streams++
	case "hipEventDestroy":
		r.Events++
	}
	return r
}

// TestEveryCallFails counts the HIP calls of loads and of reading back, and then repeats the work with each single call
// failing in turn, with several codes, at once and, where that can be, asynchronously. Either the work succeeds in
// another way or it ends in that very error, and afterwards nothing is in use that was not before, nor does a goroutine
// go on.
func TestEveryCallFails(t *testing.T) {
	t.Parallel()
	for i, s := range sweeps {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			path := ownCopy(t, sample)
			m := openModel(t, path)
			before := opened(path)
			t.Logf("%d faults", s.failEveryCall(t, m, i == 0))
			closedAgain(t, path, before)
		})
	}
}

// failEveryCall does what TestEveryCallFails says for one piece of work, with all codes or half of them, and returns
// how many faults struck.
func (s *sweep) failEveryCall(t *testing.T, m *gguf.File, all bool) (total int) {
	var calls map[string]int
	synctest.Test(t, func(t *testing.T) { calls = s.count(t, m) })
	for _, call := range slices.Sorted(maps.Keys(calls)) {
		if slices.ContainsFunc(s.base, func(f soft.Fault) bool { return f.Func == call }) {
			continue
		}
		step := 1
		if testing.Short() {
			step = max(1, calls[call]/5)
		}
		struck := 0
		for n := 1; n <= calls[call]; n += step {
			for k, f := range faultsOf(call, n) {
				if all || (k+n)%2 == 1 {
					synctest.Test(t, func(t *testing.T) { struck += s.fail(t, m, f) })
				}
				if t.Failed() {
					t.FailNow() // the first one tells most
				}
			}
		}
		if struck == 0 {
			t.Errorf("no call of %s failed, although there are %d", call, calls[call])
		}
		total += struck
	}
	return total
}

// faultsOf are the ways in which the nth call of a function is made to fail.
func faultsOf(call string, n int) []soft.Fault {
	faults := []soft.Fault{{Func: call, N: n, Code: amdhip.ErrUnknown}, {Func: call, N: n, Code: amdhip.ErrOutOfMemory}}
	switch call {
	case "hipMemcpyAsync", "hipEventRecord":
		faults = append(faults,
			soft.Fault{Func: call, N: n, Code: amdhip.ErrIllegalAddress, Async: true},
			soft.Fault{Func: call, N: n, Code: amdhip.ErrLaunchFailure, Async: true})
	case "hipEventQuery", "hipStreamQuery", "hipStreamSynchronize":
		faults = append(faults, soft.Fault{Func: call, N: n, Code: amdhip.ErrIllegalAddress})
	}
	return faults
}

// begin opens fresh devices with the sweep's standing faults. The job's device is the second of two, so that
// hipSetDevice is needed.
func (s *sweep) begin(t *testing.T, m *gguf.File) (*job, *soft.Software) {
	t.Helper()
	devs, sw := leakyDevices(t, 2, soft.Options{Integrated: s.apu})
	j := &job{ctx: t.Context(), dev: devs[1], other: devs[0], file: m, struck: func() bool { return false }}
	if s.prep {
		var err error
		if j.loaded, err = load(t.Context(), m, rawTight(), j.dev); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range s.base {
		sw.Inject(f)
	}
	return j, sw
}

// count does the work undisturbed and returns how often it calls what.
func (s *sweep) count(t *testing.T, m *gguf.File) map[string]int {
	t.Helper()
	j, sw := s.begin(t, m)
	before := sw.Calls()
	if err := s.work(j); err != nil {
		t.Fatal(err)
	}
	calls := sw.Calls()
	for call, n := range before {
		if calls[call] -= n; calls[call] == 0 {
			delete(calls, call)
		}
	}
	if n := calls["hipMemcpyAsync"]; (n < 20 || n > 90) && !s.apu {
		t.Fatalf("%d copies, want some tens", n)
	}
	if j.loaded != nil {
		mustClose(t, j.loaded)
	}
	return calls
}

// fail does the work with one fault and returns 1 if that struck, else 0.
func (s *sweep) fail(t *testing.T, m *gguf.File, f soft.Fault) (struck int) {
	t.Helper()
	j, sw := s.begin(t, m)
	before, called := using(sw), sw.Calls()[f.Func]
	sw.Inject(f)
	j.struck = func() bool { return sw.Calls()[f.Func] >= called+f.N }
	err := s.work(j)
	if j.struck() {
		struck = 1
	}
	sw.ClearFaults()
	what := fmt.Sprintf("call %d of %s, %v, async=%v", f.N, f.Func, f.Code, f.Async)
	switch {
	case err == nil && struck == 1 && !slices.Contains(mayComplete, f.Func):
		t.Errorf("%s: no error", what)
	case err != nil && !errors.Is(err, f.Code):
		t.Errorf("%s: %v", what, err)
	case err != nil && struck == 0:
		t.Errorf("%s: %v, although it never came to that", what, err)
	case err != nil && !f.Async && !strings.Contains(err.Error(), f.Func):
		t.Errorf("%s: %v does not name the call", what, err)
	case struck == 0 && !slices.Contains(polls, f.Func):
		t.Logf("%s did not strike", what)
	}
	if now := using(sw); now != before && now != keeps(f.Func, before) {
		t.Errorf("%s: in use afterwards: %+v\nbefore: %+v", what, now, before)
	}
	if j.loaded != nil {
		mustClose(t, j.loaded)
	}
	return struck
}
