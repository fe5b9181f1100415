package pinned

import (
	"runtime"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	hugePage   = 2 << 20 // of x86-64, and of arm64 with 4 KiB pages
	maxTouches = 4       // threads that touch: more only wait for each other in the kernel
)

// mapHuge maps n bytes on huge pages as far as the system has them, and touches them all. The bytes are a part of the
// mapping, which is larger so that they begin on a huge page.
func mapHuge(n int) (mapping, bytes []byte, err error) {
	mapping, err = unix.Mmap(-1, 0, n+hugePage, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, nil, err
	}
	skip := -uintptr(unsafe.Pointer(unsafe.SliceData(mapping))) & (hugePage - 1)
	bytes = mapping[skip : skip+uintptr(n) : skip+uintptr(n)]
	_ = unix.Madvise(bytes, unix.MADV_HUGEPAGE) // a wish: small pages do, too
	touch(bytes)
	return mapping, bytes, nil
}

// touch makes the kernel provide every page of b.
func touch(b []byte) {
	step := max(hugePage, (len(b)/min(maxTouches, runtime.GOMAXPROCS(0))+hugePage-1)&^(hugePage-1))
	var all sync.WaitGroup
	for ; len(b) > 0; b = b[min(step, len(b)):] {
		part := b[:min(step, len(b))]
		all.Go(func() {
			for i := 0; i < len(part); i += 4096 {
				part[i] = 0
			}
		})
	}
	all.Wait()
}

func unmap(mapping []byte) error { return unix.Munmap(mapping) }
