package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/dustin/go-humanize/english"
	"github.com/spf13/cobra"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/internal/term"
	"github.com/gguf2gpu/gguf2gpu/loader/remote"
	"github.com/gguf2gpu/gguf2gpu/loader/remote/models"
)

// remoteFlags are the flags of commands whose MODEL may be something else than a file.
type remoteFlags struct {
	cmd       *cobra.Command
	allowHTTP *bool
	digests   *remote.Digests
	cache     *string
	// expect says what the files of a model have to be; nil: nothing is expected.
	expect func(name string) (remote.Expected, error)
}

func addRemoteFlags(cmd *cobra.Command) remoteFlags {
	fs := cmd.Flags()
	return remoteFlags{
		cmd:       cmd,
		allowHTTP: fs.Bool("allow-http", false, "take a MODEL at http://, without TLS, from other hosts than this one, too"),
		digests: textFlag(fs, "digest", remote.DigestsAuto, "WHEN",
			"compare MODEL with its digest beside the load: auto (of registries), always (where one is known), never"),
		cache: fs.String("cache", "", "keep what is read of a remote MODEL in this directory, for the next time (default: nothing is kept)"),
	}
}

// openModel opens the model of that name, whatever kind of name it is; see package models. The opener is nil for the
// path of a file, unless something is expected of it. The caller must close both, the model first.
func (f remoteFlags) openModel(ctx context.Context, name string, log *slog.Logger) (*gguf.File, *models.Opener, error) {
	if models.IsPath(name) && f.expect == nil {
		m, err := gguf.Open(name)
		return m, nil, err
	}
	o, err := f.opener(name, log)
	if err != nil {
		return nil, nil, err
	}
	m, err := o.Open(ctx, name)
	if err != nil {
		o.Close()
		return nil, nil, nameTokens(name, err)
	}
	return m, o, nil
}

// withModel opens the model of that name for as long as do works with it.
func (f remoteFlags) withModel(ctx context.Context, name string, do func(*gguf.File) error) error {
	file, opener, err := f.openModel(ctx, name, nil)
	if err != nil {
		return err
	}
	err = errors.Join(do(file), file.Close())
	if opener != nil {
		opener.Close()
	}
	return err
}

// opener returns what opens a model that is not the path of a file.
func (f remoteFlags) opener(name string, log *slog.Logger) (*models.Opener, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	tokens, err := remoteTokens(name, log)
	if err != nil {
		return nil, err
	}
	return models.New(models.Options{
		Remote: remote.Options{
			Tokens: tokens, AllowHTTP: *f.allowHTTP, Digests: *f.digests, Cache: *f.cache, Expect: f.expect,
			Logger: log,
		},
		Stdin: f.cmd.InOrStdin(),
	}), nil
}

// view is openModel for a command that reads the header once; see [gguf.OpenView].
func (f remoteFlags) view(ctx context.Context, name string) (*gguf.File, *models.Opener, error) {
	if models.IsPath(name) {
		m, err := gguf.OpenView(name)
		return m, nil, err
	}
	return f.openModel(ctx, name, nil)
}

// list says what a name offers that is not one model; nil for other names.
func (f remoteFlags) list(ctx context.Context, name string) (*remote.Listing, error) {
	if models.IsPath(name) {
		return nil, nil
	}
	o, err := f.opener(name, slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, err
	}
	defer o.Close()
	l, err := o.List(ctx, name)
	return l, nameTokens(name, err)
}

// printFound prints what list has found.
func printFound(cmd *cobra.Command, l *remote.Listing, asJSON bool, err error) error {
	switch {
	case err != nil:
		return err
	case asJSON:
		return writeJSON(cmd.OutOrStdout(), l)
	}
	return printListing(cmd.OutOrStdout(), l)
}

// checkTwice refuses to read a model twice that comes only once. what is what needs that.
func checkTwice(m *gguf.File, what string) error {
	if m.Reading().Once {
		return usageErrorf("%s reads MODEL a second time, and a stream comes only once: write it to a file first", what)
	}
	return nil
}

// completeModel completes the names of models: of files as shells do, others as far as they can be listed.
func completeModel(cmd *cobra.Command, _ []string, prefix string) ([]string, cobra.ShellCompDirective) {
	if models.IsPath(prefix) || strings.HasPrefix(prefix, "http") {
		return []string{"gguf"}, cobra.ShellCompDirectiveFilterFileExt
	}
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second) // nobody waits longer for a completion
	defer cancel()
	o := models.New(models.Options{})
	defer o.Close()
	return o.Complete(ctx, prefix), cobra.ShellCompDirectiveNoFileComp
}

// The environment variables that hold tokens. A token goes to one host and to no other.
const (
	tokenVariable     = "GGUF2GPU_TOKEN"      // for the host in tokenHostVariable, else for that of MODEL
	tokenHostVariable = "GGUF2GPU_TOKEN_HOST" // HOST or HOST:PORT
	hubTokenVariable  = "HF_TOKEN"            // for huggingface.co
)

// remoteTokens returns the tokens of the environment, each with the host that it is for. address is that of MODEL.
func remoteTokens(address string, log *slog.Logger) (map[string]string, error) {
	tokens := make(map[string]string)
	if t := strings.TrimSpace(os.Getenv(hubTokenVariable)); t != "" {
		tokens["huggingface.co"] = t
	}
	t := strings.TrimSpace(os.Getenv(tokenVariable))
	if t == "" {
		return tokens, nil
	}
	host := strings.TrimSpace(os.Getenv(tokenHostVariable))
	switch {
	case strings.Contains(host, "/"):
		return nil, usageErrorf("%s is %q: use HOST or HOST:PORT, without https:// and path", tokenHostVariable, host)
	case host == "":
		if host = remote.Host(address); host == "" { // no address, so this token is not for it
			return tokens, nil
		}
		log.Warn("the token goes to the host of MODEL, and to no other", "variable", tokenVariable, "host", host,
			"to name another", tokenHostVariable)
	}
	tokens[host] = t
	return tokens, nil
}

// nameTokens adds where a token can be given to the error of a server that wants one.
func nameTokens(name string, err error) error {
	if e, ok := errors.AsType[*remote.StatusError](err); ok && remote.IsAddress(name) &&
		errors.Is(e, fs.ErrPermission) && !e.Authorized {
		return fmt.Errorf("%w; a token can be given in %s, for huggingface.co in %s", err, tokenVariable, hubTokenVariable)
	}
	return err
}

// printListing prints what a name offers.
func printListing(w io.Writer, l *remote.Listing) error {
	out := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprint(out, strings.TrimSuffix(term.Safe(l.Name), ":"))
	if l.Revision != "" {
		fmt.Fprintf(out, ", revision %s", term.Safe(l.Revision))
	}
	fmt.Fprintf(out, ": %s\n", english.Plural(len(l.Entries), "model", ""))
	if len(l.Entries) > 0 {
		fmt.Fprintln(out, "NAME\tQUANT\tFILES\tSIZE\tFILE")
	}
	for _, e := range l.Entries {
		size, files, note := "", "", ""
		if e.Bytes > 0 {
			size = humanize.IBytes(uint64(e.Bytes))
		}
		if e.Files > 0 {
			files = strconv.Itoa(e.Files)
		}
		if e.Default {
			note = " (default)"
		}
		if e.Local {
			note += " (on this machine)"
		}
		file := strings.TrimSpace(term.Safe(e.File) + note)
		fmt.Fprintf(out, "%s\t%s\t%s\t%s\t%s\n", term.Safe(e.Name), term.Safe(e.Quant), files, size, file)
	}
	return out.Flush()
}

// remoteReport has the fields of load's JSON about a model that came from a server.
type remoteReport struct {
	RemoteBytes uint64 `json:"remote_bytes"` // the part of read_bytes that came from a server
	Connections int    `json:"connections"`  // the most ranges that were read at the same time
	Requests    int64  `json:"requests"`     // sent from opening the model to the end of the load
	Retries     int64  `json:"retries"`      // how often a request was sent again after a failure
	// Digests is how many files were compared with their digests, and found right.
	Digests int `json:"digests"`
	// Unchecked is how many have a digest that they were not compared with.
	Unchecked int    `json:"digests_unchecked"`
	Revision  string `json:"revision,omitempty"` // of what the model is part of, such as a commit
}

// reportRemote fills in what is known of a model that is not a file.
func (r *remoteReport) reportRemote(m *gguf.File, o *models.Opener) {
	st := o.Stats()
	r.Requests, r.Retries = st.Requests, st.Retries
	for _, p := range m.Parts() {
		if id, ok := remote.Identify(p); ok {
			switch {
			case id.Checked:
				r.Digests++
			case id.Digest != "":
				r.Unchecked++
			}
			r.Revision = id.Revision
		}
	}
}

// print says it to people. A share of a model, of which so many of all bytes were read, is not compared with a digest
// unless that is asked for; all of a model of a registry is, so that this is worth saying.
func (r *remoteReport) print(w io.Writer, share bool, read, all uint64) {
	if r.Requests > 0 {
		fmt.Fprintf(w, "  %d requests on up to %d connections, %d of them again after a failure\n", r.Requests, r.Connections, r.Retries)
	}
	if r.Digests > 0 {
		fmt.Fprintf(w, "  %d files have the right digest\n", r.Digests)
	}
	if share && r.Unchecked > 0 {
		fmt.Fprintf(w, "  digest not checked: %s of %s were read; --digest always fetches the rest for it\n",
			humanize.Bytes(read), humanize.Bytes(all))
	}
}
