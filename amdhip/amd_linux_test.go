package amdhip

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
)

// openAMD opens AMD's own runtime where the dynamic loader finds it. The environment variable AMDHIP_VERSION says which
// version it must be; 'make amd-runtimes' runs these tests with several.
func openAMD(t *testing.T) *Runtime {
	t.Helper()
	for _, key := range []string{
		"GGUF2GPU_HIP_LIBRARY", "GGUF2GPU_HIPRTC_LIBRARY", "ROCM_PATH", "HIP_PATH",
	} {
		t.Setenv(key, "")
	}
	rt, err := Open(Options{})
	if errors.Is(err, ErrNoLibrary) {
		require(t, "amd", "AMD's runtime is not installed (Debian: libamdhip64-5): "+err.Error())
	}
	closing(t, rt, err)
	v := versionAMD(t, rt)
	wantVersion(t, "the library "+rt.Library(), fmt.Sprintf("%d.%d", v/1e7, v/1e5%100))
	return rt
}

// versionAMD returns the version of the runtime.
func versionAMD(t *testing.T, rt *Runtime) int {
	t.Helper()
	v, _, err := rt.Version()
	check(t, err)
	return v
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
	// Every version has all symbols, required and optional, but for the one that HIP 6 brought.
	var want []string
	if r < 6e7 {
		want = []string{"hipGetDevicePropertiesR0600"}
	}
	if got := unbound(rt.api); !slices.Equal(got, want) {
		t.Errorf("without %v, want %v", got, want)
	}
	wantOneRoot(t)
}

// wantOneRoot fails the test if a library of the process lies outside of the directory that the environment variable
// AMDHIP_ROOT names: libraries of two systems would be mixed.
func wantOneRoot(t *testing.T) {
	t.Helper()
	root := os.Getenv("AMDHIP_ROOT")
	if root == "" {
		return
	}
	maps, err := os.ReadFile("/proc/self/maps")
	check(t, err)
	for line := range strings.Lines(string(maps)) {
		_, path, _ := strings.Cut(strings.TrimSpace(line), "/")
		file := filepath.Base(path)
		library := strings.HasPrefix(file, "lib") || strings.HasPrefix(file, "ld-")
		if path = "/" + path; library && strings.Contains(file, ".so") && !strings.HasPrefix(path, root+"/") {
			t.Errorf("%s is not below %s", path, root)
		}
	}
}

// TestAMDDiscovery opens AMD's library, and the hipRTC that belongs to it, in each of the ways in which they are found.
func TestAMDDiscovery(t *testing.T) {
	rt := openAMD(t)
	major := versionAMD(t, rt) / 1e7
	soname := fmt.Sprintf("libamdhip64.so.%d", major)
	if rt.Library() != soname {
		t.Errorf("the dynamic loader found %s, want %s", rt.Library(), soname)
	}
	symbol, err := dlsym(must(dlopen(soname))(t), "hipGetDeviceCount")
	check(t, err)
	folder := filepath.Dir(mappedFile(symbol))
	root := t.TempDir()
	lib := filepath.Join(root, "opt", fmt.Sprintf("rocm-%d.0.0", major), "lib")
	check(t, os.MkdirAll(filepath.Dir(lib), 0o755))
	check(t, os.Symlink(folder, lib))
	for _, tt := range []struct{ name, key, value, want string }{
		{"GGUF2GPU_HIP_LIBRARY, soname", "GGUF2GPU_HIP_LIBRARY", soname, soname},
		{"GGUF2GPU_HIP_LIBRARY, path", "GGUF2GPU_HIP_LIBRARY", filepath.Join(folder, soname), filepath.Join(folder, soname)},
		{"ROCM_PATH", "ROCM_PATH", filepath.Dir(lib), filepath.Join(lib, soname)},
		{"HIP_PATH", "HIP_PATH", filepath.Dir(lib), filepath.Join(lib, soname)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv(tt.key, tt.value)
			rt := must(Open(Options{}))(t)
			defer rt.Close()
			wantCompilerBeside(t, rt, folder)
			if rt.Library() != tt.want || versionAMD(t, rt)/1e7 != major {
				t.Errorf("got %s, want %s", rt.Library(), tt.want)
			}
		})
	}
	t.Run("opt", func(t *testing.T) {
		f := finder{root: root, env: func(string) string { return "" }, open: func(path string) error {
			if path == filepath.Base(path) {
				return os.ErrNotExist // as if the dynamic loader did not find it
			}
			_, err := open(path, new(hip.API), "HIP library")
			return err
		}}
		if path, err := f.find(""); err != nil || path != filepath.Join(lib, soname) {
			t.Errorf("got %s, %v", path, err)
		}
	})
}

// wantCompilerBeside fails the test unless hipRTC was found where its version has it: in the HIP library up to HIP 6,
// then beside it.
func wantCompilerBeside(t *testing.T, rt *Runtime, folder string) {
	t.Helper()
	want := rt.Library()
	if major := versionAMD(t, rt) / 1e7; major >= 7 {
		want = filepath.Join(folder, fmt.Sprintf("libhiprtc.so.%d", major))
	}
	if path, err := rt.Compiler(); err != nil || path != want {
		t.Errorf("hipRTC: got %s, %v; want %s", path, err, want)
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

// TestAMDWithoutDevice calls every function of the table on a machine without a GPU: pinning, streams, events, copies,
// modules, graphs and virtual memory. None may end the process, each says that there is no device, and none writes to
// where its result would go.
func TestAMDWithoutDevice(t *testing.T) {
	rt := openAMD(t)
	if _, err := rt.DeviceCount(); err == nil {
		t.Skip("this machine has a GPU; the test is about having none")
	}
	want := ErrNoDevice
	if versionAMD(t, rt) < 5_07_00000 {
		want = ErrInvalidDevice // of HIP 5.2; of 5.7 and later only hipGetDeviceCount differs, and it does not any more
	}
	working := []string{
		"HipRuntimeGetVersion", "HipDriverGetVersion", "HipGetDeviceCount", "HipGetErrorName",
		"HipGetErrorString",
	}
	table := reflect.ValueOf(rt.api).Elem()
	for i := range table.NumField() {
		field := table.Type().Field(i)
		if field.Name == "_" || table.Field(i).IsNil() || slices.Contains(working, field.Name) {
			continue
		}
		var args, outs []reflect.Value
		for in := range field.Type.Ins() {
			arg := reflect.Zero(in)
			if in.Kind() == reflect.Pointer {
				arg = reflect.New(in.Elem())
				if in == reflect.TypeFor[*byte]() { // of a text or a structure
					arg = reflect.ValueOf(&make([]byte, 4096)[0])
				}
				outs = append(outs, arg)
			}
			args = append(args, arg)
		}
		if got := table.Field(i).Call(args)[0].Interface(); got != want {
			t.Errorf("%s: got %v, want %v", field.Name, got, want)
		}
		for _, out := range outs {
			if !out.Elem().IsZero() {
				t.Errorf("%s: wrote %v", field.Name, out.Elem())
			}
		}
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
		{
			"source", `extern "C" __global__ void f() { no_such_thing(); }`,
			[]string{arch},
			ErrRTCCompilation,
			"'no_such_thing'",
		},
		{"option", addOneSource, []string{arch, "--no-such-option"}, ErrRTCCompilation, "'--no-such-option'"},
		{
			"long log", "#error " + strings.Repeat("long ", 5000),
			[]string{arch},
			ErrRTCCompilation,
			strings.Repeat("long ", 5000)[:24999],
		},
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

// TestAMDUnknownArch compiles, in a process of its own, for an architecture that no version knows. That is an error, or
// it ends the process: Debian's 5.2, 5.7 and 6.4 do that, and 7.2 does not any more.
func TestAMDUnknownArch(t *testing.T) {
	rt := openAMD(t)
	if _, err := rt.Compiler(); errors.Is(err, ErrUnsupported) {
		require(t, "amd", "AMD's runtime has no hipRTC: "+err.Error())
	}
	const child = "AMDHIP_TEST_UNKNOWN_ARCH"
	if os.Getenv(child) != "" {
		_, err := rt.Compile("add_one.hip", addOneSource, "--gpu-architecture=gfx9999")
		fmt.Printf("answer: %v\n", err)
		return
	}
	cmd := exec.Command(must(os.Executable())(t), "-test.run=^TestAMDUnknownArch$")
	cmd.Env = append(os.Environ(), child+"=1")
	out, err := cmd.CombinedOutput()
	aborts := err != nil && bytes.Contains(out, []byte("SIGABRT"))
	refuses := err == nil && bytes.Contains(out, []byte("answer: hiprtcCompileProgram, program \"add_one.hip\": "+
		ErrRTCCompilation.Error()))
	if !aborts && !refuses {
		t.Errorf("got %v, want an abort or an error of the compiler:\n%.500s", err, out)
	}
	if version := os.Getenv("AMDHIP_VERSION"); version != "" && aborts != (version < "7") {
		t.Errorf("version %s: aborts: %t", version, aborts)
	}
}
