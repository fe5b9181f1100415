package main

import (
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/spf13/pflag"
)

// TestHelp wants, for each command: a topic for each flag, an example, and lines that fit.
func TestHelp(t *testing.T) {
	t.Parallel()
	root := newRootCommand()
	for _, c := range append(allCommands(root), root) {
		ofCobra := strings.HasPrefix(c.CommandPath(), "gguf2gpu completion")
		for _, g := range groupFlags(c) {
			for _, f := range g.flags {
				if g.topic == otherTopic && !ofCobra {
					t.Errorf("%s: --%s has no topic: add it to topics", c.CommandPath(), f.Name)
				}
			}
		}
		if simple := ofCobra || slices.Contains([]string{"help", "version"}, c.Name()); c.Runnable() && !simple && c.Example == "" {
			t.Errorf("%s has no example", c.CommandPath())
		}
		for _, width := range []int{44, 60, 100} { // in narrower ones some names stick out
			for line := range strings.Lines(helpText(c, width)) {
				typed := strings.HasPrefix(line, "  gguf2gpu ") || strings.HasPrefix(line, "\t") || ofCobra
				if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > width && !typed {
					t.Errorf("%s: a line of %d characters, want %d at most: %s", c.CommandPath(), n, width, line)
				}
			}
		}
		c.Flags().VisitAll(func(f *pflag.Flag) {
			words := []string{"WORD", "HOW", "WHO", "WAY", "WHEN", "DTYPE", "DEVICE", "TYPE"}
			if slices.Contains(words, f.Value.Type()) && !f.Hidden && choices(c, f.Name) == nil {
				t.Errorf("%s --%s: nobody completes its values: add them to choices", c.CommandPath(), f.Name)
			}
			for _, word := range choices(c, f.Name) { // what is completed is taken
				if err := f.Value.Set(word); err != nil {
					t.Errorf("%s --%s %s: %v", c.CommandPath(), f.Name, word, err)
				}
			}
			text := flagText(c, f)
			for _, bad := range []string{"default []", "default )", "default 0", "default <nil>", "default -1", "default false"} {
				if strings.Contains(text, bad) {
					t.Errorf("%s --%s: %s", c.CommandPath(), f.Name, text)
				}
			}
		})
	}
}

// TestHelpLists wants the items of a list each on a line of its own.
func TestHelpLists(t *testing.T) {
	t.Parallel()
	var b strings.Builder
	for _, piece := range helpPieces("One of these\ntwo:\n  a   the first\n  b c  the second, which is long\nand more.") {
		piece.write(&b, 70)
	}
	const want = "One of these two:\n  a                         the first\n" +
		"  b c                       the second, which is long\nand more.\n"
	if b.String() != want {
		t.Errorf("got\n%swant\n%s", b.String(), want)
	}
	for _, name := range []string{"hf:", "ollama:", "oci://", "s3://", "https://", "-, fd:N"} {
		if !strings.Contains(helpText(newLoadCommand(), 100), "\n  "+name) {
			t.Errorf("the help of load does not list %s", name)
		}
	}
}

// TestEnvironmentFlags wants every flag that the environment sets to be one of some command.
func TestEnvironmentFlags(t *testing.T) {
	t.Parallel()
	root := newRootCommand()
	for _, name := range fromEnvironment {
		known := root.PersistentFlags().Lookup(name) != nil
		for _, c := range allCommands(root) {
			known = known || c.Flags().Lookup(name) != nil
		}
		if !known {
			t.Errorf("no command has --%s", name)
		}
	}
}

func TestNearest(t *testing.T) {
	t.Parallel()
	commands := commandNames(newRootCommand())
	for _, tt := range []struct {
		word string
		of   []string
		want string
	}{
		{"laod", commands, "load"},
		{"inspct", commands, "inspect"},
		{"verfy", commands, "verify"},
		{"Bench", commands, "bench"},
		{"sythn", commands, "synth"},
		{"frobnicate", commands, ""},
		{"x", commands, ""},
		{"--thread", []string{"--threads", "--trace"}, "--threads"},
		{"--soft-mem", []string{"--soft-memory", "--soft-link"}, "--soft-memory"},
		{"fp16", []string{"raw", "f32", "f16", "bf16"}, "f16"},
		{"f12", []string{"raw", "f32", "f16", "bf16"}, ""}, // one as good as another
		{"q4km", []string{"q4_k_m", "q4_k"}, "q4_k_m"},
		{strings.Repeat("load", 100), commands, "load"},
	} {
		if got := nearest(tt.word, tt.of); got != tt.want {
			t.Errorf("nearest(%.20q) = %q, want %q", tt.word, got, tt.want)
		}
	}
}
