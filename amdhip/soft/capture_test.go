package soft

import (
	"bytes"
	"errors"
	"runtime"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
)

// recordGraph records, and makes what was recorded ready to be launched, until the end of the test.
func recordGraph(t testing.TB, s *amdhip.Stream, record func() error) *amdhip.GraphExec {
	t.Helper()
	g := value(s.Capture(record))(t)
	exec, err := g.Instantiate()
	closeLater(t, exec, err)
	noError(t, g.Close())
	return exec
}

// TestGraph records a kernel and copies on two streams. Nothing is done before the launches, and all of it at each.
func TestGraph(t *testing.T) {
	t.Parallel()
	rt, d := openSoft(t, Options{})
	offerAddOne(rt)
	f := loadKernel(t, d, addOneSource, "add_one")
	a, b, h := newStream(t, d), newStream(t, d), newPinned(t, d, 8)
	forked, joined := newEvent(t, d), newEvent(t, d)
	m, n := newMemory(t, d, 8), newMemory(t, d, 8)
	noError(t, a.Memset(m.Ptr(), 0, 8))
	noError(t, a.Synchronize())
	exec := recordGraph(t, a, func() error {
		return errors.Join(
			a.Wait(forked), // never recorded: nothing to wait for
			a.Launch(f, 1, 1, uint64(m.Ptr()), 1),
			a.Record(forked),
			b.Wait(forked),
			b.CopyDevice(n.Ptr(), m.Ptr(), 8),
			b.Record(joined),
			a.Wait(joined),
			a.CopyToHost(h, 0, n.Ptr(), 8),
		)
	})
	noError(t, a.Synchronize())
	if got := readBack(t, m)[0]; got != 0 {
		t.Errorf("the kernel ran %d times while it was recorded", got)
	}
	for i := range 3 {
		noError(t, a.LaunchGraph(exec))
		noError(t, a.Synchronize())
		if h.Bytes()[0] != byte(i+1) {
			t.Errorf("launch %d left %d", i, h.Bytes()[0])
		}
	}
	// On two streams at once: one after the other.
	noError(t, errors.Join(a.LaunchGraph(exec), b.LaunchGraph(exec), b.Synchronize()))
	if h.Bytes()[0] != 5 {
		t.Errorf("two launches left %d, want 5", h.Bytes()[0])
	}
	// The event stands for work in the graph, so the host cannot wait for it.
	if err := joined.Synchronize(); !errors.Is(err, hip.ErrCapturedEvent) {
		t.Errorf("an event that was recorded: %v", err)
	}
	noError(t, errors.Join(a.Record(joined), joined.Synchronize()))
	if s := Of(rt).Stats(); s.Graphs != 0 || s.GraphExecs != 1 {
		t.Errorf("counted %+v", s)
	}
}

// TestCaptureRefuses: what cannot be recorded is refused and spoils the recording; the stream is good for work
// afterwards.
func TestCaptureRefuses(t *testing.T) {
	t.Parallel()
	rt, d := openSoft(t, Options{Devices: 2})
	plain := value(d.HostPlain(64))(t)
	m, fresh := newMemory(t, d, 64), value(d.Malloc(64))(t)
	outside := newEvent(t, d)
	exec := recordGraph(t, newStream(t, d), func() error { return nil })
	for _, tt := range []struct {
		name   string
		record func(s, other *amdhip.Stream, e *amdhip.Event) error
		want   hip.Status
	}{
		{
			"synchronize", func(s, _ *amdhip.Stream, _ *amdhip.Event) error { return s.Synchronize() },
			hip.ErrStreamCaptureUnsupported,
		},
		{
			"query", func(s, _ *amdhip.Stream, _ *amdhip.Event) error { _, err := s.Query(); return err },
			hip.ErrStreamCaptureUnsupported,
		},
		{
			"device", func(*amdhip.Stream, *amdhip.Stream, *amdhip.Event) error { return d.Synchronize() },
			hip.ErrStreamCaptureUnsupported,
		},
		{
			"malloc", func(*amdhip.Stream, *amdhip.Stream, *amdhip.Event) error { _, err := d.Malloc(1); return err },
			hip.ErrStreamCaptureUnsupported,
		},
		{
			"host malloc", func(*amdhip.Stream, *amdhip.Stream, *amdhip.Event) error { _, err := d.HostMalloc(1); return err },
			hip.ErrStreamCaptureUnsupported,
		},
		{"reserve", func(*amdhip.Stream, *amdhip.Stream, *amdhip.Event) error {
			_, err := d.ReserveAddresses(4096, 0, 0)
			return err
		}, hip.ErrStreamCaptureUnsupported},
		{"malloc in stream order", func(s, _ *amdhip.Stream, _ *amdhip.Event) error {
			_, err := s.MallocAsync(1)
			return err
		}, hip.ErrStreamCaptureUnsupported},
		{
			"plain memory", func(s, _ *amdhip.Stream, _ *amdhip.Event) error { return s.CopyToDevice(m.Ptr(), plain, 0, 64) },
			hip.ErrStreamCaptureUnsupported,
		},
		{
			"graph", func(s, _ *amdhip.Stream, _ *amdhip.Event) error { return s.LaunchGraph(exec) },
			hip.ErrStreamCaptureUnsupported,
		},
		{"twice", func(s, _ *amdhip.Stream, _ *amdhip.Event) error {
			_, err := s.Capture(func() error { return nil })
			return err
		}, hip.ErrIllegalState},
		{"captured event", func(s, _ *amdhip.Stream, e *amdhip.Event) error {
			_, err := e.Query()
			return errors.Join(s.Record(e), err, e.Synchronize())
		}, hip.ErrCapturedEvent},
		{"work outside", func(s, other *amdhip.Stream, e *amdhip.Event) error {
			return errors.Join(other.Record(outside), s.Wait(outside))
		}, hip.ErrStreamCaptureIsolation},
		{"not joined", func(s, other *amdhip.Stream, e *amdhip.Event) error {
			return errors.Join(s.Record(e), other.Wait(e), other.Memset(m.Ptr(), 1, 1))
		}, hip.ErrStreamCaptureUnjoined},
		{"joined too early", func(s, other *amdhip.Stream, e *amdhip.Event) error {
			return errors.Join(s.Record(e), other.Wait(e), other.Memset(m.Ptr(), 1, 1), other.Record(e), s.Wait(e),
				other.Memset(m.Ptr(), 1, 1))
		}, hip.ErrStreamCaptureUnjoined},
		{"after a failure", func(s, _ *amdhip.Stream, _ *amdhip.Event) error {
			_, _ = s.Query()
			return s.Memset(m.Ptr(), 1, 1)
		}, hip.ErrStreamCaptureInvalidated},
		{"a failure that nobody looked at", func(s, _ *amdhip.Stream, _ *amdhip.Event) error {
			_, _ = s.Query()
			return nil
		}, hip.ErrStreamCaptureInvalidated},
		{
			"wrong arguments", func(s, _ *amdhip.Stream, _ *amdhip.Event) error { return s.Memset(m.Ptr(), 1, 65) },
			hip.ErrInvalidValue,
		},
	} {
		s, other, e := newStream(t, d), newStream(t, d), newEvent(t, d)
		g, err := s.Capture(func() error { return tt.record(s, other, e) })
		if g != nil || !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, err, tt.want)
		}
		noError(t, errors.Join(s.Memset(m.Ptr(), 1, 1), s.Synchronize(), other.Memset(m.Ptr(), 1, 1), other.Synchronize()))
	}
	if s := Of(rt).Stats(); s.Graphs != 0 || s.GraphExecs != 1 {
		t.Errorf("counted %+v", s)
	}
	noError(t, errors.Join(fresh.Close(), plain.Close()))
}

// TestCaptureElsewhere: other goroutines allocate and wait while one records.
func TestCaptureElsewhere(t *testing.T) {
	t.Parallel()
	_, d := openSoft(t, Options{})
	s, m := newStream(t, d), newMemory(t, d, 8)
	exec := recordGraph(t, s, func() error {
		done := make(chan error)
		go func() {
			p, err := d.Malloc(64)
			if err == nil {
				err = errors.Join(p.Close(), d.Synchronize())
			}
			done <- err
		}()
		return errors.Join(<-done, s.Memset(m.Ptr(), 9, 8))
	})
	noError(t, errors.Join(s.LaunchGraph(exec), s.Synchronize()))
	if got := readBack(t, m); !bytes.Equal(got, bytes.Repeat([]byte{9}, 8)) {
		t.Errorf("got %v", got)
	}
}

// TestCaptureModes asks the table for modes and orders that the binding does not use.
func TestCaptureModes(t *testing.T) {
	t.Parallel()
	rt, d := openSoft(t, Options{})
	api := Of(rt).table()
	a, b, e := newStream(t, d), newStream(t, d), newEvent(t, d)
	var graph uintptr
	runtime.LockOSThread() // so that other goroutines are on other threads
	defer runtime.UnlockOSThread()
	onThread := func(f func() hip.Status) hip.Status {
		st := make(chan hip.Status)
		go func() { st <- f() }()
		return <-st
	}
	for _, tt := range []struct {
		name string
		got  func() hip.Status
		want hip.Status
	}{
		{"mode", func() hip.Status { return api.HipStreamBeginCapture(a.Handle(), 3) }, hip.ErrInvalidValue},
		{"null stream", func() hip.Status { return api.HipStreamBeginCapture(0, 0) }, hip.ErrNotSupported},
		{"end without begin", func() hip.Status { return api.HipStreamEndCapture(a.Handle(), &graph) }, hip.ErrIllegalState},
		{"relaxed", func() hip.Status { return api.HipStreamBeginCapture(a.Handle(), hip.CaptureRelaxed) }, hip.Success},
		{"malloc while relaxed", func() hip.Status {
			var p uintptr
			return max(api.HipMalloc(&p, 64), api.HipFree(p))
		}, hip.Success},
		{"fork", func() hip.Status {
			return max(api.HipEventRecord(e.Handle(), a.Handle()), api.HipStreamWaitEvent(b.Handle(), e.Handle(), 0))
		}, hip.Success},
		{
			"nowhere to put the graph", func() hip.Status { return api.HipStreamEndCapture(a.Handle(), nil) },
			hip.ErrInvalidValue,
		},
		{
			"end on the other stream", func() hip.Status { return api.HipStreamEndCapture(b.Handle(), &graph) },
			hip.ErrStreamCaptureUnmatched,
		},
		{"end", func() hip.Status {
			return onThread(func() hip.Status { return api.HipStreamEndCapture(a.Handle(), &graph) })
		}, hip.ErrStreamCaptureInvalidated},
		{
			"wait for a graph's event", func() hip.Status { return api.HipStreamWaitEvent(a.Handle(), e.Handle(), 0) },
			hip.ErrCapturedEvent,
		},
		{"global", func() hip.Status { return api.HipStreamBeginCapture(a.Handle(), hip.CaptureGlobal) }, hip.Success},
		{"second", func() hip.Status { return api.HipStreamBeginCapture(b.Handle(), hip.CaptureRelaxed) }, hip.Success},
		{"merge", func() hip.Status {
			return max(api.HipEventRecord(e.Handle(), a.Handle()), api.HipStreamWaitEvent(b.Handle(), e.Handle(), 0))
		}, hip.ErrStreamCaptureMerge},
		{"malloc elsewhere while global", func() hip.Status {
			return onThread(func() hip.Status { var p uintptr; return api.HipMalloc(&p, 64) })
		}, hip.ErrStreamCaptureUnsupported},
		{"end b", func() hip.Status { return api.HipStreamEndCapture(b.Handle(), &graph) }, hip.ErrStreamCaptureInvalidated},
		{"end a", func() hip.Status { return api.HipStreamEndCapture(a.Handle(), &graph) }, hip.ErrStreamCaptureInvalidated},
		{"thread", func() hip.Status { return api.HipStreamBeginCapture(a.Handle(), hip.CaptureThreadLocal) }, hip.Success},
		{"end on another thread", func() hip.Status {
			return onThread(func() hip.Status { return api.HipStreamEndCapture(a.Handle(), &graph) })
		}, hip.ErrStreamCaptureWrongThread},
		{"end on the same", func() hip.Status {
			return max(api.HipStreamEndCapture(a.Handle(), &graph), api.HipGraphDestroy(graph))
		}, hip.Success},
		{"destroy twice", func() hip.Status { return api.HipGraphDestroy(graph) }, hip.ErrInvalidValue},
		{
			"instantiate nothing", func() hip.Status { return api.HipGraphInstantiate(&graph, 1, nil, nil, 0) },
			hip.ErrInvalidValue,
		},
		{"destroy nothing", func() hip.Status { return api.HipGraphDestroy(1) }, hip.ErrInvalidValue},
		{"destroy no executable", func() hip.Status { return api.HipGraphExecDestroy(1) }, hip.ErrInvalidValue},
		{"launch nothing", func() hip.Status { return api.HipGraphLaunch(1, a.Handle()) }, hip.ErrInvalidValue},
	} {
		if got := tt.got(); got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
	if got := Of(rt).Stats().Graphs; got != 0 {
		t.Errorf("%d graphs are left", got)
	}
	// Without a mode that says so the thread does not matter.
	st := onThread(func() hip.Status { return api.HipStreamBeginCapture(a.Handle(), hip.CaptureRelaxed) })
	if st != hip.Success {
		t.Error(st)
	}
	if st := api.HipStreamEndCapture(a.Handle(), &graph); st != hip.Success || api.HipGraphDestroy(graph) != hip.Success {
		t.Error(st)
	}
}

// TestGraphFaults: a graph fails as other work does, and its memory may be gone.
func TestGraphFaults(t *testing.T) {
	t.Parallel()
	rt, d := openSoft(t, Options{})
	m := value(d.Malloc(64))(t)
	exec := recordGraph(t, newStream(t, d), func() error { return nil })
	s := newStream(t, d)
	Of(rt).Inject(Fault{Func: "hipGraphLaunch", N: 1, Code: hip.ErrLaunchFailure, Async: true})
	noError(t, s.LaunchGraph(exec))
	if err := s.Synchronize(); !errors.Is(err, hip.ErrLaunchFailure) {
		t.Errorf("injected: %v", err)
	}
	s = newStream(t, d)
	exec = recordGraph(t, s, func() error { return s.Memset(m.Ptr(), 1, 64) })
	noError(t, s.LaunchGraph(exec))
	noError(t, s.Synchronize())
	noError(t, m.Close())
	noError(t, s.LaunchGraph(exec))
	if err := s.Synchronize(); !errors.Is(err, hip.ErrIllegalAddress) {
		t.Errorf("memory that is gone: %v", err)
	}
	// A stream that is destroyed spoils the recording that it takes part in.
	a, b, e := newStream(t, d), value(d.NewStream())(t), newEvent(t, d)
	g, err := a.Capture(func() error { return errors.Join(a.Record(e), b.Wait(e), b.Close()) })
	if g != nil || !errors.Is(err, hip.ErrStreamCaptureInvalidated) {
		t.Errorf("destroyed: %v", err)
	}
}
