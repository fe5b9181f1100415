//go:build !unix

package gguf

import (
	"os"

	"github.com/edsrzf/mmap-go"
)

// mapFile maps a file of size bytes for reading.
func mapFile(f *os.File, size int) (mmap.MMap, error) {
	return mmap.MapRegion(f, size, mmap.RDONLY, 0, 0)
}
