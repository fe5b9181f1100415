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
	"sync"
	"syscall"
	"testing"
	"time"
)

// needEngine skips the test if one of the programs is missing. If GGUF2GPU_REQUIRE, a list such as "mpi,slurm", names
// the engine, it fails the test instead.
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

// cleanEnv returns the environment without the variables that tell a rank, in case the tests themselves run as ranks.
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

// endOfTest returns a context that ends after two minutes, and well before the deadline of all tests, at which nothing
// would be cleaned up any more.
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

// command runs a program and fails the test unless it succeeds.
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

// ownGroup puts a process into a group of its own. The kernel kills it when the thread ends that has started it, and so
// with the test at the latest, even if the test is killed. The thread must be locked as long as the process should run.
func ownGroup() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}

// startDaemon starts a program and waits until ready returns no error. It writes to the file log. The end of the test
// stops it.
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

// waitUntil calls check until it returns no error.
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

// killAllOf kills the processes that have dir in their environment, whoever has started them. Each is an error of the
// test, unless it ends by itself soon.
func killAllOf(t *testing.T, dir string) {
	t.Helper()
	for pid, name := range waitForEnd(dir) {
		t.Errorf("process %d, %s, was left; killing it", pid, name)
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
}

// waitForEnd waits some seconds for the processes that have dir in their environment to end, except those with the
// given names. It returns the numbers and names of those that have not ended.
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

// processesOf returns the numbers and names of the processes that have dir in their environment.
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

// whileOthersWait runs a subtest for each name, eight at a time. They mostly wait for other processes, so that the one
// for each CPU that go test runs at a time would leave the CPUs idle.
func whileOthersWait(t *testing.T, names []string, test func(t *testing.T, name string)) {
	t.Helper()
	var all sync.WaitGroup
	defer all.Wait()
	places := make(chan struct{}, 8)
	for _, name := range names {
		places <- struct{}{}
		all.Go(func() {
			defer func() { <-places }()
			t.Run(name, func(t *testing.T) { test(t, name) })
		})
	}
}
