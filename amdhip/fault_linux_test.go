package amdhip

import "testing"

// TestCallFaults makes every function fail in turn: the error names it and its code, and nothing is left behind.
func TestCallFaults(t *testing.T) {
	rt, sim := openSim(t, "DEVICES=2")
	d, peer := device(t, rt, 0), device(t, rt, 1)
	b := newBench(t, d)
	plain := closing(t, must(d.HostPlain(64))(t), nil)
	code := must(rt.Compile("add_one.hip", addOneSource, "--gpu-architecture="+d.Arch()))(t)
	kernel := must(closing(t, must(d.LoadModule(code))(t), nil).Function("add_one"))(t)
	for call, f := range map[string]func() error{
		"hipMemGetInfo":              func() error { _, _, err := d.MemInfo(); return err },
		"hipDeviceSynchronize":       d.Synchronize,
		"hipMalloc":                  func() error { _, err := d.Malloc(1); return err },
		"hipHostMalloc":              func() error { _, err := d.HostMalloc(1); return err },
		"hipHostRegister":            func() error { _, err := d.HostRegister(plain.Bytes()); return err },
		"hipHostGetDevicePointer":    func() error { _, err := b.h.DevicePtr(); return err },
		"hipStreamCreateWithFlags":   func() error { _, err := d.NewStream(); return err },
		"hipEventCreateWithFlags":    func() error { _, err := d.NewEvent(EventOptions{}); return err },
		"hipMemcpyAsync":             func() error { return b.s.CopyToHost(b.h, 0, b.m.Ptr(), 64) },
		"hipMemsetAsync":             func() error { return b.s.Memset(b.m.Ptr(), 0, 64) },
		"hipStreamWaitEvent":         func() error { return b.s.Wait(b.e) },
		"hipStreamQuery":             func() error { _, err := b.s.Query(); return err },
		"hipStreamSynchronize":       b.s.Synchronize,
		"hipEventRecord":             func() error { return b.s.Record(b.e) },
		"hipEventQuery":              func() error { _, err := b.e.Query(); return err },
		"hipEventSynchronize":        b.e.Synchronize,
		"hipEventElapsedTime":        func() error { _, err := b.e.Elapsed(b.e); return err },
		"hipRuntimeGetVersion":       func() error { _, _, err := rt.Version(); return err },
		"hipDriverGetVersion":        func() error { _, _, err := rt.Version(); return err },
		"hipMallocAsync":             func() error { _, err := b.s.MallocAsync(1); return err },
		"hipDeviceCanAccessPeer":     func() error { _, err := d.CanAccessPeer(peer); return err },
		"hipDeviceEnablePeerAccess":  func() error { return d.EnablePeerAccess(peer) },
		"hipDeviceDisablePeerAccess": func() error { return d.DisablePeerAccess(peer) },
		"hipMemcpyPeerAsync":         func() error { return b.s.CopyPeer(b.m.Ptr(), b.m.Ptr(), d, 1) },
		"hipIpcGetMemHandle":         func() error { _, err := b.m.IPCHandle(); return err },
		"hipIpcOpenMemHandle":        func() error { _, err := d.OpenIPC(IPCHandle{}); return err },
		"hipModuleLoadData":          func() error { _, err := d.LoadModule(code); return err },
		"hipModuleGetFunction":       func() error { _, err := kernel.module.Function("add_one"); return err },
		"hipModuleLaunchKernel":      func() error { return b.s.Launch(kernel, 1, 1, uint64(b.m.Ptr()), 1) },
	} {
		t.Run(call, func(t *testing.T) {
			before := sim.live()
			sim.set("FAIL", call+":1:719")
			wantCode(t, f(), call, ErrLaunchFailure)
			sim.set("FAIL", "")
			if now := sim.live(); now != before {
				t.Errorf("%d live handles, %d before", now, before)
			}
		})
	}
	for _, call := range []string{"hipDeviceGetName", "hipDeviceTotalMem", "hipDeviceGetAttribute"} {
		rt := must(Open(Options{Library: rt.Library()}))(t)
		sim.set("FAIL", call+":1:719")
		_, err := rt.Device(0)
		wantCode(t, err, call, ErrLaunchFailure)
		sim.set("FAIL", "")
		check(t, rt.Close())
	}
}

// TestCloseFaults: a handle whose release failed is closed all the same, and says so once.
func TestCloseFaults(t *testing.T) {
	rt, sim := openSim(t)
	d := device(t, rt, 0)
	code := must(rt.Compile("add_one.hip", addOneSource, "--gpu-architecture="+d.Arch()))(t)
	for call, open := range map[string]func() (interface{ Close() error }, error){
		"hipModuleUnload":  func() (interface{ Close() error }, error) { return d.LoadModule(code) },
		"hipFree":          func() (interface{ Close() error }, error) { return d.Malloc(1) },
		"hipHostFree":      func() (interface{ Close() error }, error) { return d.HostMalloc(1) },
		"hipStreamDestroy": func() (interface{ Close() error }, error) { return d.NewStream() },
		"hipEventDestroy":  func() (interface{ Close() error }, error) { return d.NewEvent(EventOptions{}) },
	} {
		t.Run(call, func(t *testing.T) {
			c := must(open())(t)
			sim.set("FAIL", call+":1:709")
			wantCode(t, c.Close(), call, ErrContextIsDestroyed)
			check(t, c.Close())
			sim.wantStat(call, 1)
			sim.set("FAIL", "")
		})
	}
	if got := sim.live(); got != 5 {
		t.Errorf("%d live handles, want the 5 that the library refused to release", got)
	}
	// The library still has them; a real one does, too.
	for i, h := range []string{"device_allocations", "host_allocations", "streams", "events", "modules"} {
		if got := sim.stat(h); got != 1 {
			t.Errorf("%d: %s: got %d, want 1", i, h, got)
		}
	}
	sim.live = func() int64 { return 0 }
}

func TestAsyncFault(t *testing.T) {
	rt, sim := openSim(t)
	d := device(t, rt, 0)
	b, other := newBench(t, d), newBench(t, d)
	sim.set("FAIL", "hipMemcpyAsync:2:700:async")
	check(t, b.s.CopyToDevice(b.m.Ptr(), b.h, 0, 64))
	check(t, b.s.Record(b.e))
	check(t, b.e.Synchronize())
	check(t, b.s.CopyToDevice(b.m.Ptr(), b.h, 0, 64))
	check(t, b.s.Record(b.e))
	wantCode(t, b.e.Synchronize(), "hipEventSynchronize", ErrIllegalAddress)
	_, err := b.e.Query()
	wantCode(t, err, "hipEventQuery", ErrIllegalAddress)
	_, err = b.s.Query()
	wantCode(t, err, "hipStreamQuery", ErrIllegalAddress)
	wantCode(t, b.s.Synchronize(), "hipStreamSynchronize", ErrIllegalAddress)
	check(t, other.s.CopyToDevice(other.m.Ptr(), other.h, 0, 64))
	check(t, other.s.Synchronize())
	sim.wantStat("faults", 1)
}

func TestStall(t *testing.T) {
	rt, sim := openSim(t)
	b := newBench(t, device(t, rt, 0))
	sim.set("FAIL", "hipMemsetAsync:1:0:stall=50")
	check(t, b.s.Memset(b.m.Ptr(), 1, 64))
	check(t, b.s.Record(b.e))
	if done, err := b.e.Query(); done || err != nil {
		t.Errorf("got %v, %v, want not done", done, err)
	}
	check(t, b.s.Synchronize())
	sim.wantStat("memsets", 1)
}

// TestUnknownCode: a code that this package has no name for comes with the library's.
func TestUnknownCode(t *testing.T) {
	for version, want := range map[string]string{
		"5": "hipStreamSynchronize, stream on device 0: hipError_t 702: hipErrorLaunchTimeOut",
		"7": "hipStreamSynchronize, stream on device 0: hipError_t 702: hipErrorLaunchTimeOut: " +
			"the launch timed out and was terminated",
	} {
		rt, sim := openSim(t, "VERSION="+version)
		b := newBench(t, device(t, rt, 0))
		sim.set("FAIL", "hipStreamSynchronize:1:702")
		if err := b.s.Synchronize(); err == nil || err.Error() != want {
			t.Errorf("HIP %s: got %v, want %s", version, err, want)
		}
	}
}
