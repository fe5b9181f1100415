//go:build !android

package amdhip

import (
	"fmt"
	"log/slog"
	"os"
	"reflect"
	"runtime"
	"strings"
	"unsafe"

	"github.com/ebitengine/purego"
	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
)

// openLibrary finds the library and binds it.
func openLibrary(explicit string, log *slog.Logger) (*library, error) {
	var table *hip.API
	var handle uintptr
	f := finder{root: "/", env: os.Getenv, open: logged(log, func(path string) (err error) {
		table = new(hip.API)
		handle, err = open(path, table, "HIP library")
		return err
	})}
	path, err := f.find(explicit)
	if err != nil {
		return nil, err
	}
	bindHot(table, handle)
	log.Debug("amdhip: library opened", "path", path)
	return &library{table: table, path: path, compiler: func(major int) (*hip.Compiler, error) {
		return openCompiler(major, path, handle, log)
	}}, nil
}

// openCompiler finds hipRTC for the open HIP library and binds it.
func openCompiler(major int, library string, handle uintptr, log *slog.Logger) (*hip.Compiler, error) {
	var table *hip.RTC
	f := finder{root: "/", env: os.Getenv, open: logged(log, func(path string) (err error) {
		table = new(hip.RTC)
		if path == library {
			return bind(handle, table, "HIP library with hipRTC")
		}
		_, err = open(path, table, "hipRTC library")
		return err
	})}
	var file string
	if symbol, err := dlsym(handle, "hipGetDeviceCount"); err == nil {
		file = mappedFile(symbol)
	}
	path, err := f.findCompiler(major, library, file)
	if err != nil {
		return nil, err
	}
	log.Debug("amdhip: hipRTC found", "path", path)
	return &hip.Compiler{RTC: table, Path: path}, nil
}

// logged returns a function that calls try and logs each failure.
func logged(log *slog.Logger, try func(path string) error) func(path string) error {
	return func(path string) error {
		err := try(path)
		if err != nil {
			log.Debug("amdhip: library not used", "path", path, "err", err)
		}
		return err
	}
}

// open opens the library and fills the table that the pointer table leads to. what is how errors call the library.
func open(path string, table any, what string) (handle uintptr, err error) {
	handle, err = dlopen(path)
	if err != nil {
		return 0, err
	}
	if err := bind(handle, table, what); err != nil {
		// Nothing of it was called yet, so it can still be unloaded.
		_ = purego.Dlclose(handle)
		return 0, err
	}
	return handle, nil
}

// dlopen opens the library. It is local, so that a second HIP of another major version in this process cannot be mixed
// with this one. The dynamic loader keeps the reason of a failure for the thread that asked, so the goroutine must stay
// on it.
func dlopen(path string) (uintptr, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	return purego.Dlopen(path, purego.RTLD_NOW|purego.RTLD_LOCAL)
}

// dlsym looks up a symbol. It stays on one thread for the same reason as dlopen: purego asks the loader for the reason
// of a failure, and takes the absence of one for success.
func dlsym(handle uintptr, name string) (uintptr, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	return purego.Dlsym(handle, name)
}

// bind looks up the symbol of every field of the table that table points to. Only those after a blank field may be
// missing.
func bind(handle uintptr, table any, what string) error {
	v := reflect.ValueOf(table).Elem()
	optional := false
	var missing []string
	for i := range v.NumField() {
		name := v.Type().Field(i).Name
		if name == "_" {
			optional = true
			continue
		}
		name = hip.Symbol(name)
		symbol, err := dlsym(handle, name)
		if err != nil {
			if !optional {
				missing = append(missing, name)
			}
			continue
		}
		field := v.Field(i)
		purego.RegisterFunc(reflect.NewAt(field.Type(), unsafe.Pointer(field.UnsafeAddr())).Interface(), symbol)
	}
	if len(missing) > 0 {
		return fmt.Errorf("not a usable %s, it lacks %s", what, strings.Join(missing, ", "))
	}
	return nil
}

// mappedFile returns the file that is mapped at addr, "" if it is unknown. The kernel names it without symbolic links.
func mappedFile(addr uintptr) string {
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(maps)) {
		var from, to uintptr
		if n, _ := fmt.Sscanf(line, "%x-%x", &from, &to); n == 2 && from <= addr && addr < to {
			if i := strings.IndexByte(line, '/'); i >= 0 {
				return strings.TrimSpace(line[i:])
			}
		}
	}
	return ""
}

// bindHot replaces the functions of the copy loop, which have no out-parameters, by direct calls. They take a third of
// the time of those made by reflection, and leave little garbage.
func bindHot(t *hip.API, lib uintptr) {
	symbol := func(name string) uintptr {
		p, _ := dlsym(lib, name) // bind has found it
		return p
	}
	one := func(name string) func(uintptr) Status {
		f := symbol(name)
		return func(a uintptr) Status { return status(purego.SyscallN(f, a)) }
	}
	t.HipStreamQuery = one("hipStreamQuery")
	t.HipStreamSynchronize = one("hipStreamSynchronize")
	t.HipEventQuery = one("hipEventQuery")
	t.HipEventSynchronize = one("hipEventSynchronize")

	record, wait := symbol("hipEventRecord"), symbol("hipStreamWaitEvent")
	t.HipEventRecord = func(event, stream uintptr) Status {
		return status(purego.SyscallN(record, event, stream))
	}
	t.HipStreamWaitEvent = func(stream, event uintptr, flags uint32) Status {
		return status(purego.SyscallN(wait, stream, event, uintptr(flags)))
	}
	copyAsync, setAsync := symbol("hipMemcpyAsync"), symbol("hipMemsetAsync")
	t.HipMemcpyAsync = func(dst, src, n uintptr, kind hip.MemcpyKind, stream uintptr) Status {
		return status(purego.SyscallN(copyAsync, dst, src, n, uintptr(kind), stream))
	}
	t.HipMemsetAsync = func(dst uintptr, value int32, n, stream uintptr) Status {
		return status(purego.SyscallN(setAsync, dst, uintptr(value), n, stream))
	}
}

// status converts the results of SyscallN. The register is wider than the enum, and only its lower half is defined.
func status(r1, _, _ uintptr) Status { return Status(int32(r1)) }
