package main

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gguf2gpu/gguf2gpu/loader/hold"
)

// rig is where tests of hold and attach start their processes: the software device, or a GPU of the simulated library.
type rig struct {
	device string
	env    []string
	dir    string // for sockets and files
	socket string
}

// onRigs runs a test on both.
func onRigs(t *testing.T, test func(t *testing.T, r *rig)) {
	t.Run("soft", func(t *testing.T) { test(t, newRig(t, "soft")) })
	t.Run("hip", func(t *testing.T) {
		r := newRig(t, "hip")
		r.env = []string{"GGUF2GPU_HIP_LIBRARY=" + buildSimulator(t), "HIPSIM_DELAY_US=10", "HIPSIM_POISON=0"}
		test(t, r)
	})
}

func newRig(t *testing.T, device string) *rig {
	t.Helper()
	dir := t.TempDir()
	if len(dir) > 80 { // the name of a socket is limited
		var err error
		if dir, err = os.MkdirTemp("", "hold"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
	}
	return &rig{device: device, dir: dir, socket: filepath.Join(dir, "s")}
}

// process is a running command.
type process struct {
	*exec.Cmd
	stdout, stderr output
	ended          chan struct{}
	report         string   // the simulator's
	ready          *os.File // of hold
}

// output is a file that a process writes to: what it has written can be read at once.
type output string

func (o output) String() string {
	b, err := os.ReadFile(string(o))
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// start starts gguf2gpu with the rig's socket. It is killed when the test ends.
func (r *rig) start(t *testing.T, command string, args ...string) *process {
	t.Helper()
	p := r.command(t, command, args...)
	p.run(t)
	return p
}

// command is start without starting.
func (r *rig) command(t *testing.T, command string, args ...string) *process {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := &process{ended: make(chan struct{})}
	dir, err := os.MkdirTemp(r.dir, command)
	if err != nil {
		t.Fatal(err)
	}
	p.report, p.stdout, p.stderr = filepath.Join(dir, "report"), output(filepath.Join(dir, "stdout")), output(filepath.Join(dir, "stderr"))
	p.Cmd = &exec.Cmd{
		Path: self, Args: append([]string{"gguf2gpu", command, "--socket", r.socket}, args...),
		Env: append(append(os.Environ(), r.env...), "HIPSIM_REPORT="+p.report),
	}
	p.Cmd.Stdout, p.Cmd.Stderr = create(t, p.stdout), create(t, p.stderr)
	return p
}

func create(t *testing.T, o output) *os.File {
	t.Helper()
	f, err := os.Create(string(o))
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func (p *process) run(t *testing.T) {
	t.Helper()
	if err := p.Cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p.follow(t)
}

// follow is the rest of run, for a process that was started.
func (p *process) follow(t *testing.T) {
	t.Helper()
	for _, f := range append(p.ExtraFiles, p.Cmd.Stdout.(*os.File), p.Cmd.Stderr.(*os.File)) {
		f.Close()
	}
	go func() {
		defer close(p.ended)
		_ = p.Cmd.Wait() // its state tells
	}()
	t.Cleanup(func() {
		_ = p.Process.Kill() // it may have ended
		<-p.ended
		if p.ready != nil {
			p.ready.Close()
		}
		if t.Failed() {
			t.Logf("%v: %v\n%s%s", p.Args[1:], p.ProcessState, p.stdout, p.stderr)
		}
	})
}

// hold starts 'gguf2gpu hold'.
func (r *rig) hold(t *testing.T, args ...string) *process {
	t.Helper()
	p := r.holding(t, args...)
	p.run(t)
	return p
}

// holding is hold without starting it.
func (r *rig) holding(t *testing.T, args ...string) *process {
	t.Helper()
	p := r.command(t, "hold", append(args, "--device", r.device, "--progress", "none", "--ready-fd", "3", "--threads", "2")...)
	ready, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	p.ready, p.ExtraFiles = ready, []*os.File{write}
	return p
}

// isReady waits until hold says so.
func (p *process) isReady(t *testing.T) *process {
	t.Helper()
	b, err := io.ReadAll(p.ready)
	if err != nil || string(b) != "READY\n" {
		t.Fatalf("on --ready-fd: %q, %v", b, err)
	}
	return p
}

// exits waits for the end and wants that exit code, and text on stderr.
func (p *process) exits(t *testing.T, code exitCode, text string) {
	t.Helper()
	select {
	case <-p.ended:
	case <-time.After(time.Minute):
		_ = p.Process.Signal(syscall.SIGQUIT) // prints what its goroutines do
		<-p.ended
		t.Fatalf("%v does not end", p.Args)
	}
	if got := p.ProcessState.ExitCode(); got != int(code) || !strings.Contains(p.stderr.String(), text) {
		t.Fatalf("%v: exit code %d (%v), want %d; stderr should have %q", p.Args[1:], got, p.ProcessState, code, text)
	}
}

// ends sends SIGTERM, and wants it to end well with nothing left on the device.
func (p *process) ends(t *testing.T, r *rig) {
	t.Helper()
	if err := p.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	p.exits(t, exitOK, "")
	p.leavesNothing(t, r)
}

func (p *process) leavesNothing(t *testing.T, r *rig) {
	t.Helper()
	if r.device == "hip" {
		nothingLeft(t, p.report, nil)
	}
}

// kill is kill -9. The process may have ended already.
func (p *process) kill() {
	_ = p.Process.Kill()
	<-p.ended
}

// attach runs 'gguf2gpu attach --json' to its end.
func (r *rig) attach(t *testing.T, args ...string) attachReport {
	t.Helper()
	p := r.start(t, "attach", append(args, "--json")...)
	p.exits(t, exitOK, "")
	p.leavesNothing(t, r)
	return parse[attachReport](t, p)
}

// parse reads what a process printed with --json.
func parse[T any](t *testing.T, p *process) (v T) {
	t.Helper()
	dec := json.NewDecoder(strings.NewReader(p.stdout.String()))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&v); err != nil {
		t.Fatalf("%v in %s", err, p.stdout)
	}
	if err := dec.Decode(new(any)); !errors.Is(err, io.EOF) {
		t.Fatalf("more than one object: %s", p.stdout)
	}
	return v
}

// stay runs 'gguf2gpu attach --stay' until it is attached.
func (r *rig) stay(t *testing.T, args ...string) *process {
	t.Helper()
	p := r.start(t, "attach", append(args, "--stay")...)
	until(t, "it is attached", func() bool { return strings.Contains(p.stdout.String(), "attached in") })
	return p
}

// list runs 'gguf2gpu hold' with --list, --add or --drop.
func (r *rig) list(t *testing.T, args ...string) []hold.Model {
	t.Helper()
	if len(args) == 0 {
		args = []string{"--list"}
	}
	p := r.start(t, "hold", append(args, "--json")...)
	p.exits(t, exitOK, "")
	return parse[struct{ Models []hold.Model }](t, p).Models
}

func (r *rig) wantAttached(t *testing.T, n int) {
	t.Helper()
	until(t, "as many are attached as should be", func() bool { return r.list(t)[0].Attached == n })
}

// until waits for what another process brings about.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 3000 {
		if ok() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("it never came about: %s", what)
}
