package main

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var (
	// exampleLine is a command line in a manual: an indented one, one of a unit of systemd, or the arguments of a
	// container.
	exampleLine = regexp.MustCompile(`^(?:(?: {4,}|\t)(?:\w+=\S+ )*gguf2gpu |ExecStart=\S*/gguf2gpu | +command: )(.*)$`)
	exampleArgs = regexp.MustCompile(`^ +args: \[(.*)\]$`)
)

// exampleOf returns the arguments of the example in a line of a manual, if there is one.
func exampleOf(line string) (args []string, ok bool) {
	if m := exampleArgs.FindStringSubmatch(line); m != nil {
		for word := range strings.SplitSeq(m[1], ",") {
			args = append(args, strings.TrimSpace(word))
		}
		return args, true
	}
	m := exampleLine.FindStringSubmatch(line)
	if m == nil {
		return nil, false
	}
	text, _, _ := strings.Cut(m[1], " #")
	text, _, _ = strings.Cut(text, " | ")
	text, _, _ = strings.Cut(text, " > ")
	quoted := false
	words := strings.FieldsFunc(text, func(r rune) bool {
		if r == '\'' || r == '"' {
			quoted = !quoted
		}
		return r == ' ' && !quoted
	})
	for _, word := range words {
		if word == "&" || word == "\\" || strings.HasPrefix(word, "[") || strings.HasPrefix(word, "2>") {
			continue
		}
		args = append(args, strings.Trim(word, `'"`))
	}
	return args, len(args) > 0
}

// TestExamplesInManuals parses all command lines in the manuals, as the command would: flags that it does not have, and
// values that they do not take, are errors.
func TestExamplesInManuals(t *testing.T) {
	t.Parallel()
	found := make(map[string]int) // by command
	root := filepath.Join("..", "..")
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == "testdata" || d.Name() == "bin" || strings.HasPrefix(d.Name(), ".") && path != root):
			return filepath.SkipDir
		case filepath.Ext(path) != ".md" || d.Name() == "CHANGELOG.md":
			return nil
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for i, line := range strings.Split(string(b), "\n") {
			args, ok := exampleOf(line)
			if !ok {
				continue
			}
			cmd, rest, err := newRootCommand().Find(args)
			if err == nil && cmd.HasParent() {
				found[cmd.Name()]++
				err = cmd.ParseFlags(rest)
			}
			if err != nil && !strings.Contains(err.Error(), "help requested") {
				t.Errorf("%s:%d: %q: %v", path, i+1, args, err)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for command, least := range map[string]int{"load": 20, "hold": 15, "attach": 4, "verify": 1, "bench": 2, "devices": 1} {
		if found[command] < least {
			t.Errorf("%d examples of %s were found, at least %d are there", found[command], command, least)
		}
	}
}

// TestExamplesOfContainers: what the examples of hold give to containers is found, and is what it should be.
func TestExamplesOfContainers(t *testing.T) {
	t.Parallel()
	b, err := os.ReadFile(filepath.Join("..", "..", "loader", "hold", "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for line := range strings.SplitSeq(string(b), "\n") {
		if args, ok := exampleOf(line); ok && !strings.HasPrefix(strings.TrimSpace(line), "gguf2gpu ") {
			found = append(found, strings.Join(args[:2], " "))
		}
	}
	if want := "hold /models/model.gguf"; len(found) != 3 || found[0] != want || found[1] != want || found[2] != want {
		t.Errorf("for compose, a pod and systemd there are %q", found)
	}
}
