package bench

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/cmd/gguf2gpu/internal/synth"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels/gpu"
)

const (
	// fillBuffer is how many bytes of different blocks the input has before they repeat.
	fillBuffer = 16 << 20
	// inputOffset is where the input begins in its memory: kernels may read a little before it, and after its end.
	inputOffset = 256

	// deviceRunTime is how long one run takes at least, so that the time until the device starts hardly counts.
	deviceRunTime = 20 * time.Millisecond
)

// DeviceKeys returns the conversions between these types for which there is a kernel.
func DeviceKeys(types, dtypes []gguf.Type) []gpu.Key {
	return slices.DeleteFunc(gpu.Keys(), func(k gpu.Key) bool {
		return !slices.Contains(types, k.From) || !slices.Contains(dtypes, k.To)
	})
}

// DeviceKernels measures how fast kernels of set convert blocks, from device memory to device memory, timed by the
// device. keys are the conversions to measure, and runs how often each, at least once. buffer is the size of the output
// in bytes; 0 is [DeviceBuffer], or a quarter of the free memory if that is less. Errors are those of the device.
func DeviceKernels(
	ctx context.Context, dev *amdhip.Device, set *gpu.Set, keys []gpu.Key, runs int, buffer uint64,
) (_ *KernelsReport, err error) {
	b := &deviceBench{dev: dev, runs: runs, size: buffer}
	b.report.Device = &Device{Kind: dev.Runtime().Kind(), Index: dev.Index(), Name: dev.Name()}
	defer func() { err = errors.Join(err, b.close()) }()
	if err := b.open(keys); err != nil {
		return nil, err
	}
	if err := b.measure(ctx, set, keys); err != nil {
		return nil, err
	}
	return &b.report, nil
}

// deviceBench measures kernels on a device.
type deviceBench struct {
	dev           *amdhip.Device
	runs          int
	size          uint64 // bytes of output
	stream        *amdhip.Stream
	before, after *amdhip.Event
	blocks        *amdhip.HostMemory // the blocks that the input repeats
	in, out       *amdhip.Memory
	report        KernelsReport
}

// open makes the stream, the events and the buffers.
func (b *deviceBench) open(keys []gpu.Key) (err error) {
	if b.size == 0 {
		free, _, err := b.dev.MemInfo()
		if err != nil {
			return err
		}
		b.size = max(MinBuffer, min(DeviceBuffer, free/4)) // the input may be twice as large
	}
	input := b.size // as much as the copy needs, or more
	for _, k := range keys {
		input = max(input, blocksFor(k, b.size)*uint64(k.From.BlockBytes()))
	}
	if b.stream, err = b.dev.NewStream(); err != nil {
		return err
	}
	for _, e := range []**amdhip.Event{&b.before, &b.after} {
		if *e, err = b.dev.NewEvent(amdhip.EventOptions{Timing: true}); err != nil {
			return err
		}
	}
	if b.blocks, err = b.dev.HostMalloc(fillBuffer); err != nil {
		return err
	}
	if b.in, err = b.dev.Malloc(inputOffset + input + gpu.Padding); err != nil {
		return err
	}
	b.out, err = b.dev.Malloc(b.size)
	return err
}

// close gives back what open has made.
func (b *deviceBench) close() error {
	var errs []error
	if b.stream != nil {
		errs = append(errs, b.stream.Close())
	}
	for _, e := range []*amdhip.Event{b.before, b.after} {
		if e != nil {
			errs = append(errs, e.Close())
		}
	}
	if b.blocks != nil {
		errs = append(errs, b.blocks.Close())
	}
	for _, m := range []*amdhip.Memory{b.in, b.out} {
		if m != nil {
			errs = append(errs, m.Close())
		}
	}
	return errors.Join(errs...)
}

// blocksFor returns how many blocks become size bytes of output.
func blocksFor(k gpu.Key, size uint64) uint64 {
	return size / uint64(k.From.BlockElems()*k.To.BlockBytes())
}

// measure fills the report.
func (b *deviceBench) measure(ctx context.Context, set *gpu.Set, keys []gpu.Key) error {
	in, out := b.in.Ptr()+inputOffset, b.out.Ptr()
	// Memory that was never written is faster to read and slower to write than other memory.
	if err := errors.Join(b.fill(gguf.F32), b.stream.Memset(out, 0, b.size)); err != nil {
		return err
	}
	took, err := b.time(ctx, func() error { return b.stream.CopyPeer(out, in, b.dev, b.size) })
	if err != nil {
		return err
	}
	ceiling := 2 * float64(b.size) / took / 1e9
	b.report.Ceilings.Device.Copy = ceiling
	for i, k := range keys {
		blocks := blocksFor(k, b.size)
		if i == 0 || keys[i-1].From != k.From {
			if err := b.fill(k.From); err != nil {
				return err
			}
		}
		took, err := b.time(ctx, func() error { return set.Launch(b.stream, k, out, in, blocks) })
		if err != nil {
			return fmt.Errorf("kernel %v: %w", k, err)
		}
		written := float64(blocks) * float64(k.From.BlockElems()*k.To.BlockBytes())
		moved := (written + float64(blocks)*float64(k.From.BlockBytes())) / took / 1e9
		b.report.Kernels = append(b.report.Kernels, KernelRun{
			Type: lower(k.From), DType: lower(k.To), ISA: isaGPU, WorkingSet: SetDevice, GBps: written / took / 1e9,
			Device: true, Moved: moved, OfCopy: moved / ceiling,
		})
	}
	return nil
}

// fill fills the input with weights of type t.
func (b *deviceBench) fill(t gguf.Type) error {
	blocks := b.blocks.Bytes()
	blocks = blocks[:len(blocks)/t.BlockBytes()*t.BlockBytes()]
	synth.Fill(blocks, t, 1)
	for at := uint64(inputOffset); at < b.in.Size(); at += uint64(len(blocks)) {
		n := min(b.in.Size()-at, uint64(len(blocks)))
		if err := b.stream.CopyToDevice(b.in.Ptr()+amdhip.DevicePtr(at), b.blocks, 0, int(n)); err != nil {
			return err
		}
	}
	return b.stream.Synchronize()
}

// time returns how many seconds the device takes for what work enqueues: the median of the runs.
func (b *deviceBench) time(ctx context.Context, work func() error) (float64, error) {
	calls := 1
	var seconds []float64
	for len(seconds) < b.runs {
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		took, err := b.once(calls, work)
		if err != nil {
			return 0, err
		}
		if len(seconds) == 0 && took < deviceRunTime {
			calls *= 2 // too short to measure, and warming up
			continue
		}
		seconds = append(seconds, took.Seconds()/float64(calls))
	}
	return median(seconds), nil
}

// once returns the time that the device takes for work, enqueued calls times.
func (b *deviceBench) once(calls int, work func() error) (time.Duration, error) {
	if err := b.stream.Record(b.before); err != nil {
		return 0, err
	}
	for range calls {
		if err := work(); err != nil {
			return 0, err
		}
	}
	if err := b.stream.Record(b.after); err != nil {
		return 0, err
	}
	if err := b.after.Synchronize(); err != nil {
		return 0, err
	}
	return b.after.Elapsed(b.before)
}
