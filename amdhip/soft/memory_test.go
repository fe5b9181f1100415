package soft

import (
	"bytes"
	"errors"
	"runtime"
	"runtime/debug"
	"testing"
	"unsafe"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hostmem"
)

func TestCapacity(t *testing.T) {
	_, d := openSoft(t, Options{Memory: 1_000_003})
	free := func() uint64 {
		t.Helper()
		f, total, err := d.MemInfo()
		noError(t, err)
		if total != 1_000_003 {
			t.Errorf("total %d", total)
		}
		return f
	}
	if _, err := d.Malloc(1_000_004); !errors.Is(err, hip.ErrOutOfMemory) {
		t.Errorf("more than there is: %v", err)
	}
	a := value(d.Malloc(600_000))(t)
	if got := free(); got != 400_003 {
		t.Errorf("%d bytes are free, want 400003", got)
	}
	if _, err := d.Malloc(400_004); !errors.Is(err, hip.ErrOutOfMemory) {
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
func TestAddresses(t *testing.T) {
	rt, d := openSoft(t, Options{})
	api := Of(rt).table()
	s, m, h := newStream(t, d), newMemory(t, d, 1000), newPinned(t, d, 1000)
	gone := value(d.Malloc(1000))(t)
	noError(t, gone.Close())
	plain, err := d.HostPlain(1000)
	closeLater(t, plain, err)
	dev, host, stream := uintptr(m.Ptr()), addrOf(h), s.Handle()
	var out uintptr
	const h2d, d2h = hip.MemcpyHostToDevice, hip.MemcpyDeviceToHost
	const d2d, byAddress = hip.MemcpyDeviceToDevice, hip.MemcpyDefault
	tests := []struct {
		name string
		got  hip.Status
		want hip.Status
	}{
		{"whole", api.HipMemcpyAsync(dev, host, 1000, h2d, stream), hip.Success},
		{"kind by address", api.HipMemcpyAsync(dev, host, 1000, byAddress, stream), hip.Success},
		{"nothing", api.HipMemcpyAsync(dev, host, 0, h2d, stream), hip.Success},
		{"past the end of device memory", api.HipMemcpyAsync(dev+1, host, 1000, h2d, stream), hip.ErrInvalidValue},
		{"past the end of host memory", api.HipMemcpyAsync(dev, host+1, 1000, h2d, stream), hip.ErrInvalidValue},
		{"before device memory", api.HipMemcpyAsync(dev-1, host, 10, h2d, stream), hip.ErrInvalidValue},
		{"behind device memory", api.HipMemcpyAsync(dev+1000, host, 1, h2d, stream), hip.ErrInvalidValue},
		{"wraps around", api.HipMemcpyAsync(dev, host, ^uintptr(0), h2d, stream), hip.ErrInvalidValue},
		{"null", api.HipMemcpyAsync(0, host, 10, h2d, stream), hip.ErrInvalidValue},
		{"near null", api.HipMemcpyAsync(dev, 8, 10, h2d, stream), hip.ErrInvalidValue},
		{"freed", api.HipMemcpyAsync(uintptr(gone.Ptr()), host, 10, h2d, stream), hip.ErrInvalidValue},
		{"no such device", api.HipMemcpyAsync(dev+deviceSpace, host, 10, h2d, stream), hip.ErrInvalidValue},
		{"host for device", api.HipMemcpyAsync(host, addrOf(plain), 10, h2d, stream), hip.ErrInvalidValue},
		{"plain for device", api.HipMemcpyAsync(addrOf(plain), host, 10, h2d, stream), hip.ErrInvalidValue},
		{"device for host", api.HipMemcpyAsync(dev, dev, 10, d2h, stream), hip.ErrInvalidValue},
		{"host in device copy", api.HipMemcpyAsync(dev, host, 10, d2d, stream), hip.ErrInvalidValue},
		{"device in host copy", api.HipMemcpyAsync(dev, host, 10, hip.MemcpyHostToHost, stream), hip.ErrInvalidValue},
		{"kind 5", api.HipMemcpyAsync(dev, host, 10, 5, stream), hip.ErrInvalidMemcpyDirection},
		{"kind -1", api.HipMemcpyAsync(dev, host, 10, -1, stream), hip.ErrInvalidMemcpyDirection},
		{"null stream", api.HipMemcpyAsync(dev, host, 10, h2d, 0), hip.ErrNotSupported},
		{"no stream", api.HipMemcpyAsync(dev, host, 10, h2d, 99), hip.ErrContextIsDestroyed},
		{"set", api.HipMemsetAsync(dev, 0x107, 1000, stream), hip.Success},
		{"set past the end", api.HipMemsetAsync(dev, 7, 1001, stream), hip.ErrInvalidValue},
		{"set host memory", api.HipMemsetAsync(host, 7, 10, stream), hip.ErrInvalidValue},

		{"free inside", api.HipFree(dev + 16), hip.ErrInvalidValue},
		{"free host memory", api.HipFree(host), hip.ErrInvalidValue},
		{"free twice", api.HipFree(uintptr(gone.Ptr())), hip.ErrInvalidValue},
		{"free null", api.HipFree(0), hip.Success},
		{"free in the address space of no device", api.HipFree(dev + deviceSpace), hip.ErrInvalidValue},
		{"host free device memory", api.HipHostFree(dev), hip.ErrInvalidValue},
		{"host free null", api.HipHostFree(0), hip.Success},
		{"unregister allocated", api.HipHostUnregister(host), hip.ErrHostMemoryNotRegistered},
		{"unregister unknown", api.HipHostUnregister(addrOf(plain)), hip.ErrHostMemoryNotRegistered},
		{"register allocated", api.HipHostRegister(host+100, 10, 0), hip.ErrHostMemoryAlreadyRegistered},
		{"register nothing", api.HipHostRegister(addrOf(plain), 0, 0), hip.ErrInvalidValue},
		{"register device memory", api.HipHostRegister(dev, 10, 0), hip.ErrInvalidValue},
		{"register with unknown flags", api.HipHostRegister(addrOf(plain), 10, 16), hip.ErrInvalidValue},
		{"malloc nothing", api.HipMalloc(&out, 0), hip.Success},
		{"malloc for nobody", api.HipMalloc(nil, 10), hip.ErrInvalidValue},
		{"host malloc nothing", api.HipHostMalloc(&out, 0, 0), hip.Success},
		{"host malloc coherent and not", api.HipHostMalloc(&out, 10, 0xC0000000), hip.ErrInvalidValue},
		{"host malloc with unknown flags", api.HipHostMalloc(&out, 10, 8), hip.ErrInvalidValue},
		{"device pointer of plain memory", api.HipHostGetDevicePointer(&out, addrOf(plain), 0), hip.ErrInvalidValue},
		{"device pointer with flags", api.HipHostGetDevicePointer(&out, host, 1), hip.ErrInvalidValue},
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

func TestRegister(t *testing.T) {
	rt, d := openSoft(t, Options{})
	api := Of(rt).table()
	b := value(hostmem.Map(1 << 16))(t)
	t.Cleanup(func() { _ = hostmem.Unmap(b) })
	p := uintptr(unsafe.Pointer(&b[0]))
	s, m := newStream(t, d), newMemory(t, d, 1<<16)
	for _, tt := range []struct {
		name string
		got  hip.Status
		want hip.Status
	}{
		{"middle", api.HipHostRegister(p+4096, 8192, 0), hip.Success},
		{"again", api.HipHostRegister(p+4096, 8192, 0), hip.ErrHostMemoryAlreadyRegistered},
		{"overlapping its start", api.HipHostRegister(p, 4097, 0), hip.ErrHostMemoryAlreadyRegistered},
		{"overlapping its end", api.HipHostRegister(p+12287, 4096, 0), hip.ErrHostMemoryAlreadyRegistered},
		{"around it", api.HipHostRegister(p, 1<<16, 0), hip.ErrHostMemoryAlreadyRegistered},
		{"before it", api.HipHostRegister(p, 4096, 0), hip.Success},
		{"behind it", api.HipHostRegister(p+12288, 4096, 0), hip.Success},
		{"unregister inside", api.HipHostUnregister(p + 5000), hip.ErrHostMemoryNotRegistered},
		{
			"copy wholly inside", api.HipMemcpyAsync(uintptr(m.Ptr()), p+4096, 8192, hip.MemcpyHostToDevice, s.Handle()),
			hip.Success,
		},
		{
			"copy leaving it", api.HipMemcpyAsync(uintptr(m.Ptr()), p+4096, 8193, hip.MemcpyHostToDevice, s.Handle()),
			hip.ErrInvalidValue,
		},
		{"unregister", api.HipHostUnregister(p + 4096), hip.Success},
		{"unregister again", api.HipHostUnregister(p + 4096), hip.ErrHostMemoryNotRegistered},
		{
			"copy of what was registered",
			api.HipMemcpyAsync(uintptr(m.Ptr()), p+4096, 8192, hip.MemcpyHostToDevice, s.Handle()),
			hip.Success,
		},
		{
			"copy into registered", api.HipMemcpyAsync(uintptr(m.Ptr()), p+8192, 8192, hip.MemcpyHostToDevice, s.Handle()),
			hip.Success,
		},
		{"unregister first", api.HipHostUnregister(p), hip.Success},
		{"unregister last", api.HipHostUnregister(p + 12288), hip.Success},
	} {
		if tt.got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, tt.got, tt.want)
		}
	}
	if got := Of(rt).Stats(); got.UnpinnedCopies != 2 || got.Registrations != 0 || got.PinnedBytes != 0 {
		t.Errorf("counted %+v, want 2 unpinned copies and nothing registered", got)
	}
}

func TestPoison(t *testing.T) {
	_, d := openSoft(t, Options{Poison: true})
	want := bytes.Repeat([]byte{poisonByte}, 200_001)
	if got := readBack(t, newMemory(t, d, 200_001)); !bytes.Equal(got, want) {
		t.Error("fresh memory is not all poison")
	}
}

func TestFlipBit(t *testing.T) {
	rt, d := openSoft(t, Options{})
	m, h := newMemory(t, d, 16), newPinned(t, d, 16)
	noError(t, Of(rt).FlipBit(m.Ptr()+3, 6))
	noError(t, Of(rt).FlipBit(value(h.DevicePtr())(t), 0))
	if got := readBack(t, m); got[3] != 64 {
		t.Errorf("device byte %#x, want 0x40", got[3])
	}
	if h.Bytes()[0] != 1 {
		t.Errorf("host byte %#x, want 1", h.Bytes()[0])
	}
	if err := Of(rt).FlipBit(m.Ptr()+16, 0); !errors.Is(err, hip.ErrInvalidValue) {
		t.Errorf("behind the end: %v", err)
	}
	if Of(rt).FlipBit(m.Ptr(), 8) == nil {
		t.Error("bit 8 of a byte was flipped")
	}
}

// Memory goes back to the system with hipFree, so that touching it faults.
func TestFreeUnmaps(t *testing.T) {
	rt, d := openSoft(t, Options{Memory: 1 << 30})
	m := value(d.Malloc(512 * mib))(t)
	h, st := Of(rt).hold(uintptr(m.Ptr()), 512*mib, func(*region) bool { return true })
	if st != hip.Success {
		t.Fatal(st)
	}
	mem := h.mem
	Of(rt).release(h.block)
	mem[256*mib] = 1
	noError(t, m.Close())
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	if st := guarded(func() { mem[256*mib] = 2 }); st != hip.ErrIllegalAddress {
		t.Errorf("freed memory: %v, want %v", st, hip.ErrIllegalAddress)
	}
}

func TestAsyncMemory(t *testing.T) {
	rt, d := openSoft(t, Options{Memory: 1000})
	s := newStream(t, d)
	m := value(s.MallocAsync(1000))(t)
	if _, err := s.MallocAsync(1); !errors.Is(err, hip.ErrOutOfMemory) {
		t.Errorf("with all memory taken: %v", err)
	}
	stall(t, s, m.Ptr())
	noError(t, s.Memset(m.Ptr(), 3, 1000))
	noError(t, s.FreeAsync(m))
	api, p := Of(rt).table(), uintptr(m.Ptr())
	for _, tt := range []struct {
		name string
		got  hip.Status
		want hip.Status
	}{
		{"free a second time", api.HipFree(p), hip.ErrInvalidValue},
		{"free asynchronously a second time", api.HipFreeAsync(p, s.Handle()), hip.ErrInvalidValue},
		{"use", api.HipMemsetAsync(p, 1, 1, s.Handle()), hip.ErrInvalidValue},
		{"free null", api.HipFreeAsync(0, s.Handle()), hip.ErrInvalidValue},
	} {
		if tt.got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, tt.got, tt.want)
		}
	}
	if got := Of(rt).Stats().DeviceBytes; got != 1000 {
		t.Errorf("%d bytes are allocated before the stream gets to the free, want 1000", got)
	}
	Of(rt).ClearFaults()
	noError(t, s.Synchronize())
	if got := Of(rt).Stats().DeviceBytes; got != 0 {
		t.Errorf("%d bytes are allocated after the free", got)
	}
}

// Memory that another stream frees between the call and the execution of a copy.
func TestUseAfterAsyncFree(t *testing.T) {
	rt, d := openSoft(t, Options{})
	a, b := newStream(t, d), newStream(t, d)
	m := value(a.MallocAsync(100))(t)
	h := newPinned(t, d, 100)
	stall(t, a, m.Ptr())
	noError(t, a.CopyToDevice(m.Ptr(), h, 0, 100))
	noError(t, b.FreeAsync(m))
	noError(t, b.Synchronize())
	Of(rt).ClearFaults()
	if err := a.Synchronize(); !errors.Is(err, hip.ErrIllegalAddress) || Of(a.Device().Runtime()).Stats().Stray == 0 {
		t.Errorf("copy to freed memory: %v, want %v, and that it is counted", err, hip.ErrIllegalAddress)
	}
}

// Host memory that its owner unmapped fails the copy, not the process.
func TestUnmappedSource(t *testing.T) {
	rt, d := openSoft(t, Options{})
	s, m := newStream(t, d), newMemory(t, d, 64*mib)
	b := value(hostmem.Map(64 * mib))(t)
	p := uintptr(unsafe.Pointer(&b[0]))
	if st := Of(rt).table().HipHostRegister(p, 64*mib, 0); st != hip.Success {
		t.Fatal(st)
	}
	noError(t, hostmem.Unmap(b))
	st := Of(rt).table().HipMemcpyAsync(uintptr(m.Ptr()), p, 64*mib, hip.MemcpyHostToDevice, s.Handle())
	if st != hip.Success {
		t.Fatal(st)
	}
	if err := s.Synchronize(); !errors.Is(err, hip.ErrIllegalAddress) {
		t.Errorf("got %v, want %v", err, hip.ErrIllegalAddress)
	}
}

// TestIPC opens memory of one Software in another, which stands for that of another process.
func TestIPC(t *testing.T) {
	shared := Options{Shared: true, Memory: 1 << 20}
	if runtime.GOOS != "linux" {
		t.Skip("memory is shared between processes on Linux only")
	}
	rt, d := openSoft(t, shared)
	other, there := openSoft(t, shared)
	m := value(d.Malloc(100))(t)
	handle := value(m.IPCHandle())(t)
	if _, err := d.OpenIPC(handle); !errors.Is(err, hip.ErrInvalidContext) {
		t.Errorf("its own memory: %v, want %v", err, hip.ErrInvalidContext)
	}
	mapped := value(there.OpenIPC(handle))(t)
	twice := value(there.OpenIPC(handle))(t)
	if twice.Ptr() == mapped.Ptr() {
		t.Error("both mappings have one address")
	}
	noError(t, Of(other).FlipBit(mapped.Ptr()+5, 2))
	if got := readBack(t, m); got[5] != 4 {
		t.Error("what was written through the mapping is not in the memory")
	}
	if free, total, err := there.MemInfo(); err != nil || free != total {
		t.Errorf("mapping takes %d bytes, %v", total-free, err)
	}
	noError(t, m.Close())
	if got := Of(rt).Stats(); got.Allocations != 0 {
		t.Errorf("counted %+v", got)
	}
	noError(t, Of(other).FlipBit(mapped.Ptr()+99, 2)) // the mapping keeps the memory
	if err := Of(other).FlipBit(mapped.Ptr()+100, 2); err == nil {
		t.Error("there is a byte behind the end")
	}
	if got := Of(other).Stats(); got.IPCMappings != 2 || got.Allocations != 0 {
		t.Errorf("counted %+v", got)
	}
	noError(t, mapped.Close())
	noError(t, twice.Close())
	if _, err := there.OpenIPC(handle); !errors.Is(err, hip.ErrInvalidDevicePointer) {
		t.Errorf("a handle of freed memory: %v", err)
	}
	if _, err := there.OpenIPC(hip.IPCHandle{}); !errors.Is(err, hip.ErrInvalidValue) {
		t.Errorf("no handle: %v", err)
	}
	_, alone := openSoft(t, Options{})
	if _, err := alone.OpenIPC(value(value(d.Malloc(100))(t).IPCHandle())(t)); !errors.Is(err, amdhip.ErrUnsupported) {
		t.Errorf("without Shared: %v", err)
	}
	if _, err := there.OpenIPC(value(value(alone.Malloc(100))(t).IPCHandle())(t)); !errors.Is(err, amdhip.ErrUnsupported) {
		t.Errorf("memory of a device without Shared: %v", err)
	}
}

// TestIPCHandles wants handles that were tampered with, or whose process is another one by now, to be refused.
func TestIPCHandles(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("memory is shared between processes on Linux only")
	}
	_, d := openSoft(t, Options{Shared: true})
	_, there := openSoft(t, Options{Shared: true})
	handle := value(value(d.Malloc(100))(t).IPCHandle())(t)
	for i := range handle.Bytes() {
		b := handle.Bytes()
		b[i] ^= 0x40
		bad := hip.NewIPCHandle(b)
		if m, err := there.OpenIPC(bad); !errors.Is(err, hip.ErrInvalidValue) {
			t.Errorf("with byte %d changed: %v", i, err)
			if err == nil {
				noError(t, m.Close())
			}
		}
	}
	name, _ := parseIPCHandle(handle)
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
		if m, err := there.OpenIPC(bad.handle()); !errors.Is(err, hip.ErrInvalidDevicePointer) {
			t.Errorf("%s: %v", what, err)
			if err == nil {
				noError(t, m.Close())
			}
		}
	}
}

func TestIntegrated(t *testing.T) {
	_, d := openSoft(t, Options{Integrated: true})
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

func TestSeveralDevices(t *testing.T) {
	rt, d0 := openSoft(t, Options{Devices: 2, Memory: 10 * mib})
	d1 := value(rt.Device(1))(t)
	s0, s1 := newStream(t, d0), newStream(t, d1)
	m0, m1 := newMemory(t, d0, mib), newMemory(t, d1, 2*mib)
	if free, _, err := d1.MemInfo(); err != nil || free != 8*mib {
		t.Errorf("%d bytes of device 1 are free (%v), want 8 MiB", free, err)
	}
	h := newPinned(t, d0, mib)
	if err := s0.CopyToDevice(m1.Ptr(), h, 0, 100); !errors.Is(err, hip.ErrInvalidValue) {
		t.Errorf("copy to the memory of another device: %v", err)
	}
	noError(t, s1.CopyToDevice(m1.Ptr(), h, 0, 100)) // pinned by one device, used by the other
	e1 := newEvent(t, d1)
	if err := s0.Record(e1); !errors.Is(err, hip.ErrInvalidHandle) {
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
	if st := Of(rt).table().HipMemcpyPeerAsync(uintptr(m1.Ptr()), 0, uintptr(m0.Ptr()), 0, 1,
		s1.Handle()); st != hip.ErrInvalidValue {
		t.Errorf("peer copy with the wrong device: %v", st)
	}

	if can := value(d0.CanAccessPeer(d1))(t); !can {
		t.Error("devices cannot access each other")
	}
	if can := value(d0.CanAccessPeer(d0))(t); can {
		t.Error("a device is its own peer")
	}
	noError(t, d0.EnablePeerAccess(d1))
	if err := d0.EnablePeerAccess(d1); !errors.Is(err, hip.ErrPeerAccessAlreadyEnabled) {
		t.Errorf("enabling twice: %v", err)
	}
	noError(t, d0.DisablePeerAccess(d1))
	if err := d0.DisablePeerAccess(d1); !errors.Is(err, hip.ErrPeerAccessNotEnabled) {
		t.Errorf("disabling twice: %v", err)
	}
}

// The current device belongs to the OS thread; a fresh one has device 0.
func TestCurrentDevice(t *testing.T) {
	rt, _ := openSoft(t, Options{Devices: 2})
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	current := func() int32 {
		i := int32(-1)
		if st := Of(rt).table().HipGetDevice(&i); st != hip.Success {
			t.Error(st)
		}
		return i
	}
	if st := Of(rt).table().HipSetDevice(1); st != hip.Success {
		t.Fatal(st)
	}
	if st := Of(rt).table().HipSetDevice(2); st != hip.ErrInvalidDevice {
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
	if st := Of(rt).table().HipSetDevice(0); st != hip.Success || current() != 0 {
		t.Errorf("back to device 0: %v, now %d", st, current())
	}
}
