package amdhip

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
)

// Options says which library Open takes and where it reports. The zero value searches as the package documentation says.
type Options struct {
	// Library is the path of libamdhip64.so. When it is set nothing else is tried. A name without a slash is looked up by
	// the system's dynamic loader.
	Library string
	// Logger receives what the search did and handles that were collected unclosed, at debug level. Nil: silence.
	Logger *slog.Logger
}

// Runtime is one HIP runtime: AMD's library, or the software device. It is safe for concurrent use.
type Runtime struct {
	api    *api
	kind   string
	path   string
	log    *slog.Logger
	soft   *Software
	rtc    func() (*rtcLibrary, error) // finds hipRTC, once; nil: there is none
	pins   *pinTable
	closed atomic.Bool
	open   atomic.Int64 // handles that are open
	leaked atomic.Int64

	mu      sync.Mutex
	devices map[int]*Device
}

// libraryPins is shared by all runtimes of kind "hip": page-locking belongs to the process, not to a Runtime.
var libraryPins pinTable

// newRuntime wraps a filled table. kind is "hip" or "soft".
func newRuntime(table *api, kind, library string, log *slog.Logger) *Runtime {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	rt := &Runtime{api: table, kind: kind, path: library, log: log, devices: map[int]*Device{}, pins: &pinTable{}}
	if kind == "hip" {
		rt.pins = &libraryPins
	}
	return rt
}

// Open finds a HIP library, loads it and binds its functions; the caller must Close the result. It does not ask for a
// GPU: DeviceCount does. When no library opens, the error is a *LibraryError that matches ErrNoLibrary; on systems other
// than Linux it matches ErrUnsupported too.
func Open(o Options) (*Runtime, error) {
	log := o.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	lib, err := openLibrary(o.Library, log)
	if err != nil {
		return nil, err
	}
	rt := newRuntime(lib.table, "hip", lib.path, log)
	rt.rtc = sync.OnceValues(func() (*rtcLibrary, error) {
		version, _, err := rt.Version()
		if err != nil {
			return nil, err
		}
		return lib.compiler(version / 1e7)
	})
	return rt, nil
}

// library is an open HIP library.
type library struct {
	table    *api
	path     string                               // under which it was opened
	compiler func(major int) (*rtcLibrary, error) // finds the hipRTC that belongs to it
}

// Close ends the runtime: after it no device is given out and nothing can be created. Close what was created first. With
// a library, handles that are still open stay usable, and their own Close still releases them: the library stays loaded,
// because a HIP runtime cannot be unloaded safely. The software device ends with all its memory and streams. Close is
// idempotent.
func (rt *Runtime) Close() error {
	if rt.closed.Swap(true) {
		return nil
	}
	rt.log.Debug("amdhip: runtime closed", "kind", rt.kind, "open_handles", rt.open.Load(), "leaked", rt.leaked.Load())
	if rt.soft != nil {
		return rt.soft.close()
	}
	return nil
}

// Kind returns "hip" for a library and "soft" for the software device.
func (rt *Runtime) Kind() string { return rt.kind }

// Library returns the path or name under which the library was opened, "" for the software device.
func (rt *Runtime) Library() string { return rt.path }

// Software returns the controls of the software device, nil for a library.
func (rt *Runtime) Software() *Software { return rt.soft }

// Leaked returns how many handles were garbage-collected without Close so far. What they stood for is not freed: the GPU
// may still be using it.
func (rt *Runtime) Leaked() int64 { return rt.leaked.Load() }

// Version returns the HIP versions of the runtime and of the driver below it, as HIP encodes them; VersionString prints
// one. These are HIP's numbers, not ROCm's. They are available without a GPU.
func (rt *Runtime) Version() (runtime, driver int, err error) {
	if err := rt.usable(); err != nil {
		return 0, 0, err
	}
	var r, d int32
	if st := rt.api.hipRuntimeGetVersion(&r); st != Success {
		return 0, 0, rt.fail("hipRuntimeGetVersion", st, "")
	}
	if st := rt.api.hipDriverGetVersion(&d); st != Success {
		return 0, 0, rt.fail("hipDriverGetVersion", st, "")
	}
	return int(r), int(d), nil
}

// VersionString prints a HIP version number (major·10^7 + minor·10^5 + patch), "5.2.21153".
func VersionString(v int) string {
	return fmt.Sprintf("%d.%d.%d", v/1e7, v/1e5%100, v%1e5)
}

// DeviceCount returns the number of GPUs, at least 1. When there is none that can be used the error matches ErrNoDevice.
func (rt *Runtime) DeviceCount() (int, error) {
	if err := rt.usable(); err != nil {
		return 0, err
	}
	var n int32
	st := rt.api.hipGetDeviceCount(&n)
	switch {
	case st == Success && n > 0:
		return int(n), nil
	case st == Success || st == ErrNoDevice:
		return 0, fmt.Errorf("%w%s", rt.fail("hipGetDeviceCount", ErrNoDevice, ""), rt.noDeviceHint())
	// Without a usable GPU some versions answer with these instead.
	case st == ErrInvalidDevice || st == ErrNotInitialized || st == ErrInsufficientDriver:
		return 0, fmt.Errorf("%w: %w%s", ErrNoDevice, rt.fail("hipGetDeviceCount", st, ""), rt.noDeviceHint())
	}
	return 0, rt.fail("hipGetDeviceCount", st, "")
}

// noDeviceHint says what commonly hides a GPU from a library that works.
func (rt *Runtime) noDeviceHint() string {
	if rt.kind != "hip" || runtime.GOOS != "linux" {
		return ""
	}
	f, err := os.OpenFile("/dev/kfd", os.O_RDWR, 0)
	if err == nil {
		f.Close()
		return "; /dev/kfd opens: see HIP_VISIBLE_DEVICES, ROCR_VISIBLE_DEVICES and rocminfo"
	}
	if errors.Is(err, os.ErrNotExist) {
		return "; there is no /dev/kfd: the amdgpu driver is not loaded, or the container was started without that device"
	}
	return fmt.Sprintf("; %v: the user needs the groups render and video", err)
}

// usable returns an error matching ErrClosed after Close.
func (rt *Runtime) usable() error {
	if rt.closed.Load() {
		return fmt.Errorf("amdhip: runtime: %w", ErrClosed)
	}
	return nil
}

// fail makes the error of a HIP call that returned code.
func (rt *Runtime) fail(call string, code Status, format string, args ...any) error {
	e := &Error{Func: call, Code: code, Detail: fmt.Sprintf(format, args...)}
	if _, named := statusNames[code]; !named {
		e.Text = rt.api.hipGetErrorName(code)
		if s := rt.api.hipGetErrorString(code); s != e.Text {
			e.Text += ": " + s
		}
	}
	return e
}

// missing makes the error for an optional entry point that the library lacks.
func (rt *Runtime) missing(call string) error {
	return fmt.Errorf("amdhip: %s: %w", call, ErrUnsupported)
}
