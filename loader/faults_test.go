package loader

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// discard takes what WriteSafetensors writes.
type discard struct{}

func (discard) WriteAt(b []byte, _ int64) (int, error) { return len(b), nil }

// sweep is a piece of work whose every HIP call is made to fail.
type sweep struct {
	name string
	base []amdhip.Fault // in force all the time
	prep bool           // work gets a model that is loaded already
	apu  bool           // the device shares the host's memory
	ipc  bool           // other processes can open the device's memory
	few  bool           // it makes few copies
	work func(j *job) error
}

// job is what a sweep's work is given.
type job struct {
	ctx    context.Context
	dev    *amdhip.Device
	other  *amdhip.Device
	file   *gguf.Model
	loaded *Model      // with sweep.prep
	struck func() bool // whether the fault has come
}

// loading is the work of a load that is closed again. If it succeeds in spite of a fault, what has arrived is compared.
func loading(load loadFunc) func(*job) error {
	return func(j *job) error {
		w, err := load(j.ctx, j.dev, j.file, rawTight())
		if err != nil {
			if w != nil {
				return errors.New("a model in spite of an error")
			}
			return err
		}
		if j.struck() {
			err = w.Verify(j.ctx)
		}
		return errors.Join(err, w.Close())
	}
}

// splitting is loading onto both devices.
func splitting(by SplitBy) func(*job) error {
	return func(j *job) error {
		o := rawTight()
		o.Staging *= 2
		w, err := LoadSplit(j.ctx, []*amdhip.Device{j.other, j.dev}, j.file, o, Split{By: by})
		if err != nil {
			if w != nil {
				return errors.New("a model in spite of an error")
			}
			return err
		}
		if j.struck() {
			err = errors.Join(w.Verify(j.ctx), w.WriteSafetensors(j.ctx, discard{}))
		}
		return errors.Join(err, w.Close())
	}
}

// rawTight are the options of all loads here.
func rawTight() Options {
	o := tight
	o.DType = Raw
	return o
}

// noRegister and noMalloc make the pool take the other ways to staging memory.
var (
	noRegister = amdhip.Fault{Func: "hipHostRegister", Code: amdhip.ErrNotSupported}
	noMalloc   = amdhip.Fault{Func: "hipHostMalloc", Code: amdhip.ErrNotSupported}
)

var sweeps = []sweep{
	{name: "load", work: loading(Load)},
	{name: "load with hipHostMalloc", base: []amdhip.Fault{noRegister}, work: loading(Load)},
	{name: "load without pinning", base: []amdhip.Fault{noRegister, noMalloc}, work: loading(Load)},
	{name: "load on an APU", apu: true, work: loading(Load)},
	{name: "sync load", work: loading(LoadSync)},
	{name: "load of layers on two devices", work: splitting(SplitLayers)},
	{name: "load of two copies", work: splitting(SplitNone)},
	{name: "verify", prep: true, work: func(j *job) error { return j.loaded.Verify(j.ctx) }},
	{name: "read back", prep: true, work: func(j *job) error { return j.loaded.WriteSafetensors(j.ctx, discard{}) }},
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
func (s *sweep) keeps(call string, r resources) resources {
	switch call {
	case "hipFree":
		r.Allocations++
		r.MapBytes += 16 << 20 // the software device's memory is ours
		if s.ipc {
			r.FileMaps++
			r.Descriptors++
		}
	case "hipIpcCloseMemHandle":
		r.IPCMappings++
		r.FileMaps++
	case "hipHostFree":
		r.HostAllocations++
		r.MapBytes += 4 << 20
	case "hipHostUnregister":
		r.Registrations++
		r.MapBytes += 4 << 20
	case "hipStreamDestroy":
		r.Streams++
		r.Goroutines++
	case "hipEventDestroy":
		r.Events++
	}
	return r
}

// TestEveryCallFails counts the HIP calls of loads and of reading back, and then repeats the work with each single call
// failing in turn, with several codes, at once and, where that can be, asynchronously. Either the work succeeds in another way
// or it ends in that very error, and afterwards nothing is in use that was not before.
func TestEveryCallFails(t *testing.T) {
	m := openModel(t, sample)
	t.Logf("%d faults", failEveryCall(t, m, sweeps))
}

// failEveryCall does what TestEveryCallFails says for some pieces of work, and returns how many faults struck.
func failEveryCall(t *testing.T, m *gguf.Model, sweeps []sweep) (total int) {
	for i, s := range sweeps {
		t.Run(s.name, func(t *testing.T) {
			calls := s.count(t, m)
			for _, call := range slices.Sorted(maps.Keys(calls)) {
				if slices.ContainsFunc(s.base, func(f amdhip.Fault) bool { return f.Func == call }) {
					continue
				}
				step := 1
				if testing.Short() {
					step = max(1, calls[call]/5)
				}
				struck := 0
				for n := 1; n <= calls[call]; n += step {
					for k, f := range faultsOf(call, n) {
						if i > 0 && (k+n)%2 == 0 { // all codes for the load itself, half of them each for the others
							continue
						}
						struck += s.fail(t, m, f)
					}
				}
				if struck == 0 {
					t.Errorf("no call of %s failed, although there are %d", call, calls[call])
				}
				total += struck
			}
		})
	}
	return total
}

// faultsOf are the ways in which the nth call of a function is made to fail.
func faultsOf(call string, n int) []amdhip.Fault {
	faults := []amdhip.Fault{{Func: call, N: n, Code: amdhip.ErrUnknown}, {Func: call, N: n, Code: amdhip.ErrOutOfMemory}}
	switch call {
	case "hipMemcpyAsync", "hipEventRecord":
		faults = append(faults,
			amdhip.Fault{Func: call, N: n, Code: amdhip.ErrIllegalAddress, Async: true},
			amdhip.Fault{Func: call, N: n, Code: amdhip.ErrLaunchFailure, Async: true})
	case "hipEventQuery", "hipStreamQuery", "hipStreamSynchronize":
		faults = append(faults, amdhip.Fault{Func: call, N: n, Code: amdhip.ErrIllegalAddress})
	}
	return faults
}

// start opens a fresh device with the sweep's standing faults. It is the second of two, so that hipSetDevice is needed.
func (s *sweep) start(t *testing.T, m *gguf.Model) (rt *amdhip.Runtime, other, dev *amdhip.Device, w *Model) {
	t.Helper()
	rt, err := amdhip.OpenSoftware(amdhip.SoftwareOptions{Devices: 2, Integrated: s.apu, Shared: s.ipc})
	if err != nil {
		t.Fatal(err)
	}
	if other, err = rt.Device(0); err != nil {
		t.Fatal(err)
	}
	if dev, err = rt.Device(1); err != nil {
		t.Fatal(err)
	}
	if s.prep {
		if w, err = Load(t.Context(), dev, m, rawTight()); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range s.base {
		rt.Software().Inject(f)
	}
	return rt, other, dev, w
}

// count does the work undisturbed and returns how often it calls what.
func (s *sweep) count(t *testing.T, m *gguf.Model) map[string]int {
	t.Helper()
	rt, other, dev, w := s.start(t, m)
	defer rt.Close()
	before := rt.Software().Calls()
	if err := s.work(&job{t.Context(), dev, other, m, w, func() bool { return false }}); err != nil {
		t.Fatal(err)
	}
	calls := rt.Software().Calls()
	for call, n := range before {
		if calls[call] -= n; calls[call] == 0 {
			delete(calls, call)
		}
	}
	if n := calls["hipMemcpyAsync"]; (n < 20 || n > 90) && !s.apu && !s.few {
		t.Fatalf("%d copies, want some tens", n)
	}
	if w != nil {
		mustClose(t, w)
	}
	return calls
}

// fail does the work with one fault and returns 1 if that struck, else 0.
func (s *sweep) fail(t *testing.T, m *gguf.Model, f amdhip.Fault) (struck int) {
	t.Helper()
	rt, other, dev, w := s.start(t, m)
	sw := rt.Software()
	before, called := measure(sw), sw.Calls()[f.Func]
	sw.Inject(f)
	reached := func() bool { return sw.Calls()[f.Func] >= called+f.N }
	err := s.work(&job{t.Context(), dev, other, m, w, reached})
	if reached() {
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
	wantBack(t, sw, s.keeps(f.Func, before))
	if w != nil {
		mustClose(t, w)
	}
	if err := rt.Close(); err != nil {
		t.Error(err)
	}
	if t.Failed() {
		t.FailNow() // the first one tells most
	}
	return struck
}
