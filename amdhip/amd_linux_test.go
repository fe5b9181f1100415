package amdhip

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
)

// openAMD opens AMD's own runtime where the dynamic loader finds it.
func openAMD(t *testing.T) *Runtime {
	t.Helper()
	for _, key := range []string{"GGUF2GPU_HIP_LIBRARY", "ROCM_PATH", "HIP_PATH"} {
		t.Setenv(key, "")
	}
	rt, err := Open(Options{})
	if errors.Is(err, ErrNoLibrary) {
		require(t, "amd", "AMD's runtime is not installed (Debian: libamdhip64-5): "+err.Error())
	}
	return closing(t, rt, err)
}

// TestAMDLibrary binds AMD's runtime, with or without a GPU.
func TestAMDLibrary(t *testing.T) {
	rt := openAMD(t)
	r, d, err := rt.Version()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s: HIP runtime %s, driver %s; without %v", rt.Library(), VersionString(r), VersionString(d), unbound(rt.api))
	if !strings.HasPrefix(filepath.Base(rt.Library()), "libamdhip64.so") {
		t.Errorf("got %s", rt.Library())
	}
	if r < 5e7 || r >= 9e7 {
		t.Errorf("got version %d", r)
	}
	// The library's own names of the codes are ours.
	for code, want := range hip.StatusNames {
		if got := rt.api.HipGetErrorName(code); got != want {
			t.Errorf("code %d: the library says %s, we say %s", code, got, want)
		}
		if rt.api.HipGetErrorString(code) == "" {
			t.Errorf("code %d: no text", code)
		}
	}
	required, optional := symbols()
	if got := len(unbound(rt.api)); got > len(optional) {
		t.Errorf("%d of %d symbols are unbound", got, len(required)+len(optional))
	}
}

// TestAMDNoDevice: without a GPU AMD's runtime says so in several ways, and all of them mean ErrNoDevice.
func TestAMDNoDevice(t *testing.T) {
	rt := openAMD(t)
	n, err := rt.DeviceCount()
	if err == nil {
		t.Skipf("this machine has %d GPUs; the test is about having none", n)
	}
	wantIs(t, err, ErrNoDevice)
	_, err = rt.Device(0)
	wantIs(t, err, ErrNoDevice)
	if _, statErr := os.Stat("/dev/kfd"); statErr != nil && !strings.Contains(err.Error(), "/dev/kfd") {
		t.Errorf("got %v, want a hint at /dev/kfd", err)
	}
}

// TestAMDDevice does a round trip on the GPU, if there is one.
func TestAMDDevice(t *testing.T) {
	rt := openAMD(t)
	d, err := rt.Device(0)
	if errors.Is(err, ErrNoDevice) {
		t.Skipf("no GPU: %v", err)
	}
	check(t, err)
	t.Logf("%s, %s, %s, %s, %d bytes", d.Name(), d.Arch(), d.PCIBusID(), d.UUID(), d.TotalMemory())
	roundTrip(t, d)
	if _, err := rt.Compiler(); err != nil {
		t.Skipf("no kernel is launched: %v", err)
	}
	addOne(t, d)
}

// TestAMDCompile compiles with AMD's own compiler, which needs no GPU. The architecture is one that every version
// knows.
func TestAMDCompile(t *testing.T) {
	t.Setenv("GGUF2GPU_HIPRTC_LIBRARY", "")
	rt := openAMD(t)
	path, err := rt.Compiler()
	if errors.Is(err, ErrUnsupported) {
		require(t, "amd", "AMD's runtime has no hipRTC: "+err.Error())
	}
	check(t, err)
	const arch = "--gpu-architecture=gfx90a"
	code := must(rt.Compile("add_one.hip", addOneSource, arch, "-O3"))(t)
	t.Logf("%s: %d bytes of code", path, len(code))
	if !bytes.HasPrefix(code, []byte("\x7fELF")) || !bytes.Contains(code, []byte("add_one.kd\x00")) {
		t.Errorf("got %q..., want an ELF file with the kernel's descriptor", code[:min(len(code), 16)])
	}
	for _, tt := range []struct {
		name, source string
		options      []string
		code         RTCStatus
		log          string
	}{
		{"source", `extern "C" __global__ void f() { no_such_thing(); }`, []string{arch}, ErrRTCCompilation,
			"'no_such_thing'"},
		{"option", addOneSource, []string{arch, "--no-such-option"}, ErrRTCCompilation, "'--no-such-option'"},
		{"long log", "#error " + strings.Repeat("long ", 5000), []string{arch}, ErrRTCCompilation,
			strings.Repeat("long ", 5000)[:24999]},
		{"no source", "", []string{arch}, ErrRTCInvalidInput, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			code, err := rt.Compile("wrong.hip", tt.source, tt.options...)
			e, ok := errors.AsType[*CompileError](err)
			if !ok || code != nil || e.Code != tt.code || e.Name != "wrong.hip" || !strings.Contains(e.Log, tt.log) {
				t.Errorf("got %v, want %v with %q in the log", err, tt.code, tt.log)
			}
		})
	}
}
