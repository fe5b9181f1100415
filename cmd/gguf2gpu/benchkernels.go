package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/cmd/gguf2gpu/internal/bench"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels"
)

// deviceCPU is the value of --device of bench kernels that stands for the CPU.
const deviceCPU = "cpu"

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
		Example: `  gguf2gpu bench kernels --type q4_k,q6_k --dtype f16
  gguf2gpu bench kernels --device hip:0 --json`,
		Args: cobra.NoArgs,
	}
	fs := cmd.Flags()
	types := listFlag(fs, "type", "tensor types to measure, such as q4_0,q6_k", floatTypes())
	dtypes := listFlag(fs, "dtype", "element types to write: f32, f16, bf16", []gguf.Type{gguf.F32, gguf.F16, gguf.BF16})
	isas := listFlag(fs, "isa", "tiers of instructions that this CPU has", kernels.Supported())
	runs := intFlag(fs, "runs", 10, 1, "runs of each kind; medians are shown")
	buffer := byteSizeFlag(fs, "buffer",
		"size of output and input of the working set memory, each (default 512MiB); of the output on a device (default 1GiB)")
	device := parsedFlag(fs, "device", deviceSpec{kind: deviceCPU}, "DEVICE", "cpu, soft, hip, or hip:N", parseKernelDevice)
	cache := kernelCacheFlag(fs)
	asJSON := jsonFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		size := cmp.Or(*buffer, bench.MemoryBuffer)
		if size < bench.MinBuffer || size > bench.MaxBuffer {
			return usageErrorf("--buffer %d: allowed are 16MiB to 4GiB", size)
		}
		var report *bench.KernelsReport
		var err error
		switch {
		case device.kind == deviceCPU:
			sayWithout(notices(cmd), fs, "with --device cpu: it is for the kernels of GPUs", "kernel-cache")
			report, err = bench.CPUKernels(cmd.Context(), bench.CPUOptions{
				Types: *types, DTypes: *dtypes, ISAs: *isas, Runs: *runs, Buffer: size,
			})
		case fs.Changed("isa"):
			return usageErrorf("--isa is for the CPU, not for --device %v", *device)
		default:
			report, err = measureOnDevice(cmd, *device, *cache, *types, *dtypes, *runs, *buffer)
		}
		if err != nil {
			return err
		}
		if *asJSON {
			return writeJSON(cmd.OutOrStdout(), report)
		}
		return printKernels(cmd.OutOrStdout(), report)
	}
	return cmd
}

// parseKernelDevice is parseDevice for bench kernels: it also takes the CPU, but neither auto nor several devices.
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

// measureOnDevice opens the device, compiles the kernels between these types and measures them.
func measureOnDevice(cmd *cobra.Command, device deviceSpec, cache string, types, dtypes []gguf.Type,
	runs int, buffer uint64,
) (_ *bench.KernelsReport, err error) {
	ctx := cmd.Context()
	keys := bench.DeviceKeys(types, dtypes)
	if len(keys) == 0 {
		return nil, usageErrorf("there is no GPU kernel between these types")
	}
	log := newLogger(cmd, slog.LevelWarn)
	flags := deviceFlags{device: &device, softMemory: new(uint64), softLink: new(float64), softFlip: new(softFlips)}
	rt, dev, err := flags.open(cmd.Context(), notices(cmd), log)
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
	return bench.DeviceKernels(ctx, dev, set, keys, runs, buffer)
}

// printKernels writes the report for people.
func printKernels(out io.Writer, r *bench.KernelsReport) error {
	if r.Device != nil {
		return printDeviceKernels(out, r)
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

// printDeviceKernels is printKernels for a device.
func printDeviceKernels(out io.Writer, r *bench.KernelsReport) error {
	fmt.Fprintf(out, "on %s, GB = 10^9 bytes, medians\n", r.Device.Name)
	fmt.Fprintf(out, "ceiling: a copy on the device reads and writes %.1f GB/s\n\n", r.Ceilings.Device.Copy)
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "type\tdtype\toutput GB/s\tread+written GB/s\tof copy\t")
	for _, k := range r.Kernels {
		fmt.Fprintf(w, "%s\t%s\t%.2f\t%.2f\t%.0f %%\t\n", k.Type, k.DType, k.GBps, k.Moved, 100*k.OfCopy)
	}
	return w.Flush()
}
