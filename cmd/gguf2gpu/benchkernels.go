package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels"
)

const (
	// l2Output is the output of one call that stays in the L2 cache, and l2Elems how many different elements such calls
	// take in turn. Fewer would be learnt by heart by the branch predictor.
	l2Output = 128 << 10
	l2Elems  = 1 << 20

	// memoryBuffer is the usual size of the output, and of the input, that are in no cache: more than the last-level cache of
	// any CPU. A run goes on where the last one stopped, so that a byte is met again only after all others.
	memoryBuffer = 512 << 20
	minBuffer    = 16 << 20 // holds the L2 working set of every type
	maxBuffer    = 4 << 30  // twice that is about what a machine can spare
	memoryCall   = 1 << 20  // bytes of output of one call

	kernelRunTime = 2 * time.Millisecond // of one run, at least
)

// Working sets.
const (
	setL2     = "l2"
	setMemory = "memory"
)

// kernelsReport is the JSON of bench kernels. Speeds are in units of 10^9 bytes per second, of one thread or of the device.
type kernelsReport struct {
	Device   *deviceReport  `json:"device,omitempty"` // null: one thread of the CPU
	Ceilings kernelCeilings `json:"ceilings"`
	Kernels  []kernelRun    `json:"kernels"`
}

// kernelCeilings is how fast one thread writes, whatever it computes, or how fast the device copies.
type kernelCeilings struct {
	L2 struct {
		Memcpy float64 `json:"memcpy_gbps"` // 128 KiB to 128 KiB, over and over
	} `json:"l2,omitzero"`
	Memory struct {
		Memcpy float64 `json:"memcpy_gbps"`
		Fill   float64 `json:"fill_gbps"` // with non-temporal stores, if the CPU's best tier has them
	} `json:"memory,omitzero"`
	Device struct {
		Copy float64 `json:"copy_gbps"` // read and written, from device memory to device memory
	} `json:"device,omitzero"`
}

// kernelRun is the speed of one conversion.
type kernelRun struct {
	Type       string  `json:"type"`
	DType      string  `json:"dtype"`
	ISA        string  `json:"isa"`         // of the device: "gpu"
	WorkingSet string  `json:"working_set"` // of the device: "device"
	GBps       float64 `json:"out_gbps"`

	// Of the device only.

	Device bool    `json:"device,omitempty"`
	Moved  float64 `json:"moved_gbps,omitempty"` // read and written
	OfCopy float64 `json:"of_copy,omitempty"`    // moved_gbps as a share of copy_gbps
}

func newBenchKernelsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "kernels [flags]",
		Short: "Measure how fast one core, or a device, dequantizes each type",
		Long: `Measure how fast one thread dequantizes blocks of random weights, for each tensor type, element type and tier of
instructions, and show the bytes of output per second: medians of several runs, beside what plain copying and filling of
memory reaches in the same process.

Working set l2: output of 128 KiB that stays in the cache, input of a million elements that differ. Working set memory:
input and output larger than any cache, written around the caches where the tier can do that. A tier without a kernel
of its own for a conversion is left out of the table: it uses the next lower one.

With --device each kernel runs alone on that device, from device memory to device memory, timed by the device. It is
compiled first where it is not in the cache, and compared with the CPU. Beside the output the table shows the bytes read
and written, and what share that is of what a copy from device memory to device memory reads and writes.`,
		Args: cobra.NoArgs,
	}
	fs := cmd.Flags()
	types := listFlag(fs, "type", "tensor types to measure, such as q4_0,q6_k", floatTypes())
	dtypes := listFlag(fs, "dtype", "element types to write: f32, f16, bf16", []gguf.Type{gguf.F32, gguf.F16, gguf.BF16})
	isas := listFlag(fs, "isa", "tiers of instructions that this CPU has", kernels.Supported())
	runs := fs.Int("runs", 10, "runs of each kind; medians are shown")
	buffer := byteSizeFlag(fs, "buffer",
		"size of output and input of the working set memory, each (default 512MiB); of the output on a device (default 1GiB)")
	device := parsedFlag(fs, "device", deviceSpec{kind: deviceCPU}, "DEVICE", "cpu, soft, hip, or hip:N", parseKernelDevice)
	cache := kernelCacheFlag(fs)
	asJSON := jsonFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if *runs < 1 {
			return usageErrorf("--runs %d: at least 1", *runs)
		}
		size := cmp.Or(*buffer, memoryBuffer)
		if size < minBuffer || size > maxBuffer {
			return usageErrorf("--buffer %d: allowed are 16MiB to 4GiB", size)
		}
		var report *kernelsReport
		var err error
		if device.kind == deviceCPU {
			b := &kernelBench{runs: *runs, memory: walk{dst: make([]byte, size), src: make([]byte, size)}}
			report, err = &b.report, b.measure(cmd.Context(), *types, *isas, *dtypes)
		} else if fs.Changed("isa") {
			return usageErrorf("--isa is for the CPU, not for --device %v", *device)
		} else {
			report, err = measureGPU(cmd, *device, *cache, gpuKeys(*types, *dtypes), *runs, *buffer)
		}
		if err != nil {
			return err
		}
		if *asJSON {
			return writeJSON(cmd.OutOrStdout(), report)
		}
		return report.print(cmd.OutOrStdout())
	}
	return cmd
}

// floatTypes returns the types that hold weights.
func floatTypes() []gguf.Type { return slices.DeleteFunc(gguf.Types(), gguf.Type.Integer) }

// walk is a way through two buffers, some bytes at a time. Where one ends, it begins again.
type walk struct {
	dst, src         []byte
	dstStep, srcStep int
	dstAt, srcAt     int
}

func (w *walk) next() (dst, src []byte) {
	if w.dstAt+w.dstStep > len(w.dst) {
		w.dstAt = 0
	}
	if w.srcAt+w.srcStep > len(w.src) {
		w.srcAt = 0
	}
	dst, src = w.dst[w.dstAt:w.dstAt+w.dstStep], w.src[w.srcAt:w.srcAt+w.srcStep]
	w.dstAt += w.dstStep
	w.srcAt += w.srcStep
	return dst, src
}

// convert sets the steps to those of a conversion that writes bytes of output.
func (w *walk) convert(to, from gguf.Type, bytes int) {
	w.dstStep, w.srcStep = bytes, bytes/to.BlockBytes()/from.BlockElems()*from.BlockBytes()
}

// kernelBench measures kernels.
type kernelBench struct {
	runs   int
	memory walk // the large buffers; the small ones are pieces of them
	report kernelsReport
}

// measure fills the report.
func (b *kernelBench) measure(ctx context.Context, types []gguf.Type, isas []kernels.ISA, dtypes []gguf.Type) error {
	if err := b.measureCeilings(ctx); err != nil {
		return err
	}
	for _, from := range types {
		b.fillSource(from)
		for _, to := range dtypes {
			var done []kernels.ISA
			for _, isa := range isas {
				k, err := kernels.For(isa)
				if err != nil {
					return err
				}
				tier := k.Tier(to, from)
				if slices.Contains(done, tier) {
					continue
				}
				done = append(done, tier)
				if err := b.measureKernel(ctx, k, to, from); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// measureCeilings measures copying and filling.
func (b *kernelBench) measureCeilings(ctx context.Context) error {
	best, err := kernels.For(slices.Max(kernels.Supported()))
	if err != nil {
		return err
	}
	// Pages that were never written would count as slower to write and faster to read than they are.
	b.fillSource(gguf.F32)
	clear(b.memory.dst)
	small := walk{dst: b.memory.dst[:l2Output], src: b.memory.src[:l2Output]}
	small.convert(gguf.F32, gguf.F32, l2Output)
	b.memory.convert(gguf.F32, gguf.F32, memoryCall)
	c := &b.report.Ceilings
	for _, m := range []struct {
		to    *float64
		walk  *walk
		write func(dst, src []byte)
	}{
		{&c.L2.Memcpy, &small, func(dst, src []byte) { copy(dst, src) }},
		{&c.Memory.Memcpy, &b.memory, func(dst, src []byte) { copy(dst, src) }},
		{&c.Memory.Fill, &b.memory, func(dst, _ []byte) { best.FillNT(dst, 1) }},
	} {
		*m.to, err = b.speed(ctx, m.walk, func(dst, src []byte) error {
			m.write(dst, src)
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// measureKernel measures one conversion in both working sets.
func (b *kernelBench) measureKernel(ctx context.Context, k *kernels.Kernels, to, from gguf.Type) error {
	small := walk{dst: b.memory.dst[:l2Output], src: b.memory.src[:l2Elems/from.BlockElems()*from.BlockBytes()]}
	small.convert(to, from, l2Output)
	b.memory.convert(to, from, memoryCall)
	for _, set := range []struct {
		name string
		walk *walk
		run  func(dst []byte, to gguf.Type, src []byte, from gguf.Type) error
	}{
		{setL2, &small, k.Dequantize},
		{setMemory, &b.memory, k.DequantizeNT},
	} {
		speed, err := b.speed(ctx, set.walk, func(dst, src []byte) error { return set.run(dst, to, src, from) })
		if err != nil {
			return err
		}
		b.report.Kernels = append(b.report.Kernels, kernelRun{
			Type: lowerName(from), DType: lowerName(to), ISA: k.Tier(to, from).String(), WorkingSet: set.name, GBps: speed,
		})
	}
	return nil
}

// fillSource fills the input with random weights of type t: as many as differ in the L2 working set, again and again.
func (b *kernelBench) fillSource(t gguf.Type) {
	src := b.memory.src
	n := l2Elems / t.BlockElems() * t.BlockBytes()
	newWeights(t, 1).fill(src[:n], 0)
	for n < len(src) {
		n += copy(src[n:], src[:n])
	}
	b.memory.srcAt = 0
}

// speed has write write step after step of the walk and returns the median speed of the runs.
func (b *kernelBench) speed(ctx context.Context, w *walk, write func(dst, src []byte) error) (float64, error) {
	calls := 1
	var speeds []float64
	for len(speeds) < b.runs {
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		start := time.Now()
		for range calls {
			if err := write(w.next()); err != nil {
				return 0, err
			}
		}
		took := time.Since(start)
		if len(speeds) == 0 && took < kernelRunTime {
			calls *= 2 // warming up still
			continue
		}
		speeds = append(speeds, float64(calls)*float64(w.dstStep)/took.Seconds()/1e9)
	}
	return median(speeds), nil
}

// print is the report for people.
func (r *kernelsReport) print(out io.Writer) error {
	if r.Device != nil {
		return r.printGPU(out)
	}
	c := r.Ceilings
	fmt.Fprintln(out, "one thread, GB = 10^9 bytes of output, medians")
	fmt.Fprintf(out, "ceilings: in the L2 cache memcpy %.1f GB/s; in memory memcpy %.1f, non-temporal fill %.1f\n\n",
		c.L2.Memcpy, c.Memory.Memcpy, c.Memory.Fill)
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "type\tdtype\tisa\tL2 GB/s\tof memcpy\tmemory GB/s\tof memcpy\tof fill\t")
	for pair := range slices.Chunk(r.Kernels, 2) {
		l2, memory := pair[0], pair[1]
		fmt.Fprintf(w, "%s\t%s\t%s\t%.2f\t%.0f %%\t%.2f\t%.0f %%\t%.0f %%\t\n", l2.Type, l2.DType, l2.ISA,
			l2.GBps, 100*l2.GBps/c.L2.Memcpy,
			memory.GBps, 100*memory.GBps/c.Memory.Memcpy, 100*memory.GBps/c.Memory.Fill)
	}
	return w.Flush()
}
