package gpu

import (
	"errors"
	"fmt"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
)

// Set is kernels that are ready on a device. It is safe for concurrent use. The caller must Close it, once nothing that it
// launched is running.
type Set struct {
	dev     *amdhip.Device
	kernels map[Key]kernel
	stats   Stats
	stuck   bool // the check hangs: kernels may still be running
}

type kernel struct {
	module   *amdhip.Module
	function *amdhip.Function
}

// Stats says what Load had to do.
func (s *Set) Stats() Stats { return s.stats }

// Close unloads the kernels. It is idempotent.
func (s *Set) Close() error {
	if s.stuck {
		return nil
	}
	var errs []error
	for _, k := range s.kernels {
		errs = append(errs, k.module.Close())
	}
	return errors.Join(errs...)
}

const (
	// maxGrid bounds the blocks of a launch: HIP wants fewer than 2^32 threads. Kernels loop, so it is no limit to the work, and
	// 4 GiB of output come without a second turn.
	maxGrid = 1 << 20
	// maxWork bounds the blocks of a type that are converted by a launch: more than fit a device's memory, and their bytes can be
	// counted.
	maxWork = 1 << 40
	// threadBytes is what a thread writes in one turn.
	threadBytes = 16
)

// Launch makes stream convert blocks of k.From at in to elements of k.To at out, both multiples of Align, and returns. For types
// that are no blocks, blocks counts elements. Padding bytes on both sides of the input must be readable. The memory must stay
// allocated until the stream is done with it. Errors: amdhip's, also for addresses that are not aligned, and one matching
// amdhip.ErrUnsupported for a kernel that was not loaded.
func (s *Set) Launch(stream *amdhip.Stream, k Key, out, in amdhip.DevicePtr, blocks uint64) error {
	f, ok := s.kernels[k]
	switch {
	case !ok:
		return fmt.Errorf("gpu: kernel %v was not loaded: %w", k, amdhip.ErrUnsupported)
	case out%Align != 0 || in%Align != 0:
		return fmt.Errorf("gpu: kernel %v, from %#x to %#x: not multiples of %d: %w", k, in, out, Align, amdhip.ErrInvalidValue)
	case blocks > maxWork:
		return fmt.Errorf("gpu: kernel %v, %d blocks: more than 2^40: %w", k, blocks, amdhip.ErrInvalidValue)
	case blocks == 0:
		return nil
	}
	const bytes = Threads * threadBytes
	grid := min((blocks*k.outBytes()+bytes-1)/bytes, maxGrid)
	return stream.Launch(f.function, uint32(grid), Threads, uint64(out), uint64(in), blocks)
}

// inBytes and outBytes are the bytes of one block, before and after.
func (k Key) inBytes() uint64  { return uint64(k.From.BlockBytes()) }
func (k Key) outBytes() uint64 { return uint64(k.From.BlockElems() * k.To.BlockBytes()) }
