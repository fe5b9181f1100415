//go:build !android

package amdhip

import (
	"fmt"
	"log/slog"
	"os"
	"reflect"
	"strings"
	"unsafe"

	"github.com/ebitengine/purego"
)

// openLibrary finds the library and binds it.
func openLibrary(explicit string, log *slog.Logger) (*api, string, error) {
	var table *api
	f := finder{root: "/", env: os.Getenv, open: func(path string) (err error) {
		table, err = bind(path)
		if err != nil {
			log.Debug("amdhip: library not used", "path", path, "err", err)
		}
		return err
	}}
	path, err := f.find(explicit)
	if err != nil {
		return nil, "", err
	}
	log.Debug("amdhip: library opened", "path", path)
	return table, path, nil
}

// bind opens the library and fills the table.
func bind(path string) (*api, error) {
	// Local, so that a second HIP of another major version in this process cannot be mixed with this one.
	lib, err := purego.Dlopen(path, purego.RTLD_NOW|purego.RTLD_LOCAL)
	if err != nil {
		return nil, err
	}
	table := new(api)
	if missing := table.bindAll(lib); len(missing) > 0 {
		// Nothing of it was called yet, so it can still be unloaded.
		_ = purego.Dlclose(lib)
		return nil, fmt.Errorf("not a usable HIP library, it lacks %s", strings.Join(missing, ", "))
	}
	table.bindHot(lib)
	return table, nil
}

// bindAll looks up the symbol of every field and returns the required ones that are missing.
func (t *api) bindAll(lib uintptr) (missing []string) {
	table := reflect.ValueOf(t).Elem()
	optional := false
	for i := range table.NumField() {
		name := table.Type().Field(i).Name
		if name == "_" {
			optional = true
			continue
		}
		symbol, err := purego.Dlsym(lib, name)
		if err != nil {
			if !optional {
				missing = append(missing, name)
			}
			continue
		}
		field := table.Field(i)
		purego.RegisterFunc(reflect.NewAt(field.Type(), unsafe.Pointer(field.UnsafeAddr())).Interface(), symbol)
	}
	return missing
}

// bindHot replaces the calls of the copy loop, which have no out-parameters, by direct ones: a third of the time and a
// fraction of the garbage of those made by reflection.
func (t *api) bindHot(lib uintptr) {
	symbol := func(name string) uintptr {
		p, _ := purego.Dlsym(lib, name) // bindAll has found it
		return p
	}
	one := func(name string) func(uintptr) Status {
		f := symbol(name)
		return func(a uintptr) Status { return status(purego.SyscallN(f, a)) }
	}
	t.hipStreamQuery = one("hipStreamQuery")
	t.hipStreamSynchronize = one("hipStreamSynchronize")
	t.hipEventQuery = one("hipEventQuery")
	t.hipEventSynchronize = one("hipEventSynchronize")

	record, wait := symbol("hipEventRecord"), symbol("hipStreamWaitEvent")
	t.hipEventRecord = func(event, stream uintptr) Status {
		return status(purego.SyscallN(record, event, stream))
	}
	t.hipStreamWaitEvent = func(stream, event uintptr, flags uint32) Status {
		return status(purego.SyscallN(wait, stream, event, uintptr(flags)))
	}
	copyAsync, setAsync := symbol("hipMemcpyAsync"), symbol("hipMemsetAsync")
	t.hipMemcpyAsync = func(dst, src, n uintptr, kind memcpyKind, stream uintptr) Status {
		return status(purego.SyscallN(copyAsync, dst, src, n, uintptr(kind), stream))
	}
	t.hipMemsetAsync = func(dst uintptr, value int32, n, stream uintptr) Status {
		return status(purego.SyscallN(setAsync, dst, uintptr(value), n, stream))
	}
}

// status takes the results of SyscallN. The register is wider than the enum, and only its lower half is defined.
func status(r1, _, _ uintptr) Status { return Status(int32(r1)) }
