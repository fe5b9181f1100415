//go:build unix

package hostmem

import "golang.org/x/sys/unix"

// Map returns n zeroed bytes outside Go's heap that begin on a page. Nothing is reserved: there may be more of them
// than the host has memory, as long as not all are written.
func Map(n int) ([]byte, error) {
	return unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_NORESERVE)
}

// Unmap gives the bytes of Map back.
func Unmap(b []byte) error { return unix.Munmap(b) }
