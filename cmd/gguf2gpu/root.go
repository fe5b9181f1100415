package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/gguf2gpu/gguf2gpu/internal/term"
)

// run runs the command line args with the process's signals and standard streams, and returns the exit code.
func run(args []string) exitCode {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, current := withActivity(ctx)
	stderr := newConsole(os.Stderr)
	log.SetOutput(stderr) // packages such as net/http log what servers send
	ended, patience := make(chan exitCode, 1), make(chan struct{})
	done := make(chan struct{})
	defer close(done)
	context.AfterFunc(ctx, func() {
		stop() // after the first signal, which cancels, a second one ends the process at once
		if explainWaiting(stderr, current, lostCalls, done) {
			close(patience)
		}
	})
	go func() { ended <- Main(ctx, args, os.Stdin, os.Stdout, stderr) }()
	select {
	case code := <-ended:
		return code
	case <-patience: // what is still held goes with the process
		if slices.Contains(args, "--json") {
			_ = writeJSON(os.Stdout, failure{Error: "interrupted", Code: exitInterrupted})
		}
		return exitInterrupted
	}
}

// Main runs the command line args and returns the exit code. It also prints an error: as a message on stderr and, with
// --json, as {"error": ..., "code": N}, the only object on stdout.
func Main(ctx context.Context, args []string, stdin io.Reader, toStdout, toStderr io.Writer) exitCode {
	stdout, stderr := newConsole(toStdout), newConsole(toStderr)
	defer func() { _ = stderr.finish() }() // there is nobody left to tell
	root := newRootCommand()
	root.SetArgs(joinProve(args))
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	cmd, err := root.ExecuteContextC(ctx)
	if cmd.Name() == compileKernel {
		return reportToParent(ctx, err, rawStream(stderr))
	}
	if unwritten := stdout.finish(); err == nil && unwritten != nil {
		err = fmt.Errorf("what was to be printed could not be written: %w", unwritten)
	}
	code := codeOf(ctx, err)
	if err == nil {
		return code
	}
	text := errorText(err)
	switch code {
	case exitInterrupted:
		text = "interrupted"
	case exitUsage:
		text += environmentNote(cmd, text)
	}
	fmt.Fprintf(stderr, "gguf2gpu: %s\n", text)
	if _, reported := errors.AsType[*reportedError](err); !reported && wantsJSON(cmd, args) {
		// Nobody is left to be told that this failed. The exit code stays.
		_ = writeJSON(stdout, failure{Error: text, Code: code})
	}
	return code
}

// reportToParent ends a process that compiles a kernel: the text of its error becomes part of another process's error.
func reportToParent(ctx context.Context, err error, stderr io.Writer) exitCode {
	if err != nil {
		fmt.Fprintln(stderr, err)
	}
	return codeOf(ctx, err)
}

// failure is what --json prints when a command fails.
type failure struct {
	Error string   `json:"error"`
	Code  exitCode `json:"code"`
}

// newRootCommand builds the tree of commands. Two trees share nothing, so that tests may run several at once.
func newRootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "gguf2gpu COMMAND",
		Short: "Put the weights of a GGUF model into AMD GPU memory",
		Long: `gguf2gpu puts the weights of a GGUF model into AMD GPU memory, as fast as the link allows.
Where there is no GPU it uses a software device, so that everything but the speed can be tried anywhere.`,
		Example: `  gguf2gpu devices                         is a GPU usable, and if not, why
  gguf2gpu inspect model.gguf              what is in the file
  gguf2gpu load model.gguf --verify        load it, read it back and compare
  gguf2gpu synth -o test.gguf              make a model to try things with`,
		Version:       version(),
		SilenceErrors: true,
		SilenceUsage:  true,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				fmt.Fprintln(cmd.ErrOrStderr(), helpText(cmd, helpWidth(cmd)))
				return usageErrorf("a command is needed")
			}
			return unknownCommand(cmd, args[0])
		},
		RunE: func(*cobra.Command, []string) error { return nil }, // never reached: Args always fails
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			if err := applySettings(cmd, os.Getenv); err != nil {
				return err
			}
			if cmd.Name() != compileKernel {
				sayUnknownVariables(notices(cmd), cmd.Root(), os.Environ())
			}
			return nil
		},
	}
	root.SetVersionTemplate("gguf2gpu {{.Version}}\n")
	root.SetHelpFunc(func(cmd *cobra.Command, _ []string) {
		fmt.Fprint(cmd.OutOrStdout(), helpText(cmd, helpWidth(cmd))) // a console keeps the error
	})
	root.SetUsageFunc(func(cmd *cobra.Command) error {
		_, err := fmt.Fprint(cmd.OutOrStdout(), helpText(cmd, helpWidth(cmd)))
		return err
	})
	root.SetFlagErrorFunc(flagError)
	addGeneralFlags(root)
	root.AddCommand(
		newLoadCommand(),
		newVerifyCommand(),
		newHoldCommand(),
		newAttachCommand(),
		newBenchCommand(),
		newInspectCommand(),
		newDevicesCommand(),
		newSynthCommand(),
		newVersionCommand(),
		newEnvironmentTopic(),
		newCompileKernelCommand(),
		newManCommand(),
	)
	root.SetHelpCommand(newHelpCommand())
	root.InitDefaultCompletionCmd()
	describeCompletion(root)
	checkUsage(root)
	addCompletions(root)
	return root
}

// checkUsage makes wrong arguments to the commands below cmd usage errors.
func checkUsage(cmd *cobra.Command) {
	for _, c := range cmd.Commands() {
		c.DisableFlagsInUseLine = true
		if c.Args != nil {
			c.Args = usageArgs(c.Args)
		}
		checkUsage(c)
	}
}

// version returns the module's version as the go command has recorded it, with the commit if there is one.
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

// wantsJSON reports whether --json was given. It also looks at the arguments, as a command line with an error may not
// have been parsed up to --json.
func wantsJSON(cmd *cobra.Command, args []string) bool {
	f := cmd.Flags().Lookup("json")
	if f == nil {
		return false
	}
	return f.Value.String() == "true" || slices.Contains(args, "--json")
}

// writeJSON prints v as the one JSON object of a command.
func writeJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(term.NewJSONWriter(w))
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}
