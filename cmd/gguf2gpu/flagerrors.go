package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/gguf2gpu/gguf2gpu/internal/term"
)

// flagError makes an error in a flag a usage error, in the words of who typed it: what was wrong, what is allowed, and
// what was probably meant.
func flagError(cmd *cobra.Command, err error) error {
	explained := fmt.Sprintf("; '%s --help' lists the flags", cmd.CommandPath())
	if e, ok := errors.AsType[*pflag.NotExistError](err); ok {
		name, dashes := e.GetSpecifiedName(), "--"
		if short := e.GetSpecifiedShortnames(); short != "" {
			name, dashes = short, "-"
		}
		name, _, _ = strings.Cut(name, "=")
		return usageErrorf("unknown flag: %s%s%s%s", dashes, name, meantFlag(cmd, name), explained)
	}
	if e, ok := errors.AsType[*pflag.ValueRequiredError](err); ok {
		f := e.GetFlag()
		kind, _ := pflag.UnquoteUsage(f)
		return usageErrorf("--%s needs a value, %s%s", f.Name, valueName(f, kind), allowedValues(f))
	}
	if e, ok := errors.AsType[*pflag.InvalidValueError](err); ok {
		f := e.GetFlag()
		return usageErrorf("--%s %q: %s", f.Name, e.GetValue(), valueError(cmd, f, e.GetValue(), e.Unwrap()))
	}
	if e, ok := errors.AsType[*pflag.InvalidSyntaxError](err); ok {
		return usageErrorf("%q is no flag%s", e.GetSpecifiedFlag(), explained)
	}
	return withCode(exitUsage, err)
}

// meantFlag says what was meant by a name that is no flag of cmd.
func meantFlag(cmd *cobra.Command, name string) string {
	var names []string
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		if !f.Hidden {
			names = append(names, "--"+f.Name)
		}
	})
	if len(name) < 2 {
		return ""
	}
	word := "--" + strings.ReplaceAll(name, "_", "-")
	if slices.Contains(names, word) { // as -dtype
		return " (did you mean " + word + "?)"
	}
	var others []string
	for _, c := range allCommands(cmd.Root()) {
		if f := c.Flags().Lookup(word[2:]); c != cmd && f != nil && !f.Hidden && c.Runnable() {
			others = append(others, strings.TrimPrefix(c.CommandPath(), cmd.Root().Name()+" "))
		}
	}
	if len(others) > 0 && cmd != cmd.Root() {
		return fmt.Sprintf(" (a flag of %s)", strings.Join(others, ", "))
	}
	return didYouMean(word, names)
}

// allCommands returns the commands below root that users know of.
func allCommands(root *cobra.Command) (all []*cobra.Command) {
	for _, c := range root.Commands() {
		if !c.Hidden {
			all = append(append(all, c), allCommands(c)...)
		}
	}
	return all
}

// valueError says what is wrong with the value of a flag, without words of the program's own language.
func valueError(cmd *cobra.Command, f *pflag.Flag, value string, err error) string {
	switch f.Value.Type() {
	case "int", "count":
		return "a whole number is wanted"
	case "uint64":
		return "a whole number from 0 on is wanted"
	case "duration":
		return "a time with its unit is wanted, such as 500ms, 30s or 2m"
	case "bool":
		return "true or false is wanted, or the flag alone for true"
	}
	text := err.Error()
	if _, rest, ok := strings.Cut(text, strconv.Quote(value)+": "); ok { // the value has been named already
		text = rest
	}
	return text + meantValue(cmd, f.Name, value)
}

// allowedValues returns what the help says of the values of a flag.
func allowedValues(f *pflag.Flag) string {
	_, usage := pflag.UnquoteUsage(f)
	return ": " + usage
}

// usageArgs returns check with its errors made usage errors, which say what the command takes.
func usageArgs(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if slices.Contains(args, "") {
			return usageErrorf("an argument of %s is empty; is a variable of the shell not set?", cmd.CommandPath())
		}
		err := check(cmd, args)
		if err == nil {
			return suggestSubcommand(cmd, args)
		}
		if _, explained := errors.AsType[*exitError](err); explained {
			return err
		}
		name := strings.TrimPrefix(cmd.CommandPath(), cmd.Root().Name()+" ")
		var what string
		argument, _, _ := strings.Cut(strings.TrimPrefix(cmd.Use, cmd.Name()+" "), " ")
		switch argument = strings.Trim(argument, "[]"); {
		case len(args) == 0:
			what = name + " needs a " + argument
		case argument != "MODEL" && argument != "DIR":
			what = fmt.Sprintf("%s takes no arguments, but there is %q", name, args[0])
		default:
			quoted := make([]string, len(args))
			for i, arg := range args {
				quoted[i] = strconv.Quote(arg)
			}
			what = fmt.Sprintf("%s takes one %s, but there are %d: %s", name, argument, len(args), strings.Join(quoted, ", "))
		}
		return usageErrorf("%s; usage: %s", what, cmd.UseLine())
	}
}

// suggestSubcommand refuses an argument that is no file, and similar to the name of a command below cmd.
func suggestSubcommand(cmd *cobra.Command, args []string) error {
	if !cmd.HasSubCommands() || len(args) != 1 {
		return nil
	}
	if _, err := os.Stat(args[0]); err == nil {
		return nil
	}
	if s := nearest(args[0], commandNames(cmd)); s != "" && !strings.ContainsAny(args[0], "/.") {
		return usageErrorf("there is no file %q; did you mean '%s %s'?", args[0], cmd.CommandPath(), s)
	}
	return nil
}

// unknownCommand is the error for a word that is no command.
func unknownCommand(root *cobra.Command, word string) error {
	names := commandNames(root)
	if len(names) == 0 {
		return usageErrorf("there is no command %q below '%s'", word, root.CommandPath())
	}
	meant := didYouMean(word, names)
	if root == root.Root() && (strings.HasSuffix(word, ".gguf") || strings.ContainsAny(word, ":/")) {
		return usageErrorf("there is no command %q; did you mean '%s load %s'?", word, root.Name(), term.Safe(word))
	}
	if other := otherWords[strings.ToLower(word)]; other != "" && root == root.Root() {
		meant = " (did you mean " + other + "?)"
	}
	return usageErrorf("there is no command %q%s, only %s", word, meant, strings.Join(names, ", "))
}

// commandNames returns the names of the commands below cmd that do something of this program.
func commandNames(cmd *cobra.Command) (names []string) {
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() && c.Name() != "completion" {
			names = append(names, c.Name())
		}
	}
	return names
}
