package main

import (
	"bytes"
	"context"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// needEngine skips the test if one of the programs is missing, or fails it if GGUF2GPU_REQUIRE, a list such as "mpi,slurm", names
// the engine.
func needEngine(t *testing.T, engine string, programs ...string) {
	t.Helper()
	for _, program := range programs {
		if _, err := exec.LookPath(program); err != nil {
			lackEngine(t, engine, err.Error())
		}
	}
}

func lackEngine(t *testing.T, engine, reason string) {
	t.Helper()
	if slices.Contains(strings.Split(os.Getenv("GGUF2GPU_REQUIRE"), ","), engine) {
		t.Fatalf("GGUF2GPU_REQUIRE names %q, but: %s", engine, reason)
	}
	t.Skipf("%s (GGUF2GPU_REQUIRE=%s makes this a failure)", reason, engine)
}

// cleanEnv is the environment without what an engine that runs the tests themselves has set.
func cleanEnv() []string {
	return slices.DeleteFunc(os.Environ(), func(v string) bool {
		for _, prefix := range []string{
			"RANK=", "LOCAL_RANK=", "WORLD_SIZE=", "TORCHELASTIC_", "OMPI_", "PRTE_", "PMI_", "PMIX_", "MPI_", "SLURM", "LWS_",
		} {
			if strings.HasPrefix(v, prefix) {
				return true
			}
		}
		return false
	})
}

// endOfTest is a context that ends when something hangs: well before the deadline of all tests, where nothing would be cleaned up.
func endOfTest(t *testing.T) context.Context {
	limit := time.Now().Add(2 * time.Minute)
	if deadline, ok := t.Deadline(); ok {
		if soon := deadline.Add(-20 * time.Second); soon.Before(limit) {
			limit = soon
		}
	}
	ctx, cancel := context.WithDeadline(t.Context(), limit)
	t.Cleanup(cancel)
	return ctx
}

// command runs a program to its end, which should be a good one.
func command(t *testing.T, env []string, name string, args ...string) {
	t.Helper()
	if out, err := commandOutput(t, env, name, args...); err != nil {
		t.Fatalf("%s: %v\n%s", name, err, out)
	}
}

// commandOutput runs a program and returns what it wrote. If it hangs, it is killed with its children.
func commandOutput(t *testing.T, env []string, name string, args ...string) ([]byte, error) {
	t.Helper()
	runtime.LockOSThread() // see ownGroup
	defer runtime.UnlockOSThread()
	cmd := exec.CommandContext(endOfTest(t), name, args...)
	cmd.Env = env
	cmd.SysProcAttr = ownGroup()
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second
	return cmd.CombinedOutput()
}

// ownGroup makes a process the first of a group, that ends when the thread ends that started it: with the test at the latest, also
// when that is killed.
func ownGroup() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}

// startDaemon starts a program that the test's end stops, and waits until ready has no error. Its output goes to log.
func startDaemon(t *testing.T, env []string, log string, ready func() error, name string, args ...string) {
	t.Helper()
	out, err := os.Create(log)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd := exec.Command(name, args...)
	cmd.Env, cmd.Stdout, cmd.Stderr, cmd.SysProcAttr = env, out, out, ownGroup()
	started, ended := make(chan error, 1), make(chan struct{})
	go func() { // ends with the daemon
		defer close(ended)
		runtime.LockOSThread() // see ownGroup
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // how it ends does not matter
		}
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		kill := time.AfterFunc(5*time.Second, func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) })
		defer kill.Stop()
		<-ended
	})
	waitUntil(t, name, func() error {
		select {
		case <-ended:
			t.Fatalf("%s has ended", name)
		default:
		}
		return ready()
	})
}

// waitUntil waits for check to be happy.
func waitUntil(t *testing.T, what string, check func() error) {
	t.Helper()
	ctx := endOfTest(t)
	for {
		err := check()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("waiting for %s: %v", what, err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// killAllOf ends the processes that have dir in their environment, whoever their parents are. There should be none any more; the
// last of them may need a moment.
func killAllOf(t *testing.T, dir string) {
	t.Helper()
	for pid, name := range waitForEnd(dir) {
		t.Errorf("process %d, %s, was left; killing it", pid, name)
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
}

// waitForEnd gives the processes that have dir in their environment some time to end, but for those of the given names, and
// returns the names of those that are left.
func waitForEnd(dir string, except ...string) (left map[int]string) {
	for range 100 {
		left = processesOf(dir)
		maps.DeleteFunc(left, func(_ int, name string) bool { return slices.Contains(except, name) })
		if len(left) == 0 {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	return left
}

func processesOf(dir string) map[int]string {
	found := make(map[int]string)
	paths, _ := filepath.Glob("/proc/[0-9]*/environ")
	for _, path := range paths {
		env, err := os.ReadFile(path)
		if err != nil || !bytes.Contains(env, []byte(dir)) {
			continue // ended, or not ours
		}
		process := filepath.Dir(path)
		name, _ := os.ReadFile(filepath.Join(process, "comm"))
		if pid, err := strconv.Atoi(filepath.Base(process)); err == nil {
			found[pid] = string(bytes.TrimSpace(name))
		}
	}
	return found
}
