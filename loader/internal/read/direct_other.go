//go:build !linux

package read

import (
	"os"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// OpenDirect opens a part once more; there are no direct reads here.
func OpenDirect(p *gguf.Part) (*os.File, error) { return p.Open(0) }

// memoryAlign: ordinary reads need none.
func memoryAlign(*os.File) int { return 1 }

// readv reads at off into the first of bufs.
func readv(f *os.File, bufs [][]byte, off int64) (int, error) { return f.ReadAt(bufs[0], off) }

// openProbe is not called here.
func openProbe(p *gguf.Part) (*os.File, error) { return p.Open(0) }

// resident is not known here: the mapping is used.
func (p *part) resident(int64) bool { return true }

// letGo leaves it to the kernel.
func letGo([]byte) {}
