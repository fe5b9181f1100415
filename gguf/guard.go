package gguf

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"syscall"
	"unsafe"
)

var errChanged = errors.New("the file was changed while it was read")

// Guard calls read and turns a page fault in the file's mapping into an error: a *[FormatError] that matches
// [ErrTruncated] and says which part and which offset could not be read, if somebody has truncated the file while it is
// mapped; one that matches syscall.EIO, as that of a read does, if its disk has failed. Without Guard such a fault ends
// the process.
//
// read may call assembly code, but not C code, whose faults cannot be caught. Guard covers the calling goroutine only.
// It costs well under a microsecond. Other panics of read pass through.
func (f *File) Guard(read func() error) error { return guard(f.parts, read) }

func guard(parts []*Part, read func() error) error {
	return guardAll(func() []*Part { return parts }, read)
}

// guardAll is guard for parts that are not all known yet: parts is called when a fault has come.
func guardAll(parts func() []*Part, read func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			if err = faultError(parts(), r); err == nil {
				panic(r)
			}
		}
	}()
	return read()
}

// faultError returns the error for a recovered panic r if it was a page fault in the mapping of one of parts. For any
// other panic it returns nil.
func faultError(parts []*Part, r any) error {
	fault, ok := r.(interface {
		runtime.Error
		Addr() uintptr
	})
	if !ok {
		return changeError(parts, r)
	}
	for _, p := range parts {
		mapping := p.mapping()
		start := uintptr(unsafe.Pointer(unsafe.SliceData(mapping)))
		if off := fault.Addr() - start; fault.Addr() >= start && off < uintptr(len(mapping)) {
			return p.unreadable(int64(off))
		}
	}
	return nil
}

// unreadable is the error for a page of the mapping that cannot be read: that the disk failed where the file still has
// this place, as reading it would say, else that the file was shortened.
func (p *Part) unreadable(off int64) error {
	if info, err := os.Stat(p.absolute); err == nil && p.info != nil && os.SameFile(info, p.info) && info.Size() > off {
		err := fmt.Errorf("at offset %#x: %w", off, syscall.EIO)
		return &os.PathError{Op: "read", Path: p.Path, Err: err}
	}
	return &FormatError{Path: p.Path, Offset: off, Err: fmt.Errorf(
		"%w: this place cannot be read any more; the file has shrunk since it was opened", ErrTruncated)}
}

// changeError returns an error for a recovered panic r if it was one of the runtime, such as an index out of range, and
// a part that is an [OpenView] has changed since it was opened: its header was checked then, and is not what it was.
func changeError(parts []*Part, r any) error {
	if _, ok := r.(runtime.Error); !ok {
		return nil
	}
	for _, p := range parts {
		if p.view && p.mapping() != nil && p.changed() {
			return &FormatError{Path: p.Path, Offset: -1, Err: errChanged}
		}
	}
	return nil
}

// changed reports whether the header of a part that is a view is another one than when it was opened.
func (p *Part) changed() bool {
	if info, err := os.Stat(p.absolute); err != nil || info.ModTime() != p.info.ModTime() || info.Size() != p.Size {
		return true
	}
	var h header
	err := guard([]*Part{p}, func() (err error) {
		h, err = scan(p.Path, p.mapping()[:len(p.header)], int64(len(p.header)), true)
		return err
	})
	return err != nil || p.metadata == nil || !slices.Equal(h.keys, p.metadata.pos) || h.infos != p.infos
}
