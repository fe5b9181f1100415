package amdhip

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"unsafe"

	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
)

// nullRuntime has one device whose calls succeed and do nothing.
func nullRuntime(t *testing.T, log *slog.Logger) *Device {
	t.Helper()
	ok := func(uintptr) Status { return Success }
	out := func(p *uintptr) Status { *p = 4096; return Success }
	rt := NewRuntime(hip.Backend{Kind: "test", API: &hip.API{
		HipGetDeviceCount:        func(n *int32) Status { *n = 1; return Success },
		HipGetDevice:             func(*int32) Status { return Success },
		HipDeviceGetName:         func(*byte, int32, int32) Status { return Success },
		HipDeviceTotalMem:        func(*uintptr, int32) Status { return Success },
		HipDeviceGetAttribute:    func(*int32, hip.DeviceAttribute, int32) Status { return Success },
		HipDeviceGetPCIBusId:     func(*byte, int32, int32) Status { return Success },
		HipDeviceSynchronize:     func() Status { return Success },
		HipMalloc:                func(p *uintptr, _ uintptr) Status { return out(p) },
		HipFree:                  ok,
		HipStreamCreateWithFlags: func(p *uintptr, _ uint32) Status { return out(p) },
		HipStreamDestroy:         ok,
		HipStreamQuery:           ok,
		HipStreamWaitEvent:       func(uintptr, uintptr, uint32) Status { return Success },
		HipEventCreateWithFlags:  func(p *uintptr, _ uint32) Status { return out(p) },
		HipEventDestroy:          ok,
		HipEventRecord:           func(uintptr, uintptr) Status { return Success },
		HipEventQuery:            func(uintptr) Status { return ErrNotReady },
		HipMemcpyAsync:           func(uintptr, uintptr, uintptr, hip.MemcpyKind, uintptr) Status { return Success },
		HipMemsetAsync:           func(uintptr, int32, uintptr, uintptr) Status { return Success },
		HipModuleLoadData:        func(p *uintptr, _ uintptr) Status { return out(p) },
		HipModuleUnload:          ok,
		HipModuleGetFunction:     func(p *uintptr, _ uintptr, _ string) Status { return out(p) },
		HipModuleLaunchKernel: func(uintptr, uint32, uint32, uint32, uint32, uint32, uint32, uint32, uintptr, *unsafe.Pointer,
			*uintptr,
		) Status {
			return Success
		},
	}}, log)
	d, err := rt.Device(0)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// lockedBuffer is a buffer for loggers that write from other goroutines.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// drop makes one handle of each kind; those that are not closed are garbage when it returns.
func drop(t *testing.T, d *Device, closeThem bool) {
	s, err1 := d.NewStream()
	e, err2 := d.NewEvent(EventOptions{})
	m, err3 := d.Malloc(1)
	h, err4 := d.HostPlain(1)
	c, err5 := d.LoadModule([]byte("code"))
	if err := errors.Join(err1, err2, err3, err4, err5); err != nil {
		t.Fatal(err)
	}
	if closeThem {
		if err := errors.Join(s.Close(), e.Close(), m.Close(), h.Close(), c.Close()); err != nil {
			t.Fatal(err)
		}
	}
}

// TestLeaks: handles that are collected unclosed are counted and logged, those that were closed are not.
func TestLeaks(t *testing.T) {
	var log lockedBuffer
	d := nullRuntime(t, slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})))
	drop(t, d, true)
	drop(t, d, false)
	// Cleanups run some time after a collection, on a goroutine of their own.
	for range 1000 {
		runtime.GC()
		if d.rt.Leaked() == 5 && strings.Count(log.String(), "never closed") == 5 {
			break
		}
		runtime.Gosched()
	}
	if got := d.rt.Leaked(); got != 5 {
		t.Errorf("got %d leaked handles, want 5", got)
	}
	if got := d.rt.open.Load(); got != 0 {
		t.Errorf("got %d open handles, want 0", got)
	}
	for _, what := range []string{"stream", "event", "device memory", "plain memory", "module"} {
		if !strings.Contains(log.String(), what+" on device 0") {
			t.Errorf("the log does not name the %s", what)
		}
	}
	if got := strings.Count(log.String(), "handle_test.go:"); got != 5 {
		t.Errorf("%d messages name the file that made the handle, want 5:\n%s", got, log.String())
	}
}

// TestNoAllocations: the calls of the copy loop leave no garbage.
func TestNoAllocations(t *testing.T) {
	d := nullRuntime(t, nil)
	s, err1 := d.NewStream()
	e, err2 := d.NewEvent(EventOptions{})
	h, err3 := d.HostPlain(64)
	if err := errors.Join(err1, err2, err3); err != nil {
		t.Fatal(err)
	}
	for name, f := range map[string]func() error{
		"CopyToDevice": func() error { return s.CopyToDevice(4096, h, 0, 64) },
		"CopyToHost":   func() error { return s.CopyToHost(h, 0, 4096, 64) },
		"Memset":       func() error { return s.Memset(4096, 0, 64) },
		"Record":       func() error { return s.Record(e) },
		"Wait":         func() error { return s.Wait(e) },
		"Query":        func() error { _, err := s.Query(); return err },
		"event Query":  func() error { _, err := e.Query(); return err },
	} {
		if got := testing.AllocsPerRun(100, func() {
			if err := f(); err != nil {
				t.Error(err)
			}
		}); got != 0 {
			t.Errorf("%s: %v allocations, want none", name, got)
		}
	}
	if err := errors.Join(s.Close(), e.Close(), h.Close(), d.rt.Close()); err != nil {
		t.Error(err)
	}
}

func TestErrorText(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want string
	}{
		{ErrOutOfMemory, "hipErrorOutOfMemory (2)"},
		{Status(1054), "hipError_t 1054"},
		{&Error{Func: "hipFree", Code: ErrInvalidValue}, "hipFree: hipErrorInvalidValue (1)"},
		{&Error{Func: "hipFree", Code: 1054, Detail: "x", Text: "y"}, "hipFree, x: hipError_t 1054: y"},
	} {
		if got := tt.err.Error(); got != tt.want {
			t.Errorf("got %q, want %q", got, tt.want)
		}
	}
	var err error = &Error{Func: "hipMallocAsync", Code: ErrNotSupported}
	if !errors.Is(err, ErrUnsupported) || !errors.Is(err, ErrNotSupported) || errors.Is(err, ErrClosed) {
		t.Errorf("%v must match ErrUnsupported and its code, nothing else", err)
	}
	if errors.Is(&Error{Code: ErrOutOfMemory}, ErrUnsupported) {
		t.Error("out of memory matches ErrUnsupported")
	}
}

func TestVersionString(t *testing.T) {
	for v, want := range map[int]string{50221153: "5.2.21153", 60300000: "6.3.0", 71600042: "7.16.42", 0: "0.0.0"} {
		if got := VersionString(v); got != want {
			t.Errorf("%d: got %s, want %s", v, got, want)
		}
	}
}

func TestUUIDString(t *testing.T) {
	for want, uuid := range map[string][16]byte{
		"":                                     {},
		"GPU-8d9b1a2c3d4e5f60":                 [16]byte([]byte("8d9b1a2c3d4e5f60")),
		"GPU-0102030405060708090a0b0c0d0e0f10": {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16},
	} {
		if got := uuidString(uuid); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestPinTable(t *testing.T) {
	var pins pinTable
	if !pins.add(1000, 100) || !pins.add(1100, 1) || !pins.add(999, 1) {
		t.Fatal("neighbours are refused")
	}
	for _, r := range [][2]int{{1000, 100}, {950, 51}, {1099, 1}, {0, 5000}, {1050, 1}} {
		if pins.add(uintptr(r[0]), r[1]) {
			t.Errorf("%v overlaps and is accepted", r)
		}
	}
	pins.remove(1000)
	if !pins.add(1000, 100) {
		t.Error("a range that was removed is refused")
	}
	if got, want := fmt.Sprint(len(pins.ranges)), "3"; got != want {
		t.Errorf("got %s ranges, want %s", got, want)
	}
}

// TestCloseDuringCalls: while a call on a handle lasts, Close waits for it and every other call is refused at once.
func TestCloseDuringCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := nullRuntime(t, nil)
		release, destroyed := make(chan struct{}), 0
		d.rt.api.HipStreamSynchronize = func(uintptr) Status { <-release; return Success }
		d.rt.api.HipStreamDestroy = func(uintptr) Status { destroyed++; return Success }
		s, err := d.NewStream()
		if err != nil {
			t.Fatal(err)
		}
		results := make(chan error, 4)
		for range 2 {
			go func() { results <- s.Synchronize() }()
		}
		synctest.Wait()
		for range 2 {
			go func() { results <- s.Close() }()
		}
		synctest.Wait()
		if _, err := s.Query(); !errors.Is(err, ErrClosed) {
			t.Errorf("a call after Close has begun: %v, want ErrClosed", err)
		}
		if len(results) > 0 || destroyed > 0 {
			t.Errorf("%d calls have returned and %d streams are destroyed while calls last", len(results), destroyed)
		}
		close(release)
		for range 4 {
			if err := <-results; err != nil {
				t.Error(err)
			}
		}
		if err := s.Close(); err != nil || destroyed != 1 {
			t.Errorf("%v, destroyed %d times", err, destroyed)
		}
	})
}
