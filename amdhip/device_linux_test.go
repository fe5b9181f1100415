package amdhip

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hostmem"
)

const roundTripSize = 1 << 16

// roundTrip copies random bytes to the device and back.
func roundTrip(t *testing.T, d *Device) {
	t.Helper()
	s := must(d.NewStream())(t)
	defer s.Close()
	m := must(d.Malloc(roundTripSize))(t)
	defer m.Close()
	h := must(d.HostMalloc(2 * roundTripSize))(t)
	defer h.Close()
	in, out := h.Bytes()[:roundTripSize], h.Bytes()[roundTripSize:]
	for i := range in {
		in[i] = byte(rand.Uint32())
	}
	check(t, s.CopyToDevice(m.Ptr(), h, 0, roundTripSize))
	check(t, s.CopyToHost(h, roundTripSize, m.Ptr(), roundTripSize))
	check(t, s.Synchronize())
	if !bytes.Equal(in, out) {
		t.Error("the bytes that came back are not those that went there")
	}
}

func TestDevices(t *testing.T) {
	rt, _ := openSim(t, "DEVICES=2", "MEMORY=65536", "INTEGRATED=1")
	if n, err := rt.DeviceCount(); n != 2 || err != nil {
		t.Fatalf("got %d, %v, want 2 devices", n, err)
	}
	d := device(t, rt, 1)
	got := fmt.Sprint(d.Index(), d.Name(), d.Arch(), d.PCIBusID(), d.UUID(), d.TotalMemory(), d.Integrated(),
		d.Multiprocessors())
	want := fmt.Sprint(1, "Simulated GPU 1", "gfx90a:sramecc+:xnack-", "0000:c2:00.0", "GPU-000000000000abc1", 65536,
		true, 104)
	if got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if again := device(t, rt, 1); again != d {
		t.Error("asking for a device again gives another one")
	}
	for _, i := range []int{-1, 2} {
		_, err := rt.Device(i)
		wantIs(t, err, ErrInvalidDevice)
	}
	m := must(d.Malloc(1000))(t)
	if free, total, err := d.MemInfo(); free != 64536 || total != 65536 || err != nil {
		t.Errorf("got %d of %d free, %v", free, total, err)
	}
	if free, _, err := device(t, rt, 0).MemInfo(); free != 65536 || err != nil {
		t.Errorf("the other device: got %d free, %v", free, err)
	}
	check(t, m.Close())
	_, err := d.Malloc(65537)
	wantCode(t, err, "hipMalloc", ErrOutOfMemory)
	if want := "hipMalloc, 65537 bytes on device 1: hipErrorOutOfMemory (2)"; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func TestNoDevice(t *testing.T) {
	rt, sim := openSim(t, "DEVICES=0")
	_, err := rt.DeviceCount()
	wantIs(t, err, ErrNoDevice)
	_, err = rt.Device(0)
	wantIs(t, err, ErrNoDevice)
	sim.set("DEVICES", "1")
	for _, code := range []Status{100, 101, 3, 35} {
		sim.set("FAIL", fmt.Sprintf("hipGetDeviceCount:1:%d", code))
		_, err := rt.Device(0)
		wantIs(t, err, ErrNoDevice)
		wantIs(t, err, code)
	}
	sim.set("FAIL", "hipGetDeviceCount:1:719")
	if _, err := rt.Device(0); errors.Is(err, ErrNoDevice) || !errors.Is(err, ErrLaunchFailure) {
		t.Errorf("got %v, want a launch failure only", err)
	}
}

func TestMemory(t *testing.T) {
	rt, sim := openSim(t)
	d := device(t, rt, 0)
	_, err := d.Malloc(0)
	wantIs(t, err, ErrInvalidValue)
	m := must(d.Malloc(100))(t)
	if m.Size() != 100 || m.Ptr() == 0 || m.Device() != d {
		t.Errorf("got %d bytes at %#x", m.Size(), m.Ptr())
	}
	sim.wantStat("device_bytes", 100)
	check(t, m.Close())
	check(t, m.Close())
	sim.wantStat("hipFree", 1)
	_, err = m.IPCHandle()
	wantIs(t, err, ErrClosed)
}

func TestHostMemory(t *testing.T) {
	rt, sim := openSim(t)
	d := device(t, rt, 0)
	for _, n := range []int{0, -1} {
		_, err := d.HostMalloc(n)
		wantIs(t, err, ErrInvalidValue)
		_, err = d.HostPlain(n)
		wantIs(t, err, ErrInvalidValue)
	}
	_, err := d.HostRegister(nil)
	wantIs(t, err, ErrInvalidValue)

	pinned := must(d.HostMalloc(5000))(t)
	plain := must(d.HostPlain(3 * os.Getpagesize()))(t)
	if b := pinned.Bytes(); len(b) != 5000 || cap(b) != 5000 || pinned.Len() != 5000 || !pinned.Pinned() {
		t.Errorf("pinned: got %d bytes, capacity %d, pinned %v", len(b), cap(b), pinned.Pinned())
	}
	if plain.Pinned() || len(plain.Bytes()) != 3*os.Getpagesize() || plain.addr%uintptr(os.Getpagesize()) != 0 {
		t.Errorf("plain: got %d bytes at %#x, pinned %v", len(plain.Bytes()), plain.addr, plain.Pinned())
	}
	if p, err := pinned.DevicePtr(); uintptr(p) != pinned.addr || err != nil {
		t.Errorf("got %#x, %v, want %#x", p, err, pinned.addr)
	}
	_, err = plain.DevicePtr()
	wantIs(t, err, ErrUnsupported)

	// Registration of the middle page; what overlaps it, or other pinned memory, is refused before HIP is asked.
	page := os.Getpagesize()
	all := plain.Bytes()
	reg := must(d.HostRegister(all[page : 2*page]))(t)
	for name, b := range map[string][]byte{
		"same": all[page : 2*page], "around": all, "tail": all[2*page-1:], "hipHostMalloc's": pinned.Bytes()[1:2],
	} {
		if _, err := d.HostRegister(b); !errors.Is(err, ErrHostMemoryAlreadyRegistered) {
			t.Errorf("%s: got %v, want ErrHostMemoryAlreadyRegistered", name, err)
		}
	}
	sim.wantStat("hipHostRegister", 1)
	beside := must(d.HostRegister(all[2*page:]))(t)
	check(t, beside.Close())
	check(t, reg.Close())
	check(t, reg.Close())
	sim.wantStat("hipHostUnregister", 2)
	check(t, must(d.HostRegister(all))(t).Close())

	// A failure leaves no trace that would stop a second try.
	sim.set("FAIL", "hipHostRegister:1:2")
	_, err = d.HostRegister(all)
	wantCode(t, err, "hipHostRegister", ErrOutOfMemory)
	check(t, must(d.HostRegister(all))(t).Close())

	check(t, plain.Close())
	check(t, pinned.Close())
	check(t, pinned.Close())
	sim.wantStat("hipHostFree", 1)
	if pinned.Bytes() != nil {
		t.Error("Bytes after Close: got a slice")
	}
	_, err = pinned.DevicePtr()
	wantIs(t, err, ErrClosed)
	sim.wantStat("misuses", 0)
}

func TestRegisterReadOnly(t *testing.T) {
	rt, _ := openSim(t)
	// The text of this program is mapped without write permission.
	text := must(os.ReadFile("/proc/self/maps"))(t)
	var from, to uintptr
	for line := range strings.Lines(string(text)) {
		if strings.Contains(line, " r-xp ") {
			fmt.Sscanf(line, "%x-%x", &from, &to)
			break
		}
	}
	d := device(t, rt, 0)
	_, err := d.HostRegister(hostmem.At(from, 4096))
	wantCode(t, err, "hipHostRegister", ErrInvalidValue)
}

// TestCurrentDevice creates things on two devices from goroutines that move between threads; the simulator knows which
// device was current. The thread's own current device stays as it was.
func TestCurrentDevice(t *testing.T) {
	rt, sim := openSim(t, "DEVICES=2")
	devices := []*Device{device(t, rt, 0), device(t, rt, 1)}
	var wg sync.WaitGroup
	for g := range 16 {
		wg.Go(func() {
			d := devices[g%2]
			for range 50 {
				s, err := d.NewStream()
				if err != nil {
					t.Error(err)
					return
				}
				e, err := d.NewEvent(EventOptions{})
				if err != nil {
					t.Error(err)
					return
				}
				m, err := d.Malloc(64)
				if err != nil {
					t.Error(err)
					return
				}
				runtime.Gosched()
				// The simulator refuses an event or memory of another device than the stream's.
				if err := errors.Join(s.Memset(m.Ptr(), 1, 64), s.Record(e), d.Synchronize()); err != nil {
					t.Error(err)
				}
				if err := errors.Join(s.Close(), e.Close(), m.Close()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	sim.wantStat("misuses", 0)

	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for _, mine := range []int32{1, 0} {
		if st := rt.api.HipSetDevice(mine); st != Success {
			t.Fatal(st)
		}
		check(t, devices[1-mine].Synchronize())
		check(t, devices[mine].Synchronize())
		var now int32
		if st := rt.api.HipGetDevice(&now); st != Success || now != mine {
			t.Errorf("the thread's current device: got %d, %v, want %d", now, st, mine)
		}
	}
}

func TestCurrentDeviceFailures(t *testing.T) {
	rt, sim := openSim(t, "DEVICES=2")
	d := device(t, rt, 1)
	sim.set("FAIL", "hipSetDevice:1:101")
	_, err := d.Malloc(64)
	wantCode(t, err, "hipSetDevice", ErrInvalidDevice)
	sim.set("FAIL", "hipGetDevice:1:3")
	_, err = d.NewStream()
	wantCode(t, err, "hipGetDevice", ErrNotInitialized)
	sim.wantStat("hipMalloc", 0)
	sim.wantStat("hipStreamCreateWithFlags", 0)
}

func TestPeers(t *testing.T) {
	rt, _ := openSim(t, "DEVICES=2")
	d0, d1 := device(t, rt, 0), device(t, rt, 1)
	if can, err := d0.CanAccessPeer(d1); !can || err != nil {
		t.Errorf("got %v, %v", can, err)
	}
	if can, err := d0.CanAccessPeer(d0); can || err != nil {
		t.Errorf("itself: got %v, %v", can, err)
	}
	wantCode(t, d0.DisablePeerAccess(d1), "hipDeviceDisablePeerAccess", ErrPeerAccessNotEnabled)
	check(t, d0.EnablePeerAccess(d1))
	wantCode(t, d0.EnablePeerAccess(d1), "hipDeviceEnablePeerAccess", ErrPeerAccessAlreadyEnabled)
	check(t, d1.EnablePeerAccess(d0))
	check(t, d0.DisablePeerAccess(d1))

	m0 := closing(t, must(d0.Malloc(64))(t), nil)
	m1 := closing(t, must(d1.Malloc(64))(t), nil)
	h := closing(t, must(d1.HostMalloc(64))(t), nil)
	s0 := closing(t, must(d0.NewStream())(t), nil)
	s1 := closing(t, must(d1.NewStream())(t), nil)
	check(t, s0.Memset(m0.Ptr(), 7, 64))
	check(t, s0.Synchronize())
	check(t, s1.CopyPeer(m1.Ptr(), m0.Ptr(), d0, 64))
	check(t, s1.CopyToHost(h, 0, m1.Ptr(), 64))
	check(t, s1.Synchronize())
	if !bytes.Equal(h.Bytes(), bytes.Repeat([]byte{7}, 64)) {
		t.Errorf("got % x", h.Bytes())
	}
	wantCode(t, s1.CopyPeer(m1.Ptr(), m0.Ptr(), d1, 64), "hipMemcpyPeerAsync", ErrInvalidValue)
}

func TestMallocAsync(t *testing.T) {
	rt, sim := openSim(t)
	d := device(t, rt, 0)
	s := closing(t, must(d.NewStream())(t), nil)
	_, err := s.MallocAsync(0)
	wantIs(t, err, ErrInvalidValue)
	m := must(s.MallocAsync(64))(t)
	check(t, s.Memset(m.Ptr(), 1, 64))
	check(t, s.FreeAsync(m))
	check(t, s.FreeAsync(m))
	check(t, m.Close())
	check(t, s.Synchronize())
	sim.wantStat("device_allocations", 0)
	sim.wantStat("hipFreeAsync", 1)
	check(t, must(s.MallocAsync(64))(t).Close())
	sim.wantStat("hipFree", 1)
}

// TestIPC opens memory of this process in another one, so the 64-byte handle passes by value through C twice.
func TestIPC(t *testing.T) {
	if name := os.Getenv("AMDHIP_IPC"); name != "" {
		var h IPCHandle
		var raw []byte
		fmt.Sscanf(name, "%x", &raw)
		check(t, h.UnmarshalBinary(raw))
		rt := must(Open(Options{}))(t)
		d := device(t, rt, 0)
		s := must(d.NewStream())(t)
		m := must(d.OpenIPC(h))(t)
		check(t, s.Memset(m.Ptr(), 42, 64))
		check(t, s.Synchronize())
		check(t, m.Close())
		return
	}
	for version := range 3 {
		t.Run(fmt.Sprint("HIP ", version+5), func(t *testing.T) {
			rt, _ := openSim(t, fmt.Sprint("VERSION=", version+5))
			d := device(t, rt, 0)
			m := closing(t, must(d.Malloc(64))(t), nil)
			h := must(m.IPCHandle())(t)
			raw := must(h.MarshalBinary())(t)
			cmd := exec.Command(os.Args[0], "-test.run=^TestIPC$")
			cmd.Env = append(os.Environ(), fmt.Sprintf("AMDHIP_IPC=%x", raw), "GGUF2GPU_HIP_LIBRARY="+rt.Library(),
				fmt.Sprint("HIPSIM_VERSION=", version+5))
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			s := closing(t, must(d.NewStream())(t), nil)
			host := closing(t, must(d.HostMalloc(64))(t), nil)
			check(t, s.CopyToHost(host, 0, m.Ptr(), 64))
			check(t, s.Synchronize())
			if !bytes.Equal(host.Bytes(), bytes.Repeat([]byte{42}, 64)) {
				t.Errorf("the other process's bytes did not arrive: % x", host.Bytes())
			}
			_, err := d.OpenIPC(IPCHandle{})
			wantCode(t, err, "hipIpcOpenMemHandle", ErrInvalidValue)
			wantIs(t, h.UnmarshalBinary(raw[1:]), ErrInvalidValue)
		})
	}
}
