package amdhip

import (
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ebitengine/purego"
)

// addOne compiles, loads and launches a kernel on the device, and looks at what it did.
func addOne(t *testing.T, d *Device) {
	t.Helper()
	code := must(d.Runtime().Compile("add_one.hip", addOneSource, "--gpu-architecture="+d.Arch()))(t)
	m := must(d.LoadModule(code))(t)
	f := must(m.Function("add_one"))(t)
	s := must(d.NewStream())(t)
	defer s.Close()
	const n = 1000
	mem, h := must(d.Malloc(8*n))(t), must(d.HostMalloc(8*n))(t)
	defer mem.Close()
	defer h.Close()
	for i := range n {
		binary.LittleEndian.PutUint64(h.Bytes()[8*i:], uint64(i)<<32|0xFFFFFFFF)
	}
	check(t, s.CopyToDevice(mem.Ptr(), h, 0, 8*n))
	check(t, s.Launch(f, 2, 256, uint64(mem.Ptr()), n-1)) // fewer threads than numbers, and the last is left alone
	check(t, s.CopyToHost(h, 0, mem.Ptr(), 8*n))
	check(t, s.Synchronize())
	for i := range n {
		want := (uint64(i) + 1) << 32
		if i == n-1 {
			want--
		}
		if got := binary.LittleEndian.Uint64(h.Bytes()[8*i:]); got != want {
			t.Fatalf("number %d: got %#x, want %#x", i, got, want)
		}
	}
	_, err := m.Function("no_such_kernel")
	wantCode(t, err, "hipModuleGetFunction", ErrNotFound)
	check(t, m.Close())
}

// openSim7 opens a simulator of HIP 7, where hipRTC is a library of its own, and returns the path at which that is
// expected.
func openSim7(t *testing.T) (*Runtime, string) {
	t.Helper()
	t.Setenv("GGUF2GPU_HIPRTC_LIBRARY", "")
	path := buildLibrary(t, filepath.Join(t.TempDir(), "libamdhip64.so.7"), []string{"hipsim.c"})
	rt, _ := openSimAt(t, path, "VERSION=7")
	return rt, filepath.Join(filepath.Dir(rt.Library()), "libhiprtc.so.7")
}

// TestNoCompiler: HIP 7 without its libhiprtc.so has no hipRTC, whatever functions are in the HIP library.
func TestNoCompiler(t *testing.T) {
	rt, beside := openSim7(t)
	path, err := rt.Compiler()
	if err == nil {
		t.Skipf("this machine has a hipRTC of HIP 7, %s; the test is about having none", path)
	}
	e, ok := errors.AsType[*CompilerError](err)
	if !ok || !errors.Is(err, ErrUnsupported) || !errors.Is(err, fs.ErrNotExist) || errors.Is(err, ErrNoLibrary) {
		t.Fatalf("got %v, want a CompilerError", err)
	}
	if len(e.Attempts) < 3 || e.Attempts[0].Path != beside || e.Attempts[1].Path != "libhiprtc.so.7" {
		t.Errorf("got %v, want %s, the loader and /opt", err, beside)
	}
	_, err = rt.Compile("x", addOneSource)
	wantIs(t, err, ErrUnsupported)
	// The search is made once; what comes later is not seen.
	check(t, os.WriteFile(beside, []byte("no library"), 0o644))
	if _, again := rt.Compiler(); again == nil || again.Error() != e.Error() {
		t.Errorf("got %v, want %v again", again, e)
	}
	// A file that is there but is none is an attempt with the loader's reason.
	rt = must(Open(Options{Library: rt.Library()}))(t)
	_, err = rt.Compiler()
	if e, ok := errors.AsType[*CompilerError](err); !ok || e.Attempts[0].Path != beside ||
		errors.Is(e.Attempts[0].Err, fs.ErrNotExist) {
		t.Errorf("got %v, want the loader's reason for %s", err, beside)
	}
	check(t, rt.Close())
	_, err = rt.Compiler()
	wantIs(t, err, ErrClosed)
}

// TestCompilerVariable: the environment names hipRTC, and nothing else is tried.
func TestCompilerVariable(t *testing.T) {
	rt, _ := openSim7(t)
	t.Setenv("GGUF2GPU_HIPRTC_LIBRARY", "libm.so.6")
	_, err := rt.Compiler()
	e, ok := errors.AsType[*CompilerError](err)
	if !ok || len(e.Attempts) != 1 || e.Attempts[0].Path != "libm.so.6" ||
		!strings.Contains(err.Error(), "not a usable hipRTC library, it lacks hiprtcCreateProgram, hiprtcCompileProgram,") {
		t.Errorf("got %v, want one attempt and what libm.so.6 lacks", err)
	}
}

// TestKernels compiles, loads and launches on every version of HIP, on a device that is not the first.
func TestKernels(t *testing.T) {
	t.Setenv("GGUF2GPU_HIPRTC_LIBRARY", "")
	for _, version := range []string{"5", "6"} {
		t.Run("HIP "+version+", hipRTC inside", func(t *testing.T) {
			rt, _ := openSim(t, "VERSION="+version, "DEVICES=2")
			addOne(t, device(t, rt, 1))
			if got := must(rt.Compiler())(t); got != rt.Library() {
				t.Errorf("hipRTC is from %s, want %s", got, rt.Library())
			}
		})
	}
	t.Run("HIP 6, hipRTC outside", func(t *testing.T) {
		dir := t.TempDir()
		path := buildLibrary(t, filepath.Join(dir, "libamdhip64.so"), []string{"hipsim.c"})
		want := buildLibrary(t, filepath.Join(dir, "libhiprtc.so.6"), []string{"hiprtc.c"})
		rt, _ := openSimAt(t, path, "VERSION=6")
		addOne(t, device(t, rt, 0))
		if got := must(rt.Compiler())(t); got != want {
			t.Errorf("hipRTC is from %s, want %s", got, want)
		}
	})
	t.Run("HIP 7", func(t *testing.T) {
		rt, beside := openSim7(t)
		buildLibrary(t, beside, []string{"hiprtc.c"})
		addOne(t, device(t, rt, 0))
		if got := must(rt.Compiler())(t); got != beside {
			t.Errorf("hipRTC is from %s, want %s", got, beside)
		}
	})
	t.Run("variable", func(t *testing.T) {
		rt, _ := openSim7(t)
		want := buildLibrary(t, filepath.Join(t.TempDir(), "any-name.so"), []string{"hiprtc.c"})
		t.Setenv("GGUF2GPU_HIPRTC_LIBRARY", want)
		addOne(t, device(t, rt, 0))
		if got := must(rt.Compiler())(t); got != want {
			t.Errorf("hipRTC is from %s, want %s", got, want)
		}
	})
}

// TestSimCompileError: the compiler's log comes with the error.
func TestSimCompileError(t *testing.T) {
	rt, _ := openSim(t)
	_, err := rt.Compile("wrong.hip", `extern "C" __global__ void f() { no_such_thing(); }`, "--gpu-architecture=gfx90a")
	if e, ok := errors.AsType[*CompileError](err); !ok || e.Code != ErrRTCCompilation ||
		!strings.Contains(e.Log, "no_such_thing") {
		t.Errorf("got %v, want %v with a log", err, ErrRTCCompilation)
	}
}

// TestLaunchFaults: a kernel that fails on the device, and one that never ends, are known to the stream.
func TestLaunchFaults(t *testing.T) {
	rt, sim := openSim(t)
	d := device(t, rt, 0)
	code := must(rt.Compile("add_one.hip", addOneSource, "--gpu-architecture="+d.Arch()))(t)
	f := must(closing(t, must(d.LoadModule(code))(t), nil).Function("add_one"))(t)
	for mode, want := range map[string]error{"719:async": ErrLaunchFailure, "0:stall=50": nil} {
		b := newBench(t, d)
		sim.set("FAIL", "hipModuleLaunchKernel:1:"+mode)
		check(t, b.s.Launch(f, 1, 1, uint64(b.m.Ptr()), 1))
		check(t, b.s.Record(b.e))
		if done, err := b.e.Query(); want == nil && (done || err != nil) {
			t.Errorf("%s: %v, %v, want not done", mode, done, err)
		}
		if err := b.s.Synchronize(); !errors.Is(err, want) {
			t.Errorf("%s: got %v, want %v", mode, err, want)
		}
		sim.set("FAIL", "")
	}
}

// TestMappedFile: the file of a library is known however it was opened, through a link or by its bare name.
func TestMappedFile(t *testing.T) {
	path := buildSim(t)
	link := filepath.Join(t.TempDir(), "libamdhip64.so.6")
	check(t, os.Symlink(path, link))
	handle, err := purego.Dlopen(link, purego.RTLD_NOW|purego.RTLD_LOCAL)
	check(t, err)
	symbol := must(purego.Dlsym(handle, "hipGetDeviceCount"))(t)
	if got := mappedFile(symbol); got != must(filepath.EvalSymlinks(path))(t) {
		t.Errorf("got %q, want %q", got, path)
	}
	if got := mappedFile(0); got != "" {
		t.Errorf("of address 0: got %q, want nothing", got)
	}
}

// addOneSource has one kernel, which adds 1 to n numbers. All parameters have 8 bytes.
const addOneSource = `typedef unsigned long long u64;
extern "C" __global__ __launch_bounds__(256) void add_one(u64 *p, u64 n) {
	for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < n; i += gridDim.x * (u64)blockDim.x) p[i]++;
}
`
