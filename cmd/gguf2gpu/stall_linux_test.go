package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// blocking are the HIP functions that a load onto two devices, its verification and its end call, by the call of theirs
// that is made to block: the first, one in the middle, or, for what a load on the other device calls, a later one.
var blocking = []string{
	"hipRuntimeGetVersion:1", "hipGetDeviceCount:1", "hipGetDeviceCount:2", "hipDeviceGetName:1", "hipDeviceGetName:2",
	"hipDeviceTotalMem:2", "hipDeviceGetAttribute:3", "hipDeviceGetPCIBusId:1", "hipDeviceGetUuid:2",
	"hipGetDevicePropertiesR0600:1",
	"hipGetDevice:1", "hipGetDevice:9", "hipSetDevice:1", "hipSetDevice:3", "hipMemGetInfo:1", "hipMemGetInfo:4",
	"hipMalloc:1", "hipMalloc:2", "hipHostRegister:1", "hipHostRegister:2", "hipStreamCreateWithFlags:1",
	"hipStreamCreateWithFlags:3", "hipEventCreateWithFlags:1", "hipEventCreateWithFlags:5",
	"hipMemcpyAsync:1", "hipMemcpyAsync:20", "hipMemcpyAsync:40", "hipEventRecord:2", "hipEventRecord:20", "hipEventQuery:3",
	"hipEventQuery:50", "hipStreamQuery:1", "hipStreamQuery:9",
	"hipEventDestroy:1", "hipEventDestroy:7", "hipHostUnregister:1", "hipHostUnregister:2", "hipStreamDestroy:1",
	"hipStreamDestroy:4", "hipFree:1", "hipFree:2",
}

// onSimulator runs the command in a process of its own on the simulator. It is killed after two minutes: what does not
// end by then never does.
func onSimulator(t *testing.T, lib string, env []string, args ...string) (code exitCode, stderr string, ended bool) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, self)
	cmd.Args = append([]string{"gguf2gpu"}, args...)
	cmd.Env = append(append(os.Environ(), "GGUF2GPU_HIP_LIBRARY="+lib, "HIPSIM_DEVICES=2", "HIPSIM_POISON=0"), env...)
	var out bytes.Buffer
	cmd.Stderr = &out
	err = cmd.Run()
	exit, _ := errors.AsType[*exec.ExitError](err)
	switch {
	case ctx.Err() != nil:
		return 0, out.String(), false
	case err == nil:
		return exitOK, out.String(), true
	case exit == nil:
		t.Fatal(err)
	}
	return exitCode(exit.ExitCode()), out.String(), true
}

// loadArgs are a load onto both devices, with its verification.
func loadArgs(more ...string) []string {
	return append([]string{
		"load", samplePath, "--device", "hip:0,1", "--dtype", "raw", "--verify", "--chunk", "64KiB", "--staging", "512KiB",
		"--progress", "none",
	}, more...)
}

// TestEveryCallBlocks lets calls of a load onto two simulated devices never return, alone and with another call that
// fails, and copies never end. The command gives up with an error that says so, whatever the runtime waits for when it
// frees something.
func TestEveryCallBlocks(t *testing.T) {
	t.Parallel()
	lib := buildSimulator(t)
	var faults []string
	for i, call := range blocking {
		faults = append(faults, call+":0:block")
		second := []string{"hipStreamQuery:0:999", "hipHostUnregister:0:999", "hipFree:0:999"}[i%3]
		if name, _, _ := strings.Cut(second, ":"); !strings.HasPrefix(call, name) {
			faults = append(faults, call+":0:block,"+second)
		}
	}
	for _, n := range []int{1, 20, 40} { // in the load and in the verification
		faults = append(faults, fmt.Sprintf("hipMemcpyAsync:%d:100:stall", n),
			fmt.Sprintf("hipMemcpyAsync:%d:100:stall,hipStreamQuery:0:999", n),
			fmt.Sprintf("hipMemcpyAsync:%d:100:stall,hipStreamQuery:0:999,hipEventQuery:0:999", n))
	}
	var stalled atomic.Int64
	waits := make(map[string]string, len(faults))
	for i, fault := range faults {
		waits[fault] = fmt.Sprint(i % 2)
	}
	whileOthersWait(t, faults, func(t *testing.T, fault string) {
		code, stderr, ended := onSimulator(t, lib, []string{"HIPSIM_FAIL=" + fault, "HIPSIM_WAITS=" + waits[fault]},
			loadArgs("--stall", "1s")...)
		if !ended {
			t.Fatalf("it does not end:\n%s", stderr)
		}
		if strings.Contains(stderr, "no progress for") || strings.Contains(stderr, "may still use") {
			stalled.Add(1)
		} else if !strings.Contains(stderr, "(999)") {
			t.Errorf("nobody says that it stalled:\n%s", stderr)
		}
		if code != exitFailed && code != exitNoDevice {
			t.Errorf("exit code %d:\n%s", code, stderr)
		}
	})
	t.Logf("%d of %d stalled, others failed before that", stalled.Load(), len(faults))
	if int(stalled.Load()) < len(faults)*2/3 {
		t.Error("too few stalled")
	}
}

// TestInterruptedCalls interrupts commands whose runtime hangs. They end by themselves, and say what they waited for.
func TestInterruptedCalls(t *testing.T) {
	t.Parallel()
	lib := buildSimulator(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	says := map[string]string{
		"hipGetDeviceCount:1:0:block":        "asking the HIP library for the GPUs",
		"hipMemGetInfo:1:0:block":            "asking for free device memory",
		"hipMalloc:1:0:block":                "allocating device memory",
		"hipHostRegister:1:0:block":          "page-locking staging memory",
		"hipStreamCreateWithFlags:1:0:block": "creating a stream",
		"hipMemcpyAsync:1:0:block":           "the copies that are under way",
		"hipMemcpyAsync:1:0:stall":           "the copies that are under way",
		"hipFree:1:0:block":                  "the device to free its memory",
	}
	whileOthersWait(t, slices.Sorted(maps.Keys(says)), func(t *testing.T, fault string) {
		for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
			report := filepath.Join(t.TempDir(), "report")
			ctx := endOfTest(t)
			cmd := exec.CommandContext(ctx, self)
			cmd.Args = append([]string{"gguf2gpu"}, loadArgs("--stall", "1h")...)
			cmd.Env = append(os.Environ(), "GGUF2GPU_HIP_LIBRARY="+lib, "HIPSIM_DEVICES=2", "HIPSIM_FAIL="+fault,
				"HIPSIM_REPORT="+report)
			var stderr lockedOutput
			cmd.Stderr = &stderr
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			for ctx.Err() == nil && !bytes.Contains(read(report), []byte(`"faults":1`)) { // until the call blocks
				time.Sleep(5 * time.Millisecond)
			}
			if err := cmd.Process.Signal(signal); err != nil {
				t.Fatal(err)
			}
			err := cmd.Wait()
			exit, ok := errors.AsType[*exec.ExitError](err)
			if !ok || exitCode(exit.ExitCode()) != exitInterrupted {
				t.Errorf("%v: it ended with %v, want exit code %d\n%s", signal, err, exitInterrupted, stderr.String())
			}
			if !strings.Contains(stderr.String(), says[fault]) {
				t.Errorf("%v: it does not say %q:\n%s", signal, says[fault], stderr.String())
			}
		}
	})
}

// read returns what is in a file, nothing if it is not there.
func read(path string) []byte {
	b, _ := os.ReadFile(path)
	return b
}

// lockedOutput collects what a process writes.
type lockedOutput struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *lockedOutput) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *lockedOutput) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}
