package main

import (
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/gguf2gpu/gguf2gpu/kernels/gpu"
)

// compileKernel is the name of the hidden command that compiles one kernel. It is a process of its own because some
// versions of AMD's compiler abort the process that they are called in.
const compileKernel = "compile-kernel"

func newCompileKernelCommand() *cobra.Command {
	return &cobra.Command{
		Use:    compileKernel,
		Short:  "Compile one kernel for the process that started this one",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			// If the compiler aborts, the signal must end this process, so that the other one sees it. Without this, Go would
			// handle the signal, print its goroutines and exit with a code.
			signal.Ignore(syscall.SIGABRT)
			return gpu.ServeChild(cmd.InOrStdin(), rawStream(cmd.OutOrStdout()))
		},
	}
}

// kernelCompiler returns a compiler that keeps kernels in dir and compiles by the command compileKernel.
func kernelCompiler(dir string, log *slog.Logger) *gpu.Compiler {
	self, err := os.Executable()
	if err != nil {
		self = os.Args[0]
	}
	return &gpu.Compiler{Dir: dir, Run: gpu.Child(self, compileKernel), Logger: log}
}
