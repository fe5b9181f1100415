//go:build unix

package gguf

import (
	"errors"
	"os"

	"github.com/edsrzf/mmap-go"
	"golang.org/x/sys/unix"
)

// mapFile maps a file of size bytes for reading. Some file systems refuse shared mappings: FUSE with direct_io (rclone,
// sshfs and gcsfuse have such modes), and virtiofs without a cache. Most of them grant private ones, which are as good
// for a file that is only read.
func mapFile(f *os.File, size int) (mmap.MMap, error) {
	m, err := mmap.MapRegion(f, size, mmap.RDONLY, 0, 0)
	if errors.Is(err, unix.ENODEV) {
		return unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ, unix.MAP_PRIVATE)
	}
	return m, err
}
