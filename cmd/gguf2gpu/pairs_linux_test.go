package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/loader/hold"
)

// canHold reports whether processes can share the software device's memory, so that attaching can be tested.
const canHold = true

// pairsSimulator builds the simulated library, with a compiler of kernels. It returns nothing if the machine has no
// compilers and AMDHIP_REQUIRE does not name them.
func pairsSimulator(tb testing.TB) string {
	for _, name := range []string{compilerOfC(), "c++"} {
		if _, err := exec.LookPath(name); err != nil {
			lackCompiler(tb, err, tb.Logf)
			return ""
		}
	}
	lib := buildSimulator(tb, "hiprtc.c")
	// From HIP 7 on, the compiler is in a library of its own.
	buildLibrary(tb, filepath.Join(filepath.Dir(lib), hipRTC), filepath.Join("..", "..", "testdata", "hipsim", "hiprtc.c"))
	return lib
}

// holder is a process that holds models.
type holder struct {
	*exec.Cmd
	ready          bool
	report         string // the simulator's
	stdout, stderr bytes.Buffer
}

// hold starts a holder and waits until it is ready or has failed. The end of ctx kills it.
func (r *pairsRig) hold(ctx context.Context, c combination, dir string, rank int, more ...string) (h *holder,
	err error,
) {
	h = new(holder)
	args := append(r.args(c, dir, rank), append(more, "--ready-fd", "3")...)
	if h.Cmd, h.report, err = r.start(ctx, c, dir, args); err != nil {
		return nil, err
	}
	ready, write, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer ready.Close()
	h.Stdout, h.Stderr, h.ExtraFiles = &h.stdout, &h.stderr, []*os.File{write}
	err = h.Start()
	write.Close()
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(ready)
	h.ready = string(b) == "READY\n"
	return h, err
}

// end ends the holder, which must leave nothing on a simulated GPU.
func (h *holder) end(c combination) error {
	err := errors.Join(h.Process.Signal(syscall.SIGTERM), h.Wait())
	if err == nil && !c.is("device", "soft") {
		err = leftovers(h.report, nil)
	}
	if err != nil {
		return fmt.Errorf("hold: %w: %s", err, &h.stderr)
	}
	return nil
}

// holdAndAttach holds a model, attaches from another process, and wants both to end well. What both read back is
// compared by the caller.
func (r *pairsRig) holdAndAttach(ctx context.Context, c combination, dir string, rank int) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	h, err := r.hold(ctx, c, dir, rank, "--verify")
	if err != nil {
		return err
	}
	var a attachReport
	var o outcome
	if h.ready {
		a, o, err = r.attach(ctx, c, dir, rank, "")
	}
	if err := errors.Join(err, h.end(c)); err != nil {
		return err
	}
	if o.code != exitOK {
		return fmt.Errorf("attach: exit code %d: %s", o.code, o.stderr)
	}
	var held holdReport
	if err := json.Unmarshal(h.stdout.Bytes(), &held); err != nil {
		return fmt.Errorf("hold: %w in %s", err, &h.stdout)
	}
	if len(held.Devices) != c.count() {
		return fmt.Errorf("hold: it reports %s", &h.stdout)
	}
	return a.compare(c, held.Models)
}

// addAndAttach holds nothing at first, adds a model and attaches. The outcome is that of the holder if it does not
// become ready, else that of adding or, as this does not wait for the load, of attaching.
func (r *pairsRig) addAndAttach(ctx context.Context, c combination, dir string, rank int) (o outcome, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	h, err := r.hold(ctx, c, dir, rank)
	if err != nil {
		return o, err
	}
	if !h.ready {
		_ = h.Wait() // the code tells
		return outcome{exitCode(h.ProcessState.ExitCode()), h.stdout.String(), h.stderr.String()}, nil
	}
	args := []string{"hold", "--add", r.modelOf(c), "--name", "added", "--socket", filepath.Join(dir, "socket"), "--json"}
	for _, name := range added {
		d := numberOf(name)
		args = append(args, strings.Fields(dimensions[d].values[c[d]].args)...)
	}
	var now struct{ Models []hold.Model }
	var a attachReport
	if o, err = r.process(ctx, plain(), dir, args); err == nil && o.code == exitOK {
		err = json.Unmarshal([]byte(o.stdout), &now)
		if err == nil {
			a, o, err = r.attach(ctx, c, dir, rank, "added")
		}
	}
	if err := errors.Join(err, h.end(c)); err != nil || o.code != exitOK {
		return o, err
	}
	return o, a.compare(c, now.Models)
}

// attach attaches to the holder, compares with the file and writes what it read back.
func (r *pairsRig) attach(
	ctx context.Context, c combination, dir string, rank int, name string,
) (a attachReport, o outcome, err error) {
	readback := filepath.Join(dir, fmt.Sprint("attached", rank))
	args := []string{"attach", "--socket", filepath.Join(dir, "socket"), "--verify", "--readback", readback, "--json"}
	if name != "" {
		args = append(args, name)
	}
	if o, err = r.command(ctx, c, dir, args); err != nil || o.code != exitOK {
		return a, o, err
	}
	return a, o, json.Unmarshal([]byte(o.stdout), &a)
}

// compare compares what is attached with what is held.
func (a *attachReport) compare(c combination, held []hold.Model) error {
	if len(held) == 1 && held[0].Tensors == len(a.Tensors) && held[0].Bytes == a.DeviceBytes &&
		len(a.Devices) == c.count() &&
		held[0].Proved == (c.is("prove", "on") && held[0].State == "resident") &&
		a.Verified && a.VerifiedN == len(a.Tensors) && a.DType == c.value("dtype") {
		return nil
	}
	return fmt.Errorf("held are %+v, and attach reports %+v", held, a)
}
