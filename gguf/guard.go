package gguf

import (
	"fmt"
	"runtime"
	"runtime/debug"
	"unsafe"
)

// Guard runs f and turns a fault on the model's mapped memory into an error: a *[FormatError] matching [ErrTruncated], with
// the part's path and the offset of the page that is no longer there. That happens when a file is truncated while it is
// mapped, or when its disk fails; without Guard it ends the process. f may call assembly code, but not C code, whose faults
// cannot be caught. Guard covers the calling goroutine only, costs well under a microsecond, and may be used from many
// goroutines at once. Other panics pass through.
func (m *Model) Guard(f func() error) error { return guard(m.parts, f) }

func guard(parts []*Part, f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			if err = faultError(parts, r); err == nil {
				panic(r)
			}
		}
	}()
	return f()
}

// faultError explains a recovered panic that was a fault inside one of the mappings; it is nil for any other.
func faultError(parts []*Part, r any) error {
	fault, ok := r.(interface {
		runtime.Error
		Addr() uintptr
	})
	if !ok {
		return nil
	}
	for _, p := range parts {
		start := uintptr(unsafe.Pointer(unsafe.SliceData(p.data)))
		if off := fault.Addr() - start; fault.Addr() >= start && off < uintptr(len(p.data)) {
			return &FormatError{Path: p.Path, Offset: int64(off), Err: fmt.Errorf(
				"%w: it could no longer be read here; it has shrunk since it was opened, or its disk failed", ErrTruncated)}
		}
	}
	return nil
}
