package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
)

// newManCommand is a hidden command that writes the manual pages, for packages of this program.
func newManCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "man DIR",
		Short:  "Write the manual pages into a directory",
		Hidden: true,
		Args:   cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return err
			}
			root := cmd.Root()
			for _, c := range append([]*cobra.Command{root}, allCommands(root)...) {
				if c.Name() == "help" || strings.HasPrefix(c.CommandPath(), root.Name()+" completion ") {
					continue
				}
				name := filepath.Join(args[0], manName(c)+".1")
				if err := writeFile(name, func(o *outputFile) error { return writeMan(o, c) }); err != nil {
					return err
				}
			}
			return nil
		},
	}
}

// manName returns the name of a command's manual page: gguf2gpu-bench-kernels.
func manName(c *cobra.Command) string { return strings.ReplaceAll(c.CommandPath(), " ", "-") }

// roff escapes text for a manual page.
var roff = strings.NewReplacer(`\`, `\e`, "-", `\-`, "'", `\(aq`, ".", `\&.`)

// writeMan writes the manual page of a command in the language of man(7). It has no date, so that it is the same
// whenever it is made.
func writeMan(w io.Writer, c *cobra.Command) error {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line(`.TH "%s" "1" "" "gguf2gpu"`, roff.Replace(strings.ToUpper(manName(c))))
	line(".SH NAME\n%s \\- %s", roff.Replace(manName(c)), roff.Replace(c.Short))
	if c.Runnable() {
		line(".SH SYNOPSIS\n\\fB%s\\fR", roff.Replace(c.UseLine()))
	}
	line(".SH DESCRIPTION")
	for paragraph := range strings.SplitSeq(c.Long, "\n\n") {
		for _, p := range helpPieces(paragraph) {
			p.man(line)
		}
	}
	if c.HasAvailableSubCommands() {
		line(".SH COMMANDS")
		for _, sub := range c.Commands() {
			if sub.IsAvailableCommand() {
				line(".TP\n\\fB%s\\fR\n%s", roff.Replace(sub.Name()), roff.Replace(sub.Short))
			}
		}
	}
	if c.Runnable() {
		for _, g := range groupFlags(c) {
			line(".SH %s", strings.ToUpper(g.topic))
			for _, f := range g.flags {
				line(".TP\n\\fB%s\\fR\n%s", roff.Replace(flagHead(f)), roff.Replace(flagText(c, f)))
			}
		}
		if notes := unitNotes(c); len(notes) > 0 {
			line(".PP\n%s", roff.Replace(strings.Join(notes, " ")))
		}
		line(".SH EXIT STATUS")
		for _, code := range exitCodes(c) {
			line(".TP\n%d\n%s", code, exitMeanings[code])
		}
	}
	if c.Example != "" {
		line(".SH EXAMPLES\n.nf\n%s\n.fi", roff.Replace(c.Example))
	}
	if c.HasParent() {
		line(".SH SEE ALSO\n\\fB%s\\fR(1)", roff.Replace(manName(c.Parent())))
	}
	_, err := io.WriteString(w, b.String())
	return err
}
