package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"
)

// helpPiece is what a paragraph of a help text consists of: text that is wrapped, a line that is to be typed, or a word
// and what it means.
type helpPiece struct{ typed, word, text string }

// helpPieces takes a paragraph apart. A line that begins with a tab is to be typed. One that begins with two blanks is
// a word and, behind two more blanks, what it means.
func helpPieces(paragraph string) (all []helpPiece) {
	for line := range strings.SplitSeq(paragraph, "\n") {
		last := len(all) - 1
		word, text, isItem := strings.Cut(strings.TrimPrefix(line, "  "), "  ")
		switch {
		case strings.HasPrefix(line, "\t"):
			all = append(all, helpPiece{typed: strings.TrimPrefix(line, "\t")})
		case strings.HasPrefix(line, "  ") && isItem:
			all = append(all, helpPiece{word: word, text: strings.TrimSpace(text)})
		case last >= 0 && all[last].typed == "" && all[last].word == "":
			all[last].text += " " + line
		default:
			all = append(all, helpPiece{text: line})
		}
	}
	return all
}

func (p helpPiece) write(b *strings.Builder, width int) {
	switch {
	case p.typed != "":
		b.WriteString("  " + p.typed + "\n")
	case p.word != "":
		writeItem(b, p.word, p.text, 0, width)
	default:
		b.WriteString(wrap(p.text, "", width) + "\n")
	}
}

// man writes the piece in the language of man(7).
func (p helpPiece) man(line func(format string, args ...any)) {
	switch {
	case p.typed != "":
		line(".nf\n\\fB%s\\fR\n.fi", roff.Replace(p.typed))
	case p.word != "":
		line(".TP\n\\fB%s\\fR\n%s", roff.Replace(p.word), roff.Replace(p.text))
	default:
		line(".PP\n%s", roff.Replace(p.text))
	}
}

// shells are those that completion scripts are there for, and how each loads one.
var shells = map[string]string{
	"bash": "In this shell:\n\n\tsource <(gguf2gpu completion bash)\n\nIn every new one, with the package bash-completion:\n\n" +
		"\tmkdir -p ~/.local/share/bash-completion/completions\n" +
		"\tgguf2gpu completion bash > ~/.local/share/bash-completion/completions/gguf2gpu",
	"zsh": "In this shell:\n\n\tsource <(gguf2gpu completion zsh)\n\nIn every new one, from a directory of $fpath:\n\n" +
		"\tgguf2gpu completion zsh > \"${fpath[1]}/_gguf2gpu\"\n\nThat needs 'autoload -U compinit; compinit' in ~/.zshrc.",
	"fish": "In this shell:\n\n\tgguf2gpu completion fish | source\n\nIn every new one:\n\n" +
		"\tgguf2gpu completion fish > ~/.config/fish/completions/gguf2gpu.fish",
	"powershell": "In this shell:\n\n\tgguf2gpu completion powershell | Out-String | Invoke-Expression\n\n" +
		"In every new one: put that line into the file that $PROFILE names.",
}

// describeCompletion gives the completion command, which cobra makes, the words of this program, and refuses shells
// that there is no script for.
func describeCompletion(root *cobra.Command) {
	for _, c := range root.Commands() {
		if c.Name() != "completion" {
			continue
		}
		c.Use, c.Short = "completion SHELL", "Print a script with which a shell completes this program's command lines"
		c.Long = c.Short + ": commands, flags, values of flags and names of held models. 'gguf2gpu completion SHELL --help' says " +
			"how the shell loads it."
		c.Args = func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				fmt.Fprintln(cmd.ErrOrStderr(), helpText(cmd, helpWidth(cmd)))
				return usageErrorf("a shell is needed: %s", strings.Join(commandNames(cmd), ", "))
			}
			return usageErrorf("there is no script for %q, only for %s", args[0],
				strings.Join(commandNames(cmd), ", "))
		}
		c.RunE = func(*cobra.Command, []string) error { return nil } // never reached: Args always fails
		for _, shell := range c.Commands() {
			shell.Short = "Print the script for " + shell.Name()
			shell.Long = shell.Short + ".\n\n" + shells[shell.Name()]
			if f := shell.Flags().Lookup("no-descriptions"); f != nil {
				f.Usage = "complete words without saying what they mean"
			}
		}
	}
}
