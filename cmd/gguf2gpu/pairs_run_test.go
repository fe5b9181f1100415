package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// hipRTC is the name of the compiler's library.
const hipRTC = "libhiprtc.so"

// pairsRig is what combinations need: models in files and on a server, a simulated GPU if there is a C compiler, and
// what plain loads give.
type pairsRig struct {
	models    string // directory
	server    string // address of the same files
	simulator string // its library; empty: there is none
	kernels   string // cache of kernels
	work      string // directory for directories

	mu         sync.Mutex
	references map[string]*reference
	manifests  map[string]string // files with the hashes of a rank's slices
}

func newPairsRig(tb testing.TB) *pairsRig {
	tb.Helper()
	r := &pairsRig{
		models: tb.TempDir(), kernels: tb.TempDir(), work: workDir(tb), simulator: pairsSimulator(tb),
		references: make(map[string]*reference), manifests: make(map[string]string),
	}
	writePairsModels(tb, r.models)
	s := httptest.NewServer(http.FileServer(http.Dir(r.models)))
	tb.Cleanup(s.Close)
	r.server = s.URL
	return r
}

// workDir returns a directory with a short name, as the names of sockets are limited.
func workDir(tb testing.TB) string {
	dir, err := os.MkdirTemp("", "pairs")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// has reports whether this machine has what the combination needs.
func (r *pairsRig) has(c combination) bool {
	return (r.simulator != "" || c[numberOf("device")] <= 0) && (canHold || !c.holds())
}

// accepts reports whether the combination can be tried here and must work.
func (r *pairsRig) accepts(c combination) bool { return r.has(c) && len(c.refused()) == 0 }

// smallest looks for the combination with the fewest values that are not plain that fails as c does, and returns its
// error.
func (r *pairsRig) smallest(ctx context.Context, c combination, err error) error {
	for again := true; again; {
		again = false
		for d, v := range c {
			less := slices.Clone(c)
			if less[d] = 0; v == 0 || (len(less.refused()) > 0) != (len(c.refused()) > 0) {
				continue
			}
			if e := r.try(ctx, less); e != nil {
				c, err, again = less, e, true
			}
		}
	}
	return err
}

// try runs one combination on every rank and returns what is wrong about it.
func (r *pairsRig) try(ctx context.Context, c combination) (err error) {
	dir, err := os.MkdirTemp(r.work, "run")
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute) // then processes are killed
	defer cancel()
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	defer func() {
		if err != nil {
			err = fmt.Errorf("%v: %w\ngguf2gpu %s", c, err, strings.Join(r.args(c, "DIR", 0), " "))
		}
	}()
	if rules := c.refused(); len(rules) > 0 {
		return r.tryRefused(ctx, c, rules, dir)
	}
	return r.tryAccepted(ctx, c, dir)
}

// tryRefused wants one of the rules to be the reason for a failure that leaves nothing behind.
func (r *pairsRig) tryRefused(ctx context.Context, c combination, rules []*refusal, dir string) error {
	some := !slices.ContainsFunc(rules, func(rule *refusal) bool { return !rule.some })
	_, world := c.world()
	refused := 0
	for rank := range world {
		if err := r.writeExpected(ctx, c, dir, rank, !some); err != nil {
			return err
		}
		var o outcome
		var err error
		if c.is("by", "add") {
			o, err = r.addAndAttach(ctx, c, dir, rank)
		} else {
			o, err = r.command(ctx, c, dir, r.args(c, dir, rank))
		}
		if err != nil {
			return err
		}
		if some && o.code == exitOK {
			continue
		}
		refused++
		if !slices.ContainsFunc(rules, func(rule *refusal) bool {
			return o.code == rule.code && strings.Contains(o.stderr, rule.says)
		}) {
			return fmt.Errorf("rank %d: exit code %d, and it should be refused as %q, code %d; stderr: %s", rank, o.code, rules[0].says,
				rules[0].code, o.stderr)
		}
		var said failure
		if c.is("hash", "stdout") {
			continue // no JSON then
		}
		if err := json.Unmarshal([]byte(o.stdout), &said); err != nil || said.Code != o.code || said.Error == "" {
			return fmt.Errorf("rank %d: it says on stdout %q", rank, o.stdout)
		}
		for _, name := range []string{"readback", "sums", "trace"} {
			if _, err := os.Stat(filepath.Join(dir, name+strconv.Itoa(rank))); !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("rank %d: refused, but it has made the file %s, %v", rank, name, err)
			}
		}
	}
	if refused == 0 {
		return fmt.Errorf("it works, and should be refused as %q", rules[0].says)
	}
	return nil
}

// tryAccepted wants every rank to work, and that together they have what a plain load has.
func (r *pairsRig) tryAccepted(ctx context.Context, c combination, dir string) error {
	ref, err := r.reference(ctx, c)
	if err != nil {
		return err
	}
	by, world := c.world()
	parts := make(map[string]*assembly) // by the files' names
	for _, name := range c.files() {
		parts[name] = newAssembly(by, world, c)
	}
	for rank := range world {
		if err := r.writeExpected(ctx, c, dir, rank, false); err != nil {
			return err
		}
		if err := r.tryRank(ctx, c, dir, rank, ref, parts); err != nil {
			return fmt.Errorf("rank %d of %d: %w", rank, world, err)
		}
	}
	if c.is("by", "verify") {
		return nil // it writes no file
	}
	for name, all := range parts {
		if err := all.compare(ref); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

// tryRank loads the part of one rank and compares what can be compared without the others.
func (r *pairsRig) tryRank(ctx context.Context, c combination, dir string, rank int, ref *reference,
	parts map[string]*assembly,
) error {
	switch c.value("by") {
	case "hold":
		if err := r.holdAndAttach(ctx, c, dir, rank); err != nil {
			return err
		}
	case "add":
		o, err := r.addAndAttach(ctx, c, dir, rank)
		if err == nil && o.code != exitOK {
			err = fmt.Errorf("exit code %d: %s", o.code, o.stderr)
		}
		if err != nil {
			return err
		}
	default:
		o, err := r.command(ctx, c, dir, r.args(c, dir, rank))
		if err != nil {
			return err
		}
		if o.code != exitOK {
			return fmt.Errorf("exit code %d: %s", o.code, o.stderr)
		}
		if said := strings.TrimSpace(o.stderr); said != "" && !(c.is("output", "progress") && strings.HasPrefix(said, "loading: ")) {
			return fmt.Errorf("it says on stderr %q", said)
		}
		var report loadReport
		if err := json.Unmarshal([]byte(o.stdout), &report); err != nil {
			return fmt.Errorf("%w in %s", err, o.stdout)
		}
		if err := c.checkReport(&report, rank, ref); err != nil {
			return err
		}
		if err := r.comparePlan(ctx, c, dir, rank, &report); err != nil {
			return err
		}
	}
	if c.is("output", "trace") && !c.is("by", "verify", "add") {
		b, err := os.ReadFile(filepath.Join(dir, fmt.Sprint("trace", rank)))
		if err != nil || !json.Valid(b) {
			return fmt.Errorf("the trace is no JSON, %w", err)
		}
	}
	if !c.is("by", "verify") {
		for _, name := range c.files() {
			if err := parts[name].add(filepath.Join(dir, name+strconv.Itoa(rank)), rank); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
	}
	if c.is("hash", "write", "both", "blake3") {
		return r.compareHashes(ctx, c, dir, rank, ref)
	}
	return nil
}

// files returns the names of the files that hold what was read back.
func (c combination) files() []string {
	switch c.value("by") {
	case "hold":
		return []string{"readback", "attached"}
	case "add":
		return []string{"attached"}
	default:
		return []string{"readback"}
	}
}

// added are the dimensions whose flags are those of hold --add; all others are those of the process that holds.
var added = []string{"dtype", "dtype-for", "tensors"}

// args returns the command line of one rank, whose files are in dir. To add a model, it is that of the holder.
func (r *pairsRig) args(c combination, dir string, rank int) []string {
	command, _, _ := strings.Cut(c.value("by"), "-")
	args := []string{command, r.modelOf(c)}
	if c.is("by", "add") {
		args = []string{"hold"}
	}
	for d, v := range c {
		if !c.is("by", "add") || !slices.Contains(added, dimensions[d].name) {
			args = append(args, strings.Fields(dimensions[d].values[v].args)...)
		}
	}
	add := func(flag, v string) { args = append(args, "--"+flag, v) }
	add("device", c.device())
	add("kernel-cache", r.kernels)
	if c.is("by", "load") && c.is("split", "none") {
		args = append(args, "--verify") // the file that is written has what is on the first device
	}
	switch n := c.count(); c.value("split") {
	case "ratio", "ratio-of-none":
		add("split-ratio", "3,1,2"[:2*n-1])
	case "short-ratio":
		add("split-ratio", "3,1,2,5"[:2*n+1])
	}
	if by, world := c.world(); by != "none" {
		add("shard", by)
		add("rank", strconv.Itoa(rank))
		add("world", strconv.Itoa(world))
	}
	in := func(name string) string { return filepath.Join(dir, name+strconv.Itoa(rank)) }
	if c.is("hash", "write", "both") {
		add("hash", in("sums"))
	}
	if c.is("hash", "blake3") {
		add("hash", "blake3:"+in("sums"))
	}
	if c.is("hash", "expect", "both") {
		add("expect", in("expected"))
	}
	if c.holds() {
		add("socket", filepath.Join(dir, "socket"))
	}
	if !c.is("by", "verify", "add") {
		add("readback", in("readback"))
		if c.is("output", "trace") {
			add("trace", in("trace"))
		}
	}
	return append(args, "--json")
}

// device is the value of --device.
func (c combination) device() string {
	device, n := c.value("device"), c.value("devices")
	switch {
	case n == "unnamed" && device != "soft" && device != "auto":
		return "hip"
	case n == "unnamed":
		return device
	case device == "auto":
		return device + ":" + n
	case device != "soft":
		return "hip:" + map[string]string{"1": "1", "2": "2,0", "3": "all"}[n]
	}
	return device + ":" + n
}

// outcome is what a command did.
type outcome struct {
	code           exitCode
	stdout, stderr string
}

// command runs a command line: hold, and all with a simulated GPU, in a process of its own, else in this one.
func (r *pairsRig) command(ctx context.Context, c combination, dir string, args []string) (outcome, error) {
	if !c.is("device", "soft") || args[0] == "hold" {
		return r.process(ctx, c, dir, args)
	}
	var stdout, stderr bytes.Buffer
	code := Main(ctx, args, nil, &stdout, &stderr)
	return outcome{code, stdout.String(), withoutNotices(stderr.String())}, nil
}

// process runs a command line in a process, which must leave nothing on the simulated GPU.
func (r *pairsRig) process(ctx context.Context, c combination, dir string, args []string) (o outcome, err error) {
	cmd, report, err := r.start(ctx, c, dir, args)
	if err != nil {
		return o, err
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err = cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.Exited() {
		o.code, err = exitCode(exit.ExitCode()), nil
	}
	o.stdout, o.stderr = stdout.String(), withoutNotices(stderr.String())
	if err != nil {
		return o, fmt.Errorf("%w: %s", err, o.stderr)
	}
	if _, err := os.Stat(report); c.is("device", "soft") || o.code == exitUsage && errors.Is(err, fs.ErrNotExist) {
		return o, nil // the library was not opened
	}
	return o, leftovers(report, nil)
}

// start returns a process that was not started yet, and where the simulator will write its report.
func (r *pairsRig) start(ctx context.Context, c combination, dir string, args []string) (cmd *exec.Cmd,
	report string, err error,
) {
	self, err := os.Executable()
	if err != nil {
		return nil, "", err
	}
	own, err := os.MkdirTemp(dir, "process")
	if err != nil {
		return nil, "", err
	}
	report = filepath.Join(own, "report")
	cmd = exec.CommandContext(ctx, self, args...)
	cmd.Args[0] = "gguf2gpu"
	// The race detector would let each process sleep for a second at its end.
	cmd.Env = append(os.Environ(), "GGUF2GPU_HIP_LIBRARY="+r.simulator, "HIPSIM_DEVICES=3", "HIPSIM_MEMORY=67108864",
		"HIPSIM_DELAY_US=10", "HIPSIM_REPORT="+report)
	switch c.value("device") {
	case "hip5":
		cmd.Env = append(cmd.Env, "HIPSIM_VERSION=5")
	case "hip7":
		compiler := filepath.Join(filepath.Dir(r.simulator), hipRTC)
		cmd.Env = append(cmd.Env, "HIPSIM_VERSION=7", "GGUF2GPU_HIPRTC_LIBRARY="+compiler)
	case "apu":
		cmd.Env = append(cmd.Env, "HIPSIM_INTEGRATED=1")
	}
	return cmd, report, nil
}

// notice matches what the command says of flags that have no effect beside others, or for a model.
var notice = regexp.MustCompile(`(?m)^gguf2gpu: --[a-z-]+( has no effect |(, --soft-link)? and --soft-[a-z]+ have no effect|: no tensor's name matches |: earlier rules match all ).*\n`)

// withoutNotices returns what was said on stderr besides that.
func withoutNotices(stderr string) string { return notice.ReplaceAllString(stderr, "") }
