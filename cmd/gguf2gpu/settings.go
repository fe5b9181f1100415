package main

import (
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
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
	// Some flags of bench kernels have another meaning than those of the same name have elsewhere.
	if !slices.Contains(fromEnvironment, flag) || cmd.Name() == "kernels" && (flag == "device" || flag == "dtype") {
		return ""
	}
	return "GGUF2GPU_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// envAnnotation is the annotation of a flag that an environment variable has set.
const envAnnotation = "gguf2gpu_environment"

// applySettings sets what the command line has not: from environment variables, and no progress with --quiet. A flag
// that was set here still counts as not given.
func applySettings(cmd *cobra.Command, getenv func(string) string) error {
	if isQuiet(cmd) && (cmd.Flags().Changed("verbose") || cmd.Flags().Changed("log-level")) {
		return usageErrorf("--quiet, --verbose and --log-level all say what is logged; leave two of them out")
	}
	var err error
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
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
