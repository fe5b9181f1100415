package soft

import (
	"bytes"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hostmem"
)

// The arguments' values are taken at the call, memory is looked at when the launch executes, in the order of the
// stream.
func TestLaunchIsDeferred(t *testing.T) {
	rt, d := openSoft(t, Options{})
	var got []amdhip.KernelCall
	f := offerKernel(t, d, 2, func(l *amdhip.KernelCall) hip.Status {
		mem, st := l.Memory(amdhip.DevicePtr(l.Args[0]), l.Args[1])
		fill(mem, mem[0]+1)
		got = append(got, *l)
		return st
	})
	s, m, h := newStream(t, d), newMemory(t, d, 8), newPinned(t, d, 8)
	args := []uint64{uint64(m.Ptr()), 5}
	stall(t, s, m.Ptr())
	noError(t, s.Memset(m.Ptr(), 7, 8))
	noError(t, s.Launch(f, 3, 64, args...))
	noError(t, s.CopyToHost(h, 0, m.Ptr(), 8))
	noError(t, s.Memset(m.Ptr(), 9, 8))
	noError(t, f.Module().Close()) // the launch is queued and runs all the same
	clear(args)
	if done, err := s.Query(); done || err != nil {
		t.Errorf("a launch behind work that does not end: %v, %v; want not done", done, err)
	}
	Of(rt).ClearFaults()
	noError(t, s.Synchronize())
	if want := []byte{8, 8, 8, 8, 8, 7, 7, 7}; !bytes.Equal(h.Bytes(), want) {
		t.Errorf("the kernel left %v, want %v", h.Bytes(), want)
	}
	want := amdhip.KernelCall{
		Grid: amdhip.Dim3{X: 3, Y: 1, Z: 1}, Block: amdhip.Dim3{X: 64, Y: 1, Z: 1},
		Args: []uint64{uint64(m.Ptr()), 5},
	}
	if len(got) != 1 || got[0].Grid != want.Grid || got[0].Block != want.Block || !slices.Equal(got[0].Args, want.Args) {
		t.Errorf("the kernel saw %+v, want %+v", got, want)
	}
}

func TestLaunchMemory(t *testing.T) {
	rt, d := openSoft(t, Options{Devices: 2})
	other := newMemory(t, value(rt.Device(1))(t), 64)
	m, pinned, mapped := newMemory(t, d, 64), newPinned(t, d, 64), newPinned(t, d, 64)
	freed := value(d.Malloc(64))(t)
	noError(t, freed.Close())
	seen := value(mapped.DevicePtr())(t)
	copy(mapped.Bytes(), "from the host")
	for _, tt := range []struct {
		name string
		p    amdhip.DevicePtr
		n    uint64
		want hip.Status
	}{
		{"whole", m.Ptr(), 64, hip.Success},
		{"part", m.Ptr() + 60, 4, hip.Success},
		{"nothing, nowhere", 0, 0, hip.Success},
		{"past the end", m.Ptr() + 60, 5, hip.ErrIllegalAddress},
		{"before the start", m.Ptr() - 1, 2, hip.ErrIllegalAddress},
		{"more than there is", m.Ptr(), 1 << 63, hip.ErrIllegalAddress},
		{"round the end of all addresses", m.Ptr(), 1<<64 - 1, hip.ErrIllegalAddress},
		{"null", 0, 1, hip.ErrIllegalAddress},
		{"freed", freed.Ptr(), 1, hip.ErrIllegalAddress},
		{"another device's", other.Ptr(), 1, hip.ErrIllegalAddress},
		{"host memory as the device sees it", seen, 64, hip.Success},
		{"host memory whose device address nobody asked for", amdhip.DevicePtr(addrOf(pinned)), 64, hip.ErrIllegalAddress},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := offerKernel(t, d, 0, func(l *amdhip.KernelCall) hip.Status {
				b, st := l.Memory(tt.p, tt.n)
				if uint64(len(b)) != tt.n && st == hip.Success || cap(b) != len(b) || st != hip.Success && b != nil {
					t.Errorf("%d bytes with room for %d, %v", len(b), cap(b), st)
				}
				return st
			})
			s := newStream(t, d)
			noError(t, s.Launch(f, 1, 1))
			if err := s.Synchronize(); tt.want == hip.Success && err != nil || tt.want != hip.Success &&
				!errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
	f := offerKernel(t, d, 0, func(l *amdhip.KernelCall) hip.Status {
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
func TestLaunchHoldsMemory(t *testing.T) {
	rt, d := openSoft(t, Options{})
	a, b := newStream(t, d), newStream(t, d)
	m := value(b.MallocAsync(1 << 20))(t)
	running, free := make(chan struct{}), make(chan struct{})
	f := offerKernel(t, d, 0, func(l *amdhip.KernelCall) hip.Status {
		mem, _ := l.Memory(m.Ptr(), m.Size())
		again, _ := l.Memory(m.Ptr()+1, 1)
		close(running)
		<-free
		fill(mem, 1) // a fault if it were unmapped
		again[0] = 2
		if _, st := l.Memory(m.Ptr(), 1); st != hip.ErrIllegalAddress {
			t.Errorf("memory that was freed: %v, want %v", st, hip.ErrIllegalAddress)
		}
		return hip.Success
	})
	noError(t, a.Launch(f, 1, 1))
	<-running
	noError(t, b.FreeAsync(m))
	noError(t, b.Synchronize())
	close(free)
	noError(t, a.Synchronize())
	if got := Of(rt).Stats(); got.Allocations != 0 || got.DeviceBytes != 0 {
		t.Errorf("%d bytes in %d allocations are left", got.DeviceBytes, got.Allocations)
	}
}

// A stand-in that touches host memory which its owner has unmapped fails the stream, not the process.
func TestLaunchFault(t *testing.T) {
	_, d := openSoft(t, Options{})
	mem := value(hostmem.Map(pageSize))(t)
	h, err := d.HostRegister(mem)
	closeLater(t, h, err)
	p := value(h.DevicePtr())(t)
	f := offerKernel(t, d, 0, func(l *amdhip.KernelCall) hip.Status {
		b, st := l.Memory(p, 1)
		b[0] = 1
		return st
	})
	s := newStream(t, d)
	noError(t, s.Launch(f, 1, 1))
	noError(t, s.Synchronize())
	noError(t, hostmem.Unmap(mem))
	noError(t, s.Launch(f, 1, 1))
	if err := s.Synchronize(); !errors.Is(err, hip.ErrIllegalAddress) {
		t.Errorf("got %v, want %v", err, hip.ErrIllegalAddress)
	}
}

func TestLaunchFails(t *testing.T) {
	for _, tt := range []struct {
		name    string
		returns hip.Status
		fault   Fault
		ran     bool
	}{
		{name: "by itself", returns: hip.ErrLaunchFailure, ran: true},
		{name: "injected", fault: Fault{N: 1, Code: hip.ErrLaunchFailure, Async: true}},
		{name: "after a stall", fault: Fault{N: 1, Code: hip.ErrLaunchFailure, Stall: true}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			rt, d := openSoft(t, Options{})
			ran := false
			f := offerKernel(t, d, 0, func(*amdhip.KernelCall) hip.Status { ran = true; return tt.returns })
			if tt.fault.Code != hip.Success {
				tt.fault.Func = "hipModuleLaunchKernel"
				Of(rt).Inject(tt.fault)
			}
			s, e := newStream(t, d), newEvent(t, d)
			noError(t, s.Launch(f, 1, 1))
			noError(t, s.Record(e))
			if tt.fault.Stall {
				if done, err := e.Query(); done || err != nil {
					t.Errorf("while it is stalled: %v, %v; want not done", done, err)
				}
			}
			Of(rt).ClearFaults()
			if err := e.Synchronize(); !errors.Is(err, hip.ErrLaunchFailure) {
				t.Errorf("got %v, want %v", err, hip.ErrLaunchFailure)
			}
			if ran != tt.ran {
				t.Errorf("the kernel ran: %v, want %v", ran, tt.ran)
			}
		})
	}
}

// A launch takes the time that its function takes, on the model's clock as on any other.
func TestLaunchTakesTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, d := openSoft(t, Options{})
		f := offerKernel(t, d, 0,
			func(*amdhip.KernelCall) hip.Status { time.Sleep(5 * time.Millisecond); return hip.Success })
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

// TestOfferKernel launches a kernel of three dimensions, with arguments of all sizes and dynamic shared memory.
func TestOfferKernel(t *testing.T) {
	t.Parallel()
	rt, d := openSoft(t, Options{})
	var got amdhip.KernelCall
	type triple struct{ A, B, C int32 }
	Of(rt).OfferKernel("kernel", []int{1, 4, 8, 12}, func(c *amdhip.KernelCall) hip.Status {
		got = *c
		return hip.Success
	})
	f := loadKernel(t, d, `extern "C" __global__ void kernel()`, "kernel")
	s := newStream(t, d)
	config := amdhip.LaunchConfig{Grid: amdhip.Dim3{X: 3, Y: 2}, Block: amdhip.Dim3{X: 4, Y: 4, Z: 4}, SharedBytes: 1000}
	noError(t, s.LaunchKernel(f, config, true, float32(1), int64(-2), triple{1, 2, 3}))
	noError(t, s.Synchronize())
	if got.Grid != (amdhip.Dim3{X: 3, Y: 2, Z: 1}) || got.Block != (amdhip.Dim3{X: 4, Y: 4, Z: 4}) ||
		got.SharedBytes != 1000 {
		t.Errorf("launched %v blocks of %v threads with %d bytes", got.Grid, got.Block, got.SharedBytes)
	}
	if want := []uint64{1, 0x3f800000, 1<<64 - 2, 2<<32 | 1}; !slices.Equal(got.Args, want) {
		t.Errorf("got %#x, want %#x", got.Args, want)
	}
	if want := []byte{1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0}; len(got.Params) != 4 || !bytes.Equal(got.Params[3], want) {
		t.Errorf("got %v", got.Params)
	}
	args := []any{true, float32(1), int64(-2), triple{}}
	for name, c := range map[string]amdhip.LaunchConfig{
		"too many threads":       {Block: amdhip.Dim3{X: 32, Y: 33}},
		"too many of them":       {Grid: amdhip.Dim3{Z: 1 << 30}, Block: amdhip.Dim3{Z: 8}},
		"too much shared memory": {SharedBytes: 65537},
	} {
		if err := s.LaunchKernel(f, c, args...); !errors.Is(err, hip.ErrInvalidValue) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := s.LaunchKernel(f, config, args[:3]...); !errors.Is(err, hip.ErrInvalidValue) {
		t.Errorf("an argument too few: %v", err)
	}
	// A stand-in that knows one dimension only is not given more.
	simple := offerKernel(t, d, 1, func(*amdhip.KernelCall) hip.Status { return hip.Success })
	for _, c := range []amdhip.LaunchConfig{
		config,
		{SharedBytes: 1},
		{Grid: amdhip.Dim3{Y: 2}},
		{Block: amdhip.Dim3{Z: 2}},
	} {
		if err := s.LaunchKernel(simple, c, uint64(1)); !errors.Is(err, amdhip.ErrUnsupported) {
			t.Errorf("%+v: %v", c, err)
		}
	}
	noError(t, s.LaunchKernel(simple, amdhip.LaunchConfig{}, int32(1))) // a number of 4 bytes for a parameter of 8
	noError(t, s.Synchronize())
}

// TestBorrowedStream uses a stream through a second handle, which is none of its owner's concern.
func TestBorrowedStream(t *testing.T) {
	t.Parallel()
	rt, d := openSoft(t, Options{})
	s, m := newStream(t, d), newMemory(t, d, 8)
	borrowed := value(d.StreamFromHandle(s.Handle()))(t)
	noError(t, borrowed.Memset(m.Ptr(), 5, 8))
	noError(t, borrowed.Close())
	noError(t, s.Synchronize())
	if got := readBack(t, m)[7]; got != 5 {
		t.Errorf("got %d", got)
	}
	if err := borrowed.Synchronize(); !errors.Is(err, amdhip.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	null := value(d.StreamFromHandle(0))(t)
	if err := null.Synchronize(); !errors.Is(err, amdhip.ErrUnsupported) {
		t.Errorf("the null stream: %v", err)
	}
	if got := Of(rt).Calls()["hipStreamDestroy"]; got != 0 {
		t.Errorf("%d streams were destroyed", got)
	}
}
