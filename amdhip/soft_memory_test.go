package amdhip

import (
	"bytes"
	"errors"
	"runtime"
	"runtime/debug"
	"testing"
	"unsafe"
)

func TestSoftCapacity(t *testing.T) {
	_, d := openSoft(t, SoftwareOptions{Memory: 1_000_003})
	free := func() uint64 {
		t.Helper()
		f, total, err := d.MemInfo()
		noError(t, err)
		if total != 1_000_003 {
			t.Errorf("total %d", total)
		}
		return f
	}
	if _, err := d.Malloc(1_000_004); !errors.Is(err, ErrOutOfMemory) {
		t.Errorf("more than there is: %v", err)
	}
	a := value(d.Malloc(600_000))(t)
	if got := free(); got != 400_003 {
		t.Errorf("%d bytes are free, want 400003", got)
	}
	if _, err := d.Malloc(400_004); !errors.Is(err, ErrOutOfMemory) {
		t.Errorf("one byte too many: %v", err)
	}
	b := value(d.Malloc(400_003))(t)
	if got := free(); got != 0 {
		t.Errorf("%d bytes are free, want none", got)
	}
	noError(t, a.Close())
	noError(t, b.Close())
	if got := free(); got != 1_000_003 {
		t.Errorf("%d bytes are free in the end", got)
	}
}

// What the table answers to addresses that no caller of the handles could give it.
func TestSoftAddresses(t *testing.T) {
	rt, d := openSoft(t, SoftwareOptions{})
	api := rt.api
	s, m, h := newStream(t, d), newMemory(t, d, 1000), newPinned(t, d, 1000)
	gone := value(d.Malloc(1000))(t)
	noError(t, gone.Close())
	plain, err := d.HostPlain(1000)
	closeLater(t, plain, err)
	dev, host, stream := uintptr(m.Ptr()), h.addr, s.raw
	var out uintptr
	const h2d, d2h, d2d, byAddress = memcpyHostToDevice, memcpyDeviceToHost, memcpyDeviceToDevice, memcpyDefault
	tests := []struct {
		name string
		got  Status
		want Status
	}{
		{"whole", api.hipMemcpyAsync(dev, host, 1000, h2d, stream), Success},
		{"kind by address", api.hipMemcpyAsync(dev, host, 1000, byAddress, stream), Success},
		{"nothing", api.hipMemcpyAsync(dev, host, 0, h2d, stream), Success},
		{"past the end of device memory", api.hipMemcpyAsync(dev+1, host, 1000, h2d, stream), ErrInvalidValue},
		{"past the end of host memory", api.hipMemcpyAsync(dev, host+1, 1000, h2d, stream), ErrInvalidValue},
		{"before device memory", api.hipMemcpyAsync(dev-1, host, 10, h2d, stream), ErrInvalidValue},
		{"behind device memory", api.hipMemcpyAsync(dev+1000, host, 1, h2d, stream), ErrInvalidValue},
		{"wraps around", api.hipMemcpyAsync(dev, host, ^uintptr(0), h2d, stream), ErrInvalidValue},
		{"null", api.hipMemcpyAsync(0, host, 10, h2d, stream), ErrInvalidValue},
		{"near null", api.hipMemcpyAsync(dev, 8, 10, h2d, stream), ErrInvalidValue},
		{"freed", api.hipMemcpyAsync(uintptr(gone.Ptr()), host, 10, h2d, stream), ErrInvalidValue},
		{"no such device", api.hipMemcpyAsync(dev+deviceSpace, host, 10, h2d, stream), ErrInvalidValue},
		{"host for device", api.hipMemcpyAsync(host, plain.addr, 10, h2d, stream), ErrInvalidValue},
		{"plain for device", api.hipMemcpyAsync(plain.addr, host, 10, h2d, stream), ErrInvalidValue},
		{"device for host", api.hipMemcpyAsync(dev, dev, 10, d2h, stream), ErrInvalidValue},
		{"host in device copy", api.hipMemcpyAsync(dev, host, 10, d2d, stream), ErrInvalidValue},
		{"device in host copy", api.hipMemcpyAsync(dev, host, 10, memcpyHostToHost, stream), ErrInvalidValue},
		{"kind 5", api.hipMemcpyAsync(dev, host, 10, 5, stream), ErrInvalidMemcpyDirection},
		{"kind -1", api.hipMemcpyAsync(dev, host, 10, -1, stream), ErrInvalidMemcpyDirection},
		{"null stream", api.hipMemcpyAsync(dev, host, 10, h2d, 0), ErrNotSupported},
		{"no stream", api.hipMemcpyAsync(dev, host, 10, h2d, 99), ErrContextIsDestroyed},
		{"set", api.hipMemsetAsync(dev, 0x107, 1000, stream), Success},
		{"set past the end", api.hipMemsetAsync(dev, 7, 1001, stream), ErrInvalidValue},
		{"set host memory", api.hipMemsetAsync(host, 7, 10, stream), ErrInvalidValue},

		{"free inside", api.hipFree(dev + 16), ErrInvalidValue},
		{"free host memory", api.hipFree(host), ErrInvalidValue},
		{"free twice", api.hipFree(uintptr(gone.Ptr())), ErrInvalidValue},
		{"free null", api.hipFree(0), Success},
		{"free in the address space of no device", api.hipFree(dev + deviceSpace), ErrInvalidValue},
		{"host free device memory", api.hipHostFree(dev), ErrInvalidValue},
		{"host free null", api.hipHostFree(0), Success},
		{"unregister allocated", api.hipHostUnregister(host), ErrHostMemoryNotRegistered},
		{"unregister unknown", api.hipHostUnregister(plain.addr), ErrHostMemoryNotRegistered},
		{"register allocated", api.hipHostRegister(host+100, 10, 0), ErrHostMemoryAlreadyRegistered},
		{"register nothing", api.hipHostRegister(plain.addr, 0, 0), ErrInvalidValue},
		{"register device memory", api.hipHostRegister(dev, 10, 0), ErrInvalidValue},
		{"register with unknown flags", api.hipHostRegister(plain.addr, 10, 16), ErrInvalidValue},
		{"malloc nothing", api.hipMalloc(&out, 0), Success},
		{"malloc for nobody", api.hipMalloc(nil, 10), ErrInvalidValue},
		{"host malloc nothing", api.hipHostMalloc(&out, 0, 0), Success},
		{"host malloc coherent and not", api.hipHostMalloc(&out, 10, 0xC0000000), ErrInvalidValue},
		{"host malloc with unknown flags", api.hipHostMalloc(&out, 10, 8), ErrInvalidValue},
		{"device pointer of plain memory", api.hipHostGetDevicePointer(&out, plain.addr, 0), ErrInvalidValue},
		{"device pointer with flags", api.hipHostGetDevicePointer(&out, host, 1), ErrInvalidValue},
	}
	for _, tt := range tests {
		if tt.got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, tt.got, tt.want)
		}
	}
	if out != 0 {
		t.Errorf("an address was answered: %#x", out)
	}
	noError(t, s.Synchronize())
	if got := readBack(t, m); !bytes.Equal(got, bytes.Repeat([]byte{7}, 1000)) {
		t.Error("hipMemsetAsync did not set the low byte of its value")
	}
}

func TestSoftRegister(t *testing.T) {
	rt, d := openSoft(t, SoftwareOptions{})
	api := rt.api
	b := value(mapAnonymous(1 << 16))(t)
	t.Cleanup(func() { _ = unmapAnonymous(b) })
	p := uintptr(unsafe.Pointer(&b[0]))
	s, m := newStream(t, d), newMemory(t, d, 1<<16)
	for _, tt := range []struct {
		name string
		got  Status
		want Status
	}{
		{"middle", api.hipHostRegister(p+4096, 8192, 0), Success},
		{"again", api.hipHostRegister(p+4096, 8192, 0), ErrHostMemoryAlreadyRegistered},
		{"overlapping its start", api.hipHostRegister(p, 4097, 0), ErrHostMemoryAlreadyRegistered},
		{"overlapping its end", api.hipHostRegister(p+12287, 4096, 0), ErrHostMemoryAlreadyRegistered},
		{"around it", api.hipHostRegister(p, 1<<16, 0), ErrHostMemoryAlreadyRegistered},
		{"before it", api.hipHostRegister(p, 4096, 0), Success},
		{"behind it", api.hipHostRegister(p+12288, 4096, 0), Success},
		{"unregister inside", api.hipHostUnregister(p + 5000), ErrHostMemoryNotRegistered},
		{"copy wholly inside", api.hipMemcpyAsync(uintptr(m.Ptr()), p+4096, 8192, memcpyHostToDevice, s.raw), Success},
		{"copy leaving it", api.hipMemcpyAsync(uintptr(m.Ptr()), p+4096, 8193, memcpyHostToDevice, s.raw), ErrInvalidValue},
		{"unregister", api.hipHostUnregister(p + 4096), Success},
		{"unregister again", api.hipHostUnregister(p + 4096), ErrHostMemoryNotRegistered},
		{"copy of what was registered", api.hipMemcpyAsync(uintptr(m.Ptr()), p+4096, 8192, memcpyHostToDevice, s.raw), Success},
		{"copy into registered", api.hipMemcpyAsync(uintptr(m.Ptr()), p+8192, 8192, memcpyHostToDevice, s.raw), Success},
		{"unregister first", api.hipHostUnregister(p), Success},
		{"unregister last", api.hipHostUnregister(p + 12288), Success},
	} {
		if tt.got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, tt.got, tt.want)
		}
	}
	if got := rt.Software().Stats(); got.UnpinnedCopies != 2 || got.Registrations != 0 || got.PinnedBytes != 0 {
		t.Errorf("counted %+v, want 2 unpinned copies and nothing registered", got)
	}
}

func TestSoftPoison(t *testing.T) {
	_, d := openSoft(t, SoftwareOptions{Poison: true})
	want := bytes.Repeat([]byte{poisonByte}, 200_001)
	if got := readBack(t, newMemory(t, d, 200_001)); !bytes.Equal(got, want) {
		t.Error("fresh memory is not all poison")
	}
}

func TestSoftFlipBit(t *testing.T) {
	rt, d := openSoft(t, SoftwareOptions{})
	m, h := newMemory(t, d, 16), newPinned(t, d, 16)
	noError(t, rt.Software().FlipBit(m.Ptr()+3, 6))
	noError(t, rt.Software().FlipBit(value(h.DevicePtr())(t), 0))
	if got := readBack(t, m); got[3] != 64 {
		t.Errorf("device byte %#x, want 0x40", got[3])
	}
	if h.Bytes()[0] != 1 {
		t.Errorf("host byte %#x, want 1", h.Bytes()[0])
	}
	if err := rt.Software().FlipBit(m.Ptr()+16, 0); !errors.Is(err, ErrInvalidValue) {
		t.Errorf("behind the end: %v", err)
	}
	if rt.Software().FlipBit(m.Ptr(), 8) == nil {
		t.Error("bit 8 of a byte was flipped")
	}
}

// Memory goes back to the system with hipFree, so that touching it faults.
func TestSoftFreeUnmaps(t *testing.T) {
	rt, d := openSoft(t, SoftwareOptions{Memory: 1 << 30})
	m := value(d.Malloc(512 * mib))(t)
	h, st := rt.soft.hold(uintptr(m.Ptr()), 512*mib)
	if st != Success {
		t.Fatal(st)
	}
	mem := h.mem
	rt.soft.release(h.block)
	mem[256*mib] = 1
	noError(t, m.Close())
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	if st := guarded(func() { mem[256*mib] = 2 }); st != ErrIllegalAddress {
		t.Errorf("freed memory: %v, want %v", st, ErrIllegalAddress)
	}
}

func TestSoftAsyncMemory(t *testing.T) {
	rt, d := openSoft(t, SoftwareOptions{Memory: 1000})
	s := newStream(t, d)
	m := value(s.MallocAsync(1000))(t)
	if _, err := s.MallocAsync(1); !errors.Is(err, ErrOutOfMemory) {
		t.Errorf("with all memory taken: %v", err)
	}
	stall(t, s, m.Ptr())
	noError(t, s.Memset(m.Ptr(), 3, 1000))
	noError(t, s.FreeAsync(m))
	api, p := rt.api, uintptr(m.Ptr())
	for _, tt := range []struct {
		name string
		got  Status
		want Status
	}{
		{"free a second time", api.hipFree(p), ErrInvalidValue},
		{"free asynchronously a second time", api.hipFreeAsync(p, s.raw), ErrInvalidValue},
		{"use", api.hipMemsetAsync(p, 1, 1, s.raw), ErrInvalidValue},
		{"free null", api.hipFreeAsync(0, s.raw), ErrInvalidValue},
	} {
		if tt.got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, tt.got, tt.want)
		}
	}
	if got := rt.soft.Stats().DeviceBytes; got != 1000 {
		t.Errorf("%d bytes are allocated before the stream gets to the free, want 1000", got)
	}
	rt.soft.ClearFaults()
	noError(t, s.Synchronize())
	if got := rt.soft.Stats().DeviceBytes; got != 0 {
		t.Errorf("%d bytes are allocated after the free", got)
	}
}

// Memory that another stream frees between the call and the execution of a copy.
func TestSoftUseAfterAsyncFree(t *testing.T) {
	rt, d := openSoft(t, SoftwareOptions{})
	a, b := newStream(t, d), newStream(t, d)
	m := value(a.MallocAsync(100))(t)
	h := newPinned(t, d, 100)
	stall(t, a, m.Ptr())
	noError(t, a.CopyToDevice(m.Ptr(), h, 0, 100))
	noError(t, b.FreeAsync(m))
	noError(t, b.Synchronize())
	rt.soft.ClearFaults()
	if err := a.Synchronize(); !errors.Is(err, ErrIllegalAddress) {
		t.Errorf("copy to freed memory: %v, want %v", err, ErrIllegalAddress)
	}
}

// Host memory that its owner unmapped fails the copy, not the process.
func TestSoftUnmappedSource(t *testing.T) {
	rt, d := openSoft(t, SoftwareOptions{})
	s, m := newStream(t, d), newMemory(t, d, 64*mib)
	b := value(mapAnonymous(64 * mib))(t)
	p := uintptr(unsafe.Pointer(&b[0]))
	if st := rt.api.hipHostRegister(p, 64*mib, 0); st != Success {
		t.Fatal(st)
	}
	noError(t, unmapAnonymous(b))
	if st := rt.api.hipMemcpyAsync(uintptr(m.Ptr()), p, 64*mib, memcpyHostToDevice, s.raw); st != Success {
		t.Fatal(st)
	}
	if err := s.Synchronize(); !errors.Is(err, ErrIllegalAddress) {
		t.Errorf("got %v, want %v", err, ErrIllegalAddress)
	}
}

// TestSoftIPC opens memory of one Software in another, which stands for that of another process.
func TestSoftIPC(t *testing.T) {
	shared := SoftwareOptions{Shared: true, Memory: 1 << 20}
	if runtime.GOOS != "linux" {
		t.Skip("memory is shared between processes on Linux only")
	}
	rt, d := openSoft(t, shared)
	other, there := openSoft(t, shared)
	m := value(d.Malloc(100))(t)
	handle := value(m.IPCHandle())(t)
	if _, err := d.OpenIPC(handle); !errors.Is(err, ErrInvalidContext) {
		t.Errorf("its own memory: %v, want %v", err, ErrInvalidContext)
	}
	mapped := value(there.OpenIPC(handle))(t)
	twice := value(there.OpenIPC(handle))(t)
	if twice.Ptr() == mapped.Ptr() {
		t.Error("both mappings have one address")
	}
	noError(t, other.soft.FlipBit(mapped.Ptr()+5, 2))
	if got := readBack(t, m); got[5] != 4 {
		t.Error("what was written through the mapping is not in the memory")
	}
	if free, total, err := there.MemInfo(); err != nil || free != total {
		t.Errorf("mapping takes %d bytes, %v", total-free, err)
	}
	noError(t, m.Close())
	if got := rt.soft.Stats(); got.Allocations != 0 {
		t.Errorf("counted %+v", got)
	}
	noError(t, other.soft.FlipBit(mapped.Ptr()+99, 2)) // the mapping keeps the memory
	if err := other.soft.FlipBit(mapped.Ptr()+100, 2); err == nil {
		t.Error("there is a byte behind the end")
	}
	if got := other.soft.Stats(); got.IPCMappings != 2 || got.Allocations != 0 {
		t.Errorf("counted %+v", got)
	}
	noError(t, mapped.Close())
	noError(t, twice.Close())
	if _, err := there.OpenIPC(handle); !errors.Is(err, ErrInvalidDevicePointer) {
		t.Errorf("a handle of freed memory: %v", err)
	}
	if _, err := there.OpenIPC(IPCHandle{}); !errors.Is(err, ErrInvalidValue) {
		t.Errorf("no handle: %v", err)
	}
	_, alone := openSoft(t, SoftwareOptions{})
	if _, err := alone.OpenIPC(value(value(d.Malloc(100))(t).IPCHandle())(t)); !errors.Is(err, ErrUnsupported) {
		t.Errorf("without Shared: %v", err)
	}
	if _, err := there.OpenIPC(value(value(alone.Malloc(100))(t).IPCHandle())(t)); !errors.Is(err, ErrUnsupported) {
		t.Errorf("memory of a device without Shared: %v", err)
	}
}

// TestSoftIPCHandles wants handles that were tampered with, or whose process is another one by now, to be refused.
func TestSoftIPCHandles(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("memory is shared between processes on Linux only")
	}
	_, d := openSoft(t, SoftwareOptions{Shared: true})
	_, there := openSoft(t, SoftwareOptions{Shared: true})
	handle := value(value(d.Malloc(100))(t).IPCHandle())(t)
	for i := range handle.b {
		bad := handle
		bad.b[i] ^= 0x40
		if m, err := there.OpenIPC(bad); !errors.Is(err, ErrInvalidValue) {
			t.Errorf("with byte %d changed: %v", i, err)
			if err == nil {
				noError(t, m.Close())
			}
		}
	}
	name, _ := handle.softName()
	for what, change := range map[string]func(*ipcName){
		"another process number": func(n *ipcName) { n.pid = 1 << 30 },
		"a process since":        func(n *ipcName) { n.start++ },
		"another descriptor":     func(n *ipcName) { n.fd = 0 },
		"no such descriptor":     func(n *ipcName) { n.fd = 1 << 20 },
		"another allocation":     func(n *ipcName) { n.nonce++ },
		"another size":           func(n *ipcName) { n.size++ },
	} {
		bad := name
		change(&bad)
		if m, err := there.OpenIPC(bad.handle()); !errors.Is(err, ErrInvalidDevicePointer) {
			t.Errorf("%s: %v", what, err)
			if err == nil {
				noError(t, m.Close())
			}
		}
	}
}

func TestSoftIntegrated(t *testing.T) {
	_, d := openSoft(t, SoftwareOptions{Integrated: true})
	weights, host := newPinned(t, d, 4096), newPinned(t, d, 4096)
	copy(weights.Bytes(), "straight into device-visible memory")
	p := value(weights.DevicePtr())(t)
	s := newStream(t, d)
	noError(t, s.CopyToHost(host, 0, p+9, 100))
	noError(t, s.Memset(p, 'x', 1))
	noError(t, s.Synchronize())
	if !bytes.HasPrefix(host.Bytes(), []byte("into device")) || weights.Bytes()[0] != 'x' {
		t.Errorf("read %q", host.Bytes()[:20])
	}
}

func TestSoftSeveralDevices(t *testing.T) {
	rt, d0 := openSoft(t, SoftwareOptions{Devices: 2, Memory: 10 * mib})
	d1 := value(rt.Device(1))(t)
	s0, s1 := newStream(t, d0), newStream(t, d1)
	m0, m1 := newMemory(t, d0, mib), newMemory(t, d1, 2*mib)
	if free, _, err := d1.MemInfo(); err != nil || free != 8*mib {
		t.Errorf("%d bytes of device 1 are free (%v), want 8 MiB", free, err)
	}
	h := newPinned(t, d0, mib)
	if err := s0.CopyToDevice(m1.Ptr(), h, 0, 100); !errors.Is(err, ErrInvalidValue) {
		t.Errorf("copy to the memory of another device: %v", err)
	}
	noError(t, s1.CopyToDevice(m1.Ptr(), h, 0, 100)) // pinned by one device, used by the other
	e1 := newEvent(t, d1)
	if err := s0.Record(e1); !errors.Is(err, ErrInvalidHandle) {
		t.Errorf("recording the event of another device: %v", err)
	}

	noError(t, s0.Memset(m0.Ptr(), 42, mib))
	e0 := newEvent(t, d0)
	noError(t, s0.Record(e0))
	noError(t, s1.Wait(e0)) // waiting across devices is allowed
	noError(t, s1.CopyPeer(m1.Ptr()+mib, m0.Ptr(), d0, mib))
	noError(t, s1.Synchronize())
	if got := readBack(t, m1); !bytes.Equal(got[mib:], bytes.Repeat([]byte{42}, mib)) {
		t.Error("the peer copy brought other bytes")
	}
	if st := rt.api.hipMemcpyPeerAsync(uintptr(m1.Ptr()), 0, uintptr(m0.Ptr()), 0, 1, s1.raw); st != ErrInvalidValue {
		t.Errorf("peer copy with the wrong device: %v", st)
	}

	if can := value(d0.CanAccessPeer(d1))(t); !can {
		t.Error("devices cannot access each other")
	}
	if can := value(d0.CanAccessPeer(d0))(t); can {
		t.Error("a device is its own peer")
	}
	noError(t, d0.EnablePeerAccess(d1))
	if err := d0.EnablePeerAccess(d1); !errors.Is(err, ErrPeerAccessAlreadyEnabled) {
		t.Errorf("enabling twice: %v", err)
	}
	noError(t, d0.DisablePeerAccess(d1))
	if err := d0.DisablePeerAccess(d1); !errors.Is(err, ErrPeerAccessNotEnabled) {
		t.Errorf("disabling twice: %v", err)
	}
}

// The current device belongs to the OS thread; a fresh one has device 0.
func TestSoftCurrentDevice(t *testing.T) {
	rt, _ := openSoft(t, SoftwareOptions{Devices: 2})
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	current := func() int32 {
		i := int32(-1)
		if st := rt.api.hipGetDevice(&i); st != Success {
			t.Error(st)
		}
		return i
	}
	if st := rt.api.hipSetDevice(1); st != Success {
		t.Fatal(st)
	}
	if st := rt.api.hipSetDevice(2); st != ErrInvalidDevice {
		t.Errorf("device 2 of 2: %v", st)
	}
	other := make(chan int32)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		other <- current()
	}()
	if got := <-other; got != 0 {
		t.Errorf("another thread has device %d, want 0", got)
	}
	if got := current(); got != 1 {
		t.Errorf("this thread has device %d, want 1", got)
	}
	if st := rt.api.hipSetDevice(0); st != Success || current() != 0 {
		t.Errorf("back to device 0: %v, now %d", st, current())
	}
}
