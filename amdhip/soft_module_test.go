package amdhip

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"
)

// addOneSource has one kernel, which adds 1 to n numbers. All parameters have 8 bytes.
const addOneSource = `typedef unsigned long long u64;
extern "C" __global__ __launch_bounds__(256) void add_one(u64 *p, u64 n) {
	for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < n; i += gridDim.x * (u64)blockDim.x) p[i]++;
}
`

// offerAddOne makes a stand-in for add_one known.
func offerAddOne(rt *Runtime) {
	rt.Software().Offer("add_one", 2, func(l *SoftLaunch) Status {
		mem, st := l.Memory(DevicePtr(l.Args[0]), 8*l.Args[1])
		for ; len(mem) > 0; mem = mem[8:] {
			binary.LittleEndian.PutUint64(mem, binary.LittleEndian.Uint64(mem)+1)
		}
		return st
	})
}

// loadKernel compiles source for d and returns the function of that name, until the end of the test.
func loadKernel(t testing.TB, d *Device, source, name string) *Function {
	t.Helper()
	code := value(d.Runtime().Compile("test.hip", source, "--gpu-architecture="+d.Arch()))(t)
	m, err := d.LoadModule(code)
	closeLater(t, m, err)
	return value(m.Function(name))(t)
}

// softKernelFor offers run as a kernel of params parameters and returns the function that runs it.
func softKernelFor(t testing.TB, d *Device, params int, run func(*SoftLaunch) Status) *Function {
	t.Helper()
	d.Runtime().Software().Offer("kernel", params, run)
	return loadKernel(t, d, `extern "C" __global__ void kernel()`, "kernel")
}

func TestSoftKernel(t *testing.T) {
	rt, d := openSoft(t, SoftwareOptions{})
	if path, err := rt.Compiler(); path != "software device" || err != nil {
		t.Errorf("the compiler is %q, %v", path, err)
	}
	offerAddOne(rt)
	f := loadKernel(t, d, addOneSource, "add_one")
	if f.module.Device() != d {
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
	if got := rt.Software().Stats().Modules; got != 1 {
		t.Errorf("%d modules, want 1", got)
	}
	noError(t, f.module.Close())
	noError(t, f.module.Close())
	sw := rt.Software()
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

// The arguments' values are taken at the call, memory is looked at when the launch executes, in the order of the stream.
func TestSoftLaunchIsDeferred(t *testing.T) {
	rt, d := openSoft(t, SoftwareOptions{})
	var got []SoftLaunch
	f := softKernelFor(t, d, 2, func(l *SoftLaunch) Status {
		mem, st := l.Memory(DevicePtr(l.Args[0]), l.Args[1])
		fill(mem, mem[0]+1)
		got = append(got, SoftLaunch{Blocks: l.Blocks, Threads: l.Threads, Args: l.Args})
		return st
	})
	s, m, h := newStream(t, d), newMemory(t, d, 8), newPinned(t, d, 8)
	args := []uint64{uint64(m.Ptr()), 5}
	stall(t, s, m.Ptr())
	noError(t, s.Memset(m.Ptr(), 7, 8))
	noError(t, s.Launch(f, 3, 64, args...))
	noError(t, s.CopyToHost(h, 0, m.Ptr(), 8))
	noError(t, s.Memset(m.Ptr(), 9, 8))
	noError(t, f.module.Close()) // the launch is queued and runs all the same
	clear(args)
	if done, err := s.Query(); done || err != nil {
		t.Errorf("a launch behind work that does not end: %v, %v; want not done", done, err)
	}
	rt.Software().ClearFaults()
	noError(t, s.Synchronize())
	if want := []byte{8, 8, 8, 8, 8, 7, 7, 7}; !bytes.Equal(h.Bytes(), want) {
		t.Errorf("the kernel left %v, want %v", h.Bytes(), want)
	}
	want := SoftLaunch{Blocks: 3, Threads: 64, Args: []uint64{uint64(m.Ptr()), 5}}
	if len(got) != 1 || got[0].Blocks != want.Blocks || got[0].Threads != want.Threads || !slices.Equal(got[0].Args, want.Args) {
		t.Errorf("the kernel saw %+v, want %+v", got, want)
	}
}

func TestSoftLaunchMemory(t *testing.T) {
	rt, d := openSoft(t, SoftwareOptions{Devices: 2})
	other := newMemory(t, value(rt.Device(1))(t), 64)
	m, pinned, mapped := newMemory(t, d, 64), newPinned(t, d, 64), newPinned(t, d, 64)
	freed := value(d.Malloc(64))(t)
	noError(t, freed.Close())
	seen := value(mapped.DevicePtr())(t)
	copy(mapped.Bytes(), "from the host")
	for _, tt := range []struct {
		name string
		p    DevicePtr
		n    uint64
		want Status
	}{
		{"whole", m.Ptr(), 64, Success},
		{"part", m.Ptr() + 60, 4, Success},
		{"nothing, nowhere", 0, 0, Success},
		{"past the end", m.Ptr() + 60, 5, ErrIllegalAddress},
		{"before the start", m.Ptr() - 1, 2, ErrIllegalAddress},
		{"more than there is", m.Ptr(), 1 << 63, ErrIllegalAddress},
		{"round the end of all addresses", m.Ptr(), 1<<64 - 1, ErrIllegalAddress},
		{"null", 0, 1, ErrIllegalAddress},
		{"freed", freed.Ptr(), 1, ErrIllegalAddress},
		{"another device's", other.Ptr(), 1, ErrIllegalAddress},
		{"host memory as the device sees it", seen, 64, Success},
		{"host memory whose device address nobody asked for", DevicePtr(pinned.addr), 64, ErrIllegalAddress},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := softKernelFor(t, d, 0, func(l *SoftLaunch) Status {
				b, st := l.Memory(tt.p, tt.n)
				if uint64(len(b)) != tt.n && st == Success || cap(b) != len(b) || st != Success && b != nil {
					t.Errorf("%d bytes with room for %d, %v", len(b), cap(b), st)
				}
				return st
			})
			s := newStream(t, d)
			noError(t, s.Launch(f, 1, 1))
			if err := s.Synchronize(); tt.want == Success && err != nil || tt.want != Success && !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
	f := softKernelFor(t, d, 0, func(l *SoftLaunch) Status {
		b, st := l.Memory(seen+5, 8)
		copy(b, "THE HOST")
		return st
	})
	s := newStream(t, d)
	noError(t, s.Launch(f, 1, 1))
	noError(t, s.Synchronize())
	if got := cString(mapped.Bytes()); got != "from THE HOST" {
		t.Errorf("the host's memory has %q", got)
	}
}

// Memory that is freed on another stream while a kernel works on it stays until the kernel is done, and no longer.
func TestSoftLaunchHoldsMemory(t *testing.T) {
	rt, d := openSoft(t, SoftwareOptions{})
	a, b := newStream(t, d), newStream(t, d)
	m := value(b.MallocAsync(1 << 20))(t)
	running, free := make(chan struct{}), make(chan struct{})
	f := softKernelFor(t, d, 0, func(l *SoftLaunch) Status {
		mem, _ := l.Memory(m.Ptr(), m.Size())
		again, _ := l.Memory(m.Ptr()+1, 1)
		close(running)
		<-free
		fill(mem, 1) // a fault if it were unmapped
		again[0] = 2
		if _, st := l.Memory(m.Ptr(), 1); st != ErrIllegalAddress {
			t.Errorf("memory that was freed: %v, want %v", st, ErrIllegalAddress)
		}
		return Success
	})
	noError(t, a.Launch(f, 1, 1))
	<-running
	noError(t, b.FreeAsync(m))
	noError(t, b.Synchronize())
	close(free)
	noError(t, a.Synchronize())
	if got := rt.Software().Stats(); got.Allocations != 0 || got.DeviceBytes != 0 {
		t.Errorf("%d bytes in %d allocations are left", got.DeviceBytes, got.Allocations)
	}
}

// A stand-in that touches host memory which its owner has unmapped fails the stream, not the process.
func TestSoftLaunchFault(t *testing.T) {
	_, d := openSoft(t, SoftwareOptions{})
	mem := value(mapAnonymous(softPage))(t)
	h, err := d.HostRegister(mem)
	closeLater(t, h, err)
	p := value(h.DevicePtr())(t)
	f := softKernelFor(t, d, 0, func(l *SoftLaunch) Status {
		b, st := l.Memory(p, 1)
		b[0] = 1
		return st
	})
	s := newStream(t, d)
	noError(t, s.Launch(f, 1, 1))
	noError(t, s.Synchronize())
	noError(t, unmapAnonymous(mem))
	noError(t, s.Launch(f, 1, 1))
	if err := s.Synchronize(); !errors.Is(err, ErrIllegalAddress) {
		t.Errorf("got %v, want %v", err, ErrIllegalAddress)
	}
}

func TestSoftLaunchFails(t *testing.T) {
	for _, tt := range []struct {
		name    string
		returns Status
		fault   Fault
		ran     bool
	}{
		{name: "by itself", returns: ErrLaunchFailure, ran: true},
		{name: "injected", fault: Fault{N: 1, Code: ErrLaunchFailure, Async: true}},
		{name: "after a stall", fault: Fault{N: 1, Code: ErrLaunchFailure, Stall: true}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			rt, d := openSoft(t, SoftwareOptions{})
			ran := false
			f := softKernelFor(t, d, 0, func(*SoftLaunch) Status { ran = true; return tt.returns })
			if tt.fault.Code != Success {
				tt.fault.Func = "hipModuleLaunchKernel"
				rt.Software().Inject(tt.fault)
			}
			s, e := newStream(t, d), newEvent(t, d)
			noError(t, s.Launch(f, 1, 1))
			noError(t, s.Record(e))
			if tt.fault.Stall {
				if done, err := e.Query(); done || err != nil {
					t.Errorf("while it is stalled: %v, %v; want not done", done, err)
				}
			}
			rt.Software().ClearFaults()
			if err := e.Synchronize(); !errors.Is(err, ErrLaunchFailure) {
				t.Errorf("got %v, want %v", err, ErrLaunchFailure)
			}
			if ran != tt.ran {
				t.Errorf("the kernel ran: %v, want %v", ran, tt.ran)
			}
		})
	}
}

// A launch takes the time that its function takes, on the model's clock as on any other.
func TestSoftLaunchTakesTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, d := openSoft(t, SoftwareOptions{})
		f := softKernelFor(t, d, 0, func(*SoftLaunch) Status { time.Sleep(5 * time.Millisecond); return Success })
		s, before, after := newStream(t, d), newEvent(t, d), newEvent(t, d)
		noError(t, s.Record(before))
		noError(t, s.Launch(f, 1, 1))
		noError(t, s.Record(after))
		noError(t, after.Synchronize())
		if got := value(after.Elapsed(before))(t); got != 5*time.Millisecond {
			t.Errorf("it took %v, want 5ms", got)
		}
	})
}

func TestSoftImages(t *testing.T) {
	rt, d := openSoft(t, SoftwareOptions{})
	rt.Software().Offer("b", 0, func(*SoftLaunch) Status { return Success })
	offerAddOne(rt)
	code := value(rt.Compile("x", addOneSource+`extern "C" __global__ void b()`))(t)
	page := []byte(softCode(softArch, []string{strings.Repeat("n", softPage-len(softCode(softArch, []string{""})))}))
	flipped, longer := bytes.Clone(code), append(bytes.Clone(code), '\n')
	flipped[len(softMagic)+1] ^= 1
	for _, tt := range []struct {
		name string
		code []byte
		want error
	}{
		{"good", code, nil},
		{"good, of exactly a page", page, nil},
		{"nothing", nil, ErrInvalidImage},
		{"one byte", []byte("x"), ErrInvalidImage},
		{"an ELF file", []byte("\x7fELF\x02\x01\x01\x00"), ErrInvalidImage},
		{"cut short", code[:len(code)-1], ErrInvalidImage},
		{"a byte more", longer, ErrInvalidImage},
		{"a bit is wrong", flipped, ErrInvalidImage},
		{"other magic, right checksum", []byte(sealed("code for " + softArch + "\nadd_one\n")), ErrInvalidImage},
		{"another architecture", value(rt.Compile("x", addOneSource, "--offload-arch=gfx906"))(t), ErrNoBinaryForGPU},
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
	if got := rt.Software().Stats().Modules; got != 0 {
		t.Errorf("%d modules are left", got)
	}
}

// wantLoad compares the error of LoadModule, which must also name the call.
func wantLoad(t *testing.T, err, want error) {
	t.Helper()
	if e, ok := errors.AsType[*Error](err); !ok || !errors.Is(err, want) || e.Func != "hipModuleLoadData" {
		t.Errorf("got %v, want hipModuleLoadData: %v", err, want)
	}
}

func TestSoftFunctions(t *testing.T) {
	rt, d := openSoft(t, SoftwareOptions{})
	offerAddOne(rt)
	code := softCode(softArch, []string{"add_one", "not_offered"})
	m, err := d.LoadModule([]byte(code))
	closeLater(t, m, err)
	value(m.Function("add_one"))(t)
	for name, want := range map[string]error{"not_offered": ErrNotFound, "add": ErrNotFound, "": ErrInvalidValue} {
		if f, err := m.Function(name); f != nil || !errors.Is(err, want) || !strings.Contains(err.Error(), fmt.Sprintf("%q", name)) {
			t.Errorf("%q: %v, %v; want %v", name, f, err, want)
		}
	}
	rt.Software().Offer("other", 0, func(*SoftLaunch) Status { return Success })
	if _, err := m.Function("other"); !errors.Is(err, ErrNotFound) {
		t.Errorf("a kernel that the module does not have: %v, want %v", err, ErrNotFound)
	}
	defer func() {
		if recover() == nil {
			t.Error("Offer takes a function that is nil")
		}
	}()
	rt.Software().Offer("nothing", 0, nil)
}

func TestLaunchRefuses(t *testing.T) {
	rt, d := openSoft(t, SoftwareOptions{Devices: 2})
	otherRuntime, stranger := openSoft(t, SoftwareOptions{})
	offerAddOne(rt)
	offerAddOne(otherRuntime)
	f, foreign := loadKernel(t, d, addOneSource, "add_one"), loadKernel(t, stranger, addOneSource, "add_one")
	neighbour := loadKernel(t, value(rt.Device(1))(t), addOneSource, "add_one")
	s, m := newStream(t, d), newMemory(t, d, 8)
	closed, gone := value(d.NewStream())(t), loadKernel(t, d, addOneSource, "add_one")
	noError(t, closed.Close())
	noError(t, gone.module.Close())
	p := uint64(m.Ptr())
	for _, tt := range []struct {
		name            string
		s               *Stream
		f               *Function
		blocks, threads uint32
		args            []uint64
		want            error
	}{
		{"closed stream", closed, f, 1, 1, []uint64{p, 1}, ErrClosed},
		{"closed module", s, gone, 1, 1, []uint64{p, 1}, ErrClosed},
		{"another runtime's module", s, foreign, 1, 1, []uint64{p, 1}, ErrInvalidHandle},
		{"another device's module", s, neighbour, 1, 1, []uint64{p, 1}, ErrInvalidHandle},
		{"no blocks", s, f, 0, 1, []uint64{p, 1}, ErrInvalidValue},
		{"no threads", s, f, 1, 0, []uint64{p, 1}, ErrInvalidValue},
		{"too many threads in all", s, f, 1 << 31, 2, []uint64{p, 1}, ErrInvalidValue},
		{"too many threads in a block", s, f, 1, 1025, []uint64{p, 1}, ErrInvalidValue},
		{"an argument too few", s, f, 1, 1, []uint64{p}, ErrInvalidValue},
		{"no argument", s, f, 1, 1, nil, ErrInvalidValue},
		{"an argument too many", s, f, 1, 1, []uint64{p, 1, 1}, ErrInvalidValue},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := tt.s.Launch(tt.f, tt.blocks, tt.threads, tt.args...); !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
	if _, err := gone.module.Function("add_one"); !errors.Is(err, ErrClosed) {
		t.Errorf("function of a closed module: %v, want %v", err, ErrClosed)
	}
	// What was refused has not spoilt the stream, and it takes what is right.
	noError(t, s.Launch(f, 1, 1024, p, 1))
	noError(t, s.Synchronize())
}

// On a machine with two GPUs whatever device is current, all calls reach the module's own.
func TestModuleOnSecondDevice(t *testing.T) {
	rt, _ := openSoft(t, SoftwareOptions{Devices: 2})
	offerAddOne(rt)
	d := value(rt.Device(1))(t)
	f := loadKernel(t, d, addOneSource, "add_one")
	s, m := newStream(t, d), newMemory(t, d, 8)
	noError(t, s.Memset(m.Ptr(), 0, 8))
	noError(t, s.Launch(f, 1, 1, uint64(m.Ptr()), 1))
	if got := readBackAfter(t, s, m); got[0] != 1 {
		t.Errorf("got %v, want 1", got)
	}
	noError(t, f.module.Close())
}

func readBackAfter(t testing.TB, s *Stream, m *Memory) []byte {
	t.Helper()
	noError(t, s.Synchronize())
	return readBack(t, m)
}

// What the table answers to calls that the handles above never make.
func TestSoftModuleCalls(t *testing.T) {
	rt, d := openSoft(t, SoftwareOptions{Devices: 2})
	offerAddOne(rt)
	f := loadKernel(t, d, addOneSource, "add_one")
	foreign := loadKernel(t, value(rt.Device(1))(t), addOneSource, "add_one")
	gone := loadKernel(t, d, addOneSource, "add_one")
	noError(t, gone.module.Close())
	s, m := newStream(t, d), newMemory(t, d, 8)
	values := []uint64{uint64(m.Ptr()), 1}
	params := []unsafe.Pointer{unsafe.Pointer(&values[0]), unsafe.Pointer(&values[1]), nil}
	api := rt.api
	var out uintptr
	launch := func(f *Function, grid, block [3]uint32, shared uint32, extra *uintptr) Status {
		return api.hipModuleLaunchKernel(f.raw, grid[0], grid[1], grid[2], block[0], block[1], block[2], shared, s.raw,
			&params[0], extra)
	}
	one := [3]uint32{1, 1, 1}
	for _, tt := range []struct {
		name      string
		got, want Status
	}{
		{"good", launch(f, one, one, 0, nil), Success},
		{"function of an unloaded module", launch(gone, one, one, 0, nil), ErrInvalidHandle},
		{"function of another device", launch(foreign, one, one, 0, nil), ErrInvalidHandle},
		{"no depth", launch(f, [3]uint32{1, 1, 0}, one, 0, nil), ErrInvalidValue},
		{"two dimensions of blocks", launch(f, [3]uint32{1, 2, 1}, one, 0, nil), ErrNotSupported},
		{"three dimensions of threads", launch(f, one, [3]uint32{1, 1, 2}, 0, nil), ErrNotSupported},
		{"shared memory", launch(f, one, one, 4, nil), ErrNotSupported},
		{"extra", launch(f, one, one, 0, &out), ErrNotSupported},
		{"too large", launch(f, [3]uint32{1 << 31, 1, 1}, [3]uint32{2, 1, 1}, 0, nil), ErrInvalidValue},
		{"no parameters", api.hipModuleLaunchKernel(f.raw, 1, 1, 1, 1, 1, 1, 0, s.raw, nil, nil), ErrInvalidValue},
		{"unload twice", api.hipModuleUnload(gone.module.raw), ErrNotFound},
		{"nowhere to put the module", api.hipModuleLoadData(nil, uintptr(unsafe.Pointer(unsafe.SliceData(f.module.image)))), ErrInvalidValue},
		{"no image", api.hipModuleLoadData(&out, 0), ErrInvalidValue},
		{"function of an unloaded module by name", api.hipModuleGetFunction(&out, gone.module.raw, "add_one"), ErrInvalidHandle},
		{"function while another device is current", api.hipModuleGetFunction(&out, foreign.module.raw, "add_one"), ErrInvalidHandle},
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
	rt, d := openSoft(t, SoftwareOptions{})
	offerAddOne(rt)
	f := loadKernel(t, d, addOneSource, "add_one")
	s, m := newStream(t, d), newMemory(t, d, 8)
	for call, try := range map[string]func() error{
		"hipModuleLoadData": func() error {
			_, err := d.LoadModule([]byte(softCode(softArch, nil)))
			return err
		},
		"hipModuleGetFunction":  func() error { _, err := f.module.Function("add_one"); return err },
		"hipModuleLaunchKernel": func() error { return s.Launch(f, 1, 1, uint64(m.Ptr()), 1) },
	} {
		rt.Software().Inject(Fault{Func: call, N: 1, Code: ErrLaunchOutOfResources})
		e, ok := errors.AsType[*Error](try())
		if !ok || e.Func != call || e.Code != ErrLaunchOutOfResources {
			t.Errorf("got %v, want %s: %v", e, call, ErrLaunchOutOfResources)
		}
	}
	if got := rt.Software().Stats().Modules; got != 1 {
		t.Errorf("%d modules, want 1", got)
	}
	noError(t, s.Synchronize())
	// A module whose unloading failed is closed all the same, and says so once.
	again := loadKernel(t, d, addOneSource, "add_one")
	rt.Software().Inject(Fault{Func: "hipModuleUnload", N: 1, Code: ErrUnknown})
	if err := again.module.Close(); !errors.Is(err, ErrUnknown) {
		t.Errorf("got %v, want %v", err, ErrUnknown)
	}
	noError(t, again.module.Close())
	if got := rt.Software().Calls()["hipModuleUnload"]; got != 1 {
		t.Errorf("%d calls of hipModuleUnload, want 1", got)
	}
}

func TestSoftModulesAfterClose(t *testing.T) {
	rt := value(OpenSoftware(SoftwareOptions{Memory: mib}))(t)
	offerAddOne(rt)
	d := value(rt.Device(0))(t)
	code := value(rt.Compile("x", addOneSource))(t)
	m := value(d.LoadModule(code))(t)
	f, s := value(m.Function("add_one"))(t), value(d.NewStream())(t)
	noError(t, rt.Close())
	if got := rt.Software().Stats().Modules; got != 1 {
		t.Errorf("%d modules are left, want 1", got)
	}
	_, loadErr := d.LoadModule(code)
	_, compileErr := rt.Compile("x", addOneSource)
	_, compilerErr := rt.Compiler()
	_, functionErr := m.Function("add_one")
	for _, tt := range []struct {
		name      string
		got, want error
	}{
		{"load", loadErr, ErrClosed},
		{"compile", compileErr, ErrClosed},
		{"compiler", compilerErr, ErrClosed},
		{"function", functionErr, ErrDeinitialized},
		{"launch", s.Launch(f, 1, 1, 0, 0), ErrDeinitialized},
		{"unload", m.Close(), ErrDeinitialized},
		{"load at the table", rt.api.hipModuleLoadData(new(uintptr), uintptr(unsafe.Pointer(unsafe.SliceData(m.image)))), ErrDeinitialized},
	} {
		if !errors.Is(tt.got, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, tt.got, tt.want)
		}
	}
}

// Close of a module waits for calls with it; for the race detector, too.
func TestModuleConcurrency(t *testing.T) {
	rt, d := openSoft(t, SoftwareOptions{Devices: 2})
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
	if got := rt.Software().Stats().Modules; got != 0 {
		t.Errorf("%d modules are left", got)
	}
}

// launchOften adds 1 to the number at p, n times, each time with a module of its own that two goroutines close at once
// while a third, in vain or not, looks a function up.
func launchOften(d *Device, code []byte, p uint64, n int) error {
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
		d.Runtime().Software().Offer("other", 0, func(*SoftLaunch) Status { return Success })
		var wg sync.WaitGroup
		errs := make([]error, 3)
		wg.Go(func() { errs[0] = m.Close() })
		wg.Go(func() { errs[1] = m.Close() })
		wg.Go(func() {
			if _, err := m.Function("add_one"); err != nil && !errors.Is(err, ErrClosed) {
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
