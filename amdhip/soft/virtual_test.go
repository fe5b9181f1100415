package soft

import (
	"bytes"
	"errors"
	"os"
	"runtime"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
)

// newPhysical creates memory until the end of the test.
func newPhysical(t testing.TB, d *amdhip.Device, n uint64, exportable bool) *amdhip.PhysicalMemory {
	t.Helper()
	p, err := d.CreatePhysical(n, amdhip.PhysicalOptions{Exportable: exportable})
	return closeLater(t, p, err)
}

// nothingVirtual fails the test if virtual memory is left.
func nothingVirtual(t testing.TB, sw *Software) {
	t.Helper()
	if s := sw.Stats(); s.Physical+s.Mappings+s.Reservations != 0 || s.DeviceBytes != 0 {
		t.Errorf("left: %+v", s)
	}
}

// TestMapMemory works with mapped memory in all ways in which one can with allocated memory.
func TestMapMemory(t *testing.T) {
	t.Parallel()
	rt, d := openSoft(t, Options{Poison: true, Memory: mib})
	sw := Of(rt)
	minimum, recommended, err := d.Granularity()
	noError(t, err)
	if minimum != granularity || recommended != 64<<10 || !d.VirtualMemory() {
		t.Errorf("granularity %d and %d", minimum, recommended)
	}
	p := newPhysical(t, d, 8192, false)
	if free, _, err := d.MemInfo(); free != mib-8192 || err != nil {
		t.Errorf("%d bytes are free, %v", free, err)
	}
	m, err := d.MapMemory(p, 0)
	noError(t, err)
	if got := readBack(t, m); !bytes.Equal(got, bytes.Repeat([]byte{poisonByte}, 8192)) {
		t.Error("fresh memory is not all poison")
	}
	other := newMemory(t, d, 8192)
	s, h := newStream(t, d), newPinned(t, d, 16)
	copy(h.Bytes(), "0123456789abcdef")
	noError(t, s.CopyToDevice(m.Ptr()+100, h, 0, 16))
	noError(t, s.CopyDevice(other.Ptr(), m.Ptr()+102, 8))
	noError(t, s.Memset(m.Ptr()+100, 'x', 1))
	noError(t, s.Synchronize())
	if got := readBack(t, other)[:8]; string(got) != "23456789" {
		t.Errorf("got %q", got)
	}
	noError(t, sw.FlipBit(m.Ptr()+100, 0))
	if got := readBack(t, m)[100]; got != 'x'^1 {
		t.Errorf("got %q", got)
	}
	if base, size, err := d.AddressRangeOf(m.Ptr() + 8191); base != m.Ptr() || size != 8192 || err != nil {
		t.Errorf("%d bytes at %#x, %v", size, base, err)
	}
	if _, err := m.IPCHandle(); !errors.Is(err, amdhip.ErrUnsupported) || sw.Calls()["hipIpcGetMemHandle"] != 0 {
		t.Errorf("IPC handle: %v", err)
	}
	at := m.Ptr()
	noError(t, m.Close())
	if err := s.Memset(at, 0, 1); !errors.Is(err, hip.ErrInvalidValue) {
		t.Errorf("unmapped memory: %v", err)
	}
	again, err := d.MapMemory(p, at)
	noError(t, err)
	noError(t, p.Close())
	if again.Ptr() != at || readBack(t, again)[100] != 'x'^1 {
		t.Errorf("mapped again at %#x, want %#x and the bytes that were there", again.Ptr(), at)
	}
	if got := sw.Stats(); got.DeviceBytes != 8192+8192 || got.Physical != 0 || got.Mappings != 1 || got.Reservations != 1 {
		t.Errorf("counted %+v", got)
	}
	noError(t, again.Close())
	noError(t, other.Close())
	nothingVirtual(t, sw)
}

// TestVirtualTable asks the table for what the binding never would.
func TestVirtualTable(t *testing.T) {
	t.Parallel()
	rt, d := openSoft(t, Options{Memory: mib})
	api := Of(rt).table()
	prop := hip.AllocationProp{Type: hip.AllocationPinned, Location: hip.Location{Type: hip.LocationDevice}}
	var a, b, out, at, far uintptr
	for _, st := range []hip.Status{
		api.HipMemCreate(&a, 8192, &prop, 0), api.HipMemCreate(&b, 4096, &prop, 0),
		api.HipMemAddressReserve(&at, 32768, 0, 0, 0), api.HipMemAddressReserve(&far, 4096, 1<<30, 0, 0),
		api.HipMemMap(at, 8192, 0, a, 0),
	} {
		if st != hip.Success {
			t.Fatal(st)
		}
	}
	if far%(1<<30) != 0 {
		t.Errorf("%#x is not aligned", far)
	}
	desc := func(typ hip.LocationType, id int32, flags hip.AccessFlags) *hip.AccessDesc {
		return &hip.AccessDesc{Location: hip.Location{Type: typ, ID: id}, Flags: flags}
	}
	changed := func(f func(*hip.AllocationProp)) *hip.AllocationProp {
		p := prop
		f(&p)
		return &p
	}
	fd := int32(0)
	for _, tt := range []struct {
		name string
		got  hip.Status
		want hip.Status
	}{
		{"create for nobody", api.HipMemCreate(nil, 4096, &prop, 0), hip.ErrInvalidValue},
		{"create of nothing", api.HipMemCreate(&out, 4096, nil, 0), hip.ErrInvalidValue},
		{"create odd size", api.HipMemCreate(&out, 4097, &prop, 0), hip.ErrInvalidValue},
		{"create no size", api.HipMemCreate(&out, 0, &prop, 0), hip.ErrInvalidValue},
		{"create with flags", api.HipMemCreate(&out, 4096, &prop, 1), hip.ErrInvalidValue},
		{"create more than there is", api.HipMemCreate(&out, 2*mib, &prop, 0), hip.ErrOutOfMemory},
		{
			"create on no device", api.HipMemCreate(&out, 4096, changed(func(p *hip.AllocationProp) { p.Location.ID = 1 }), 0),
			hip.ErrInvalidDevice,
		},
		{
			"create on the host", api.HipMemCreate(&out, 4096, changed(func(p *hip.AllocationProp) { p.Location.Type = 2 }), 0),
			hip.ErrInvalidValue,
		},
		{
			"create managed", api.HipMemCreate(&out, 4096, changed(func(p *hip.AllocationProp) { p.Type = 2 }), 0),
			hip.ErrInvalidValue,
		},
		{
			"create for Windows", api.HipMemCreate(&out, 4096, changed(func(p *hip.AllocationProp) { p.HandleTypes = 2 }), 0),
			hip.ErrNotSupported,
		},
		{"granularity of what", api.HipMemGetAllocationGranularity(&out, &prop, 2), hip.ErrInvalidValue},
		{"granularity for nobody", api.HipMemGetAllocationGranularity(nil, &prop, 0), hip.ErrInvalidValue},
		{"reserve odd size", api.HipMemAddressReserve(&out, 100, 0, 0, 0), hip.ErrInvalidValue},
		{"reserve odd alignment", api.HipMemAddressReserve(&out, 4096, 3*4096, 0, 0), hip.ErrInvalidValue},
		{"reserve odd hint", api.HipMemAddressReserve(&out, 4096, 0, at+1, 0), hip.ErrInvalidValue},
		{"reserve too much", api.HipMemAddressReserve(&out, 1<<53, 0, 0, 0), hip.ErrOutOfMemory},
		{"map over it", api.HipMemMap(at+4096, 4096, 0, b, 0), hip.ErrAlreadyMapped},
		{"map a part", api.HipMemMap(at+8192, 4096, 0, a, 0), hip.ErrInvalidValue},
		{"map with an offset", api.HipMemMap(at+8192, 4096, 4096, b, 0), hip.ErrInvalidValue},
		{"map odd", api.HipMemMap(at+8200, 4096, 0, b, 0), hip.ErrInvalidValue},
		{"map past the end", api.HipMemMap(at+32768, 4096, 0, b, 0), hip.ErrInvalidValue},
		{"map across the end", api.HipMemMap(at+28672, 8192, 0, a, 0), hip.ErrInvalidValue},
		{"map nothing", api.HipMemMap(at+8192, 4096, 0, 77, 0), hip.ErrInvalidValue},
		{"access to a part", api.HipMemSetAccess(at, 4096, desc(1, 0, 3), 1), hip.ErrInvalidValue},
		{"access to a hole", api.HipMemSetAccess(at, 12288, desc(1, 0, 3), 1), hip.ErrInvalidValue},
		{"access for the host", api.HipMemSetAccess(at, 8192, desc(2, 0, 3), 1), hip.ErrInvalidValue},
		{"access for no device", api.HipMemSetAccess(at, 8192, desc(1, 1, 3), 1), hip.ErrInvalidDevice},
		{"access to write only", api.HipMemSetAccess(at, 8192, desc(1, 0, 2), 1), hip.ErrInvalidValue},
		{"access for nobody", api.HipMemSetAccess(at, 8192, nil, 1), hip.ErrInvalidValue},
		{"unmap a part", api.HipMemUnmap(at, 4096), hip.ErrInvalidValue},
		{"unmap inside", api.HipMemUnmap(at+4096, 4096), hip.ErrInvalidValue},
		{"free mapped addresses", api.HipMemAddressFree(at, 32768), hip.ErrInvalidValue},
		{"free a part", api.HipMemAddressFree(far, 2048), hip.ErrInvalidValue},
		{"export what was not made for it", api.HipMemExportToShareableHandle(&fd, a, 1, 0), hip.ErrInvalidValue},
		{"export for Windows", api.HipMemExportToShareableHandle(&fd, a, 2, 0), hip.ErrInvalidValue},
		{"import no descriptor", api.HipMemImportFromShareableHandle(&out, 1<<10, 1), hip.ErrInvalidValue},
		{"import the standard input", api.HipMemImportFromShareableHandle(&out, 0, 1), hip.ErrInvalidValue},
		{"hipFree", api.HipFree(at), hip.ErrInvalidValue},
		{"the size of nothing", api.HipMemGetAddressRange(&out, &out, far), hip.ErrInvalidValue},
		{"release", api.HipMemRelease(b), hip.Success},
		{"release twice", api.HipMemRelease(b), hip.ErrInvalidValue},
		{"free", api.HipMemAddressFree(far, 4096), hip.Success},
		{"free twice", api.HipMemAddressFree(far, 4096), hip.ErrInvalidValue},
		{"unmap", api.HipMemUnmap(at, 8192), hip.Success},
		{"unmap twice", api.HipMemUnmap(at, 8192), hip.ErrInvalidValue},
		{"free the rest", api.HipMemAddressFree(at, 32768), hip.Success},
		{"release the rest", api.HipMemRelease(a), hip.Success},
	} {
		if tt.got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, tt.got, tt.want)
		}
	}
	nothingVirtual(t, Of(rt))
	if d.UnpinnedCopies() != 0 {
		t.Error("a copy was counted")
	}
}

// TestVirtualAccess: a device may do what it was given, no more.
func TestVirtualAccess(t *testing.T) {
	t.Parallel()
	rt, d0 := openSoft(t, Options{Devices: 2})
	d1 := value(rt.Device(1))(t)
	s0, s1, h := newStream(t, d0), newStream(t, d1), newPinned(t, d0, 64)
	p := newPhysical(t, d0, 4096, false)
	r, err := d0.ReserveAddresses(4096, 0, 0)
	closeLater(t, r, err)
	noError(t, r.Map(0, p))
	write := func(s *amdhip.Stream) error { return s.CopyToDevice(r.Ptr(), h, 0, 64) }
	read := func(s *amdhip.Stream) error { return s.CopyToHost(h, 0, r.Ptr(), 64) }
	expect := func(when string, err error, allowed bool) {
		t.Helper()
		if allowed && err != nil || !allowed && !errors.Is(err, hip.ErrInvalidValue) {
			t.Errorf("%s: %v", when, err)
		}
	}
	expect("before any access", write(s0), false)
	noError(t, r.SetAccess(0, 4096, amdhip.AccessReadWrite, d0))
	expect("write", write(s0), true)
	expect("another device", read(s1), false)
	noError(t, r.SetAccess(0, 4096, amdhip.AccessRead, d1))
	expect("read", read(s1), true)
	expect("write with access to read", write(s1), false)
	noError(t, errors.Join(s0.Synchronize(), s1.Synchronize()))

	// Access that is taken away under work that still needs it.
	stall(t, s1, newMemory(t, d1, 1).Ptr())
	noError(t, read(s1))
	noError(t, r.SetAccess(0, 4096, amdhip.AccessNone, d1))
	Of(rt).ClearFaults()
	if err := s1.Synchronize(); !errors.Is(err, hip.ErrIllegalAddress) {
		t.Errorf("access was taken away: %v", err)
	}
	stall(t, s0, newMemory(t, d0, 1).Ptr())
	noError(t, write(s0))
	noError(t, r.Unmap(0)) // does not wait
	Of(rt).ClearFaults()
	if err := s0.Synchronize(); !errors.Is(err, hip.ErrIllegalAddress) {
		t.Errorf("unmapped: %v", err)
	}
}

// TestVirtualHints: an address that is free is given, and one that is not, another.
func TestVirtualHints(t *testing.T) {
	t.Parallel()
	_, d := openSoft(t, Options{})
	_, elsewhere := openSoft(t, Options{})
	first := value(d.ReserveAddresses(65536, 0, 0))(t)
	at := first.Ptr()
	taken := value(d.ReserveAddresses(4096, 0, at+4096))(t)
	if p := taken.Ptr(); p >= at && p < at+65536 {
		t.Errorf("%#x was reserved already", p)
	}
	noError(t, first.Close())
	again := value(d.ReserveAddresses(4096, 0, at+8192))(t)
	same := value(elsewhere.ReserveAddresses(4096, 0, at+8192))(t)
	if again.Ptr() != at+8192 || same.Ptr() != at+8192 {
		t.Errorf("reserved %#x here and %#x elsewhere, want %#x", again.Ptr(), same.Ptr(), at+8192)
	}
	fresh := value(d.ReserveAddresses(4096, 0, 0))(t)
	if fresh.Ptr() <= taken.Ptr() {
		t.Errorf("addresses of before were given out again: %#x", fresh.Ptr())
	}
	nowhere := value(d.ReserveAddresses(4096, 0, 4096))(t)
	if nowhere.Ptr() < virtualBase {
		t.Errorf("%#x is an address of the host", nowhere.Ptr())
	}
	noError(t, errors.Join(taken.Close(), again.Close(), same.Close(), fresh.Close(), nowhere.Close()))
}

// TestMapLies: what AMD's runtime 7.2 was seen to do can be asked for.
func TestMapLies(t *testing.T) {
	t.Parallel()
	rt, d := openSoft(t, Options{})
	p := newPhysical(t, d, 4096, false)
	Of(rt).Inject(Fault{Func: "hipMemMap", N: 1, Code: hip.ErrUnknown, Async: true})
	_, err := d.MapMemory(p, 0)
	if e, ok := errors.AsType[*amdhip.Error](err); !ok || e.Func != "hipMemSetAccess" {
		t.Errorf("got %v, want an error of hipMemSetAccess", err)
	}
	if s := Of(rt).Stats(); s.Reservations != 0 || s.Mappings != 0 {
		t.Errorf("left: %+v", s)
	}
	m, err := d.MapMemory(p, 0)
	noError(t, errors.Join(err, m.Close()))
}

// TestVirtualLeft: memory that nobody released goes with the Software.
func TestVirtualLeft(t *testing.T) {
	t.Parallel()
	d := value(Open(Options{Memory: mib}))(t)
	p := value(d.CreatePhysical(4096, amdhip.PhysicalOptions{}))(t)
	m := value(d.MapMemory(p, 0))(t)
	alone := value(d.CreatePhysical(4096, amdhip.PhysicalOptions{}))(t)
	noError(t, p.Close())
	noError(t, d.Runtime().Close())
	for name, err := range map[string]error{"memory": m.Close(), "physical": alone.Close()} {
		if !errors.Is(err, hip.ErrDeinitialized) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestExport gives memory to another machine of this process, which stands for another process.
func TestExport(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" {
		_, d := openSoft(t, Options{})
		if _, err := d.CreatePhysical(4096, amdhip.PhysicalOptions{Exportable: true}); !errors.Is(err,
			amdhip.ErrUnsupported) {
			t.Errorf("memory to export: %v", err)
		}
		return
	}
	rt, d := openSoft(t, Options{Memory: mib, Poison: true})
	other, there := openSoft(t, Options{Memory: mib})
	p := value(d.CreatePhysical(8192, amdhip.PhysicalOptions{Exportable: true}))(t)
	m := value(d.MapMemory(p, 0))(t)
	f := value(p.Export())(t)
	again := value(p.Export())(t) // as often as wanted
	noError(t, again.Close())
	imported := value(there.ImportPhysical(f, 8192))(t)
	mapped := value(there.MapMemory(imported, m.Ptr()))(t)
	if mapped.Ptr() != m.Ptr() || mapped.Size() != 8192 {
		t.Errorf("mapped at %#x, want %#x", mapped.Ptr(), m.Ptr())
	}
	noError(t, Of(other).FlipBit(mapped.Ptr()+5, 2))
	if got := readBack(t, m)[5]; got != poisonByte^4 {
		t.Errorf("what was written there is not here: %#x", got)
	}
	if free, total, err := there.MemInfo(); err != nil || free != total {
		t.Errorf("imported memory takes %d bytes, %v", total-free, err)
	}
	// The memory belongs to whoever has it: the exporter may go.
	noError(t, errors.Join(m.Close(), p.Close()))
	nothingVirtual(t, Of(rt))
	second := value(there.ImportPhysical(f, 8192))(t)
	noError(t, f.Close())
	onward := value(second.Export())(t)
	noError(t, errors.Join(mapped.Close(), imported.Close()))
	back := value(d.MapMemory(value(d.ImportPhysical(onward, 8192))(t), 0))(t)
	if got := readBack(t, back)[5]; got != poisonByte^4 {
		t.Errorf("the bytes are gone: %#x", got)
	}
	noError(t, errors.Join(onward.Close(), second.Close(), back.Close()))

	for _, name := range []string{os.DevNull, os.Args[0]} {
		file := value(os.Open(name))(t)
		if _, err := d.ImportPhysical(file, 4096); !errors.Is(err, hip.ErrInvalidValue) {
			t.Errorf("%s: %v", name, err)
		}
		noError(t, file.Close())
	}
	if _, err := d.MapMemory(value(there.CreatePhysical(4096, amdhip.PhysicalOptions{}))(t), 0); !errors.Is(err,
		hip.ErrInvalidHandle) {
		t.Errorf("memory of another runtime: %v", err)
	}
}
