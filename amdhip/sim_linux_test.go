package amdhip

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
)

// TestSimRefuses checks the instrument itself: the simulator must notice what the handles above it never do.
func TestSimRefuses(t *testing.T) {
	rt, sim := openSim(t, "DEVICES=2")
	api := rt.api
	b := newBench(t, device(t, rt, 0))
	plain := closing(t, must(b.d.HostPlain(64))(t), nil)
	mem, host := uintptr(b.m.Ptr()), b.h.addr
	var p uintptr
	var n int32
	closedStream, closedEvent := must(b.d.NewStream())(t), must(b.d.NewEvent(EventOptions{}))(t)
	check(t, closedStream.Close())
	check(t, closedEvent.Close())
	var freed uintptr
	if st := api.HipMalloc(&freed, 64); st != Success || api.HipFree(freed) != Success {
		t.Fatal(st)
	}
	copyAsync := func(dst, src, n uintptr, kind hip.MemcpyKind) func() Status {
		return func() Status { return api.HipMemcpyAsync(dst, src, n, kind, b.s.raw) }
	}
	for _, tt := range []struct {
		name string
		call func() Status
		want Status
	}{
		{"double free", func() Status { return api.HipFree(freed) }, 1},
		{"free inside", func() Status { return api.HipFree(mem + 8) }, 1},
		{"free of host memory", func() Status { return api.HipFree(host) }, 1},
		{"host free of device memory", func() Status { return api.HipHostFree(mem) }, 1},
		{"host flags", func() Status { return api.HipHostMalloc(&p, 64, 8) }, 1},
		{"coherent and not", func() Status { return api.HipHostMalloc(&p, 64, 0xC0000000) }, 1},
		{"register flags", func() Status { return api.HipHostRegister(plain.addr, 64, 16) }, 1},
		{"register nothing", func() Status { return api.HipHostRegister(plain.addr, 0, 0) }, 1},
		{"register twice", func() Status { return api.HipHostRegister(host+8, 8, 0) }, 712},
		{"unregister", func() Status { return api.HipHostUnregister(plain.addr) }, 713},
		{"pointer of unpinned", func() Status { return api.HipHostGetDevicePointer(&p, plain.addr, 0) }, 1},
		{"stream flags", func() Status { return api.HipStreamCreateWithFlags(&p, 2) }, 1},
		{"event flags", func() Status { return api.HipEventCreateWithFlags(&p, 8) }, 1},
		{"interprocess with timing", func() Status { return api.HipEventCreateWithFlags(&p, 4) }, 1},
		{"closed stream", func() Status { return api.HipStreamQuery(closedStream.raw) }, 709},
		{"null stream", func() Status { return api.HipStreamQuery(0) }, 709},
		{"event as stream", func() Status { return api.HipStreamQuery(b.e.raw) }, 709},
		{"closed event", func() Status { return api.HipEventQuery(closedEvent.raw) }, 400},
		{"wait flags", func() Status { return api.HipStreamWaitEvent(b.s.raw, b.e.raw, 1) }, 1},
		{"kind", copyAsync(mem, host, 64, 5), 21},
		{"copy of freed memory", copyAsync(freed, host, 64, hip.MemcpyHostToDevice), 1},
		{"copy past the end", copyAsync(mem+1, host, 64, hip.MemcpyHostToDevice), 1},
		{"copy past pinned memory", copyAsync(mem, host+1, 64, hip.MemcpyHostToDevice), 1},
		{"wrong direction", copyAsync(mem, host, 64, hip.MemcpyDeviceToHost), 1},
		{"host to device from a device", copyAsync(mem, mem, 64, hip.MemcpyHostToDevice), 1},
		{"device", func() Status { return api.HipSetDevice(2) }, 101},
		{"attribute", func() Status { return api.HipDeviceGetAttribute(&n, 64, 0) }, 1},
		{"attribute of no device", func() Status { return api.HipDeviceGetAttribute(&n, hip.AttrIntegrated, 2) }, 101},
	} {
		before := sim.stat("misuses")
		if got := tt.call(); got != tt.want {
			t.Errorf("%s: got %v, want %v", tt.name, got, tt.want)
		}
		if got := sim.stat("misuses") - before; got != 1 {
			t.Errorf("%s: counted %d times", tt.name, got)
		}
	}
}

// TestSimCrashes: with HIP 7 a stale stream ends the process.
func TestSimCrashes(t *testing.T) {
	if os.Getenv("HIPSIM_VERSION") == "7" {
		rt := must(Open(Options{}))(t)
		rt.api.HipStreamQuery(4096)
		return
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestSimCrashes$")
	cmd.Env = append(os.Environ(), "HIPSIM_VERSION=7", "GGUF2GPU_HIP_LIBRARY="+buildSim(t))
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "invalid stream") {
		t.Errorf("got %v, want a crash\n%s", err, out)
	}
}
