package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels/gpu"
)

const (
	// deviceBuffer is the usual size of the output on a device, which has no cache as large as that.
	deviceBuffer = 1 << 30
	// fillBuffer is how many bytes of different blocks the input has; then they begin again.
	fillBuffer = 16 << 20
	// inputOffset is where the input begins in its memory: kernels may read a little before it, and after its end.
	inputOffset = 256

	deviceRunTime = 20 * time.Millisecond // of one run, at least: a wait for the device to take notice is little of that

	deviceCPU = "cpu"    // the --device of bench kernels that is none
	isaGPU    = "gpu"    // in reports
	setDevice = "device" // working set
)

// parseKernelDevice is parseDevice with the CPU, and without a choice.
func parseKernelDevice(s string) (deviceSpec, error) {
	if s == deviceCPU {
		return deviceSpec{kind: deviceCPU}, nil
	}
	d, err := parseDevice(s)
	if err != nil || d.kind == "auto" || d.list != "" {
		return d, errors.New("allowed are cpu, soft, hip, and hip:N for GPU number N")
	}
	return d, nil
}

// gpuKeys are the kernels that there are for these types.
func gpuKeys(types, dtypes []gguf.Type) []gpu.Key {
	return slices.DeleteFunc(gpu.Keys(), func(k gpu.Key) bool {
		return !slices.Contains(types, k.From) || !slices.Contains(dtypes, k.To)
	})
}

// gpuBench measures kernels on a device.
type gpuBench struct {
	dev           *amdhip.Device
	runs          int
	size          uint64 // bytes of output
	stream        *amdhip.Stream
	before, after *amdhip.Event
	blocks        *amdhip.HostMemory // of which the input is made
	in, out       *amdhip.Memory
	report        kernelsReport
}

// measureGPU measures the kernels keys on the device. buffer is the size of their output in bytes, 0 for the usual one.
func measureGPU(cmd *cobra.Command, device deviceSpec, cache string, keys []gpu.Key, runs int, buffer uint64) (
	_ *kernelsReport, err error) {
	if len(keys) == 0 {
		return nil, usageErrorf("there is no GPU kernel between these types")
	}
	ctx, stderr := cmd.Context(), cmd.ErrOrStderr()
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	flags := deviceFlags{device: &device, softMemory: new(uint64), softLink: new(float64)}
	rt, dev, err := flags.open(stderr, log)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, rt.Close()) }()
	set, err := kernelCompiler(cache, log).Load(ctx, dev, keys)
	if errors.Is(err, amdhip.ErrUnsupported) {
		return nil, withCode(exitNoDevice, err)
	}
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, set.Close()) }()
	b := &gpuBench{dev: dev, runs: runs, size: buffer}
	b.report.Device = &deviceReport{Kind: rt.Kind(), Index: dev.Index(), Name: dev.Name()}
	defer func() { err = errors.Join(err, b.close()) }()
	if err := b.open(keys); err != nil {
		return nil, err
	}
	if err := b.measure(ctx, set, keys); err != nil {
		return nil, err
	}
	return &b.report, nil
}

// open makes what b works with.
func (b *gpuBench) open(keys []gpu.Key) (err error) {
	if b.size == 0 {
		free, _, err := b.dev.MemInfo()
		if err != nil {
			return err
		}
		b.size = max(minBuffer, min(deviceBuffer, free/4)) // the input may be twice as large
	}
	input := b.size // for the copy
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

// close gives it back.
func (b *gpuBench) close() error {
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

// blocksFor is how many blocks become size bytes of output.
func blocksFor(k gpu.Key, size uint64) uint64 {
	return size / uint64(k.From.BlockElems()*k.To.BlockBytes())
}

// measure fills the report.
func (b *gpuBench) measure(ctx context.Context, set *gpu.Set, keys []gpu.Key) error {
	in, out := b.in.Ptr()+inputOffset, b.out.Ptr()
	// Memory that was never written would be read too fast, and written too slowly.
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
		b.report.Kernels = append(b.report.Kernels, kernelRun{
			Type: lowerName(k.From), DType: lowerName(k.To), ISA: isaGPU, WorkingSet: setDevice, GBps: written / took / 1e9,
			Device: true, Moved: moved, OfCopy: moved / ceiling,
		})
	}
	return nil
}

// fill makes the input weights of type t.
func (b *gpuBench) fill(t gguf.Type) error {
	blocks := b.blocks.Bytes()
	blocks = blocks[:len(blocks)/t.BlockBytes()*t.BlockBytes()]
	newWeights(t, 1).fill(blocks, 0)
	for at := uint64(inputOffset); at < b.in.Size(); at += uint64(len(blocks)) {
		n := min(b.in.Size()-at, uint64(len(blocks)))
		if err := b.stream.CopyToDevice(b.in.Ptr()+amdhip.DevicePtr(at), b.blocks, 0, int(n)); err != nil {
			return err
		}
	}
	return b.stream.Synchronize()
}

// time returns how many seconds what work enqueues takes on the device: the median of the runs.
func (b *gpuBench) time(ctx context.Context, work func() error) (float64, error) {
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
			calls *= 2 // warming up still
			continue
		}
		seconds = append(seconds, took.Seconds()/float64(calls))
	}
	return median(seconds), nil
}

// once is the time that the device takes for work, enqueued so many times.
func (b *gpuBench) once(calls int, work func() error) (time.Duration, error) {
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

// printGPU is the report of a device for people.
func (r *kernelsReport) printGPU(out io.Writer) error {
	fmt.Fprintf(out, "on %s, GB = 10^9 bytes, medians\n", r.Device.Name)
	fmt.Fprintf(out, "ceiling: a copy on the device reads and writes %.1f GB/s\n\n", r.Ceilings.Device.Copy)
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "type\tdtype\toutput GB/s\tread+written GB/s\tof copy\t")
	for _, k := range r.Kernels {
		fmt.Fprintf(w, "%s\t%s\t%.2f\t%.2f\t%.0f %%\t\n", k.Type, k.DType, k.GBps, k.Moved, 100*k.OfCopy)
	}
	return w.Flush()
}
