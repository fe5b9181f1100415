package amdhip

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
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
	for code, want := range statusNames {
		if got := rt.api.hipGetErrorName(code); got != want {
			t.Errorf("code %d: the library says %s, we say %s", code, got, want)
		}
		if rt.api.hipGetErrorString(code) == "" {
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
}
