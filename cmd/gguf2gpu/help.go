package main

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	xterm "golang.org/x/term"
)

// topics are the groups of flags in the help, in order. A flag belongs to one topic in all commands.
var topics = []struct {
	name  string
	flags []string
}{
	{"What goes where", []string{
		"device", "dtype", "dtype-for", "tensors", "split", "split-ratio", "plan",
	}},
	{"One rank of several", []string{"shard", "rank", "world", "shard-rule"}},
	{"The model to write", []string{"output", "force", "preset", "type", "seed"}},
	{"What is shown", []string{"tensors", "no-tensors", "keys", "full"}},
	{"Holding and attaching", []string{
		"socket", "name", "vram", "ram", "share", "keep", "keeper", "grace", "allow-group", "metrics", "ready-fd", "stay",
	}},
	{"Orders to a holder", []string{"add", "drop", "sleep", "wake", "pin", "unpin", "list"}},
	{"What is measured", []string{
		"device", "type", "dtype", "preset", "runs", "limit", "scaling", "cold", "isa", "buffer",
	}},
	{"Checks", []string{"check", "prove", "verify", "scrub", "file", "hash", "expect"}},
	{"How it is done", []string{"sync", "threads", "streams", "staging", "chunk", "io", "dequant", "kernel-cache", "stall"}},
	{"Software device", []string{"soft-memory", "soft-link"}},
	{"Models that are elsewhere", []string{"digest", "cache", "allow-http", "connections"}},
	{"Output", []string{"json", "progress", "readback", "names", "trace", "chart", "no-descriptions"}},
	{"General", []string{"log-level", "verbose", "quiet", "version", "help"}},
}

// topicsOf are topics of flags that mean something else in some commands.
var topicsOf = map[string]map[string]string{
	"bench": {"preset": "What is measured"},
	"kernels": {
		"device": "What is measured", "type": "What is measured", "dtype": "What is measured",
	},
	"inspect": {"tensors": "What is shown"},
}

// otherTopic is the topic of flags that have none.
const otherTopic = "Other"

// topicOf returns the topic of a flag of cmd.
func topicOf(cmd *cobra.Command, flag string) string {
	if t := topicsOf[cmd.Name()][flag]; t != "" {
		return t
	}
	for _, t := range topics {
		if slices.Contains(t.flags, flag) {
			return t.name
		}
	}
	return otherTopic
}

// flagGroup is the flags of one topic.
type flagGroup struct {
	topic string
	flags []*pflag.Flag
}

// groupFlags returns the flags of cmd by topic, in the order of the topics.
func groupFlags(cmd *cobra.Command) (groups []flagGroup) {
	cmd.InitDefaultHelpFlag()
	cmd.InitDefaultVersionFlag()
	cmd.Flags().Lookup("help").Usage = "show this help"
	if f := cmd.Flags().Lookup("version"); f != nil {
		f.Usage = "show the version"
	}
	byTopic := map[string][]*pflag.Flag{}
	add := func(f *pflag.Flag) {
		if !f.Hidden {
			topic := topicOf(cmd, f.Name)
			byTopic[topic] = append(byTopic[topic], f)
		}
	}
	cmd.LocalFlags().VisitAll(add)
	cmd.InheritedFlags().VisitAll(add)
	for _, t := range topics {
		flags := byTopic[t.name]
		slices.SortFunc(flags, func(a, b *pflag.Flag) int {
			return slices.Index(t.flags, a.Name) - slices.Index(t.flags,
				b.Name)
		})
		if len(flags) > 0 {
			groups = append(groups, flagGroup{t.name, flags})
		}
	}
	if flags := byTopic[otherTopic]; len(flags) > 0 {
		groups = append(groups, flagGroup{otherTopic, flags})
	}
	return groups
}

// takesFile reports whether a flag's value is the path of a file or a directory.
func takesFile(flag string) bool {
	return slices.Contains([]string{
		"output", "file", "hash", "expect", "readback", "trace", "chart", "kernel-cache", "socket", "keep",
	}, flag)
}

// valueName returns what the help calls the value of a flag, "" for one without. kind is what pflag calls it.
func valueName(f *pflag.Flag, kind string) string {
	switch {
	case f.Value.Type() == "bool", f.Value.Type() == "count":
		return ""
	case f.Name == "kernel-cache", f.Name == "cache":
		return "DIR"
	case f.Name == "socket", f.Name == "keep":
		return "PATH"
	case takesFile(f.Name):
		return "FILE"
	case f.Name == "metrics":
		return "ADDRESS"
	case f.Value.Type() == "int", f.Value.Type() == "uint64":
		return "N"
	case f.Value.Type() == "duration":
		return "TIME"
	case f.Value.Type() == "string":
		return "NAME"
	}
	return kind
}

// flagHead returns the flag and its value as they are typed: "-o, --output FILE".
func flagHead(f *pflag.Flag) string {
	kind, _ := pflag.UnquoteUsage(f)
	head := "--" + f.Name
	switch name := valueName(f, kind); {
	case name == "":
	case f.NoOptDefVal != "": // it needs no value
		head += "[=" + name + "]"
	default:
		head += " " + name
	}
	if f.Shorthand != "" {
		return "-" + f.Shorthand + ", " + head
	}
	return head
}

// flagText returns what a flag does, with its default and its environment variable.
func flagText(cmd *cobra.Command, f *pflag.Flag) string {
	_, text := pflag.UnquoteUsage(f)
	if !slices.Contains([]string{"", "0", "0s", "-1", "false", "[]", "<nil>"}, f.DefValue) {
		def := f.DefValue
		if f.Value.Type() == "duration" {
			def = strings.Replace(def, "m0s", "m", 1)
		}
		text += " (default " + def + ")"
	}
	if env := envName(cmd, f.Name); env != "" {
		text += " [$" + env + "]"
	}
	return text
}

// unitNotes explains units, for commands that have flags that take sizes, speeds or times.
func unitNotes(cmd *cobra.Command) (notes []string) {
	kinds := map[string]bool{}
	cmd.LocalFlags().VisitAll(func(f *pflag.Flag) {
		if !f.Hidden {
			kinds[f.Value.Type()] = true
		}
	})
	if kinds["SIZE"] {
		notes = append(notes, "A SIZE takes a unit: 64MiB (2^20 bytes), 16GB (10^9). Without one it is in bytes.")
	}
	if kinds["RATE"] {
		notes = append(notes, "A RATE takes a unit, too: 25GB/s. Without one it is in bytes per second.")
	}
	if kinds["duration"] {
		notes = append(notes, "A TIME takes a unit: 500ms, 30s, 2m.")
	}
	return notes
}

// helpWidth is how wide the help is, in characters.
func helpWidth(cmd *cobra.Command) int {
	const usual, narrowest = 100, 40
	if f, ok := rawStream(cmd.OutOrStdout()).(*os.File); ok {
		if w, _, err := xterm.GetSize(int(f.Fd())); err == nil && w > 0 {
			return max(min(w, 120), narrowest)
		}
	}
	return usual
}

// helpText is the help of a command.
func helpText(cmd *cobra.Command, width int) string {
	var b strings.Builder
	long := cmd.Long
	if long == "" {
		long = cmd.Short + "."
	}
	for paragraph := range strings.SplitSeq(long, "\n\n") {
		for _, piece := range helpPieces(paragraph) {
			piece.write(&b, width)
		}
		b.WriteString("\n")
	}
	if !cmd.Runnable() && !cmd.HasAvailableSubCommands() { // a topic that is explained
		return strings.TrimSuffix(b.String(), "\n")
	}
	fmt.Fprintf(&b, "USAGE\n  %s\n", cmd.UseLine())
	if cmd.HasAvailableSubCommands() && cmd.HasExample() && cmd != cmd.Root() { // bench: what can be left out
		fmt.Fprintf(&b, "  %s COMMAND\n", cmd.CommandPath())
	}
	writeCommands(&b, cmd, width)
	if cmd.Example != "" {
		fmt.Fprintf(&b, "\nEXAMPLES\n%s\n", strings.Trim(cmd.Example, "\n"))
	}
	for _, g := range groupFlags(cmd) {
		fmt.Fprintf(&b, "\n%s\n", strings.ToUpper(g.topic))
		for _, f := range g.flags {
			writeItem(&b, flagHead(f), flagText(cmd, f), 4-4*min(len(f.Shorthand), 1), width)
		}
	}
	if notes := unitNotes(cmd); len(notes) > 0 {
		b.WriteString("\n" + wrap(strings.Join(notes, " "), "", width) + "\n")
	}
	b.WriteString("\nEXIT STATUS\n")
	for _, code := range exitCodes(cmd) {
		meaning := strings.TrimSpace(wrap(exitMeanings[code], strings.Repeat(" ", 7), width))
		fmt.Fprintf(&b, "  %-4d %s\n", code, meaning)
	}
	if cmd == cmd.Root() {
		fmt.Fprintf(&b, "\n'%s help COMMAND' explains a command.\n", cmd.Name())
	}
	return b.String()
}

// writeCommands lists the commands below cmd, and the topics that are explained.
func writeCommands(b *strings.Builder, cmd *cobra.Command, width int) {
	list := func(title string, want func(*cobra.Command) bool) {
		for _, c := range cmd.Commands() {
			if want(c) {
				if title != "" {
					fmt.Fprintf(b, "\n%s\n", title)
					title = ""
				}
				writeItem(b, c.Name(), c.Short, 0, width)
			}
		}
	}
	list("COMMANDS", func(c *cobra.Command) bool { return c.IsAvailableCommand() })
	list("ALSO EXPLAINED", (*cobra.Command).IsAdditionalHelpTopicCommand)
}

// writeItem writes a word and what it means, aligned with others. indent is that of the word, beyond two.
func writeItem(b *strings.Builder, word, text string, indent, width int) {
	column := 28 // where the text begins
	if width < 70 {
		column = 8 // beneath the word
	}
	head := strings.Repeat(" ", 2+indent) + word
	body := wrap(text, strings.Repeat(" ", column), width)
	if width >= 70 && utf8.RuneCountInString(head) <= column-2 {
		body = head + strings.Repeat(" ", column-utf8.RuneCountInString(head)) + strings.TrimLeft(body, " ")
	} else {
		body = head + "\n" + body
	}
	b.WriteString(body + "\n")
}

// wrap breaks a text into lines of at most width characters, each behind the indent. Longer words stick out.
func wrap(text, indent string, width int) string {
	var b strings.Builder
	room := 0
	for word := range strings.FieldsSeq(text) {
		n := utf8.RuneCountInString(word)
		switch {
		case b.Len() == 0:
			b.WriteString(indent)
			room = width - len(indent)
		case n+1 > room:
			b.WriteString("\n" + indent)
			room = width - len(indent)
		default:
			b.WriteByte(' ')
			room--
		}
		b.WriteString(word)
		room -= n
	}
	return b.String()
}

// newHelpCommand is 'help'.
func newHelpCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "help [COMMAND...]",
		Short:   "Explain a command",
		Long:    "Explain a command, as 'gguf2gpu COMMAND --help' does, or what 'gguf2gpu help' lists besides.",
		Example: "  gguf2gpu help load\n  gguf2gpu help environment",
		ValidArgsFunction: func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			at, _, err := cmd.Root().Find(args)
			if err != nil {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return commandNames(at), cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			at := cmd.Root()
			for _, word := range args {
				next := slices.IndexFunc(at.Commands(), func(c *cobra.Command) bool { return c.Name() == word && !c.Hidden })
				if next < 0 {
					return unknownCommand(at, word)
				}
				at = at.Commands()[next]
			}
			_, err := fmt.Fprint(cmd.OutOrStdout(), helpText(at, helpWidth(cmd)))
			return err
		},
	}
}

// newEnvironmentTopic is 'help environment'.
func newEnvironmentTopic() *cobra.Command {
	var flags strings.Builder
	for _, name := range fromEnvironment {
		fmt.Fprintf(&flags, "  %s  --%s\n", variableOf(name), name)
	}
	return &cobra.Command{
		Use:   "environment",
		Short: "Environment variables",
		Long: `These environment variables set flags of the commands that have them. A flag on the command line wins, and an empty
variable counts as none.

` + flags.String() + `
Others:

  GGUF2GPU_HIP_LIBRARY  the HIP library to use
  GGUF2GPU_HIPRTC_LIBRARY  the hipRTC library to use, which compiles GPU kernels
  GGUF2GPU_ISA  the instructions that the CPU's kernels use, as in 'bench kernels --isa'
  GGUF2GPU_TOKEN  the token for servers
  GGUF2GPU_TOKEN_HOST  the host that the token goes to (default that of MODEL)
  HF_TOKEN  the token for huggingface.co
  HTTPS_PROXY, HTTP_PROXY, NO_PROXY  as for other programs
  ROCR_VISIBLE_DEVICES, HIP_VISIBLE_DEVICES  the GPUs that can be seen; set and empty they hide all`,
	}
}

// newVersionCommand is 'version'.
func newVersionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Show the version",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "gguf2gpu %s\n", version())
			return err
		},
	}
}
