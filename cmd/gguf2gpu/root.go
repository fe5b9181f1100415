package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// run is the process without its exit: signals, standard streams, arguments.
func run(args []string) exitCode {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // the first signal cancels; a second one ends the process at once
	return Main(ctx, args, os.Stdin, os.Stdout, os.Stderr)
}

// Main runs the command line args and returns the code to exit with. It prints the error, too: one message on stderr and,
// where --json was asked for, {"error": ..., "code": N} as the only object on stdout.
func Main(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) exitCode {
	root := newRootCommand()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	cmd, err := root.ExecuteContextC(ctx)
	code := codeOf(ctx, err)
	if err == nil {
		return code
	}
	text := err.Error()
	if code == exitInterrupted {
		text = "interrupted"
	}
	if cmd.Name() == compileKernel { // it becomes part of another error
		fmt.Fprintln(stderr, text)
		return code
	}
	fmt.Fprintf(stderr, "gguf2gpu: %s\n", text)
	if wantsJSON(cmd, args) {
		// A failure to report the failure has no one left to be told to; the exit code stands.
		_ = writeJSON(stdout, failure{Error: text, Code: code})
	}
	return code
}

// failure is what --json prints when a command fails.
type failure struct {
	Error string   `json:"error"`
	Code  exitCode `json:"code"`
}

// newRootCommand builds the command tree. Nothing in it is shared between two trees, so tests may run several at once.
func newRootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "gguf2gpu COMMAND",
		Short: "Put the weights of a GGUF model into AMD GPU memory",
		Long: `gguf2gpu puts the weights of a GGUF model into AMD GPU memory, as fast as the link allows.
Where there is no GPU it uses a software device, so that everything but the speed can be tried anywhere.`,
		Version:       version(),
		SilenceErrors: true,
		SilenceUsage:  true,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usageErrorf("a command is needed: %s; 'gguf2gpu help' explains them", commandNames(cmd))
			}
			return usageErrorf("there is no command %q, only %s", args[0], commandNames(cmd))
		},
		RunE: func(*cobra.Command, []string) error { return nil }, // never reached: Args always fails
	}
	root.SetVersionTemplate("gguf2gpu {{.Version}}\n")
	root.SetUsageTemplate(root.UsageTemplate() + exitStatus)
	root.SetFlagErrorFunc(flagError)
	root.AddCommand(
		newLoadCommand(),
		newVerifyCommand(),
		newHoldCommand(),
		newAttachCommand(),
		newBenchCommand(),
		newInspectCommand(),
		newDevicesCommand(),
		newSynthCommand(),
		newCompileKernelCommand(),
	)
	checkUsage(root)
	return root
}

// checkUsage makes wrong arguments of the commands below cmd usage errors.
func checkUsage(cmd *cobra.Command) {
	for _, c := range cmd.Commands() {
		c.DisableFlagsInUseLine = true
		c.Args = usageArgs(c.Args)
		checkUsage(c)
	}
}

// flagError makes a bad flag a usage error. The flags' own errors say which values are allowed; for an unknown flag this
// says which flags are.
func flagError(cmd *cobra.Command, err error) error {
	if _, ok := errors.AsType[*pflag.NotExistError](err); !ok {
		return withCode(exitUsage, err)
	}
	var names []string
	cmd.Flags().VisitAll(func(f *pflag.Flag) { names = append(names, "--"+f.Name) })
	return usageErrorf("%w; allowed are %s", err, strings.Join(names, ", "))
}

// usageArgs makes a failed check of the arguments a usage error that shows how the command is called.
func usageArgs(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return usageErrorf("%w; usage: %s", err, cmd.UseLine())
		}
		return nil
	}
}

func commandNames(root *cobra.Command) string {
	var names []string
	for _, c := range root.Commands() {
		if c.IsAvailableCommand() && c.Name() != "help" && c.Name() != "completion" {
			names = append(names, c.Name())
		}
	}
	return strings.Join(names, ", ")
}

// version is the module's version as the go command recorded it, and the commit where there is one.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "(unknown)"
	}
	v := info.Main.Version
	if v == "" {
		v = "(devel)"
	}
	i := slices.IndexFunc(info.Settings, func(s debug.BuildSetting) bool { return s.Key == "vcs.revision" })
	if i >= 0 {
		v += " (" + info.Settings[i].Value + ")"
	}
	return v + " " + info.GoVersion
}

// wantsJSON reports whether --json was asked for. A command line with an error in it may not have been parsed as far as
// --json, so the arguments are looked at, too.
func wantsJSON(cmd *cobra.Command, args []string) bool {
	f := cmd.Flags().Lookup("json")
	if f == nil {
		return false
	}
	return f.Value.String() == "true" || slices.Contains(args, "--json")
}

// writeJSON prints v as the one JSON object of a command.
func writeJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}
