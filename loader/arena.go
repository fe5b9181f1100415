package loader

import (
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
)

// exportAlign is what the size of allocations is a multiple of that other processes open. A driver may cut smaller ones
// from a block that other allocations share, and hand over that.
const exportAlign = 2 << 20

// arena is one of the few large allocations that hold a model.
type arena struct {
	mem  io.Closer
	ptr  amdhip.DevicePtr
	host []byte // the same memory for the host, on a device that shares it; else nil
}

// newArena allocates n bytes. On a device that shares the host's memory there is nothing to stage for: the arena is
// then page-locked host memory that the device sees, and weights are written straight into it. Other processes can open
// device memory only, so what is exported is that.
func newArena(dev *amdhip.Device, n uint64, exported bool) (arena, error) {
	if exported {
		n = (n + exportAlign - 1) &^ (exportAlign - 1)
	}
	if !dev.Integrated() || exported {
		mem, err := dev.Malloc(n)
		if err != nil {
			return arena{}, err
		}
		return arena{mem: mem, ptr: mem.Ptr()}, nil
	}
	if n > math.MaxInt {
		return arena{}, fmt.Errorf("loader: %d bytes: %w", n, amdhip.ErrOutOfMemory)
	}
	mem, err := dev.HostMalloc(int(n))
	if err != nil {
		return arena{}, err
	}
	ptr, err := mem.DevicePtr()
	if err != nil {
		return arena{}, errors.Join(err, mem.Close())
	}
	return arena{mem: mem, ptr: ptr, host: mem.Bytes()}, nil
}
