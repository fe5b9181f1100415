package soft

import (
	"bytes"
	"errors"
	"reflect"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
)

// A copy reads its source when it executes. A staging buffer that is reused too early is wrong on the device.
func TestDeferredRead(t *testing.T) {
	rt, d := openSoft(t, Options{})
	s, m, h := newStream(t, d), newMemory(t, d, 100), newPinned(t, d, 100)
	copy(h.Bytes(), "before")
	stall(t, s, m.Ptr())
	noError(t, s.CopyToDevice(m.Ptr(), h, 0, 100))
	copy(h.Bytes(), "after!")
	Of(rt).ClearFaults()
	noError(t, s.Synchronize())
	if got := readBack(t, m); !bytes.HasPrefix(got, []byte("after!")) {
		t.Errorf("the device has %q, want what the source held when the copy ran", got[:6])
	}
}

func TestOrder(t *testing.T) {
	rt, d := openSoft(t, Options{})
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
	Of(rt).ClearFaults()
	noError(t, b.Synchronize())
	if done, err := a.Query(); !done || err != nil {
		t.Errorf("a in the end: %v, %v; want done", done, err)
	}
	if got := readBack(t, m); got[0] != 2 {
		t.Errorf("byte %d, want 2: the order was not kept", got[0])
	}
}

// hipStreamWaitEvent takes the event as it is at the call.
func TestWaitCaptures(t *testing.T) {
	rt, d := openSoft(t, Options{})
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
	Of(rt).ClearFaults()
}

// Freeing and destroying wait for the work that uses what goes.
func TestFreeWaits(t *testing.T) {
	tests := []struct {
		name string
		free func(s *amdhip.Stream, m *amdhip.Memory, h *amdhip.HostMemory) error
	}{
		{"memory", func(_ *amdhip.Stream, m *amdhip.Memory, _ *amdhip.HostMemory) error { return m.Close() }},
		{"host memory", func(_ *amdhip.Stream, _ *amdhip.Memory, h *amdhip.HostMemory) error { return h.Close() }},
		{"stream", func(s *amdhip.Stream, _ *amdhip.Memory, _ *amdhip.HostMemory) error { return s.Close() }},
		{"device", func(s *amdhip.Stream, _ *amdhip.Memory, _ *amdhip.HostMemory) error { return s.Device().Synchronize() }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				_, d := openSoft(t, Options{LinkBytesPerSecond: 1e6})
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

func TestUnpinnedBlocks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, d := openSoft(t, Options{LinkBytesPerSecond: 1e6})
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

func TestHandles(t *testing.T) {
	rt, d := openSoft(t, Options{})
	api := Of(rt).table()
	s, e := newStream(t, d), newEvent(t, d)
	untimed, err := d.NewEvent(amdhip.EventOptions{})
	closeLater(t, untimed, err)
	noError(t, s.Record(untimed))
	gone := value(d.NewStream())(t)
	dead := value(d.NewEvent(amdhip.EventOptions{}))(t)
	noError(t, gone.Close())
	noError(t, dead.Close())
	noError(t, s.Synchronize())
	var out uintptr
	var ms float32
	tests := []struct {
		name string
		got  hip.Status
		want hip.Status
	}{
		{"stream flags", api.HipStreamCreateWithFlags(&out, 2), hip.ErrInvalidValue},
		{"destroyed stream", api.HipStreamQuery(gone.Handle()), hip.ErrContextIsDestroyed},
		{"destroy stream twice", api.HipStreamDestroy(gone.Handle()), hip.ErrContextIsDestroyed},
		{"null stream", api.HipStreamSynchronize(0), hip.ErrNotSupported},
		{"event for a stream", api.HipStreamSynchronize(e.Handle()), hip.ErrContextIsDestroyed},
		{"event flag of nobody", api.HipEventCreateWithFlags(&out, 8), hip.ErrInvalidValue},
		{"interprocess with timing", api.HipEventCreateWithFlags(&out, 4), hip.ErrInvalidValue},
		{"two fences", api.HipEventCreateWithFlags(&out, 0xC0000000), hip.ErrInvalidValue},
		{"destroyed event", api.HipEventQuery(dead.Handle()), hip.ErrInvalidHandle},
		{"destroy event twice", api.HipEventDestroy(dead.Handle()), hip.ErrContextIsDestroyed},
		{"destroy null event", api.HipEventDestroy(0), hip.ErrInvalidHandle},
		{"wait with flags", api.HipStreamWaitEvent(s.Handle(), e.Handle(), 1), hip.ErrInvalidValue},
		{"wait for null", api.HipStreamWaitEvent(s.Handle(), 0, 0), hip.ErrInvalidHandle},
		{"elapsed of nothing recorded", api.HipEventElapsedTime(&ms, e.Handle(), e.Handle()), hip.ErrInvalidHandle},
		{"elapsed without timing", api.HipEventElapsedTime(&ms, untimed.Handle(), untimed.Handle()), hip.ErrInvalidHandle},
	}
	for _, tt := range tests {
		if tt.got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, tt.got, tt.want)
		}
	}
	if out != 0 {
		t.Errorf("a handle was answered: %#x", out)
	}
	if got := api.HipGetErrorName(77777); got != "hipErrorUnknown" {
		t.Errorf("the name of a number that is none is %q", got)
	}
}

func TestFaultAtOnce(t *testing.T) {
	rt, d := openSoft(t, Options{})
	sw := Of(rt)
	sw.Inject(Fault{Func: "hipMalloc", N: 2, Code: hip.ErrUnknown})
	sw.Inject(Fault{Func: "hipMalloc", N: 4, Code: hip.ErrOutOfMemory})
	for i, want := range []error{nil, hip.ErrUnknown, nil, hip.ErrOutOfMemory, nil} {
		m, err := d.Malloc(10)
		if !errors.Is(err, want) || (err == nil) != (want == nil) {
			t.Errorf("call %d: %v, want %v", i+1, err, want)
		}
		if err == nil {
			noError(t, m.Close())
		}
	}
	sw.Inject(Fault{Func: "hipStreamCreateWithFlags", Code: hip.ErrOutOfMemory})
	for range 3 {
		if _, err := d.NewStream(); !errors.Is(err, hip.ErrOutOfMemory) {
			t.Errorf("every call: %v", err)
		}
	}
	sw.ClearFaults()
	noError(t, newStream(t, d).Synchronize())
	if got := sw.Stats().Allocations; got != 0 {
		t.Errorf("%d allocations are left", got)
	}
}

func TestFaultAsync(t *testing.T) {
	rt, d := openSoft(t, Options{})
	a, b, m, h := newStream(t, d), newStream(t, d), newMemory(t, d, 10), newPinned(t, d, 10)
	before, after, other := newEvent(t, d), newEvent(t, d), newEvent(t, d)
	Of(rt).Inject(Fault{Func: "hipMemcpyAsync", N: 2, Code: hip.ErrIllegalAddress, Async: true})
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
			if err := wait(); !errors.Is(err, hip.ErrIllegalAddress) {
				t.Errorf("%s: %v, want %v", name, err, hip.ErrIllegalAddress)
			}
		}
	}
	if done, err := before.Query(); !done || err != nil {
		t.Errorf("the event before the failure: %v, %v; want done", done, err)
	}
	if got := readBack(t, m); string(got) != "012\x00\x00\x00\x00\x00\x00\x00" {
		t.Errorf("the device has %q, want only the bytes before the failure", got)
	}
	Of(rt).Inject(Fault{Func: "hipFreeAsync", N: 1, Code: hip.ErrLaunchFailure, Async: true})
	s := newStream(t, d)
	p := value(s.MallocAsync(5))(t)
	noError(t, s.FreeAsync(p))
	if err := s.Synchronize(); !errors.Is(err, hip.ErrLaunchFailure) {
		t.Errorf("free that fails: %v", err)
	}
	if got := Of(rt).Stats().DeviceBytes; got != m.Size() {
		t.Errorf("%d bytes are allocated, want %d", got, m.Size())
	}
}

// Every function counts its calls, can be made to fail, and takes null pointers and handles without a crash.
func TestEveryFunction(t *testing.T) {
	rt, _ := openSoft(t, Options{})
	for _, table := range []reflect.Value{
		reflect.ValueOf(Of(rt).table()).Elem(),
		reflect.ValueOf(Of(rt).rtcTable()).Elem(),
	} {
		for i := range table.NumField() {
			name, f := hip.Symbol(table.Type().Field(i).Name), table.Field(i)
			if f.Kind() != reflect.Func {
				continue
			}
			t.Run(name, func(t *testing.T) { callTwice(t, Of(rt), name, f) })
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
		sw.Inject(Fault{Func: name, N: 1, Code: hip.ErrLaunchFailure})
		if got := f.Call(zeros)[0].Int(); got != int64(hip.ErrLaunchFailure) {
			t.Errorf("with a fault: %v, want %v", got, hip.ErrLaunchFailure)
		}
		before++
	}
	if got := sw.Calls()[name]; got != before+1 {
		t.Errorf("%d calls were counted, want %d", got, before+1)
	}
}

func TestInjectPanics(t *testing.T) {
	rt, _ := openSoft(t, Options{})
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
		{"block and stall", Fault{Func: "hipMemcpyAsync", Block: true, Stall: true}},
		{"block and async", Fault{Func: "hipMemcpyAsync", Code: 1, Block: true, Async: true}},
		{"no effect", Fault{Func: "hipMalloc"}},
		{"negative call", Fault{Func: "hipMalloc", N: -1, Code: 1}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			defer func() {
				if recover() == nil {
					t.Error("no panic")
				}
			}()
			Of(rt).Inject(tt.f)
		})
	}
}

// Close ends everything that hangs or waits, and what is left is still counted.
func TestClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rt, err := OpenRuntime(Options{Memory: 64 * mib, LinkBytesPerSecond: 1})
		noError(t, err)
		d := value(rt.Device(0))(t)
		stalled, slow, waiting := value(d.NewStream())(t), value(d.NewStream())(t), value(d.NewStream())(t)
		m, h := value(d.Malloc(mib))(t), value(d.HostMalloc(mib))(t)
		e := value(d.NewEvent(amdhip.EventOptions{}))(t)
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
			if err := <-result; name != "destroy" && !errors.Is(err, hip.ErrDeinitialized) {
				t.Errorf("%s: %v, want %v", name, err, hip.ErrDeinitialized)
			}
		}
		if got := time.Since(start); got != 0 {
			t.Errorf("Close took %v", got)
		}
		if got := Of(rt).Stats(); got.Streams != 2 || got.Events != 1 || got.Allocations != 1 || got.HostAllocations != 1 {
			t.Errorf("after Close %+v are left, want 2 streams, an event, an allocation and a host allocation", got)
		}
		var p uintptr
		for name, st := range map[string]hip.Status{
			"malloc": Of(rt).table().HipMalloc(&p, 1), "host malloc": Of(rt).table().HipHostMalloc(&p, 1, 0),
			"stream": Of(rt).table().HipStreamCreateWithFlags(&p, 0), "event": Of(rt).table().HipEventCreateWithFlags(&p, 0),
			"query": Of(rt).table().HipStreamQuery(slow.Handle()), "record": Of(rt).table().HipEventRecord(e.Handle(),
				slow.Handle()),
		} {
			if st != hip.ErrDeinitialized {
				t.Errorf("%s after Close: %v, want %v", name, st, hip.ErrDeinitialized)
			}
		}
	})
}
