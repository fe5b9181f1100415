//go:build unix

package amdhip

import (
	"encoding/binary"
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// descriptorByValue is the first version of HIP that is known to take a descriptor by its value.
const descriptorByValue = 7_01_00000

// descriptorArgument returns the argument osHandle of hipMemImportFromShareableHandle for a descriptor; release is
// called after the call. HIP takes the descriptor itself from 7.1 on. Before, some versions take a pointer to it, such
// as 6.4, and some the descriptor, and nothing tells which: to take a descriptor for a pointer ends the process.
//
// For those there is an argument that is right both ways. Its lower 32 bits are the descriptor, which is all that the
// one kind looks at; and it is the address of four bytes that hold the descriptor, which is what the other kind looks
// at. So a page is mapped whose address has 32 zeros at its end, and the descriptor's number is the offset in that
// page. Descriptor 12:
//
//	the page is at 0x7000000000, osHandle is 0x700000000c, and the int at 0x700000000c is 12
//
// A descriptor whose number is no such offset is duplicated to one that is.
func descriptorArgument(fd, version int) (osHandle uintptr, release func(), err error) {
	if version >= descriptorByValue {
		return uintptr(fd), func() {}, nil
	}
	const page = 4096
	close := func() {}
	if fd%4 != 0 || fd > page-4 {
		if fd, err = multipleOf4(fd); err != nil {
			return 0, nil, err
		}
		close = func() { _ = unix.Close(fd) }
	}
	if fd > page-4 {
		close()
		return 0, nil, errors.New("too many files are open: no descriptor below 4096 is free")
	}
	base, err := mapAtMultiple(page)
	if err != nil {
		close()
		return 0, nil, err
	}
	cell := unsafe.Slice((*byte)(unsafe.Add(base, fd)), 4)
	binary.NativeEndian.PutUint32(cell, uint32(fd))
	return uintptr(base) + uintptr(fd), func() {
		_ = unix.MunmapPtr(base, page)
		close()
	}, nil
}

// multipleOf4 duplicates the descriptor to one whose number is a multiple of 4.
func multipleOf4(fd int) (int, error) {
	for at := 0; ; {
		dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, at)
		if errors.Is(err, unix.EINVAL) { // a number as high as that is beyond the process's limit
			err = unix.EMFILE
		}
		if err != nil {
			return 0, fmt.Errorf("duplicating descriptor %d: %w", fd, err)
		}
		if dup%4 == 0 {
			return dup, nil
		}
		_ = unix.Close(dup)
		at = dup/4*4 + 4
	}
}

// mapAtMultiple maps n bytes at an address that is a multiple of 2^32.
func mapAtMultiple(n uintptr) (unsafe.Pointer, error) {
	var failed error
	for at := uintptr(0x70); at > 0x60; at-- { // below what the kernel gives out by itself, above what programs occupy
		want := at << 32
		p, err := unix.MmapPtr(-1, 0, *(*unsafe.Pointer)(unsafe.Pointer(&want)), n, unix.PROT_READ|unix.PROT_WRITE,
			unix.MAP_PRIVATE|unix.MAP_ANON)
		if err != nil {
			failed = err
			continue
		}
		if uintptr(p) == want {
			return p, nil
		}
		_ = unix.MunmapPtr(p, n) // something is there already, so the kernel chose another place
	}
	return nil, errors.Join(errors.New("no address that is a multiple of 2^32 is free"), failed)
}
