package main

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/gguf2gpu/gguf2gpu/internal/term"
	"github.com/gguf2gpu/gguf2gpu/kernels"
)

// addGeneralFlags registers the flags that every command has.
func addGeneralFlags(root *cobra.Command) {
	fs := root.PersistentFlags()
	choiceFlag(fs, "log-level", "", "what is logged on stderr, from this level on; hold logs info, other commands warn", logLevels...)
	fs.CountP("verbose", "v", "log more: one level, with -vv two")
	fs.BoolP("quiet", "q", false, "log errors only, and show neither progress nor notices")
}

var logLevels = []string{"debug", "info", "warn", "error"}

// general returns the value of a flag that every command has.
func general(cmd *cobra.Command, name string) string {
	if f := cmd.Flags().Lookup(name); f != nil {
		return f.Value.String()
	}
	return "" // cmd is no part of a tree, in a test
}

// isQuiet reports whether --quiet was given.
func isQuiet(cmd *cobra.Command) bool { return general(cmd, "quiet") == "true" }

// newLogger returns a logger on stderr, from the level on that is usual for the command, unless flags say otherwise.
func newLogger(cmd *cobra.Command, usual slog.Level) *slog.Logger {
	level := usual
	if n := general(cmd, "verbose"); n != "" && n != "0" {
		steps := slog.Level(4) // from a level to the next
		if n != "1" {
			steps = 8
		}
		level = max(usual-steps, slog.LevelDebug)
	}
	if isQuiet(cmd) {
		level = slog.LevelError
	}
	if text := general(cmd, "log-level"); text != "" {
		_ = level.UnmarshalText([]byte(text)) // the flag has checked it
	}
	return slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: level}))
}

// notices returns where a command says what is not an error: stderr, or nowhere with --quiet.
func notices(cmd *cobra.Command) io.Writer {
	if isQuiet(cmd) {
		return io.Discard
	}
	return cmd.ErrOrStderr()
}

// fromEnvironment are the flags that can also be set by an environment variable: what belongs to a machine or a user
// more than to one command line.
var fromEnvironment = []string{
	"device", "dtype", "dequant", "kernel-cache", "prove", "io", "threads", "streams", "staging", "chunk", "connections", "stall",
	"progress", "socket", "grace", "log-level",
}

// envName returns the environment variable that sets a flag of cmd, "" if there is none.
func envName(cmd *cobra.Command, flag string) string {
	// Some flags of bench and of bench kernels have another meaning than those of the same name have elsewhere.
	if !slices.Contains(fromEnvironment, flag) || cmd.Name() == "kernels" && (flag == "device" || flag == "dtype") ||
		cmd.Name() == "bench" && flag == "dtype" {
		return ""
	}
	return variableOf(flag)
}

// variablePrefix is how this program's environment variables begin.
const variablePrefix = "GGUF2GPU_"

// variableOf returns the name that the environment variable of a flag has.
func variableOf(flag string) string {
	return variablePrefix + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// envAnnotation is the annotation of a flag that an environment variable has set.
const envAnnotation = "gguf2gpu_environment"

// applySettings sets what the command line has not: from environment variables, and no progress with --quiet. A flag
// that was set here still counts as not given.
func applySettings(cmd *cobra.Command, getenv func(string) string) error {
	if isQuiet(cmd) && (cmd.Flags().Changed("verbose") || cmd.Flags().Changed("log-level")) {
		return usageErrorf("--quiet, --verbose and --log-level all say what is logged; leave two of them out")
	}
	err := checkTier(cmd, getenv)
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		if err == nil && f.Changed {
			err = checkGiven(f)
		}
		env := envName(cmd, f.Name)
		value := ""
		if env != "" {
			value = getenv(env)
		}
		if f.Name == "progress" && isQuiet(cmd) {
			env, value = "", "none"
		}
		if value == "" || f.Changed || err != nil {
			return
		}
		if wrong := f.Value.Set(value); wrong != nil {
			err = usageErrorf("%s=%q: %s", env, value, valueError(cmd, f, value, wrong))
			return
		}
		if env != "" {
			_ = cmd.Flags().SetAnnotation(f.Name, envAnnotation, []string{env}) // it exists
		}
	})
	return err
}

// checkGiven refuses values that flags of their kind would take, but hardly anybody means: a file without a name,
// mostly from a variable of the shell that is not set, and a time below zero.
func checkGiven(f *pflag.Flag) error {
	value := f.Value.String()
	switch {
	case value == "" && f.Name != "socket" && f.Name != "kernel-cache" && (takesFile(f.Name) || f.Name == "cache"):
		return usageErrorf("--%s \"\": it needs a name; is a variable of the shell not set?", f.Name)
	case f.Value.Type() == "duration" && strings.HasPrefix(value, "-") && f.Name != "stall" && f.Name != "scrub":
		return usageErrorf("--%s %s: a time from 0 on is wanted", f.Name, value)
	}
	return nil
}

// checkTier refuses instructions for the CPU's kernels that are unknown or not there, in a command that uses them.
func checkTier(cmd *cobra.Command, getenv func(string) string) error {
	name := getenv("GGUF2GPU_ISA")
	if name == "" || cmd.Flags().Lookup("kernel-cache") == nil {
		return nil
	}
	var isa kernels.ISA
	err := isa.UnmarshalText([]byte(name))
	if err == nil {
		_, err = kernels.For(isa)
	}
	if err != nil {
		return usageErrorf("GGUF2GPU_ISA=%q: %w", name, err)
	}
	return nil
}

// otherVariables are the environment variables of this program that set no flag.
var otherVariables = []string{
	"GGUF2GPU_HIP_LIBRARY", "GGUF2GPU_HIPRTC_LIBRARY", "GGUF2GPU_ISA", "GGUF2GPU_TOKEN", "GGUF2GPU_TOKEN_HOST",
}

// sayUnknownVariables says which variables in environ look like settings of this program and are none: those that are
// named as a flag that no variable sets, and misspelled ones. Others may be of other programs.
func sayUnknownVariables(w io.Writer, root *cobra.Command, environ []string) {
	known := slices.Clone(otherVariables)
	for _, flag := range fromEnvironment {
		known = append(known, variableOf(flag))
	}
	flags := map[string]string{}
	for _, c := range append(allCommands(root), root) {
		c.Flags().VisitAll(func(f *pflag.Flag) { flags[variableOf(f.Name)] = f.Name })
	}
	for _, v := range environ {
		name, value, _ := strings.Cut(v, "=")
		rest, ours := strings.CutPrefix(name, variablePrefix)
		if !ours || value == "" || slices.Contains(known, name) {
			continue
		}
		near := ""
		for _, k := range known {
			if s := nearest(rest, []string{k[len(variablePrefix):]}); s != "" && distance(rest, s) <= 2 {
				near = k
			}
		}
		switch flag := flags[name]; {
		case flag != "":
			fmt.Fprintf(w, "gguf2gpu: %s has no effect: no variable sets --%s\n", term.Safe(name), flag)
		case near != "":
			fmt.Fprintf(w, "gguf2gpu: %s has no effect (did you mean %s?)\n", term.Safe(name), near)
		}
	}
}

// environmentNote returns what to add to the text of an error in usage: which flags in it come from the environment.
func environmentNote(cmd *cobra.Command, text string) string {
	var b strings.Builder
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		if env := f.Annotations[envAnnotation]; len(env) > 0 && strings.Contains(text, "--"+f.Name) {
			b.WriteString("; --" + f.Name + " comes from " + env[0] + "=" + os.Getenv(env[0]))
		}
	})
	return b.String()
}
