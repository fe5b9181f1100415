package amdhip

import (
	"bytes"
	"errors"
	"reflect"
	"testing"
	"testing/synctest"
	"time"
)

// A copy reads its source when it executes. A staging buffer that is reused too early is wrong on the device.
func TestSoftDeferredRead(t *testing.T) {
	rt, d := openSoft(t, SoftwareOptions{})
	s, m, h := newStream(t, d), newMemory(t, d, 100), newPinned(t, d, 100)
	copy(h.Bytes(), "before")
	stall(t, s, m.Ptr())
	noError(t, s.CopyToDevice(m.Ptr(), h, 0, 100))
	copy(h.Bytes(), "after!")
	rt.Software().ClearFaults()
	noError(t, s.Synchronize())
	if got := readBack(t, m); !bytes.HasPrefix(got, []byte("after!")) {
		t.Errorf("the device has %q, want what the source held when the copy ran", got[:6])
	}
}

func TestSoftOrder(t *testing.T) {
	rt, d := openSoft(t, SoftwareOptions{})
	a, b, m := newStream(t, d), newStream(t, d), newMemory(t, d, 1)
	e := newEvent(t, d)
	if done, err := e.Query(); !done || err != nil {
		t.Errorf("event that recorded nothing: %v, %v; want done", done, err)
	}
	noError(t, e.Synchronize())
	noError(t, b.Wait(e)) // does not wait for what is recorded later

	stall(t, a, m.Ptr())
	noError(t, a.Memset(m.Ptr(), 1, 1))
	noError(t, a.Record(e))
	noError(t, b.Synchronize())
	noError(t, b.Wait(e))
	noError(t, b.Memset(m.Ptr(), 2, 1))
	for name, query := range map[string]func() (bool, error){"event": e.Query, "a": a.Query, "b": b.Query} {
		if done, err := query(); done || err != nil {
			t.Errorf("%s with work to do: %v, %v; want not done", name, done, err)
		}
	}
	noError(t, e.Close()) // while b waits for it
	rt.Software().ClearFaults()
	noError(t, b.Synchronize())
	if done, err := a.Query(); !done || err != nil {
		t.Errorf("a in the end: %v, %v; want done", done, err)
	}
	if got := readBack(t, m); got[0] != 2 {
		t.Errorf("byte %d, want 2: the order was not kept", got[0])
	}
}

// hipStreamWaitEvent takes the event as it is at the call.
func TestSoftWaitCaptures(t *testing.T) {
	rt, d := openSoft(t, SoftwareOptions{})
	a, b, m := newStream(t, d), newStream(t, d), newMemory(t, d, 1)
	e := newEvent(t, d)
	noError(t, a.Record(e))
	noError(t, b.Wait(e))
	stall(t, a, m.Ptr())
	noError(t, a.Record(e)) // again, behind work that does not end
	noError(t, b.Synchronize())
	if done, err := e.Query(); done || err != nil {
		t.Errorf("recorded again: %v, %v; want not done", done, err)
	}
	rt.Software().ClearFaults()
}

// Freeing and destroying wait for the work that uses what goes.
func TestSoftFreeWaits(t *testing.T) {
	tests := []struct {
		name string
		free func(s *Stream, m *Memory, h *HostMemory) error
	}{
		{"memory", func(_ *Stream, m *Memory, _ *HostMemory) error { return m.Close() }},
		{"host memory", func(_ *Stream, _ *Memory, h *HostMemory) error { return h.Close() }},
		{"stream", func(s *Stream, _ *Memory, _ *HostMemory) error { return s.Close() }},
		{"device", func(s *Stream, _ *Memory, _ *HostMemory) error { return s.Device().Synchronize() }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				_, d := openSoft(t, SoftwareOptions{LinkBytesPerSecond: 1e6})
				s, m, h := newStream(t, d), newMemory(t, d, 5000), newPinned(t, d, 5000)
				start := time.Now()
				noError(t, s.CopyToDevice(m.Ptr(), h, 0, 5000))
				noError(t, tt.free(s, m, h))
				if got := time.Since(start); got != 5*time.Millisecond {
					t.Errorf("it took %v, want the 5ms of the copy", got)
				}
			})
		})
	}
}

func TestSoftUnpinnedBlocks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, d := openSoft(t, SoftwareOptions{LinkBytesPerSecond: 1e6})
		s, m := newStream(t, d), newMemory(t, d, 5000)
		plain, err := d.HostPlain(5000)
		closeLater(t, plain, err)
		start := time.Now()
		noError(t, s.CopyToDevice(m.Ptr(), plain, 0, 5000))
		if got := time.Since(start); got != 5*time.Millisecond {
			t.Errorf("the call took %v, want the 5ms of the copy", got)
		}
	})
}

func TestSoftHandles(t *testing.T) {
	rt, d := openSoft(t, SoftwareOptions{})
	api := rt.api
	s, e := newStream(t, d), newEvent(t, d)
	untimed, err := d.NewEvent(EventOptions{})
	closeLater(t, untimed, err)
	noError(t, s.Record(untimed))
	gone := value(d.NewStream())(t)
	dead := value(d.NewEvent(EventOptions{}))(t)
	noError(t, gone.Close())
	noError(t, dead.Close())
	noError(t, s.Synchronize())
	var out uintptr
	var ms float32
	tests := []struct {
		name string
		got  Status
		want Status
	}{
		{"stream flags", api.hipStreamCreateWithFlags(&out, 2), ErrInvalidValue},
		{"destroyed stream", api.hipStreamQuery(gone.raw), ErrContextIsDestroyed},
		{"destroy stream twice", api.hipStreamDestroy(gone.raw), ErrContextIsDestroyed},
		{"null stream", api.hipStreamSynchronize(0), ErrNotSupported},
		{"event for a stream", api.hipStreamSynchronize(e.raw), ErrContextIsDestroyed},
		{"event flag of nobody", api.hipEventCreateWithFlags(&out, 8), ErrInvalidValue},
		{"interprocess with timing", api.hipEventCreateWithFlags(&out, 4), ErrInvalidValue},
		{"two fences", api.hipEventCreateWithFlags(&out, 0xC0000000), ErrInvalidValue},
		{"destroyed event", api.hipEventQuery(dead.raw), ErrInvalidHandle},
		{"destroy event twice", api.hipEventDestroy(dead.raw), ErrContextIsDestroyed},
		{"destroy null event", api.hipEventDestroy(0), ErrInvalidHandle},
		{"wait with flags", api.hipStreamWaitEvent(s.raw, e.raw, 1), ErrInvalidValue},
		{"wait for null", api.hipStreamWaitEvent(s.raw, 0, 0), ErrInvalidHandle},
		{"elapsed of nothing recorded", api.hipEventElapsedTime(&ms, e.raw, e.raw), ErrInvalidHandle},
		{"elapsed without timing", api.hipEventElapsedTime(&ms, untimed.raw, untimed.raw), ErrInvalidHandle},
	}
	for _, tt := range tests {
		if tt.got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, tt.got, tt.want)
		}
	}
	if out != 0 {
		t.Errorf("a handle was answered: %#x", out)
	}
	if got := api.hipGetErrorName(77777); got != "hipErrorUnknown" {
		t.Errorf("the name of a number that is none is %q", got)
	}
}

func TestSoftFaultAtOnce(t *testing.T) {
	rt, d := openSoft(t, SoftwareOptions{})
	sw := rt.Software()
	sw.Inject(Fault{Func: "hipMalloc", N: 2, Code: ErrUnknown})
	sw.Inject(Fault{Func: "hipMalloc", N: 4, Code: ErrOutOfMemory})
	for i, want := range []error{nil, ErrUnknown, nil, ErrOutOfMemory, nil} {
		m, err := d.Malloc(10)
		if !errors.Is(err, want) || (err == nil) != (want == nil) {
			t.Errorf("call %d: %v, want %v", i+1, err, want)
		}
		if err == nil {
			noError(t, m.Close())
		}
	}
	sw.Inject(Fault{Func: "hipStreamCreateWithFlags", Code: ErrOutOfMemory})
	for range 3 {
		if _, err := d.NewStream(); !errors.Is(err, ErrOutOfMemory) {
			t.Errorf("every call: %v", err)
		}
	}
	sw.ClearFaults()
	noError(t, newStream(t, d).Synchronize())
	if got := sw.Stats().Allocations; got != 0 {
		t.Errorf("%d allocations are left", got)
	}
}

func TestSoftFaultAsync(t *testing.T) {
	rt, d := openSoft(t, SoftwareOptions{})
	a, b, m, h := newStream(t, d), newStream(t, d), newMemory(t, d, 10), newPinned(t, d, 10)
	before, after, other := newEvent(t, d), newEvent(t, d), newEvent(t, d)
	rt.Software().Inject(Fault{Func: "hipMemcpyAsync", N: 2, Code: ErrIllegalAddress, Async: true})
	copy(h.Bytes(), "0123456789")
	noError(t, a.CopyToDevice(m.Ptr(), h, 0, 3))
	noError(t, a.Record(before))
	noError(t, a.CopyToDevice(m.Ptr()+3, h, 3, 3))
	noError(t, a.Record(after))
	noError(t, a.CopyToDevice(m.Ptr()+6, h, 6, 3)) // skipped
	noError(t, b.Wait(after))
	noError(t, b.Memset(m.Ptr(), 'x', 1)) // skipped
	noError(t, b.Record(other))
	noError(t, before.Synchronize())
	for name, wait := range map[string]func() error{
		"event": after.Synchronize, "stream": a.Synchronize, "stream that waited": b.Synchronize,
		"its event": other.Synchronize, "device": d.Synchronize,
		"query of the event":  func() error { _, err := after.Query(); return err },
		"query of the stream": func() error { _, err := a.Query(); return err },
		"elapsed":             func() error { _, err := after.Elapsed(before); return err },
	} {
		for range 2 {
			if err := wait(); !errors.Is(err, ErrIllegalAddress) {
				t.Errorf("%s: %v, want %v", name, err, ErrIllegalAddress)
			}
		}
	}
	if done, err := before.Query(); !done || err != nil {
		t.Errorf("the event before the failure: %v, %v; want done", done, err)
	}
	if got := readBack(t, m); string(got) != "012\x00\x00\x00\x00\x00\x00\x00" {
		t.Errorf("the device has %q, want only the bytes before the failure", got)
	}
	rt.Software().Inject(Fault{Func: "hipFreeAsync", N: 1, Code: ErrLaunchFailure, Async: true})
	s := newStream(t, d)
	p := value(s.MallocAsync(5))(t)
	noError(t, s.FreeAsync(p))
	if err := s.Synchronize(); !errors.Is(err, ErrLaunchFailure) {
		t.Errorf("free that fails: %v", err)
	}
	if got := rt.Software().Stats().DeviceBytes; got != m.Size() {
		t.Errorf("%d bytes are allocated, want %d", got, m.Size())
	}
}

// Every function counts its calls, can be made to fail, and takes null pointers and handles without a crash.
func TestSoftEveryFunction(t *testing.T) {
	rt, _ := openSoft(t, SoftwareOptions{})
	for _, table := range []reflect.Value{reflect.ValueOf(rt.api).Elem(), reflect.ValueOf(value(rt.compiler())(t).api).Elem()} {
		for i := range table.NumField() {
			name, f := table.Type().Field(i).Name, table.Field(i)
			if f.Kind() != reflect.Func {
				continue
			}
			f = reflect.NewAt(f.Type(), f.Addr().UnsafePointer()).Elem() // one that reflection may call
			t.Run(name, func(t *testing.T) { callTwice(t, rt.Software(), name, f) })
		}
	}
}

// callTwice calls a function of the table with zeros for all arguments, without a fault and with one.
func callTwice(t *testing.T, sw *Software, name string, f reflect.Value) {
	var zeros []reflect.Value
	for in := range f.Type().Ins() {
		zeros = append(zeros, reflect.Zero(in))
	}
	before := sw.Calls()[name]
	f.Call(zeros)
	if f.Type().Out(0).Kind() != reflect.String {
		sw.Inject(Fault{Func: name, N: 1, Code: ErrLaunchFailure})
		if got := f.Call(zeros)[0].Int(); got != int64(ErrLaunchFailure) {
			t.Errorf("with a fault: %v, want %v", got, ErrLaunchFailure)
		}
		before++
	}
	if got := sw.Calls()[name]; got != before+1 {
		t.Errorf("%d calls were counted, want %d", got, before+1)
	}
}

func TestSoftInjectPanics(t *testing.T) {
	rt, _ := openSoft(t, SoftwareOptions{})
	for _, tt := range []struct {
		name string
		f    Fault
	}{
		{"no such function", Fault{Func: "hipLaunchKernel", Code: 1}},
		{"blank", Fault{Func: "_", Code: 1}},
		{"function without a code", Fault{Func: "hipGetErrorName", Code: 1}},
		{"function of hipRTC without a code", Fault{Func: "hiprtcGetErrorString", Code: 1}},
		{"async of compiling", Fault{Func: "hiprtcCompileProgram", Code: 1, Async: true}},
		{"async of what is no operation", Fault{Func: "hipMalloc", Code: 1, Async: true}},
		{"stall of what is no operation", Fault{Func: "hipEventQuery", Stall: true}},
		{"no effect", Fault{Func: "hipMalloc"}},
		{"negative call", Fault{Func: "hipMalloc", N: -1, Code: 1}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			defer func() {
				if recover() == nil {
					t.Error("no panic")
				}
			}()
			rt.Software().Inject(tt.f)
		})
	}
}

// Close ends everything that hangs or waits, and what is left is still counted.
func TestSoftClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rt, err := OpenSoftware(SoftwareOptions{Memory: 64 * mib, LinkBytesPerSecond: 1})
		noError(t, err)
		d := value(rt.Device(0))(t)
		stalled, slow, waiting := value(d.NewStream())(t), value(d.NewStream())(t), value(d.NewStream())(t)
		m, h := value(d.Malloc(mib))(t), value(d.HostMalloc(mib))(t)
		e := value(d.NewEvent(EventOptions{}))(t)
		stall(t, stalled, m.Ptr())
		noError(t, stalled.Record(e))
		noError(t, slow.CopyToDevice(m.Ptr(), h, 0, mib)) // for twelve days
		noError(t, waiting.Wait(e))
		calls := map[string]func() error{
			"event": e.Synchronize, "stream": slow.Synchronize, "device": d.Synchronize, "waiting": waiting.Synchronize,
			"destroy": stalled.Close, "free": m.Close,
		}
		results := make(map[string]chan error)
		for name, call := range calls {
			result := make(chan error, 1)
			results[name] = result
			go func() { result <- call() }()
		}
		synctest.Wait()
		start := time.Now()
		noError(t, rt.Close())
		noError(t, rt.Close())
		for name, result := range results {
			// The stream's goroutine is gone then, which is all that destroying it promises.
			if err := <-result; name != "destroy" && !errors.Is(err, ErrDeinitialized) {
				t.Errorf("%s: %v, want %v", name, err, ErrDeinitialized)
			}
		}
		if got := time.Since(start); got != 0 {
			t.Errorf("Close took %v", got)
		}
		if got := rt.Software().Stats(); got.Streams != 2 || got.Events != 1 || got.Allocations != 1 || got.HostAllocations != 1 {
			t.Errorf("after Close %+v are left, want 2 streams, an event, an allocation and a host allocation", got)
		}
		var p uintptr
		for name, st := range map[string]Status{
			"malloc": rt.api.hipMalloc(&p, 1), "host malloc": rt.api.hipHostMalloc(&p, 1, 0),
			"stream": rt.api.hipStreamCreateWithFlags(&p, 0), "event": rt.api.hipEventCreateWithFlags(&p, 0),
			"query": rt.api.hipStreamQuery(slow.raw), "record": rt.api.hipEventRecord(e.raw, slow.raw),
		} {
			if st != ErrDeinitialized {
				t.Errorf("%s after Close: %v, want %v", name, st, ErrDeinitialized)
			}
		}
	})
}
