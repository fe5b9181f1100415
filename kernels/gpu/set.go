package gpu

import (
	"errors"
	"fmt"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/internal/watch"
)

// Set has kernels that are ready on a device. It is safe for concurrent use. The caller must Close it, after everything
// that it has launched is done.
type Set struct {
	dev     *amdhip.Device
	kernels map[Key]kernel
	stats   Stats
	stuck   bool // kernels of the check have not ended, and may still be running
}

type kernel struct {
	module   *amdhip.Module
	function *amdhip.Function
}

// Stats returns what Load did.
func (s *Set) Stats() Stats { return s.stats }

// Close unloads the kernels. Further calls do nothing. If kernels of the check have not ended, it unloads nothing.
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

// unload is Close within the limit. What the device does not let go stays.
func (s *Set) unload(limit *watch.Limit) error {
	err, _ := limit.Free("unloading kernels", s.Close) // the caller has an error already
	return err
}

const (
	// maxGrid bounds the number of blocks of threads in a launch, as HIP allows fewer than 2^32 threads. Kernels loop,
	// so it does not limit the output. They need a second iteration only for more than 4 GiB.
	maxGrid = 1 << 20
	// maxWork bounds how many blocks of a type a launch converts. It is more than fits the memory of a device, and
	// small enough that their bytes do not overflow 64 bits.
	maxWork = 1 << 40
	// threadBytes is how many bytes a thread writes in one iteration.
	threadBytes = 16
)

// Launch enqueues kernel k on stream and returns. The kernel converts blocks blocks of type k.From at in to elements of
// type k.To at out. For plain types blocks is the number of elements. Both addresses must be multiples of Align,
// Padding bytes before and after the input must be readable, and the memory must stay allocated until the stream is
// done with it. Errors: *amdhip.Error, amdhip.ErrInvalidValue for an address that is not aligned or more than 2^40
// blocks, and amdhip.ErrUnsupported for a kernel that was not loaded.
func (s *Set) Launch(stream *amdhip.Stream, k Key, out, in amdhip.DevicePtr, blocks uint64) error {
	f, ok := s.kernels[k]
	switch {
	case !ok:
		return fmt.Errorf("gpu: kernel %v was not loaded: %w", k, amdhip.ErrUnsupported)
	case k.Fingerprint:
		return fmt.Errorf("gpu: kernel %v converts nothing, Set.Fingerprint launches it: %w", k, amdhip.ErrInvalidValue)
	case out%Align != 0 || in%Align != 0:
		return fmt.Errorf("gpu: kernel %v, from %#x to %#x: the addresses must be multiples of %d: %w",
			k, in, out, Align, amdhip.ErrInvalidValue)
	case blocks > maxWork:
		return fmt.Errorf("gpu: kernel %v, %d blocks: more than 2^40: %w", k, blocks, amdhip.ErrInvalidValue)
	case blocks == 0:
		return nil
	}
	const bytes = Threads * threadBytes
	grid := min((blocks*k.outBytes()+bytes-1)/bytes, maxGrid)
	return stream.Launch(f.function, uint32(grid), Threads, uint64(out), uint64(in), blocks)
}

// inBytes and outBytes return how many bytes one block has, before and after the conversion.
func (k Key) inBytes() uint64  { return uint64(k.From.BlockBytes()) }
func (k Key) outBytes() uint64 { return uint64(k.From.BlockElems() * k.To.BlockBytes()) }
