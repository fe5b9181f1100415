package amdhip

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
	"unsafe"

	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hostmem"
)

// contents copies the beginning of device memory to the host.
func contents(t *testing.T, d *Device, p DevicePtr, n int) []byte {
	t.Helper()
	s := closing(t, must(d.NewStream())(t), nil)
	h := closing(t, must(d.HostMalloc(n))(t), nil)
	check(t, s.CopyToHost(h, 0, p, n))
	check(t, s.Synchronize())
	return bytes.Clone(h.Bytes())
}

// set fills device memory.
func set(t *testing.T, d *Device, p DevicePtr, v byte, n uint64) {
	t.Helper()
	s := closing(t, must(d.NewStream())(t), nil)
	check(t, s.Memset(p, v, n))
	check(t, s.Synchronize())
}

// TestVirtualMemory maps memory at the same address again and again, and frees it.
func TestVirtualMemory(t *testing.T) {
	for _, version := range []string{"6", "7"} {
		t.Run("HIP "+version, func(t *testing.T) {
			rt, sim := openSim(t, "VERSION="+version, "DEVICES=2")
			d := device(t, rt, 1)
			if !d.VirtualMemory() {
				t.Fatal("there is no virtual memory")
			}
			minimum, recommended, err := d.Granularity()
			check(t, err)
			if minimum != 65536 || recommended != 65536 {
				t.Errorf("granularity %d and %d, want 65536", minimum, recommended)
			}
			p := must(d.CreatePhysical(2*minimum, PhysicalOptions{}))(t)
			m := must(d.MapMemory(p, 0))(t)
			if p.Size() != 2*minimum || m.Size() != 2*minimum || m.Device() != d || p.Device() != d {
				t.Errorf("%d and %d bytes, want %d", p.Size(), m.Size(), 2*minimum)
			}
			set(t, d, m.Ptr(), 42, m.Size())
			if base, size, err := d.AddressRangeOf(m.Ptr() + 100); base != m.Ptr() || size != m.Size() || err != nil {
				t.Errorf("%#x lies in %d bytes at %#x, %v", m.Ptr()+100, size, base, err)
			}
			at := m.Ptr()
			check(t, m.Close())
			check(t, m.Close())
			again := must(d.MapMemory(p, at))(t)
			if again.Ptr() != at {
				t.Errorf("mapped at %#x, want %#x", again.Ptr(), at)
			}
			check(t, p.Close()) // the mapping keeps it
			if got := contents(t, d, at, 64); !bytes.Equal(got, bytes.Repeat([]byte{42}, 64)) {
				t.Errorf("the bytes are % x", got)
			}
			sim.wantStat("virtual_allocations", 1)
			check(t, again.Close())
			for _, name := range []string{"virtual_allocations", "mappings", "reservations", "misuses"} {
				sim.wantStat(name, 0)
			}
		})
	}
}

// TestAddressRange puts two pieces of memory side by side, and gives a second device access.
func TestAddressRange(t *testing.T) {
	rt, sim := openSim(t, "DEVICES=2")
	d, other := device(t, rt, 0), device(t, rt, 1)
	n, _, err := d.Granularity()
	check(t, err)
	a := closing(t, must(d.CreatePhysical(n, PhysicalOptions{}))(t), nil)
	b := closing(t, must(d.CreatePhysical(n, PhysicalOptions{}))(t), nil)
	r := must(d.ReserveAddresses(2*n, 0, 0))(t)
	if r.Size() != 2*n || r.Device() != d {
		t.Errorf("%d addresses of %v", r.Size(), r.Device().Index())
	}
	check(t, r.Map(0, a))
	check(t, r.Map(n, b))
	wantCode(t, r.Map(n+1, b), "hipMemMap", ErrInvalidValue) // in Go: it would leave the range
	check(t, r.SetAccess(0, 2*n, AccessReadWrite, d))
	set(t, d, r.Ptr(), 1, n)
	set(t, d, r.Ptr()+DevicePtr(n), 2, n)

	s := closing(t, must(other.NewStream())(t), nil)
	if err := s.Memset(r.Ptr(), 3, 64); err == nil {
		t.Error("a device without access wrote")
	}
	check(t, r.SetAccess(0, n, AccessReadWrite, other))
	set(t, other, r.Ptr(), 4, 64)
	if got := contents(t, d, r.Ptr(), 65); got[63] != 4 || got[64] != 1 {
		t.Errorf("the bytes are % x", got)
	}
	wantCode(t, r.SetAccess(0, n, AccessRead), "hipMemSetAccess", ErrInvalidValue)
	wantCode(t, r.SetAccess(n, n+1, AccessRead, d), "hipMemSetAccess", ErrInvalidValue)
	wantCode(t, r.Unmap(1), "hipMemUnmap", ErrNotMapped)
	check(t, r.Unmap(0))
	wantCode(t, r.Unmap(0), "hipMemUnmap", ErrNotMapped)
	check(t, r.Close()) // unmaps the other
	check(t, r.Close())
	wantIs(t, r.Map(0, a), ErrClosed)
	wantIs(t, r.SetAccess(0, n, AccessRead, d), ErrClosed)
	sim.wantStat("mappings", 0)
	sim.wantStat("reservations", 0)
	sim.wantStat("misuses", 1) // of the device without access
}

// TestVirtualMemoryIsRefused: where it is missing, everything says so, and nobody is asked.
func TestVirtualMemoryIsRefused(t *testing.T) {
	for name, settings := range map[string][]string{"HIP 5": {"VERSION=5"}, "a device without": {"VMM=0"}} {
		t.Run(name, func(t *testing.T) {
			rt, sim := openSim(t, settings...)
			d := device(t, rt, 0)
			if d.VirtualMemory() {
				t.Error("there is virtual memory")
			}
			_, _, err1 := d.Granularity()
			_, err2 := d.CreatePhysical(65536, PhysicalOptions{})
			_, err3 := d.ReserveAddresses(65536, 0, 0)
			_, err4 := d.ImportPhysical(os.Stdin, 65536)
			for _, err := range []error{err1, err2, err3, err4} {
				if !errors.Is(err, ErrUnsupported) || !errors.Is(err, errors.ErrUnsupported) {
					t.Errorf("got %v", err)
				}
			}
			sim.wantStat("misuses", 0)
		})
	}
}

// TestVirtualMemoryWithoutIPC: to ask AMD's runtime for an IPC handle of such memory leaks it, so it must not be asked.
func TestVirtualMemoryWithoutIPC(t *testing.T) {
	rt, sim := openSim(t)
	d := device(t, rt, 0)
	p := closing(t, must(d.CreatePhysical(65536, PhysicalOptions{Exportable: true}))(t), nil)
	m := closing(t, must(d.MapMemory(p, 0))(t), nil)
	_, err := m.IPCHandle()
	wantIs(t, err, ErrUnsupported)
	s := closing(t, must(d.NewStream())(t), nil)
	wantCode(t, s.FreeAsync(m), "hipFreeAsync", ErrInvalidValue)
	for _, name := range []string{"hipIpcGetMemHandle", "hipFreeAsync", "ipc_leaks", "misuses"} {
		sim.wantStat(name, 0)
	}
}

// TestMapLies: AMD's runtime may say that it has mapped what it has not. The error comes with the access, and nothing
// is left.
func TestMapLies(t *testing.T) {
	rt, sim := openSim(t, "DEFECTS=map-lies")
	d := device(t, rt, 0)
	p := closing(t, must(d.CreatePhysical(65536, PhysicalOptions{}))(t), nil)
	_, err := d.MapMemory(p, 0)
	wantCode(t, err, "hipMemSetAccess", ErrInvalidValue)
	sim.wantStat("reservations", 0)
	sim.wantStat("hipMemUnmap", 1)
}

// TestVirtualMemoryFaults: each call that fails is named, and nothing is left of what was made before it.
func TestVirtualMemoryFaults(t *testing.T) {
	rt, sim := openSim(t)
	d := device(t, rt, 0)
	p := closing(t, must(d.CreatePhysical(65536, PhysicalOptions{Exportable: true}))(t), nil)
	for _, call := range []string{"hipMemAddressReserve", "hipMemMap", "hipMemSetAccess"} {
		sim.set("FAIL", call+":1:2")
		_, err := d.MapMemory(p, 0)
		wantCode(t, err, call, ErrOutOfMemory)
	}
	sim.set("FAIL", "hipMemCreate:1:2")
	_, err := d.CreatePhysical(65536, PhysicalOptions{})
	wantCode(t, err, "hipMemCreate", ErrOutOfMemory)
	sim.set("FAIL", "hipMemExportToShareableHandle:1:1")
	_, err = p.Export()
	wantCode(t, err, "hipMemExportToShareableHandle", ErrInvalidValue)
	sim.set("FAIL", "hipMemGetAllocationGranularity:2:1")
	_, _, err = d.Granularity()
	wantCode(t, err, "hipMemGetAllocationGranularity", ErrInvalidValue)
	_, err = d.CreatePhysical(0, PhysicalOptions{})
	wantIs(t, err, ErrInvalidValue)
	sim.wantStat("reservations", 0)
	sim.wantStat("mappings", 0)
	sim.wantStat("virtual_allocations", 1)
}

// TestExport opens memory in another process, which finds it at the same address, by a descriptor; both ways in which a
// runtime may take one. The memory outlives the handle of the process that made it.
func TestExport(t *testing.T) {
	if at := os.Getenv("AMDHIP_EXPORT"); at != "" {
		exportedChild(t, at)
		return
	}
	for _, way := range []string{"value", "pointer"} {
		t.Run("descriptor by "+way, func(t *testing.T) {
			rt, sim := openSim(t, "IMPORT="+way)
			d := device(t, rt, 0)
			p := must(d.CreatePhysical(65536, PhysicalOptions{Exportable: true}))(t)
			m := closing(t, must(d.MapMemory(p, 0x5000_0000_0000))(t), nil)
			set(t, d, m.Ptr(), 1, m.Size())
			f := closing(t, must(p.Export())(t), nil)
			check(t, p.Close())
			cmd := exec.Command(os.Args[0], "-test.run=^TestExport$")
			cmd.Env = append(os.Environ(), fmt.Sprintf("AMDHIP_EXPORT=%d", m.Ptr()), "GGUF2GPU_HIP_LIBRARY="+rt.Library(),
				"HIPSIM_IMPORT="+way)
			cmd.ExtraFiles = []*os.File{f}
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			if got := contents(t, d, m.Ptr(), 64); !bytes.Equal(got, bytes.Repeat([]byte{42}, 64)) {
				t.Errorf("the other process's bytes did not arrive: % x", got)
			}
			sim.wantStat("misuses", 0)
		})
	}
}

// exportedChild is the other process of TestExport.
func exportedChild(t *testing.T, at string) {
	var want uint64
	fmt.Sscan(at, &want)
	f := os.NewFile(3, "exported")
	size := must(f.Seek(0, io.SeekEnd))(t)
	rt := must(Open(Options{}))(t)
	d := device(t, rt, 0)
	// Twice, so that there is one descriptor whose number is no multiple of 4, and one beyond what fits on a page.
	p := must(d.ImportPhysical(f, uint64(size)))(t)
	check(t, f.Close())
	m := must(d.MapMemory(p, DevicePtr(want)))(t)
	if uint64(m.Ptr()) != want {
		t.Errorf("mapped at %#x, want %#x", m.Ptr(), want)
	}
	if got := contents(t, d, m.Ptr(), 64); got[0] != 1 || got[63] != 1 {
		t.Errorf("the bytes are % x", got)
	}
	set(t, d, m.Ptr(), 42, m.Size())
	check(t, errors.Join(p.Close(), m.Close()))
}

// TestDescriptorArgument checks that what HIP before 7.1 gets is the descriptor both ways, whatever its number.
func TestDescriptorArgument(t *testing.T) {
	f := closing(t, must(os.Open(os.DevNull))(t), nil)
	first := closing(t, must(os.Open(os.DevNull))(t), nil)
	second := closing(t, must(os.Open(os.DevNull))(t), nil)
	same := func(fd int) bool {
		link, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
		return err == nil && link == os.DevNull
	}
	for _, fd := range []int{int(f.Fd()), int(first.Fd()), int(second.Fd())} {
		handle, release, err := descriptorArgument(fd, 6_03_00000)
		check(t, err)
		another, releaseAnother, err := descriptorArgument(fd, 6_03_00000) // while the first is in use
		check(t, err)
		for _, h := range []uintptr{handle, another} {
			value := int(int32(h))
			pointed := int(*(*int32)(unsafe.Pointer(unsafe.SliceData(hostmem.At(h, 4)))))
			if h < 4096 || value != pointed || !same(value) {
				t.Errorf("descriptor %d: argument %#x is %d by value and %d by address", fd, h, value, pointed)
			}
		}
		release()
		releaseAnother()
		if handle, release, err := descriptorArgument(fd, 7_01_00000); handle != uintptr(fd) || err != nil {
			t.Errorf("from HIP 7.1 on: %#x, %v, want %d", handle, err, fd)
		} else {
			release()
		}
	}
	if handle, _, err := descriptorArgument(1<<20, 6_03_00000); err == nil {
		t.Errorf("a descriptor that is none: %#x", handle)
	}
}

// TestImportRefused: a descriptor of anything else is HIP's to refuse.
func TestImportRefused(t *testing.T) {
	rt, _ := openSim(t)
	d := device(t, rt, 0)
	f := closing(t, must(os.Open(os.DevNull))(t), nil)
	_, err := d.ImportPhysical(f, 65536)
	wantCode(t, err, "hipMemImportFromShareableHandle", ErrInvalidValue)
	if err == nil || !strings.Contains(err.Error(), "65536 bytes") {
		t.Errorf("%v does not say how many bytes", err)
	}
	if st := rt.api.HipMemImportFromShareableHandle(nil, 0, hip.HandleDescriptor); st != ErrInvalidValue {
		t.Errorf("nowhere to put the handle: %v", st)
	}
}
