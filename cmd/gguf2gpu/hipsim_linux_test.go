package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// buildSimulator compiles the simulated libamdhip64.so from hipsim.c and the sources in more.
func buildSimulator(t testing.TB, more ...string) string {
	t.Helper()
	lib := filepath.Join(t.TempDir(), "libamdhip64.so")
	sources := []string{filepath.Join("..", "..", "testdata", "hipsim", "hipsim.c")}
	for _, source := range more {
		sources = append(sources, filepath.Join("..", "..", "testdata", "hipsim", source))
	}
	buildLibrary(t, lib, sources...)
	return lib
}

// buildLibrary compiles C sources to a shared library at lib.
func buildLibrary(t testing.TB, lib string, sources ...string) {
	t.Helper()
	path, err := exec.LookPath(compilerOfC())
	if err != nil {
		lackCompiler(t, err, t.Skipf)
	}
	args := append([]string{"-O1", "-shared", "-fPIC", "-pthread", "-o", lib}, sources...)
	if out, err := exec.Command(path, args...).CombinedOutput(); err != nil {
		t.Fatalf("compiling %q: %v\n%s", sources, err, out)
	}
}

// compilerOfC returns the name of the C compiler.
func compilerOfC() string {
	if out, err := exec.Command("go", "env", "CC").Output(); err == nil && len(bytes.TrimSpace(out)) > 0 {
		return string(bytes.TrimSpace(out))
	}
	return "cc"
}

// lackCompiler fails the test if AMDHIP_REQUIRE names a C compiler, else it says by say why there is no simulator.
func lackCompiler(t testing.TB, err error, say func(format string, args ...any)) {
	t.Helper()
	if strings.Contains(os.Getenv("AMDHIP_REQUIRE"), "cc") {
		t.Fatalf("AMDHIP_REQUIRE names a C compiler, but: %v", err)
	}
	say("there is no C compiler to build the simulator with: %v (AMDHIP_REQUIRE=cc makes this a failure)", err)
}

// TestFaultsOfTheLibrary lets the simulator fail one call of each kind. The command must end with the right exit code
// and one line on stderr, and have given back everything on the device.
func TestFaultsOfTheLibrary(t *testing.T) {
	t.Parallel()
	lib := buildSimulator(t)
	sample := filepath.Join("..", "..", "testdata", "tiny-llama.gguf")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		fault  string // of HIPSIM_FAIL
		code   exitCode
		stderr string
		args   string         // more of them
		left   map[string]int // what cannot be given back, because that is the call that fails
	}{
		{fault: "", code: exitOK},
		{fault: "", code: exitOK, args: "--verify --check --sync"},
		{fault: "hipGetDeviceCount:1:100", code: exitNoDevice, stderr: "hipErrorNoDevice"},
		{fault: "hipGetDeviceCount:0:999", code: exitNoDevice, stderr: "hipGetDeviceCount"},
		{fault: "hipDeviceGetName:1:1", code: exitNoDevice, stderr: "hipDeviceGetName"},
		{fault: "hipMemGetInfo:1:999", code: exitFailed, stderr: "hipMemGetInfo"},
		{fault: "hipMalloc:1:2", code: exitNoMemory, stderr: "hipMalloc"},
		{fault: "hipMalloc:1:999", code: exitFailed, stderr: "hipMalloc"},
		{fault: "hipSetDevice:1:101", code: exitOK}, // one device: it is never set
		{fault: "hipStreamCreateWithFlags:2:999", code: exitFailed, stderr: "hipStreamCreateWithFlags"},
		// No device memory is lacking: HIP says the same of hardware queues and of memory of the host.
		{fault: "hipStreamCreateWithFlags:2:2", code: exitFailed, stderr: "hipErrorOutOfMemory"},
		{fault: "hipEventCreateWithFlags:1:2", code: exitFailed, stderr: "hipErrorOutOfMemory"},
		{fault: "hipMemcpyAsync:5:2", code: exitFailed, stderr: "hipErrorOutOfMemory"},
		{fault: "hipEventCreateWithFlags:1:999", code: exitFailed, stderr: "hipEventCreateWithFlags"},
		{fault: "hipHostRegister:0:801", code: exitOK},
		{fault: "hipHostRegister:0:801,hipHostMalloc:0:2", code: exitOK, stderr: "locked-memory limit"},
		{fault: "hipMemcpyAsync:5:1", code: exitFailed, stderr: "hipMemcpyAsync"},
		{fault: "hipMemcpyAsync:5:700:async", code: exitFailed, stderr: "hipErrorIllegalAddress"},
		{fault: "hipMemcpyAsync:9:0:stall=50", code: exitOK},
		{fault: "hipEventRecord:7:400", code: exitFailed, stderr: "hipEventRecord"},
		{fault: "hipEventRecord:7:719:async", code: exitFailed, stderr: "hipErrorLaunchFailure"},
		{fault: "hipEventQuery:6:999", code: exitFailed, stderr: "hipEventQuery"},
		{fault: "hipStreamSynchronize:3:999", code: exitFailed, stderr: "hipStreamSynchronize", args: "--sync"},
		{fault: "hipStreamQuery:20:999", code: exitFailed, stderr: "read back", args: "--verify"}, // a load asks a few times only
		{fault: "hipMemcpyAsync:3:700:async", code: exitFailed, stderr: "read back", args: "--verify --sync --chunk 16MiB " +
			"--staging 16MiB --tensors ^output"},
		{fault: "hipEventDestroy:2:999", code: exitFailed, stderr: "hipEventDestroy", left: map[string]int{"events": 1}},
		{fault: "hipHostUnregister:1:999", code: exitFailed, stderr: "hipHostUnregister", left: map[string]int{"registrations": 1}},
		{
			fault: "hipHostRegister:0:801,hipHostFree:1:999", code: exitFailed, stderr: "hipHostFree",
			left: map[string]int{"host_allocations": 1},
		},
		{fault: "hipStreamDestroy:1:999", code: exitFailed, stderr: "hipStreamDestroy", left: map[string]int{"streams": 1}},
		{fault: "hipFree:1:999", code: exitFailed, stderr: "hipFree", left: map[string]int{"device_allocations": 1}},
	} {
		t.Run(tt.fault+tt.args, func(t *testing.T) {
			t.Parallel()
			report := filepath.Join(t.TempDir(), "report.json")
			args := []string{
				"gguf2gpu", "load", sample, "--device", "hip", "--progress", "none", "--dtype", "raw", "--chunk", "64KiB",
				"--staging", "256KiB", "--threads", "3",
			}
			var stdout, stderr bytes.Buffer
			cmd := exec.Cmd{
				Path: self, Args: append(args, strings.Fields(tt.args)...), Stdout: &stdout, Stderr: &stderr,
				Env: append(os.Environ(), "GGUF2GPU_HIP_LIBRARY="+lib, "HIPSIM_FAIL="+tt.fault, "HIPSIM_REPORT="+report,
					"HIPSIM_DELAY_US=10", "HIPSIM_POISON=0"),
			}
			code := exitOK
			if err := cmd.Run(); err != nil {
				exit, ok := errors.AsType[*exec.ExitError](err)
				if !ok {
					t.Fatal(err)
				}
				code = exitCode(exit.ExitCode())
			}
			text := withoutNotices(stderr.String())
			if code != tt.code || !strings.Contains(text, tt.stderr) || tt.stderr == "" && text != "" {
				t.Errorf("exit code %d, want %d; stderr, which should have %q:\n%s", code, tt.code, tt.stderr, text)
			}
			if code != exitOK && (strings.Count(text, "\n") != 1 || !strings.HasPrefix(text, "gguf2gpu: ") || stdout.Len() > 0) {
				t.Errorf("want one line on stderr, and nothing on stdout:\n%s%s", text, &stdout)
			}
			nothingLeft(t, report, tt.left)
		})
	}
}

// nothingLeft reads the simulator's report: nothing may be left when the process has ended, except what but names.
func nothingLeft(t *testing.T, report string, but map[string]int) {
	t.Helper()
	if err := leftovers(report, but); err != nil {
		t.Error(err)
	}
}

// leftovers is nothingLeft that returns an error.
func leftovers(report string, but map[string]int) error {
	b, err := os.ReadFile(report)
	if err != nil {
		return err
	}
	var stats map[string]int
	if err := json.Unmarshal(bytes.TrimRight(b, "\x00 \n"), &stats); err != nil {
		return fmt.Errorf("%w in the report %s", err, b)
	}
	var errs []error
	if stats["calls"] == 0 {
		errs = append(errs, errors.New("the simulator was not used"))
	}
	for _, what := range []string{"device_allocations", "host_allocations", "registrations", "streams", "events", "ipc_opens"} {
		if stats[what] != but[what] {
			errs = append(errs, fmt.Errorf("%d %s were left, want %d", stats[what], what, but[what]))
		}
	}
	if stats["misuses"] != 0 {
		errs = append(errs, fmt.Errorf("%d calls broke HIP's rules", stats["misuses"]))
	}
	return errors.Join(errs...)
}

// TestStalledLibrary has one copy that never ends. The command must give up with an error that says what it waited for.
func TestStalledLibrary(t *testing.T) {
	t.Parallel()
	lib := buildSimulator(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, fault := range []string{"hipMemcpyAsync:5:0:stall", "hipMemcpyAsync:40:0:stall"} { // in the load and in the verification
		var stderr bytes.Buffer
		cmd := exec.Cmd{
			Path: self, Stderr: &stderr,
			Args: []string{
				"gguf2gpu", "verify", filepath.Join("..", "..", "testdata", "tiny-llama.gguf"), "--device", "hip",
				"--progress", "none", "--dtype", "raw", "--chunk", "64KiB", "--staging", "256KiB", "--stall", "1s",
			},
			Env: append(os.Environ(), "GGUF2GPU_HIP_LIBRARY="+lib, "HIPSIM_FAIL="+fault),
		}
		err := cmd.Run()
		exit, ok := errors.AsType[*exec.ExitError](err)
		if !ok || exitCode(exit.ExitCode()) != exitFailed || !strings.Contains(stderr.String(), "no progress") ||
			!strings.Contains(stderr.String(), "tensor \"") {
			t.Errorf("%s: %v, stderr %q; want exit code 1, and which tensor's copy does not end", fault, err, stderr.String())
		}
	}
}
