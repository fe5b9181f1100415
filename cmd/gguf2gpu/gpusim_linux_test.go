package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gguf2gpu/gguf2gpu/cmd/gguf2gpu/internal/bench"
	"github.com/gguf2gpu/gguf2gpu/cmd/gguf2gpu/internal/doctor"
	"github.com/gguf2gpu/gguf2gpu/cmd/gguf2gpu/internal/synth"
	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// simulated runs the command on a simulated GPU. Its hipRTC compiles for the host.
type simulated struct {
	t    *testing.T
	env  []string
	self string
}

func newSimulated(t *testing.T) *simulated {
	t.Helper()
	if _, err := exec.LookPath("c++"); err != nil {
		if strings.Contains(os.Getenv("AMDHIP_REQUIRE"), "cc") {
			t.Fatalf("AMDHIP_REQUIRE names a C compiler, but there is none for C++: %v", err)
		}
		t.Skipf("there is no C++ compiler for the simulated hipRTC: %v (AMDHIP_REQUIRE=cc makes this a failure)", err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return &simulated{t: t, self: self, env: []string{
		"GGUF2GPU_HIP_LIBRARY=" + buildSimulator(t, "hiprtc.c"), "XDG_CACHE_HOME=" + t.TempDir(),
		"HIPSIM_DELAY_US=10", "HIPSIM_POISON=0",
	}}
}

// with returns a copy of s with more environment variables.
func (s *simulated) with(env ...string) *simulated {
	c := *s
	c.env = append(slices.Clip(c.env), env...)
	return &c
}

// run runs the command and fails the test unless it ends with that exit code.
func (s *simulated) run(code exitCode, args ...string) (stdout, stderr string) {
	s.t.Helper()
	got, stdout, stderr := s.try(args...)
	if got != code {
		s.t.Fatalf("%q: exit code %d, want %d; stderr:\n%s", args, got, code, stderr)
	}
	return stdout, stderr
}

// try runs the command.
func (s *simulated) try(args ...string) (code exitCode, stdout, stderr string) {
	s.t.Helper()
	var out, errs bytes.Buffer
	cmd := exec.Cmd{
		Path: s.self, Args: append([]string{"gguf2gpu"}, args...), Env: append(os.Environ(), s.env...), Stdout: &out, Stderr: &errs,
	}
	if err := cmd.Run(); err != nil {
		exit, ok := errors.AsType[*exec.ExitError](err)
		if !ok {
			s.t.Fatal(err)
		}
		code = exitCode(exit.ExitCode())
	}
	return code, out.String(), errs.String()
}

// load runs load --json and returns the report and stderr.
func (s *simulated) load(path string, args ...string) (r loadReport, stderr string) {
	s.t.Helper()
	out, stderr := s.run(exitOK, append([]string{"load", path, "--device", "hip", "--progress", "none", "--json"}, args...)...)
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		s.t.Fatalf("%v in %s", err, out)
	}
	return r, stderr
}

// noCompiler is a setting that makes every compilation fail.
const noCompiler = "HIPSIM_FAIL=hiprtcCompileProgram:0:6"

// TestDequantOnGPU loads with kernels that hipRTC compiles: the device must have the same bytes as without them. A
// second load must find the kernels in the cache, and need no compiler.
func TestDequantOnGPU(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	report := filepath.Join(dir, "report.json")
	s := newSimulated(t).with("HIPSIM_REPORT=" + report)
	cache := filepath.Join(dir, "kernels")
	var contents [][]byte
	for _, by := range []string{"cpu", "gpu"} {
		path := filepath.Join(dir, by)
		r, stderr := s.load(samplePath, "--dequant", by, "--kernel-cache", cache, "--readback", path, "--dtype-for", "ffn=bf16")
		if r.Dequant != by || (r.Expanded > 0) != (by == "gpu") || by == "gpu" && r.Seconds.Kernels <= 0 ||
			stderr != "" {
			t.Errorf("--dequant %s: %+v, stderr %q", by, r, stderr)
		}
		nothingLeft(t, report, nil)
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		contents = append(contents, b)
	}
	if !bytes.Equal(contents[0], contents[1]) {
		t.Error("the device gives other bytes than the CPU")
	}
	entries := cached(t, cache)
	if len(entries) == 0 {
		t.Fatal("nothing was kept")
	}
	s.with(noCompiler).load(samplePath, "--dequant", "gpu", "--kernel-cache", cache, "--verify", "--dtype-for", "ffn=bf16")
	for path, was := range entries {
		if is := cached(t, cache)[path]; !os.SameFile(was, is) || !is.ModTime().Equal(was.ModTime()) {
			t.Errorf("%s was written again", path)
		}
	}
}

// cached returns the files in the cache of kernels.
func cached(t *testing.T, dir string) map[string]os.FileInfo {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]os.FileInfo{}
	for _, e := range entries {
		if all[e.Name()], err = e.Info(); err != nil {
			t.Fatal(err)
		}
	}
	return all
}

// abortingCompiler writes the source of a hipRTC that aborts the process, as some versions do.
func abortingCompiler(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "hiprtc.c")
	text := "#include <stdlib.h>\nint hiprtcCreateProgram(void) { return 0; }\nint hiprtcCompileProgram(void) { abort(); }\n"
	for _, name := range []string{
		"GetProgramLogSize", "GetProgramLog", "GetCodeSize", "GetCode", "DestroyProgram", "GetErrorString", "Version",
	} {
		text += "int hiprtc" + name + "(void) { return 11; }\n"
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestDequantCannot lets each thing fail that --dequant gpu needs: the command must end with an error.
func TestDequantCannot(t *testing.T) {
	t.Parallel()
	s := newSimulated(t)
	missing := s.with("GGUF2GPU_HIPRTC_LIBRARY=/nowhere/libhiprtc.so")
	aborts := filepath.Join(t.TempDir(), "libhiprtc.so")
	buildLibrary(t, aborts, abortingCompiler(t))
	load := []string{"load", samplePath, "--device", "hip", "--progress", "none", "--dequant", "gpu"}
	for _, tt := range []struct {
		name   string
		on     *simulated
		code   exitCode
		stderr []string
		args   []string
	}{
		{"no hipRTC", missing, exitNoDevice, []string{"the device cannot convert", "/nowhere/libhiprtc.so"}, load},
		{"source refused", s.with(noCompiler), exitFailed, []string{"the device cannot convert", "HIPRTC_ERROR_COMPILATION"}, load},
		{"compiler aborts", s.with("GGUF2GPU_HIPRTC_LIBRARY=" + aborts), exitFailed, []string{"the compiler crashed", "abort"}, load},
		{"code refused", s.with("HIPSIM_FAIL=hipModuleLoadData:0:209"), exitFailed, []string{"hipModuleLoadData"}, load},
		{"launch", s.with("HIPSIM_FAIL=hipModuleLaunchKernel:0:719"), exitFailed, []string{"hipErrorLaunchFailure"}, load},
		{"fault", s.with("HIPSIM_FAIL=hipModuleLaunchKernel:5:700:async"), exitFailed, []string{"expand", "hipErrorIllegal"}, load},
		{
			"bench kernels without hipRTC", missing, exitNoDevice,
			[]string{"/nowhere/libhiprtc.so"},
			[]string{"bench", "kernels", "--device", "hip", "--type", "q4_0"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.on.t = t
			stdout, stderr := tt.on.run(tt.code, tt.args...)
			for _, want := range tt.stderr {
				if !strings.Contains(stderr, want) {
					t.Errorf("stderr has no %q:\n%s", want, stderr)
				}
			}
			if stdout != "" || strings.Count(stderr, "gguf2gpu: ") == 0 {
				t.Errorf("stdout %q, stderr %q", stdout, stderr)
			}
		})
	}
}

// TestAutoDequant loads a model that is large enough for --dequant auto to use the device. Where that fails, the CPU
// converts, and a warning says why.
func TestAutoDequant(t *testing.T) {
	t.Parallel()
	s := newSimulated(t)
	path := largeModel(t)
	for _, tt := range []struct {
		name    string
		on      *simulated
		by      string
		warning string
	}{
		{"all well", s, "gpu", ""},
		{"cached", s.with(noCompiler), "gpu", ""},
		{"no hipRTC", s.with("GGUF2GPU_HIPRTC_LIBRARY=/nowhere/libhiprtc.so"), "cpu", "/nowhere/libhiprtc.so"},
		{"no code", s.with("XDG_CACHE_HOME="+t.TempDir(), noCompiler), "cpu", "HIPRTC_ERROR_COMPILATION"},
		{"launch", s.with("HIPSIM_FAIL=hipModuleLaunchKernel:4:719"), "cpu", "hipErrorLaunchFailure"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.on.t = t
			r, stderr := tt.on.load(path, "--dtype", "f32")
			warnings := 0
			if tt.warning != "" {
				warnings = 1
			}
			if r.Dequant != tt.by || strings.Count(stderr, "level=") != warnings || !strings.Contains(stderr, tt.warning) {
				t.Errorf("%q converted, want %q; stderr, which should have %d warning with %q:\n%s", r.Dequant, tt.by, warnings,
					tt.warning, stderr)
			}
		})
	}
}

// largeModel writes a model that takes 280 MiB more as float32 than in the file.
func largeModel(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "large.gguf")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const rows, width = 18 << 10, 4096
	w := gguf.NewWriter(f, gguf.WriterOptions{})
	err = errors.Join(w.Set("general.architecture", "llama"), w.AddTensor("output.weight", gguf.Q1_0, width, rows), w.WriteHeader())
	if err != nil {
		t.Fatal(err)
	}
	size, _ := gguf.Q1_0.Bytes(rows * width)
	blocks := make([]byte, size)
	synth.Fill(blocks, gguf.Q1_0, 1)
	if err := errors.Join(w.WriteTensor("output.weight", blocks), w.Close()); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestBenchOnGPU measures loads that the CPU and that the device converts for, and kernels alone.
func TestBenchOnGPU(t *testing.T) {
	t.Parallel()
	s := newSimulated(t)
	args := []string{
		"bench", samplePath, "--device", "hip", "--runs", "1", "--scaling=false", "--cold=false", "--json", "--progress", "none",
	}
	modes := func(stdout string) (all []string) {
		t.Helper()
		var r benchReport
		if err := json.Unmarshal([]byte(stdout), &r); err != nil {
			t.Fatalf("%v in %s", err, stdout)
		}
		for _, run := range r.Runs {
			all = append(all, string(run.Mode)+" "+run.DType+" "+run.Dequant)
		}
		return all
	}
	stdout, stderr := s.run(exitOK, args...)
	got := strings.Join(modes(stdout), ", ")
	want := "sync raw none, async raw none, sync f16 cpu, async f16 cpu, async-gpu f16 gpu, sync bf16 cpu, async bf16 cpu, " +
		"async-gpu bf16 gpu, sync f32 cpu, async f32 cpu, async-gpu f32 gpu"
	if got != want || stderr != "" {
		t.Errorf("measured %s, want %s; stderr %q", got, want, stderr)
	}
	stdout, stderr = s.with("GGUF2GPU_HIPRTC_LIBRARY=/nowhere/libhiprtc.so").run(exitOK, args...)
	if n := len(modes(stdout)); n != 8 || strings.Count(stderr, "are not measured") != 1 {
		t.Errorf("%d runs without hipRTC, want 8 and a warning; stderr %q", n, stderr)
	}

	kernels := []string{
		"bench", "kernels", "--device", "hip:0", "--type", "q4_0", "--dtype", "f16", "--buffer", "16MiB", "--runs", "1", "--json",
	}
	began := time.Now()
	stdout, _ = s.run(exitOK, kernels...)
	var r bench.KernelsReport
	if err := json.Unmarshal([]byte(stdout), &r); err != nil {
		t.Fatalf("%v in %s", err, stdout)
	}
	if len(r.Kernels) != 1 || r.Device.Kind != "hip" {
		t.Fatalf("got %s, want one kernel on a GPU", stdout)
	}
	// Writing the output must have taken less time than the whole process. It does not if the unit of the events or the
	// number of bytes is wrong.
	k := r.Kernels[0]
	if (16<<20)/(k.GBps*1e9) > time.Since(began).Seconds() || k.Moved <= k.GBps || r.Ceilings.Device.Copy <= 0 {
		t.Errorf("impossible figures: %s", stdout)
	}
}

// TestDevicesShowsHipRTC shows where hipRTC is, or why it was not found and what that means.
func TestDevicesShowsHipRTC(t *testing.T) {
	t.Parallel()
	s := newSimulated(t)
	library := strings.TrimPrefix(s.env[0], "GGUF2GPU_HIP_LIBRARY=")
	out, _ := s.run(exitOK, "devices")
	if !strings.Contains(out, "\nhipRTC       "+library+"\n") || strings.Contains(out, "without hipRTC") {
		t.Errorf("hipRTC is in %s, but is not shown there:\n%s", library, out)
	}
	missing := s.with("GGUF2GPU_HIPRTC_LIBRARY=/nowhere/libhiprtc.so")
	if out, _ := missing.run(exitOK, "devices"); !strings.Contains(out, "\nhipRTC       none: ") ||
		!strings.Contains(out, "/nowhere/libhiprtc.so") || !strings.Contains(out, "warning      without hipRTC") {
		t.Errorf("there is no hipRTC, but this is not shown:\n%s", out)
	}
	for _, tt := range []struct {
		on       *simulated
		compiler string
		err      string
	}{{s, library, ""}, {missing, "", "/nowhere/libhiprtc.so"}} {
		out, _ := tt.on.run(exitOK, "devices", "--json")
		var r doctor.Report
		if err := json.Unmarshal([]byte(out), &r); err != nil {
			t.Fatalf("%v in %s", err, out)
		}
		l := r.Library
		if l.Compiler != tt.compiler || !strings.Contains(l.CompilerError, tt.err) || (l.CompilerError == "") != (tt.err == "") {
			t.Errorf("compiler %q, error %q; want %q, %q", l.Compiler, l.CompilerError, tt.compiler, tt.err)
		}
	}
}
