package soft

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
)

// addOneSource has one kernel, which adds 1 to n numbers. All parameters have 8 bytes.
const addOneSource = `typedef unsigned long long u64;
extern "C" __global__ __launch_bounds__(256) void add_one(u64 *p, u64 n) {
	for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < n; i += gridDim.x * (u64)blockDim.x) p[i]++;
}
`

// offerAddOne makes a stand-in for add_one known.
func offerAddOne(rt *amdhip.Runtime) {
	Of(rt).Offer("add_one", 2, func(l *amdhip.KernelCall) hip.Status {
		mem, st := l.Memory(amdhip.DevicePtr(l.Args[0]), 8*l.Args[1])
		for ; len(mem) > 0; mem = mem[8:] {
			binary.LittleEndian.PutUint64(mem, binary.LittleEndian.Uint64(mem)+1)
		}
		return st
	})
}

// loadKernel compiles source for d and returns the function of that name, until the end of the test.
func loadKernel(t testing.TB, d *amdhip.Device, source, name string) *amdhip.Function {
	t.Helper()
	code := value(d.Runtime().Compile("test.hip", source, "--gpu-architecture="+d.Arch()))(t)
	m, err := d.LoadModule(code)
	closeLater(t, m, err)
	return value(m.Function(name))(t)
}

// offerKernel offers run as a kernel of params parameters and returns the function that runs it.
func offerKernel(t testing.TB, d *amdhip.Device, params int, run func(*amdhip.KernelCall) hip.Status) *amdhip.Function {
	t.Helper()
	Of(d.Runtime()).Offer("kernel", params, run)
	return loadKernel(t, d, `extern "C" __global__ void kernel()`, "kernel")
}

func TestKernel(t *testing.T) {
	rt, d := openSoft(t, Options{})
	if path, err := rt.Compiler(); path != "software device" || err != nil {
		t.Errorf("the compiler is %q, %v", path, err)
	}
	offerAddOne(rt)
	f := loadKernel(t, d, addOneSource, "add_one")
	if f.Module().Device() != d {
		t.Error("the module is on another device")
	}
	s, m := newStream(t, d), newMemory(t, d, 4096)
	noError(t, s.Memset(m.Ptr(), 0xFF, 4096))
	noError(t, s.Launch(f, 2, 256, uint64(m.Ptr()), 3))
	want := append(make([]byte, 24), bytes.Repeat([]byte{0xFF}, 4096-24)...)
	noError(t, s.Synchronize())
	if got := readBack(t, m); !bytes.Equal(got, want) {
		t.Errorf("the memory begins with %x, want %x", got[:32], want[:32])
	}
	if got := Of(rt).Stats().Modules; got != 1 {
		t.Errorf("%d modules, want 1", got)
	}
	noError(t, f.Module().Close())
	noError(t, f.Module().Close())
	sw := Of(rt)
	if got := sw.Stats().Modules + len(sw.modules) + len(sw.functions) + len(sw.programs); got != 0 {
		t.Errorf("%d modules, functions and programs are left", got)
	}
	for _, call := range []string{
		"hiprtcCreateProgram", "hiprtcCompileProgram", "hiprtcGetProgramLogSize", "hiprtcGetProgramLog", "hiprtcGetCodeSize",
		"hiprtcGetCode", "hiprtcDestroyProgram", "hipModuleLoadData", "hipModuleGetFunction", "hipModuleLaunchKernel",
		"hipModuleUnload",
	} {
		if got := sw.Calls()[call]; got != 1 {
			t.Errorf("%d calls of %s, want 1", got, call)
		}
	}
}

func TestImages(t *testing.T) {
	rt, d := openSoft(t, Options{})
	Of(rt).Offer("b", 0, func(*amdhip.KernelCall) hip.Status { return hip.Success })
	offerAddOne(rt)
	code := value(rt.Compile("x", addOneSource+`extern "C" __global__ void b()`))(t)
	page := []byte(codeObject(archName, []string{strings.Repeat("n", pageSize-len(codeObject(archName, []string{""})))}))
	flipped, longer := bytes.Clone(code), append(bytes.Clone(code), '\n')
	flipped[len(codeMagic)+1] ^= 1
	for _, tt := range []struct {
		name string
		code []byte
		want error
	}{
		{"good", code, nil},
		{"good, of exactly a page", page, nil},
		{"nothing", nil, hip.ErrInvalidImage},
		{"one byte", []byte("x"), hip.ErrInvalidImage},
		{"an ELF file", []byte("\x7fELF\x02\x01\x01\x00"), hip.ErrInvalidImage},
		{"cut short", code[:len(code)-1], hip.ErrInvalidImage},
		{"a byte more", longer, hip.ErrInvalidImage},
		{"a bit is wrong", flipped, hip.ErrInvalidImage},
		{"other magic, right checksum", []byte(sealed("code for " + archName + "\nadd_one\n")), hip.ErrInvalidImage},
		{"another architecture", value(rt.Compile("x", addOneSource, "--offload-arch=gfx906"))(t), hip.ErrNoBinaryForGPU},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m, err := d.LoadModule(tt.code)
			if tt.want != nil {
				wantLoad(t, err, tt.want)
				return
			}
			noError(t, err)
			noError(t, m.Close())
		})
	}
	if got := Of(rt).Stats().Modules; got != 0 {
		t.Errorf("%d modules are left", got)
	}
}

// wantLoad compares the error of LoadModule, which must also name the call.
func wantLoad(t *testing.T, err, want error) {
	t.Helper()
	if e, ok := errors.AsType[*amdhip.Error](err); !ok || !errors.Is(err, want) || e.Func != "hipModuleLoadData" {
		t.Errorf("got %v, want hipModuleLoadData: %v", err, want)
	}
}

func TestFunctions(t *testing.T) {
	rt, d := openSoft(t, Options{})
	offerAddOne(rt)
	code := codeObject(archName, []string{"add_one", "not_offered"})
	m, err := d.LoadModule([]byte(code))
	closeLater(t, m, err)
	value(m.Function("add_one"))(t)
	for name, want := range map[string]error{
		"not_offered": hip.ErrNotFound, "add": hip.ErrNotFound,
		"": hip.ErrInvalidValue,
	} {
		if f, err := m.Function(name); f != nil || !errors.Is(err, want) ||
			!strings.Contains(err.Error(), fmt.Sprintf("%q", name)) {
			t.Errorf("%q: %v, %v; want %v", name, f, err, want)
		}
	}
	Of(rt).Offer("other", 0, func(*amdhip.KernelCall) hip.Status { return hip.Success })
	if _, err := m.Function("other"); !errors.Is(err, hip.ErrNotFound) {
		t.Errorf("a kernel that the module does not have: %v, want %v", err, hip.ErrNotFound)
	}
	defer func() {
		if recover() == nil {
			t.Error("Offer takes a function that is nil")
		}
	}()
	Of(rt).Offer("nothing", 0, nil)
}

func TestLaunchRefuses(t *testing.T) {
	rt, d := openSoft(t, Options{Devices: 2})
	otherRuntime, stranger := openSoft(t, Options{})
	offerAddOne(rt)
	offerAddOne(otherRuntime)
	f, foreign := loadKernel(t, d, addOneSource, "add_one"), loadKernel(t, stranger, addOneSource, "add_one")
	neighbour := loadKernel(t, value(rt.Device(1))(t), addOneSource, "add_one")
	s, m := newStream(t, d), newMemory(t, d, 8)
	closed, gone := value(d.NewStream())(t), loadKernel(t, d, addOneSource, "add_one")
	noError(t, closed.Close())
	noError(t, gone.Module().Close())
	p := uint64(m.Ptr())
	for _, tt := range []struct {
		name            string
		s               *amdhip.Stream
		f               *amdhip.Function
		blocks, threads uint32
		args            []uint64
		want            error
	}{
		{"closed stream", closed, f, 1, 1, []uint64{p, 1}, amdhip.ErrClosed},
		{"closed module", s, gone, 1, 1, []uint64{p, 1}, amdhip.ErrClosed},
		{"another runtime's module", s, foreign, 1, 1, []uint64{p, 1}, hip.ErrInvalidHandle},
		{"another device's module", s, neighbour, 1, 1, []uint64{p, 1}, hip.ErrInvalidHandle},
		{"no blocks", s, f, 0, 1, []uint64{p, 1}, hip.ErrInvalidValue},
		{"no threads", s, f, 1, 0, []uint64{p, 1}, hip.ErrInvalidValue},
		{"too many threads in all", s, f, 1 << 31, 2, []uint64{p, 1}, hip.ErrInvalidValue},
		{"too many threads in a block", s, f, 1, 1025, []uint64{p, 1}, hip.ErrInvalidValue},
		{"an argument too few", s, f, 1, 1, []uint64{p}, hip.ErrInvalidValue},
		{"no argument", s, f, 1, 1, nil, hip.ErrInvalidValue},
		{"an argument too many", s, f, 1, 1, []uint64{p, 1, 1}, hip.ErrInvalidValue},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := tt.s.Launch(tt.f, tt.blocks, tt.threads, tt.args...); !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
	if _, err := gone.Module().Function("add_one"); !errors.Is(err, amdhip.ErrClosed) {
		t.Errorf("function of a closed module: %v, want %v", err, amdhip.ErrClosed)
	}
	// What was refused has not spoilt the stream, and it takes what is right.
	noError(t, s.Launch(f, 1, 1024, p, 1))
	noError(t, s.Synchronize())
}

// On a machine with two GPUs whatever device is current, all calls reach the module's own.
func TestModuleOnSecondDevice(t *testing.T) {
	rt, _ := openSoft(t, Options{Devices: 2})
	offerAddOne(rt)
	d := value(rt.Device(1))(t)
	f := loadKernel(t, d, addOneSource, "add_one")
	s, m := newStream(t, d), newMemory(t, d, 8)
	noError(t, s.Memset(m.Ptr(), 0, 8))
	noError(t, s.Launch(f, 1, 1, uint64(m.Ptr()), 1))
	if got := readBackAfter(t, s, m); got[0] != 1 {
		t.Errorf("got %v, want 1", got)
	}
	noError(t, f.Module().Close())
}

func readBackAfter(t testing.TB, s *amdhip.Stream, m *amdhip.Memory) []byte {
	t.Helper()
	noError(t, s.Synchronize())
	return readBack(t, m)
}

// What the table answers to calls that the handles above never make.
func TestModuleCalls(t *testing.T) {
	rt, d := openSoft(t, Options{Devices: 2})
	offerAddOne(rt)
	f := loadKernel(t, d, addOneSource, "add_one")
	foreign := loadKernel(t, value(rt.Device(1))(t), addOneSource, "add_one")
	gone := loadKernel(t, d, addOneSource, "add_one")
	noError(t, gone.Module().Close())
	s, m := newStream(t, d), newMemory(t, d, 8)
	values := []uint64{uint64(m.Ptr()), 1}
	params := []unsafe.Pointer{unsafe.Pointer(&values[0]), unsafe.Pointer(&values[1]), nil}
	api := Of(rt).table()
	var out uintptr
	launch := func(f *amdhip.Function, grid, block [3]uint32, shared uint32, extra *uintptr) hip.Status {
		return api.HipModuleLaunchKernel(f.Handle(), grid[0], grid[1], grid[2], block[0], block[1], block[2], shared,
			s.Handle(),
			&params[0], extra)
	}
	one := [3]uint32{1, 1, 1}
	for _, tt := range []struct {
		name      string
		got, want hip.Status
	}{
		{"good", launch(f, one, one, 0, nil), hip.Success},
		{"function of an unloaded module", launch(gone, one, one, 0, nil), hip.ErrInvalidHandle},
		{"function of another device", launch(foreign, one, one, 0, nil), hip.ErrInvalidHandle},
		{"no depth", launch(f, [3]uint32{1, 1, 0}, one, 0, nil), hip.ErrInvalidValue},
		{"two dimensions of blocks", launch(f, [3]uint32{1, 2, 1}, one, 0, nil), hip.ErrNotSupported},
		{"three dimensions of threads", launch(f, one, [3]uint32{1, 1, 2}, 0, nil), hip.ErrNotSupported},
		{"shared memory", launch(f, one, one, 4, nil), hip.ErrNotSupported},
		{"extra", launch(f, one, one, 0, &out), hip.ErrNotSupported},
		{"too large", launch(f, [3]uint32{1 << 31, 1, 1}, [3]uint32{2, 1, 1}, 0, nil), hip.ErrInvalidValue},
		{
			"no parameters", api.HipModuleLaunchKernel(f.Handle(), 1, 1, 1, 1, 1, 1, 0, s.Handle(), nil, nil),
			hip.ErrInvalidValue,
		},
		{"unload twice", api.HipModuleUnload(gone.Module().Handle()), hip.ErrNotFound},
		{"nowhere to put the module", api.HipModuleLoadData(nil, pageSize), hip.ErrInvalidValue},
		{"no image", api.HipModuleLoadData(&out, 0), hip.ErrInvalidValue},
		{
			"function of an unloaded module by name", api.HipModuleGetFunction(&out, gone.Module().Handle(), "add_one"),
			hip.ErrInvalidHandle,
		},
		{
			"function while another device is current", api.HipModuleGetFunction(&out, foreign.Module().Handle(), "add_one"),
			hip.ErrInvalidHandle,
		},
	} {
		if tt.got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, tt.got, tt.want)
		}
	}
	if out != 0 {
		t.Errorf("a handle was answered: %#x", out)
	}
	noError(t, s.Synchronize())
}

// Each call fails in turn: the error names it, and nothing is left behind.
func TestModuleFaults(t *testing.T) {
	rt, d := openSoft(t, Options{})
	offerAddOne(rt)
	f := loadKernel(t, d, addOneSource, "add_one")
	s, m := newStream(t, d), newMemory(t, d, 8)
	for call, try := range map[string]func() error{
		"hipModuleLoadData": func() error {
			_, err := d.LoadModule([]byte(codeObject(archName, nil)))
			return err
		},
		"hipModuleGetFunction":  func() error { _, err := f.Module().Function("add_one"); return err },
		"hipModuleLaunchKernel": func() error { return s.Launch(f, 1, 1, uint64(m.Ptr()), 1) },
	} {
		Of(rt).Inject(Fault{Func: call, N: 1, Code: hip.ErrLaunchOutOfResources})
		e, ok := errors.AsType[*amdhip.Error](try())
		if !ok || e.Func != call || e.Code != hip.ErrLaunchOutOfResources {
			t.Errorf("got %v, want %s: %v", e, call, hip.ErrLaunchOutOfResources)
		}
	}
	if got := Of(rt).Stats().Modules; got != 1 {
		t.Errorf("%d modules, want 1", got)
	}
	noError(t, s.Synchronize())
	// A module whose unloading failed is closed all the same, and says so once.
	again := loadKernel(t, d, addOneSource, "add_one")
	Of(rt).Inject(Fault{Func: "hipModuleUnload", N: 1, Code: hip.ErrUnknown})
	if err := again.Module().Close(); !errors.Is(err, hip.ErrUnknown) {
		t.Errorf("got %v, want %v", err, hip.ErrUnknown)
	}
	noError(t, again.Module().Close())
	if got := Of(rt).Calls()["hipModuleUnload"]; got != 1 {
		t.Errorf("%d calls of hipModuleUnload, want 1", got)
	}
}

func TestModulesAfterClose(t *testing.T) {
	rt := value(OpenRuntime(Options{Memory: mib}))(t)
	offerAddOne(rt)
	d := value(rt.Device(0))(t)
	code := value(rt.Compile("x", addOneSource))(t)
	m := value(d.LoadModule(code))(t)
	f, s := value(m.Function("add_one"))(t), value(d.NewStream())(t)
	noError(t, rt.Close())
	if got := Of(rt).Stats().Modules; got != 1 {
		t.Errorf("%d modules are left, want 1", got)
	}
	image := append(bytes.Clone(code), 0)
	defer runtime.KeepAlive(image) // its address goes to the table as a number
	_, loadErr := d.LoadModule(code)
	_, compileErr := rt.Compile("x", addOneSource)
	_, compilerErr := rt.Compiler()
	_, functionErr := m.Function("add_one")
	for _, tt := range []struct {
		name      string
		got, want error
	}{
		{"load", loadErr, amdhip.ErrClosed},
		{"compile", compileErr, amdhip.ErrClosed},
		{"compiler", compilerErr, amdhip.ErrClosed},
		{"function", functionErr, hip.ErrDeinitialized},
		{"launch", s.Launch(f, 1, 1, 0, 0), hip.ErrDeinitialized},
		{"unload", m.Close(), hip.ErrDeinitialized},
		{"load at the table", Of(rt).table().HipModuleLoadData(new(uintptr),
			uintptr(unsafe.Pointer(unsafe.SliceData(image)))), hip.ErrDeinitialized},
	} {
		if !errors.Is(tt.got, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, tt.got, tt.want)
		}
	}
}

// Close of a module waits for calls with it; for the race detector, too.
func TestModuleConcurrency(t *testing.T) {
	rt, d := openSoft(t, Options{Devices: 2})
	offerAddOne(rt)
	code := value(rt.Compile("x", addOneSource))(t)
	const workers, rounds = 4, 25
	m := newMemory(t, d, 8*workers)
	var wg sync.WaitGroup
	for i := range workers {
		wg.Go(func() {
			p := uint64(m.Ptr()) + uint64(8*i)
			if err := launchOften(d, code, p, rounds); err != nil {
				t.Errorf("worker %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	for i, b := range readBack(t, m) {
		want := byte(0)
		if i%8 == 0 {
			want = rounds
		}
		if b != want {
			t.Errorf("byte %d is %d, want %d", i, b, want)
		}
	}
	if got := Of(rt).Stats().Modules; got != 0 {
		t.Errorf("%d modules are left", got)
	}
}

// launchOften adds 1 to the number at p, n times, each time with a module of its own that two goroutines close at once
// while a third, in vain or not, looks a function up.
func launchOften(d *amdhip.Device, code []byte, p uint64, n int) error {
	s, err := d.NewStream()
	if err != nil {
		return err
	}
	defer s.Close()
	for range n {
		m, err := d.LoadModule(code)
		if err != nil {
			return err
		}
		f, err := m.Function("add_one")
		if err != nil {
			return err
		}
		if err := s.Launch(f, 1, 64, p, 1); err != nil {
			return err
		}
		Of(d.Runtime()).Offer("other", 0, func(*amdhip.KernelCall) hip.Status { return hip.Success })
		var wg sync.WaitGroup
		errs := make([]error, 3)
		wg.Go(func() { errs[0] = m.Close() })
		wg.Go(func() { errs[1] = m.Close() })
		wg.Go(func() {
			if _, err := m.Function("add_one"); err != nil && !errors.Is(err, amdhip.ErrClosed) {
				errs[2] = err
			}
		})
		wg.Wait()
		if err := errors.Join(errs...); err != nil {
			return err
		}
	}
	return s.Synchronize()
}
