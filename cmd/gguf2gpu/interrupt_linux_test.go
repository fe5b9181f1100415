package main

import (
	"bufio"
	"errors"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

// TestInterruptedLoad interrupts a load whose copies take a minute. It says what it waits for, and a second signal ends
// it.
func TestInterruptedLoad(t *testing.T) {
	t.Parallel()
	for range 10 {
		if inTime := interruptTwice(t); inTime || t.Failed() {
			return
		}
	}
	t.Error("the second signal has never come before the load ended by itself")
}

// interruptTwice is false if the load had ended by itself, as it does within two seconds, before the second signal.
func interruptTwice(t *testing.T) (inTime bool) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Args = []string{
		"gguf2gpu", "load", samplePath, "--device", "soft", "--soft-link", "100KB/s", "--progress", "json",
	}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	lines := bufio.NewScanner(stderr)
	next := func(want string) {
		t.Helper()
		for lines.Scan() {
			if strings.Contains(lines.Text(), want) {
				return
			}
		}
		t.Fatalf("it ended without saying %q: %v", want, lines.Err())
	}
	next(`"done_bytes":0,"total_bytes":6623808`) // it is known how much there is to do before anything has arrived
	signal := func() {
		t.Helper()
		if err := cmd.Process.Signal(syscall.SIGINT); err != nil && !errors.Is(err, os.ErrProcessDone) {
			t.Fatal(err)
		}
	}
	signal()
	next("gguf2gpu: stopping; it waits for the copies that are under way")
	signal()
	inTime = true
	for lines.Scan() {
		switch line := lines.Text(); {
		case strings.HasPrefix(line, "gguf2gpu: interrupted; it does not wait any longer for"):
			inTime = false
		case !strings.HasPrefix(line, "{"):
			t.Errorf("after the second signal it says %q", line)
		}
	}
	exit, ok := errors.AsType[*exec.ExitError](cmd.Wait())
	if !ok || inTime && exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGINT {
		t.Errorf("it ended with %v, want the second signal", exit)
	}
	return inTime
}
