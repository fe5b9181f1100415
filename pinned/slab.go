package pinned

import (
	"errors"
	"fmt"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
)

// errCannotPin is matched when memory cannot be page-locked.
var errCannotPin = errors.New("pinned: memory cannot be page-locked")

// slab is a run of host memory that several buffers are cut from.
type slab struct {
	mem     *amdhip.HostMemory
	mapping []byte // that mem registers; nil: mem has its own
	freed   bool   // guarded by Pool.mu
}

// registeredSlab returns n bytes of page-locked memory: huge pages, touched by several threads and then registered.
// That is several times quicker than hipHostMalloc, and spares the CPU most address translations when the buffers are
// filled. An error of the registration matches errCannotPin.
func registeredSlab(dev *amdhip.Device, n int) (*slab, error) {
	mapping, bytes, err := mapHuge(n)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errCannotPin, err)
	}
	mem, err := dev.HostRegister(bytes)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errCannotPin, errors.Join(err, unmap(mapping)))
	}
	return &slab{mem: mem, mapping: mapping}, nil
}

// pinnedSlab returns n bytes of page-locked memory from hipHostMalloc. An error matches errCannotPin.
func pinnedSlab(dev *amdhip.Device, n int) (*slab, error) {
	mem, err := dev.HostMalloc(n)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errCannotPin, err)
	}
	return &slab{mem: mem}, nil
}

// plainSlab returns n bytes of memory that is not page-locked.
func plainSlab(dev *amdhip.Device, n int) (*slab, error) {
	mem, err := dev.HostPlain(n)
	if err != nil {
		return nil, err
	}
	return &slab{mem: mem}, nil
}

// close unlocks and frees the memory.
func (s *slab) close() error {
	if err := s.mem.Close(); err != nil || s.mapping == nil {
		return err // memory that may be registered still must not go away
	}
	return unmap(s.mapping)
}
