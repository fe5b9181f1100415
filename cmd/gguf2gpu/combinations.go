package main

import (
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/internal/term"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
	"github.com/gguf2gpu/gguf2gpu/loader/remote/models"
)

// sayWithout says on w which of some flags were given on the command line although they have no effect. It is not an
// error: scripts give flags that matter to some of their command lines only.
func sayWithout(w io.Writer, fs *pflag.FlagSet, why string, flags ...string) {
	for _, name := range flags {
		if fs.Changed(name) {
			fmt.Fprintf(w, "gguf2gpu: --%s has no effect %s\n", name, why)
		}
	}
}

// sayCombinations says on w which flags have no effect beside others.
func (f *loadFlags) sayCombinations(w io.Writer, fs *pflag.FlagSet) {
	if *f.sync {
		sayWithout(w, fs, "with --sync: one thread reads, converts and copies one chunk at a time",
			"threads", "streams", "staging", "io", "connections", "stall")
		if *f.prove != loader.ProveOn {
			sayWithout(w, fs, "with --sync: the CPU converts, and no kernels are used", "kernel-cache")
		}
	}
	if *f.dtype == plan.Raw && len(f.rules) == 0 {
		sayWithout(w, fs, "with --dtype raw, as nothing is converted", "dequant")
	}
}

// firstError returns the first of errs that is one. A user who reads about one mistake at a time is not kept from work.
func firstError(errs []error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// sayPlanOnly says, beside --plan, what needs a load.
func sayPlanOnly(w io.Writer, fs *pflag.FlagSet) {
	sayWithout(w, fs, "with --plan, as nothing is loaded", "verify", "readback", "names",
		"trace", "hash", "expect", "check", "prove", "sync")
}

// sayTalk says which flags of hold mean nothing where it talks to another process: all but what and allowed.
func sayTalk(w io.Writer, cmd *cobra.Command, what string, allowed ...string) {
	may := append([]string{"json", "socket", "progress", what}, allowed...)
	cmd.Flags().Visit(func(f *pflag.Flag) {
		if !slices.Contains(may, f.Name) && cmd.InheritedFlags().Lookup(f.Name) == nil {
			sayWithout(w, cmd.Flags(), "with --"+what+": it is for the process that holds the models", f.Name)
		}
	})
}

// sayUseless says, on w, which flags have no effect for this model.
func (f *loadFlags) sayUseless(w io.Writer, fs *pflag.FlagSet, path string, m *gguf.File) {
	if models.IsPath(path) {
		sayWithout(w, fs, "as MODEL is a file, not on a server", "connections", "allow-http", "digest", "cache")
	}
	if models.IsStream(path) {
		sayWithout(w, fs, "as MODEL comes by a descriptor, not from a server", "connections", "allow-http", "digest", "cache")
	}
	rules := make([]*regexp.Regexp, len(f.rules))
	for i, r := range f.rules {
		rules[i] = r.Name
	}
	sayUselessRules(w, "dtype-for", rules, *f.tensors, m)
	if f.shard == nil {
		return
	}
	rules = rules[:0]
	for _, r := range f.shard.rules {
		rules = append(rules, r.Name)
	}
	sayUselessRules(w, "shard-rule", rules, *f.tensors, m)
}

// sayUselessRules says which of the rules of a flag decide about no tensor that is loaded: the first that matches
// decides. selected may be nil, for all tensors.
func sayUselessRules(w io.Writer, flag string, rules []*regexp.Regexp, selected *regexp.Regexp, m *gguf.File) {
	decides, matches := make([]int, len(rules)), make([]int, len(rules))
	for i := range m.Tensors() {
		name := m.Tensors()[i].Name
		if selected != nil && !selected.MatchString(name) {
			continue
		}
		decided := false
		for k, rule := range rules {
			if !rule.MatchString(name) {
				continue
			}
			matches[k]++
			if !decided {
				decides[k]++
				decided = true
			}
		}
	}
	for k, rule := range rules {
		switch {
		case matches[k] == 0:
			fmt.Fprintf(w, "gguf2gpu: --%s: no tensor's name matches %s\n", flag, term.Safe(rule.String()))
		case decides[k] == 0:
			fmt.Fprintf(w, "gguf2gpu: --%s: earlier rules match all tensors that %s matches\n", flag, term.Safe(rule.String()))
		}
	}
}

// sayUselessFor is sayUseless for a model that is not open. Of models that are elsewhere it says nothing.
func (f *loadFlags) sayUselessFor(w io.Writer, fs *pflag.FlagSet, path string) error {
	if len(f.rules) == 0 || !models.IsPath(path) {
		return nil
	}
	m, err := gguf.OpenView(path)
	if err != nil {
		return err
	}
	err = m.Guard(func() error { f.sayUseless(w, fs, path, m); return nil })
	return errors.Join(err, m.Close())
}
