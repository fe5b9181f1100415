package amdhip

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
)

// Options says which library Open takes and where it reports. The zero value searches as the package documentation
// says.
type Options struct {
	// Library is the path of libamdhip64.so. When it is set nothing else is tried. A name without a slash is looked up
	// by the system's dynamic loader.
	Library string
	// Logger receives what the search did and handles that were collected unclosed, at debug level. Nil: silence.
	Logger *slog.Logger
}

// Runtime is one HIP runtime: AMD's library, or the software device. It is safe for concurrent use.
type Runtime struct {
	api     *hip.API // of backend
	backend hip.Backend
	log     *slog.Logger
	pins    *pinTable
	closed  atomic.Bool
	open    atomic.Int64 // handles that are open
	leaked  atomic.Int64
	mapped  atomic.Bool // virtual memory was used, see Device.forCopies

	mu      sync.Mutex
	devices map[int]*Device
}

// libraryPins is shared by all runtimes of kind "hip": page-locking belongs to the process, not to a Runtime.
var libraryPins pinTable

// NewRuntime makes a Runtime of a filled table. It is for the packages that fill one: Open of this package, and
// amdhip/soft. A nil log is silent.
func NewRuntime(b hip.Backend, log *slog.Logger) *Runtime {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	rt := &Runtime{api: b.API, backend: b, log: log, devices: map[int]*Device{}, pins: &pinTable{}}
	if b.Kind == "hip" {
		rt.pins = &libraryPins
	}
	return rt
}

// Open finds a HIP library, loads it and binds its functions; the caller must Close the result. It does not ask for a
// GPU: DeviceCount does. When no library opens, the error is a *LibraryError that matches ErrNoLibrary; on systems
// other than Linux it matches ErrUnsupported too.
func Open(o Options) (*Runtime, error) {
	log := o.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	lib, err := openLibrary(o.Library, log)
	if err != nil {
		return nil, err
	}
	var rt *Runtime
	rt = NewRuntime(hip.Backend{
		API: lib.table, Kind: "hip", Library: lib.path,
		Compiler: sync.OnceValues(func() (*hip.Compiler, error) {
			version, _, err := rt.Version()
			if err != nil {
				return nil, err
			}
			return lib.compiler(version / 1e7)
		}),
	}, log)
	return rt, nil
}

// defaults is what Default has opened.
var defaults struct {
	mu sync.Mutex
	rt *Runtime
}

// Default opens the HIP library as Open does without options, and returns GPU 0. Every call gives the same device until
// its Runtime is closed; then the next call opens the library again. An error that matches ErrNoLibrary or ErrNoDevice
// says why there is no GPU; soft.Open gives a software device to go on with.
func Default() (*Device, error) {
	defaults.mu.Lock()
	defer defaults.mu.Unlock()
	rt := defaults.rt
	if rt == nil || rt.closed.Load() {
		var err error
		if rt, err = Open(Options{}); err != nil {
			return nil, err
		}
	}
	dev, err := rt.Device(0)
	if err != nil {
		if rt != defaults.rt {
			err = errors.Join(err, rt.Close())
		}
		return nil, err
	}
	defaults.rt = rt
	return dev, nil
}

// library is an open HIP library.
type library struct {
	table    *hip.API
	path     string                                 // under which it was opened
	compiler func(major int) (*hip.Compiler, error) // finds the hipRTC that belongs to it
}

// Close ends the runtime: after it no device is given out and nothing can be created. Close what was created first.
// With a library, handles that are still open stay usable, and their own Close still releases them: the library stays
// loaded, because a HIP runtime cannot be unloaded safely. The software device ends with all its memory and streams.
// Close is idempotent.
func (rt *Runtime) Close() error {
	if rt.closed.Swap(true) {
		return nil
	}
	rt.log.Debug("amdhip: runtime closed", "kind", rt.backend.Kind, "open_handles", rt.open.Load(),
		"leaked", rt.leaked.Load())
	if rt.backend.Close != nil {
		return rt.backend.Close()
	}
	return nil
}

// Kind returns "hip" for a library and "soft" for the software device.
func (rt *Runtime) Kind() string { return rt.backend.Kind }

// Library returns the path or name under which the library was opened, "" for the software device.
func (rt *Runtime) Library() string { return rt.backend.Library }

// Backend returns what fills the runtime's table of functions: a *soft.Software for the software device, which
// implements StandIns; nil for a library. soft.Of returns the same as a *soft.Software.
func (rt *Runtime) Backend() any { return rt.backend.Owner }

// Leaked returns how many handles were garbage-collected without Close so far. What they stood for is not freed: the
// GPU may still be using it.
func (rt *Runtime) Leaked() int64 { return rt.leaked.Load() }

// Version returns the HIP versions of the runtime and of the driver below it, as HIP encodes them; VersionString prints
// one. These are HIP's numbers, not ROCm's. They are available without a GPU.
func (rt *Runtime) Version() (runtime, driver int, err error) {
	if err := rt.usable(); err != nil {
		return 0, 0, err
	}
	var r, d int32
	if st := rt.api.HipRuntimeGetVersion(&r); st != Success {
		return 0, 0, rt.fail("hipRuntimeGetVersion", st, "")
	}
	if st := rt.api.HipDriverGetVersion(&d); st != Success {
		return 0, 0, rt.fail("hipDriverGetVersion", st, "")
	}
	return int(r), int(d), nil
}

// VersionString prints a HIP version number (major·10^7 + minor·10^5 + patch), "5.2.21153".
func VersionString(v int) string {
	return fmt.Sprintf("%d.%d.%d", v/1e7, v/1e5%100, v%1e5)
}

// DeviceCount returns the number of GPUs, at least 1. When there is none that can be used the error matches
// ErrNoDevice.
func (rt *Runtime) DeviceCount() (int, error) {
	if err := rt.usable(); err != nil {
		return 0, err
	}
	var n int32
	st := rt.api.HipGetDeviceCount(&n)
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

// visibleVariables say which GPUs HIP sees, in the order in which its layers apply them.
var visibleVariables = []string{"ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL"}

// hiddenBy says which environment variables hide GPUs; "" if none is set. A variable that is set and empty hides all.
func hiddenBy(lookup func(string) (string, bool)) string {
	var all []string
	for _, name := range visibleVariables {
		switch v, set := lookup(name); {
		case set && v == "":
			all = append(all, name+" is set and empty, so that none is seen")
		case set:
			all = append(all, fmt.Sprintf("%s is %q", name, v))
		}
	}
	if len(all) == 0 {
		return ""
	}
	return "; the environment hides GPUs: " + strings.Join(all, ", ")
}

// noDeviceHint says what commonly hides a GPU from a library that works.
func (rt *Runtime) noDeviceHint() string {
	if rt.backend.Kind != "hip" || runtime.GOOS != "linux" {
		return ""
	}
	if hint := hiddenBy(os.LookupEnv); hint != "" {
		return hint
	}
	f, err := os.OpenFile("/dev/kfd", os.O_RDWR, 0)
	if err == nil {
		f.Close()
		return "; /dev/kfd opens: see rocminfo and the kernel's log"
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
	if _, named := hip.StatusNames[code]; !named {
		e.Text = rt.api.HipGetErrorName(code)
		if s := rt.api.HipGetErrorString(code); s != e.Text {
			e.Text += ": " + s
		}
	}
	return e
}

// missing makes the error for an optional entry point that the library lacks.
func (rt *Runtime) missing(call string) error {
	return fmt.Errorf("amdhip: %s: %w", call, ErrUnsupported)
}
