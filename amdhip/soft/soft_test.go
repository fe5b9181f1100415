package soft

import (
	"bytes"
	"errors"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"unsafe"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hostmem"
	"github.com/google/go-cmp/cmp"
)

const mib = 1 << 20

// openSoft opens a software device for the length of the test.
func openSoft(t testing.TB, o Options) (*amdhip.Runtime, *amdhip.Device) {
	t.Helper()
	if o.Memory == 0 {
		o.Memory = 64 * mib
	}
	rt, err := OpenRuntime(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := rt.Close(); err != nil {
			t.Error(err)
		}
	})
	d, err := rt.Device(0)
	if err != nil {
		t.Fatal(err)
	}
	return rt, d
}

// value returns v and ends the test when err is set.
func value[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// addrOf returns the address of the memory's first byte.
func addrOf(h *amdhip.HostMemory) uintptr {
	return uintptr(unsafe.Pointer(unsafe.SliceData(h.Bytes())))
}

// cString returns the C string at the beginning of b.
func cString(b []byte) string {
	s, _, _ := bytes.Cut(b, []byte{0})
	return string(s)
}

func noError(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// closeLater closes a handle at the end of the test, before the runtime.
func closeLater[T interface{ Close() error }](t testing.TB, h T, err error) T {
	t.Helper()
	noError(t, err)
	t.Cleanup(func() {
		if err := h.Close(); err != nil && !errors.Is(err, hip.ErrDeinitialized) {
			t.Error(err)
		}
	})
	return h
}

func newStream(t testing.TB, d *amdhip.Device) *amdhip.Stream {
	t.Helper()
	s, err := d.NewStream()
	return closeLater(t, s, err)
}

func newEvent(t testing.TB, d *amdhip.Device) *amdhip.Event {
	t.Helper()
	e, err := d.NewEvent(amdhip.EventOptions{Timing: true})
	return closeLater(t, e, err)
}

func newPinned(t testing.TB, d *amdhip.Device, n int) *amdhip.HostMemory {
	t.Helper()
	h, err := d.HostMalloc(n)
	return closeLater(t, h, err)
}

func newMemory(t testing.TB, d *amdhip.Device, n uint64) *amdhip.Memory {
	t.Helper()
	m, err := d.Malloc(n)
	return closeLater(t, m, err)
}

// readBack returns what device memory holds, through a stream of its own.
func readBack(t testing.TB, m *amdhip.Memory) []byte {
	t.Helper()
	s, h := newStream(t, m.Device()), newPinned(t, m.Device(), int(m.Size()))
	noError(t, s.CopyToHost(h, 0, m.Ptr(), h.Len()))
	noError(t, s.Synchronize())
	return bytes.Clone(h.Bytes())
}

// stall puts an operation on s, which writes the byte at p, that ends at ClearFaults or Close.
func stall(t testing.TB, s *amdhip.Stream, p amdhip.DevicePtr) {
	t.Helper()
	Of(s.Device().Runtime()).Inject(Fault{Func: "hipMemsetAsync", N: 1, Stall: true})
	noError(t, s.Memset(p, 0, 1))
}

func TestOptions(t *testing.T) {
	tests := []struct {
		name string
		o    Options
	}{
		{"negative devices", Options{Devices: -1}},
		{"too many devices", Options{Devices: 65}},
		{"negative rate", Options{LinkBytesPerSecond: -1}},
		{"rate not a number", Options{LinkBytesPerSecond: math.NaN()}},
		{"negative latency", Options{LinkLatency: -1}},
		{"more memory than addresses", Options{Memory: 1 << 60}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if rt, err := OpenRuntime(tt.o); err == nil {
				t.Error("no error", rt.Close())
			}
		})
	}
}

func TestDescription(t *testing.T) {
	rt, err := OpenRuntime(Options{Devices: 3, Integrated: true}) // with the host's memory
	closeLater(t, rt, err)
	if n := value(rt.DeviceCount())(t); n != 3 {
		t.Errorf("%d devices, want 3", n)
	}
	if _, err := rt.Device(3); !errors.Is(err, hip.ErrInvalidDevice) {
		t.Errorf("device 3: %v", err)
	}
	seen := map[string]bool{}
	for i := range 3 {
		d := value(rt.Device(i))(t)
		if d.Arch() != archName || !d.Integrated() || d.TotalMemory() == 0 || d.Multiprocessors() == 0 || d.Name() == "" {
			t.Errorf("device %d: arch %q, integrated %v, %d bytes, %d multiprocessors, name %q",
				i, d.Arch(), d.Integrated(), d.TotalMemory(), d.Multiprocessors(), d.Name())
		}
		seen[d.PCIBusID()], seen[d.UUID()] = true, true
		free, total, err := d.MemInfo()
		if noError(t, err); free != total || total != d.TotalMemory() {
			t.Errorf("device %d: %d of %d bytes are free, TotalMemory %d", i, free, total, d.TotalMemory())
		}
	}
	if len(seen) != 6 {
		t.Errorf("bus ids and UUIDs are not all different: %v", slices.Sorted(maps.Keys(seen)))
	}
	if version, _, err := rt.Version(); err != nil || amdhip.VersionString(version) != "6.2.0" {
		t.Errorf("version %d, %v", version, err)
	}
}

// Both layouts of the properties must agree, at the offsets that the headers of HIP give.
func TestProperties(t *testing.T) {
	rt, d := openSoft(t, Options{})
	for _, tt := range []struct {
		name              string
		call              func(*byte, int32) hip.Status
		size, total, arch int
	}{
		{name: "R0000", call: Of(rt).table().HipGetDeviceProperties, size: 792, total: 256, arch: 396},
		{name: "R0600", call: Of(rt).table().HipGetDevicePropertiesR0600, size: 1472, total: 288, arch: 1160},
	} {
		t.Run(tt.name, func(t *testing.T) {
			prop := bytes.Repeat([]byte{0xEE}, 2000)
			if st := tt.call(&prop[0], 0); st != hip.Success {
				t.Fatal(st)
			}
			if got := cString(prop[tt.arch:]); got != "gfx-soft" {
				t.Errorf("arch %q", got)
			}
			if got := cString(prop); got != d.Name() {
				t.Errorf("name %q, want %q", got, d.Name())
			}
			if got := prop[tt.total+3]; got != 4 { // 64 MiB = 0x4000000
				t.Errorf("byte 3 of the memory size is %#x", got)
			}
			if prop[tt.size-1] != 0 || prop[tt.size] != 0xEE {
				t.Errorf("the struct does not end at byte %d", tt.size)
			}
			if st := tt.call(&prop[0], 1); st != hip.ErrInvalidDevice {
				t.Errorf("of a device that does not exist: %v", st)
			}
		})
	}
}

func TestText(t *testing.T) {
	rt, _ := openSoft(t, Options{})
	tests := []struct {
		name string
		call func(*byte, int32, int32) hip.Status
		n    int32
		want string
		st   hip.Status
	}{
		{"name", Of(rt).table().HipDeviceGetName, 64, "Software device 0", hip.Success},
		{"name cut", Of(rt).table().HipDeviceGetName, 5, "Soft", hip.Success},
		{"name without room", Of(rt).table().HipDeviceGetName, 0, "", hip.ErrInvalidValue},
		{"bus id", Of(rt).table().HipDeviceGetPCIBusId, 13, "0000:01:00.0", hip.Success},
		{"bus id cut", Of(rt).table().HipDeviceGetPCIBusId, 12, "0000:01:00.", hip.ErrInvalidValue},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var b [64]byte
			st := tt.call(&b[0], tt.n, 0)
			if got := cString(b[:]); got != tt.want || st != tt.st {
				t.Errorf("got %q, %v; want %q, %v", got, st, tt.want, tt.st)
			}
		})
	}
}

func TestRoundTrip(t *testing.T) {
	for _, tt := range []struct {
		name string
		host func(d *amdhip.Device, n int) (*amdhip.HostMemory, error)
		want int64 // unpinned copies
	}{
		{"pinned", (*amdhip.Device).HostMalloc, 0},
		{"plain", (*amdhip.Device).HostPlain, 1},
		{"registered", func(d *amdhip.Device, n int) (*amdhip.HostMemory, error) {
			b, err := hostmem.Map(n)
			if err != nil {
				return nil, err
			}
			t.Cleanup(func() { _ = hostmem.Unmap(b) })
			return d.HostRegister(b)
		}, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			rt, d := openSoft(t, Options{})
			const n = 3*mib + 5
			h, err := tt.host(d, n)
			closeLater(t, h, err)
			for i := range h.Bytes() {
				h.Bytes()[i] = byte(i * 7 >> 3)
			}
			s, m := newStream(t, d), newMemory(t, d, n)
			noError(t, s.CopyToDevice(m.Ptr(), h, 0, n))
			noError(t, s.Synchronize())
			if got := readBack(t, m); !bytes.Equal(got, h.Bytes()) {
				t.Error("other bytes came back")
			}
			got := Of(rt).Stats()
			if got.UnpinnedCopies != tt.want || d.UnpinnedCopies() != tt.want || got.Copies != 2 || got.CopiedBytes != 2*n {
				t.Errorf("counted %+v, want %d unpinned of 2 copies of %d bytes", got, tt.want, n)
			}
		})
	}
}

func TestCallsAndStats(t *testing.T) {
	rt, d := openSoft(t, Options{Memory: mib})
	b := value(hostmem.Map(8192))(t)
	t.Cleanup(func() { _ = hostmem.Unmap(b) })
	s := value(d.NewStream())(t)
	e := value(d.NewEvent(amdhip.EventOptions{}))(t)
	m := value(d.Malloc(1000))(t)
	h := value(d.HostMalloc(100))(t)
	r := value(d.HostRegister(b))(t)
	noError(t, s.Memset(m.Ptr(), 1, 1000))
	noError(t, s.CopyToHost(h, 0, m.Ptr(), 100))
	noError(t, s.Synchronize())
	want := Stats{
		Allocations: 1, DeviceBytes: 1000, HostAllocations: 1, Registrations: 1, PinnedBytes: 8292,
		Streams: 1, Events: 1, PeakDeviceBytes: 1000, PeakPinnedBytes: 8292, Copies: 1, CopiedBytes: 100,
	}
	if diff := cmp.Diff(want, Of(rt).Stats()); diff != "" {
		t.Error("in use (-want +got):\n" + diff)
	}
	for _, c := range []interface{ Close() error }{s, e, m, h, r} {
		noError(t, c.Close())
	}
	want = Stats{PeakDeviceBytes: 1000, PeakPinnedBytes: 8292, Copies: 1, CopiedBytes: 100}
	if diff := cmp.Diff(want, Of(rt).Stats()); diff != "" {
		t.Error("released (-want +got):\n" + diff)
	}
	calls := Of(rt).Calls()
	for name, want := range map[string]int{
		"hipMalloc": 1, "hipFree": 1, "hipMemcpyAsync": 1, "hipMemsetAsync": 1,
		"hipStreamDestroy": 1, "hipHostUnregister": 1,
	} {
		if calls[name] != want {
			t.Errorf("%d calls of %s, want %d", calls[name], name, want)
		}
	}
	if _, ok := calls["hipFreeAsync"]; ok {
		t.Error("a function that was not called is listed")
	}
}

// Workers with a stream each, as in a loader, next to one that allocates and frees: for the race detector, too.
func TestConcurrent(t *testing.T) {
	rt, d := openSoft(t, Options{Memory: 256 * mib, Devices: 2})
	var wg sync.WaitGroup
	for i := range 6 {
		wg.Go(func() {
			dev, err := rt.Device(i % 2)
			if err != nil {
				t.Error(err)
				return
			}
			if err := shuffle(dev, rand.New(rand.NewPCG(1, uint64(i)))); err != nil {
				t.Errorf("worker %d: %v", i, err)
			}
		})
	}
	wg.Go(func() {
		for i := range 50 {
			m, err := d.Malloc(uint64(i+1) * 1000)
			if err == nil {
				err = m.Close()
			}
			if err != nil {
				t.Error(err)
			}
		}
	})
	wg.Wait()
	if s := Of(rt).Stats(); s.Streams+s.Events+s.Allocations+s.HostAllocations != 0 || s.UnpinnedCopies != 0 {
		t.Errorf("left: %+v", s)
	}
}

// shuffle copies random ranges up and compares them with what comes down again.
func shuffle(d *amdhip.Device, rnd *rand.Rand) (err error) {
	const n = 1 << 18
	var opened []interface{ Close() error }
	defer func() {
		for _, h := range slices.Backward(opened) {
			err = errors.Join(err, h.Close())
		}
	}()
	up, err := d.HostMalloc(n)
	if err != nil {
		return err
	}
	opened = append(opened, up)
	down, err := d.HostMalloc(n)
	if err != nil {
		return err
	}
	opened = append(opened, down)
	m, err := d.Malloc(n)
	if err != nil {
		return err
	}
	opened = append(opened, m)
	s, err := d.NewStream()
	if err != nil {
		return err
	}
	opened = append(opened, s)
	e, err := d.NewEvent(amdhip.EventOptions{})
	if err != nil {
		return err
	}
	opened = append(opened, e)
	for range 30 {
		off := rnd.IntN(n)
		k := rnd.IntN(n - off)
		part := up.Bytes()[off : off+k]
		for i := range part {
			part[i] = byte(rnd.Uint32())
		}
		p := m.Ptr() + amdhip.DevicePtr(off)
		if err := errors.Join(s.CopyToDevice(p, up, off, k), s.CopyToHost(down, off, p, k), s.Record(e),
			e.Synchronize()); err != nil {
			return err
		}
		if !bytes.Equal(part, down.Bytes()[off:off+k]) {
			return errors.New("other bytes came back")
		}
	}
	return nil
}
