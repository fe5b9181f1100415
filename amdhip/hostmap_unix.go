//go:build unix

package amdhip

import "golang.org/x/sys/unix"

// mapAnonymous returns n zeroed bytes outside Go's heap that begin on a page.
func mapAnonymous(n int) ([]byte, error) {
	return unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
}

// unmapAnonymous gives the bytes of mapAnonymous back.
func unmapAnonymous(b []byte) error { return unix.Munmap(b) }
