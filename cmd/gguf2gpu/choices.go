package main

import (
	"cmp"
	"context"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/gguf2gpu/gguf2gpu/cmd/gguf2gpu/internal/synth"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels"
	"github.com/gguf2gpu/gguf2gpu/loader/hold"
)

// choices returns the words that a flag of cmd takes, for shells that complete them and for errors that guess what was
// meant. It returns nil for a flag that takes anything else.
func choices(cmd *cobra.Command, flag string) []string {
	ofKernels := cmd.Name() == "kernels"
	switch flag {
	case "device":
		if ofKernels {
			return []string{deviceCPU, "soft", "hip", "hip:0"}
		}
		if cmd.Name() == "bench" {
			return []string{"auto", "soft", "hip", "hip:0"}
		}
		return []string{"auto", "soft", "hip", "hip:0", "hip:all", "soft:2"}
	case "dtype":
		if ofKernels {
			return []string{"f32", "f16", "bf16"}
		}
		return []string{"raw", "f32", "f16", "bf16"}
	case "io":
		return []string{"auto", "mmap", "direct"}
	case "dequant":
		return []string{"auto", "cpu", "gpu"}
	case "prove":
		return []string{"auto", "on", "off"}
	case "digest":
		return []string{"auto", "always", "never"}
	case "share":
		return []string{"auto", "fd", "ipc"}
	case "names":
		return []string{namesGGUF, namesHF}
	case "split":
		return []string{"layer", "none"}
	case "shard":
		return []string{"layer", "tensor"}
	case "progress":
		return progressModes
	case "log-level":
		return logLevels
	case "preset":
		return strings.Split(synth.PresetNames(), ", ")
	case "isa":
		return lowerNames(kernels.Supported())
	case "type":
		names := lowerNames(floatTypes())
		if !ofKernels {
			names = append([]string{"q4_k_m"}, names...)
		}
		return names
	}
	return nil
}

func lowerNames[T any](all []T) []string {
	names := make([]string, len(all))
	for i, v := range all {
		names[i] = lowerName(v)
	}
	return names
}

// addCompletions tells shells what can follow: words that flags take, files of a kind, names of models that are held.
func addCompletions(root *cobra.Command) {
	const noFiles = cobra.ShellCompDirectiveNoFileComp
	for _, c := range allCommands(root) {
		c.Flags().VisitAll(func(f *pflag.Flag) {
			complete := cobra.NoFileCompletions
			switch words := choices(c, f.Name); {
			case words != nil:
				complete = cobra.FixedCompletions(words, noFiles)
			case slices.Contains([]string{"drop", "sleep", "wake", "pin", "unpin"}, f.Name):
				complete = heldModels
			case f.Name == "file":
				complete = completeModel
			case takesFile(f.Name):
				return // as shells do without being told
			}
			_ = c.RegisterFlagCompletionFunc(f.Name, complete) // it exists, and is registered once
		})
		switch {
		case c.Name() == "attach":
			c.ValidArgsFunction = heldModels
		case strings.Contains(c.Use, "MODEL"):
			c.ValidArgsFunction = completeModel
		case c.ValidArgsFunction == nil && c.Runnable():
			c.ValidArgsFunction = cobra.NoFileCompletions
		}
	}
	for _, words := range [][]string{logLevels} {
		_ = root.RegisterFlagCompletionFunc("log-level", cobra.FixedCompletions(words, noFiles)) // it exists
	}
}

// heldModels completes the names of models that a process holds. Without such a process there are none.
func heldModels(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second) // nobody waits longer for a completion
	defer cancel()
	socket := cmp.Or(general(cmd, "socket"), os.Getenv(variableOf("socket"))) // which nobody has applied here
	models, _ := (&hold.Client{Socket: socket}).List(ctx)
	var names []string
	for _, m := range models {
		names = append(names, m.Name)
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// floatTypes returns the types that hold weights.
func floatTypes() []gguf.Type {
	var all []gguf.Type
	for _, t := range gguf.Types() {
		if !t.Integer() {
			all = append(all, t)
		}
	}
	return all
}
