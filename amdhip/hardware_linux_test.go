package amdhip

import (
	"bytes"
	"errors"
	"io"
	"os"
	"testing"
)

// openHardware opens the library that AMDHIP_HARDWARE names, for a GPU that is there: AMD's, or the one over NVIDIA's
// driver of testdata/rigs. The tests with it are not part of every run, because some of AMD's runtimes never return
// from calls for virtual memory.
func openHardware(t *testing.T) *Device {
	t.Helper()
	path := os.Getenv("AMDHIP_HARDWARE")
	if path == "" {
		t.Skip("AMDHIP_HARDWARE names no library to test on a GPU")
	}
	rt := must(Open(Options{Library: path}))(t)
	d := device(t, rt, 0)
	version, _, err := rt.Version()
	check(t, err)
	t.Logf("%s, %s, HIP %s", d.Name(), d.Arch(), VersionString(version))
	t.Cleanup(func() {
		if n := rt.open.Load(); n != 0 {
			t.Errorf("%d handles are open", n)
		}
		check(t, rt.Close())
	})
	return d
}

// TestHardwareKernels launches kernels of both kinds.
func TestHardwareKernels(t *testing.T) {
	d := openHardware(t)
	roundTrip(t, d)
	addOne(t, d)
	launchShapes(t, d)
}

// TestHardwareGraph records work on two streams and launches it.
func TestHardwareGraph(t *testing.T) {
	d := openHardware(t)
	a, b := newBench(t, d), newBench(t, d)
	g := closing(t, must(a.s.Capture(func() error {
		return errors.Join(
			a.s.CopyToDevice(a.m.Ptr(), a.h, 0, 64),
			a.s.Record(a.e),
			b.s.Wait(a.e),
			b.s.CopyDevice(b.m.Ptr(), a.m.Ptr(), 64),
			b.s.Memset(b.m.Ptr(), 7, 1),
			b.s.Record(b.e),
			a.s.Wait(b.e),
			a.s.CopyToHost(b.h, 0, b.m.Ptr(), 64),
		)
	}))(t), nil)
	exec := closing(t, must(g.Instantiate())(t), nil)
	for round := range 3 {
		copy(a.h.Bytes(), bytes.Repeat([]byte{byte(round + 1)}, 64))
		check(t, errors.Join(a.s.LaunchGraph(exec), a.s.Synchronize()))
		if got := b.h.Bytes(); got[0] != 7 || !bytes.Equal(got[1:], a.h.Bytes()[1:]) {
			t.Errorf("round %d: % x", round, got)
		}
	}
}

// TestHardwareVirtualMemory creates, maps, exports, imports and maps again, at an address of the test's choice.
func TestHardwareVirtualMemory(t *testing.T) {
	d := openHardware(t)
	if !d.VirtualMemory() {
		t.Skip("the device has no virtual memory")
	}
	minimum, n, err := d.Granularity()
	check(t, err)
	t.Logf("granularity %d, recommended %d", minimum, n)
	n = max(n, 1<<20)
	p := must(d.CreatePhysical(n, PhysicalOptions{Exportable: true}))(t)
	const hint = 0x7e0000000000
	m := must(d.MapMemory(p, hint))(t)
	t.Logf("mapped at %#x, wanted %#x", m.Ptr(), hint)
	set(t, d, m.Ptr(), 42, n)
	f := must(p.Export())(t)
	size, seekErr := f.Seek(0, io.SeekEnd)
	t.Logf("the descriptor says that it has %d bytes, %v", size, seekErr)
	at := m.Ptr()
	imported := must(d.ImportPhysical(f, n))(t)
	check(t, errors.Join(m.Close(), p.Close()))
	again := must(d.MapMemory(imported, at))(t)
	if again.Ptr() != at {
		t.Errorf("mapped again at %#x, want %#x", again.Ptr(), at)
	}
	if got := contents(t, d, again.Ptr(), 64); !bytes.Equal(got, bytes.Repeat([]byte{42}, 64)) {
		t.Errorf("the imported bytes are % x", got)
	}
	if base, size, err := d.AddressRangeOf(again.Ptr() + 5); err != nil || base != again.Ptr() || size != n {
		t.Errorf("%d bytes at %#x, %v", size, base, err)
	}
	check(t, errors.Join(f.Close(), imported.Close(), again.Close()))
}
