package amdhip

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
)

// codeCase is a call with what AMD's runtimes answer and, where that is stricter, the simulator.
type codeCase struct {
	name      string
	got       Status
	amd       Status
	simulator Status
}

// as is a case in which the simulator does as AMD.
func as(name string, got, want Status) codeCase { return codeCase{name, got, want, want} }

// codeCases makes calls that break HIP's rules, or nearly do. None ends the process in any version. The answers of
// AMD's runtimes are those of 6.4.3 and 7.2.4 on the model of a GPU in testdata/rigs, and hold for 5.7 by its source.
func codeCases(t *testing.T, rt *Runtime) []codeCase {
	t.Helper()
	a := rt.api
	version := versionAMD(t, rt)
	var n int32
	var text [64]byte
	var dev, host, stream, event, timed, other uintptr
	var ms float32
	mapping, err := unix.MmapPtr(-1, 0, nil, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	check(t, err)
	defer func() { check(t, unix.MunmapPtr(mapping, 1<<20)) }()
	m := uintptr(mapping)
	ok := func(st Status) {
		t.Helper()
		if st != Success {
			t.Fatal(st)
		}
	}
	ok(a.HipSetDevice(0))
	ok(a.HipMalloc(&dev, 1<<20))
	ok(a.HipHostMalloc(&host, 1<<20, hip.HostMallocPortable))
	ok(a.HipStreamCreateWithFlags(&stream, hip.StreamNonBlocking))
	ok(a.HipEventCreateWithFlags(&event, hip.EventDisableTiming))
	ok(a.HipEventCreateWithFlags(&timed, hip.EventDefault))
	cases := []codeCase{
		as("an attribute that does not exist", a.HipDeviceGetAttribute(&n, 9999, 0), ErrInvalidValue),
		as("a PCI address in 12 bytes", a.HipDeviceGetPCIBusId(&text[0], 12, 0), ErrInvalidValue),
		as("a PCI address in 13 bytes", a.HipDeviceGetPCIBusId(&text[0], 13, 0), Success),
		as("a device that does not exist", a.HipSetDevice(99), ErrInvalidDevice),
		as("no memory", a.HipMalloc(&other, 0), Success),
		as("a petabyte", a.HipMalloc(&other, 1<<50), ErrOutOfMemory),
		as("freeing what was not allocated", a.HipFree(m), ErrInvalidValue),
		as("memory that is coherent and is not",
			a.HipHostMalloc(&other, 4096, hip.HostMallocCoherent|hip.HostMallocNonCoherent), ErrInvalidValue),
		as("registering", a.HipHostRegister(m, 1<<20, hip.HostRegisterPortable), Success),
		{"registering again", a.HipHostRegister(m, 1<<20, hip.HostRegisterPortable), Success, ErrHostMemoryAlreadyRegistered},
		as("registering with an unknown flag", a.HipHostRegister(m, 4096, 64), ErrInvalidValue),
		as("unregistering", a.HipHostUnregister(m), Success),
		as("unregistering again", a.HipHostUnregister(m), ErrHostMemoryNotRegistered),
		as("the device's address of pageable memory", a.HipHostGetDevicePointer(&other, m, 0), ErrInvalidValue),
		as("a stream with unknown flags", a.HipStreamCreateWithFlags(&other, 9), ErrInvalidValue),
		as("destroying no stream", a.HipStreamDestroy(0), ErrInvalidHandle),
		as("a copy in no direction", a.HipMemcpyAsync(dev, host, 64, 9, stream), ErrInvalidMemcpyDirection),
		as("a copy of nothing", a.HipMemcpyAsync(dev, host, 0, hip.MemcpyHostToDevice, stream), Success),
		as("a copy beyond the end", a.HipMemcpyAsync(dev+1<<19, host, 1<<20, hip.MemcpyHostToDevice, stream), ErrInvalidValue),
		{
			"a copy in the other direction", a.HipMemcpyAsync(dev, host, 64, hip.MemcpyDeviceToHost, stream), Success,
			ErrInvalidValue,
		},
		as("a fill beyond the end", a.HipMemsetAsync(dev+1<<19, 0, 1<<20, stream), ErrInvalidValue),
		as("an event with unknown flags", a.HipEventCreateWithFlags(&other, 0x100), ErrInvalidValue),
		as("an event for other processes with timing", a.HipEventCreateWithFlags(&other, hip.EventInterprocess),
			ErrInvalidValue),
		as("asking for an event that was never recorded", a.HipEventQuery(timed), Success),
		as("waiting for an event that was never recorded", a.HipEventSynchronize(timed), Success),
		as("the time between events that were never recorded", a.HipEventElapsedTime(&ms, timed, timed), ErrInvalidHandle),
		as("recording", a.HipEventRecord(event, stream), Success),
		as("the time between events without timing", a.HipEventElapsedTime(&ms, event, event), ErrInvalidHandle),
		as("a wait with flags", a.HipStreamWaitEvent(stream, event, 7), ErrInvalidValue),
		as("waiting for an event", a.HipEventSynchronize(event), Success),
		as("destroying no event", a.HipEventDestroy(0), ErrInvalidHandle),
		as("recording no event", a.HipEventRecord(0, stream), ErrInvalidHandle),
		as("asking for no event", a.HipEventQuery(0), ErrInvalidHandle),
		as("a stream that waits for no event", a.HipStreamWaitEvent(stream, 0, 0), ErrInvalidHandle),
	}
	freed := ErrInvalidValue
	if version >= 7e7 {
		freed = Success
	}
	// A code object that is none: an ELF header and no more.
	garbage := append([]byte("\x7fELF"), make([]byte, 1000)...)
	var handle IPCHandle
	flag, wrong := uint32(1), uint32(0) // hipIpcMemLazyEnablePeerAccess
	if version < 6e7 {
		flag, wrong = 0, 1
	}
	cases = append(cases,
		as("freeing nothing in stream order", a.HipFreeAsync(0, stream), freed),
		codeCase{"a handle for memory of the host", a.HipIpcGetMemHandle(&handle, host), Success, ErrInvalidValue},
		as("a handle for memory of the device", a.HipIpcGetMemHandle(&handle, dev), Success),
		as("opening with the flag of another version", a.HipIpcOpenMemHandle(&other, handle, wrong), ErrInvalidValue),
		as("opening a handle of one's own", a.HipIpcOpenMemHandle(&other, handle, flag), ErrInvalidContext),
		as("opening what is no handle", a.HipIpcOpenMemHandle(&other, IPCHandle{}, flag), ErrInvalidValue),
		as("closing what was not opened", a.HipIpcCloseMemHandle(m), ErrInvalidValue),
		as("loading what is no code", a.HipModuleLoadData(&other, uintptr(unsafe.Pointer(&garbage[0]))), ErrInvalidImage),
		as("destroying an event", a.HipEventDestroy(event), Success),
		as("destroying it again", a.HipEventDestroy(event), ErrContextIsDestroyed),
	)
	ok(a.HipEventDestroy(timed))
	ok(a.HipStreamDestroy(stream))
	ok(a.HipHostFree(host))
	ok(a.HipFree(dev))
	return cases
}

// destroyedStreamChild names the library to a child process, which then asks for a stream that it has destroyed.
const destroyedStreamChild = "AMDHIP_TEST_DESTROYED_STREAM"

// wantDestroyedStream asks for a destroyed stream in a process of its own: 709 up to HIP 6, its end from 7 on.
func wantDestroyedStream(t *testing.T, library string, ends bool, env ...string) {
	t.Helper()
	cmd := exec.Command(must(os.Executable())(t), "-test.run=^TestDestroyedStream$")
	cmd.Env = append(append(os.Environ(), destroyedStreamChild+"="+library), env...)
	out, err := cmd.CombinedOutput()
	if answered := bytes.Contains(out, []byte(ErrContextIsDestroyed.Error())); answered == ends || ends != (err != nil) {
		t.Errorf("a destroyed stream: got %v, want the end of the process: %t\n%.500s", err, ends, out)
	}
}

// TestDestroyedStream is the child of wantDestroyedStream.
func TestDestroyedStream(t *testing.T) {
	library := os.Getenv(destroyedStreamChild)
	if library == "" {
		t.Skip("it is for the child processes of other tests")
	}
	rt := must(Open(Options{Library: library}))(t)
	var stream uintptr
	if st := rt.api.HipStreamCreateWithFlags(&stream, hip.StreamNonBlocking); st != Success {
		t.Fatal(st)
	}
	if st := rt.api.HipStreamDestroy(stream); st != Success {
		t.Fatal(st)
	}
	fmt.Println(rt.api.HipStreamQuery(stream))
}

// TestCodes compares the simulator with what AMD's runtimes answer.
func TestCodes(t *testing.T) {
	for _, version := range []string{"5.7", "6.4", "7.2"} {
		t.Run(version, func(t *testing.T) {
			path := buildSim(t)
			rt, _ := openSimAt(t, path, "VERSION="+version)
			for _, c := range codeCases(t, rt) {
				if c.got != c.simulator {
					t.Errorf("%s: got %v, want %v", c.name, c.got, c.simulator)
				}
			}
			wantDestroyedStream(t, path, version >= "7", "HIPSIM_VERSION="+version)
		})
	}
}

// TestHardwareCodes compares AMD's runtime with the same table.
func TestHardwareCodes(t *testing.T) {
	d := openHardware(t)
	if !strings.HasPrefix(d.Arch(), "gfx") {
		t.Skipf("%s is no GPU of AMD's", d.Arch())
	}
	for _, c := range codeCases(t, d.rt) {
		if c.got != c.amd {
			t.Errorf("%s: got %v, want %v", c.name, c.got, c.amd)
		}
	}
	wantDestroyedStream(t, d.rt.Library(), versionAMD(t, d.rt) >= 7e7)
}
