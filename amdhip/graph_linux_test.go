package amdhip

import (
	"bytes"
	"errors"
	"slices"
	"testing"
)

// TestGraph records work on two streams and launches it twice.
func TestGraph(t *testing.T) {
	rt, sim := openSim(t)
	d := device(t, rt, 0)
	code := must(rt.Compile("add_one.hip", addOneSource, "--gpu-architecture="+d.Arch()))(t)
	f := must(closing(t, must(d.LoadModule(code))(t), nil).Function("add_one"))(t)
	a, b := newBench(t, d), newBench(t, d)
	check(t, a.s.Memset(a.m.Ptr(), 0, 64))
	check(t, a.s.Synchronize())
	g := must(a.s.Capture(func() error {
		return errors.Join(
			a.s.Launch(f, 1, 8, uint64(a.m.Ptr()), 8),
			a.s.Record(a.e),
			b.s.Wait(a.e), // b joins
			b.s.CopyDevice(b.m.Ptr(), a.m.Ptr(), 64),
			b.s.Record(b.e),
			a.s.Wait(b.e),
			a.s.CopyToHost(a.h, 0, b.m.Ptr(), 64),
		)
	}))(t)
	if done, err := a.s.Query(); !done || err != nil {
		t.Errorf("recorded work is done or spoiled the stream: %v, %v", done, err)
	}
	exec := must(g.Instantiate())(t)
	check(t, g.Close())
	check(t, g.Close())
	if g.Device() != d || exec.Device() != d || g.Handle() == 0 || exec.Handle() == 0 {
		t.Error("the graph is of another device, or has no handle")
	}
	for i := range 3 {
		check(t, a.s.LaunchGraph(exec))
		check(t, a.s.Synchronize())
		want := bytes.Repeat([]byte{byte(i + 1), 0, 0, 0, 0, 0, 0, 0}, 8)
		if got := a.h.Bytes(); !bytes.Equal(got, want) {
			t.Errorf("launch %d left % x, want % x", i, got, want)
		}
	}
	check(t, exec.Close())
	check(t, exec.Close())
	wantIs(t, a.s.LaunchGraph(exec), ErrClosed)
	_, err := g.Instantiate()
	wantIs(t, err, ErrClosed)
	sim.wantStat("misuses", 0)
}

// TestCaptureFails: whatever goes wrong, the recording is over, and the stream works again.
func TestCaptureFails(t *testing.T) {
	rt, sim := openSim(t)
	d := device(t, rt, 0)
	broken := errors.New("broken")
	for name, tt := range map[string]struct {
		fail   string
		record func(a, b *bench) error
		want   error
	}{
		"error":        {record: func(a, _ *bench) error { return broken }, want: broken},
		"not to begin": {fail: "hipStreamBeginCapture:1:999", want: ErrUnknown},
		"not to end":   {fail: "hipStreamEndCapture:1:999", want: ErrUnknown},
		"synchronize":  {record: func(a, _ *bench) error { return a.s.Synchronize() }, want: ErrStreamCaptureUnsupported},
		"ignored": {
			record: func(a, _ *bench) error { _, _ = a.s.Query(); return nil },
			want:   ErrStreamCaptureInvalidated,
		},
		"allocation": {
			record: func(a, _ *bench) error { _, err := d.Malloc(64); return err },
			want:   ErrStreamCaptureUnsupported,
		},
		"captured event": {
			record: func(a, _ *bench) error { return errors.Join(a.s.Record(a.e), a.e.Synchronize()) },
			want:   ErrCapturedEvent,
		},
		"not joined": {
			record: func(a, b *bench) error {
				return errors.Join(a.s.Record(a.e), b.s.Wait(a.e), b.s.Memset(b.m.Ptr(), 1, 64))
			},
			want: ErrStreamCaptureUnjoined,
		},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := newBench(t, d), newBench(t, d)
			sim.set("FAIL", tt.fail)
			g, err := a.s.Capture(func() error {
				if tt.record == nil {
					return nil
				}
				return tt.record(a, b)
			})
			sim.set("FAIL", "")
			if g != nil || !errors.Is(err, tt.want) {
				t.Errorf("got %v, %v, want %v", g, err, tt.want)
			}
			for _, x := range []*bench{a, b} {
				check(t, x.s.Memset(x.m.Ptr(), 1, 64))
				check(t, x.s.Synchronize())
			}
			sim.wantStat("graphs", 0)
		})
	}
}

// TestCapturePanics: a recording that panics is over, too.
func TestCapturePanics(t *testing.T) {
	rt, sim := openSim(t)
	b := newBench(t, device(t, rt, 0))
	func() {
		defer func() { _ = recover() }()
		_, _ = b.s.Capture(func() error { panic("on purpose") })
		t.Error("the panic was swallowed")
	}()
	check(t, b.s.Synchronize())
	sim.wantStat("hipStreamEndCapture", 1)
}

// TestGraphFaults: instantiating and launching may fail.
func TestGraphFaults(t *testing.T) {
	rt, sim := openSim(t)
	b := newBench(t, device(t, rt, 0))
	g := closing(t, must(b.s.Capture(func() error { return b.s.Memset(b.m.Ptr(), 1, 64) }))(t), nil)
	sim.set("FAIL", "hipGraphInstantiate:1:2")
	_, err := g.Instantiate()
	wantCode(t, err, "hipGraphInstantiate", ErrOutOfMemory)
	exec := closing(t, must(g.Instantiate())(t), nil)
	sim.set("FAIL", "hipGraphLaunch:1:1")
	wantCode(t, b.s.LaunchGraph(exec), "hipGraphLaunch", ErrInvalidValue)
	sim.set("FAIL", "hipGraphLaunch:1:700:async")
	check(t, b.s.LaunchGraph(exec))
	wantIs(t, b.s.Synchronize(), ErrIllegalAddress)
	other, _ := openSim(t)
	wantIs(t, newBench(t, device(t, other, 0)).s.LaunchGraph(exec), ErrInvalidHandle)
}

// shapesSource has a kernel that takes arguments of all sizes, and writes which thread of which block it is.
const shapesSource = `struct pair { float a; short b[2]; };
extern "C" __global__ void shapes(unsigned *out, unsigned char c, short s, int i, float f, double d, struct pair p) {
	extern __shared__ unsigned shared[];
	unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
	unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
	unsigned threads = blockDim.x * blockDim.y * blockDim.z;
	shared[thread] = c + s + i + (int)f + (int)d + (int)p.a + p.b[0] + p.b[1];
	out[block * threads + thread] = shared[thread] + 1000 * thread + 100000 * block;
}
`

// launchShapes launches a three-dimensional grid with arguments of every size, and dynamic shared memory.
func launchShapes(t *testing.T, d *Device) (*Stream, *Function, LaunchConfig) {
	t.Helper()
	code := must(d.rt.Compile("shapes.hip", shapesSource, "--gpu-architecture="+d.Arch()))(t)
	f := must(closing(t, must(d.LoadModule(code))(t), nil).Function("shapes"))(t)
	const blocks, threads = 2 * 3 * 2, 4 * 2 * 3
	m := closing(t, must(d.Malloc(4*blocks*threads))(t), nil)
	s := closing(t, must(d.NewStream())(t), nil)
	type pair struct {
		A float32
		B [2]int16
	}
	config := LaunchConfig{Grid: Dim3{2, 3, 2}, Block: Dim3{4, 2, 3}, SharedBytes: 4 * threads}
	check(t, s.LaunchKernel(f, config, m.Ptr(), uint8(1), int16(-2), int32(30), float32(400), float64(5),
		pair{6, [2]int16{7, -8}}))
	check(t, s.Synchronize())
	got := contents(t, d, m.Ptr(), 4*blocks*threads)
	for i := range uint32(blocks * threads) {
		word := uint32(got[4*i]) | uint32(got[4*i+1])<<8 | uint32(got[4*i+2])<<16 | uint32(got[4*i+3])<<24
		if want := 1 - 2 + 30 + 400 + 5 + 6 + 7 - 8 + 1000*(i%threads) + 100000*(i/threads); word != want {
			t.Fatalf("thread %d wrote %d, want %d", i, word, want)
		}
	}
	return s, f, config
}

// TestLaunchKernel does that on the simulator, and wants arguments that C has no layout for to be refused.
func TestLaunchKernel(t *testing.T) {
	rt, sim := openSim(t)
	s, f, config := launchShapes(t, device(t, rt, 0))
	for name, arg := range map[string]any{
		"int": 1, "uint": uint(1), "string": "x", "nil": nil, "pointer": new(int32), "slice": []byte{1},
		"struct with int": struct{ A int }{1},
		"no fields":       struct{}{}, "empty array": [0]int32{}, "array of pointers": [1]*int32{},
	} {
		if err := s.LaunchKernel(f, config, arg); !errors.Is(err, ErrInvalidValue) {
			t.Errorf("%s: %v", name, err)
		}
	}
	sim.wantStat("misuses", 0)
	wantCode(t, s.LaunchKernel(f, LaunchConfig{Grid: Dim3{Y: 1 << 31}, Block: Dim3{Y: 2}}), "hipModuleLaunchKernel",
		ErrInvalidValue)
	sim.wantStat("hipModuleLaunchKernel", 1)
}

// TestMappedHostMemory: a kernel writes memory of the host.
func TestMappedHostMemory(t *testing.T) {
	rt, _ := openSim(t)
	b := newBench(t, device(t, rt, 0))
	code := must(rt.Compile("add_one.hip", addOneSource, "--gpu-architecture="+b.d.Arch()))(t)
	f := must(closing(t, must(b.d.LoadModule(code))(t), nil).Function("add_one"))(t)
	clear(b.h.Bytes())
	p := must(b.h.DevicePtr())(t)
	check(t, b.s.Launch(f, 1, 8, uint64(p), 8))
	check(t, b.s.Synchronize())
	if want := bytes.Repeat([]byte{1, 0, 0, 0, 0, 0, 0, 0}, 8); !bytes.Equal(b.h.Bytes(), want) {
		t.Errorf("got % x", b.h.Bytes())
	}
}

// TestStreamFromHandle uses a stream that another binding has made.
func TestStreamFromHandle(t *testing.T) {
	rt, sim := openSim(t)
	b := newBench(t, device(t, rt, 0))
	s := must(b.d.StreamFromHandle(b.s.Handle()))(t)
	if s.Handle() != b.s.Handle() || s.Device() != b.d || b.e.Handle() == 0 {
		t.Error("it has another handle or device")
	}
	check(t, errors.Join(s.Memset(b.m.Ptr(), 7, 64), s.Record(b.e), b.e.Synchronize()))
	check(t, s.Close())
	check(t, s.Close())
	wantIs(t, s.Memset(b.m.Ptr(), 7, 64), ErrClosed)
	check(t, errors.Join(b.s.CopyToHost(b.h, 0, b.m.Ptr(), 64), b.s.Synchronize())) // it was not destroyed
	if !slices.Contains(b.h.Bytes(), 7) {
		t.Errorf("got % x", b.h.Bytes())
	}
	sim.wantStat("hipStreamDestroy", 0)
	sim.wantStat("misuses", 0)
	closed := closing(t, must(Open(Options{Library: rt.Library()}))(t), nil)
	d := device(t, closed, 0)
	check(t, closed.Close())
	_, err := d.StreamFromHandle(b.s.Handle())
	wantIs(t, err, ErrClosed)
}

// TestDefault opens a GPU once, again after Close, and says why there is none.
func TestDefault(t *testing.T) {
	path := buildSim(t)
	t.Setenv("GGUF2GPU_HIP_LIBRARY", path)
	d := must(Default())(t)
	if again := must(Default())(t); again != d || d.Index() != 0 || d.Runtime().Library() != path {
		t.Errorf("got device %d of %s, want one device 0 of %s", d.Index(), d.Runtime().Library(), path)
	}
	check(t, d.Runtime().Close())
	another := must(Default())(t)
	if _, _, err := another.MemInfo(); another == d || err != nil {
		t.Errorf("after Close: %v, the same device %v", err, another == d)
	}
	check(t, another.Runtime().Close())
	t.Setenv("GGUF2GPU_HIP_LIBRARY", "libm.so.6")
	_, err := Default()
	wantIs(t, err, ErrNoLibrary)
	t.Setenv("HIPSIM_DEVICES", "0")
	t.Setenv("GGUF2GPU_HIP_LIBRARY", buildSim(t))
	_, err = Default()
	wantIs(t, err, ErrNoDevice)
}
