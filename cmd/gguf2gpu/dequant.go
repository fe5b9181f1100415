package main

import (
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels/gpu"
	"github.com/gguf2gpu/gguf2gpu/loader"
)

// compileKernel is the hidden command that compiles one kernel, for a process that must not die of it.
const compileKernel = "compile-kernel"

func newCompileKernelCommand() *cobra.Command {
	return &cobra.Command{
		Use:    compileKernel,
		Short:  "Compile one kernel for the process that started this one",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			// When the compiler aborts, the signal is to end this process and so tell the other one: Go would handle it, print
			// what its goroutines do and exit with a code.
			signal.Ignore(syscall.SIGABRT)
			return gpu.ServeChild(cmd.InOrStdin(), cmd.OutOrStdout())
		},
	}
}

// dequantFlags are --dequant and --kernel-cache.
type dequantFlags struct {
	by    *loader.Dequant
	cache *string
}

func addDequantFlags(fs *pflag.FlagSet) dequantFlags {
	return dequantFlags{
		by: parsedFlag(fs, "dequant", loader.DequantAuto, "WHO",
			"who converts: cpu, gpu (kernels compiled by hipRTC), auto (gpu where that is quicker)", loader.ParseDequant),
		cache: kernelCacheFlag(fs),
	}
}

// check refuses --dequant gpu for a loader that never lets the device convert.
func (f dequantFlags) check(sync bool) error {
	if sync && *f.by == loader.DequantGPU {
		return usageErrorf("--sync and --dequant gpu: the synchronous loader converts on the CPU; leave one of the two out")
	}
	return nil
}

func kernelCacheFlag(fs *pflag.FlagSet) *string {
	return fs.String("kernel-cache", "",
		"directory for compiled kernels, "+gpu.NoCache+" for none (default gguf2gpu/kernels in the user's cache directory)")
}

// kernelCompiler returns a compiler that keeps kernels in dir. It compiles in processes of their own, as some versions of
// AMD's compiler abort the one that they are called in.
func kernelCompiler(dir string, log *slog.Logger) *gpu.Compiler {
	self, err := os.Executable()
	if err != nil {
		self = os.Args[0]
	}
	return &gpu.Compiler{Dir: dir, Run: gpu.Child(self, compileKernel), Logger: log}
}

// dequantizedBy says who converted tensors of w on their way from m: "gpu" if the device did, for some at least, "cpu", or "none"
// if there was nothing to convert.
func dequantizedBy(w onDevices, m *gguf.Model) string {
	if w.Report().Expanded > 0 {
		return "gpu"
	}
	for _, t := range w.Tensors() {
		if in, ok := m.Tensor(t.Name); ok && in.Type != t.DType {
			return "cpu"
		}
	}
	return "none"
}
