package amdhip

import (
	"bytes"
	"errors"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const mib = 1 << 20

// openSoft opens a software device for the length of the test.
func openSoft(t testing.TB, o SoftwareOptions) (*Runtime, *Device) {
	t.Helper()
	if o.Memory == 0 {
		o.Memory = 64 * mib
	}
	rt, err := OpenSoftware(o)
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
		if err := h.Close(); err != nil && !errors.Is(err, ErrDeinitialized) {
			t.Error(err)
		}
	})
	return h
}

func newStream(t testing.TB, d *Device) *Stream {
	t.Helper()
	s, err := d.NewStream()
	return closeLater(t, s, err)
}

func newEvent(t testing.TB, d *Device) *Event {
	t.Helper()
	e, err := d.NewEvent(EventOptions{Timing: true})
	return closeLater(t, e, err)
}

func newPinned(t testing.TB, d *Device, n int) *HostMemory {
	t.Helper()
	h, err := d.HostMalloc(n)
	return closeLater(t, h, err)
}

func newMemory(t testing.TB, d *Device, n uint64) *Memory {
	t.Helper()
	m, err := d.Malloc(n)
	return closeLater(t, m, err)
}

// readBack returns what device memory holds, through a stream of its own.
func readBack(t testing.TB, m *Memory) []byte {
	t.Helper()
	s, h := newStream(t, m.Device()), newPinned(t, m.Device(), int(m.Size()))
	noError(t, s.CopyToHost(h, 0, m.Ptr(), h.Len()))
	noError(t, s.Synchronize())
	return bytes.Clone(h.Bytes())
}

// stall puts an operation on s, which writes the byte at p, that ends at ClearFaults or Close.
func stall(t testing.TB, s *Stream, p DevicePtr) {
	t.Helper()
	s.Device().Runtime().Software().Inject(Fault{Func: "hipMemsetAsync", N: 1, Stall: true})
	noError(t, s.Memset(p, 0, 1))
}

func TestSoftOptions(t *testing.T) {
	tests := []struct {
		name string
		o    SoftwareOptions
	}{
		{"negative devices", SoftwareOptions{Devices: -1}},
		{"too many devices", SoftwareOptions{Devices: 65}},
		{"negative rate", SoftwareOptions{LinkBytesPerSecond: -1}},
		{"rate not a number", SoftwareOptions{LinkBytesPerSecond: math.NaN()}},
		{"negative latency", SoftwareOptions{LinkLatency: -1}},
		{"more memory than addresses", SoftwareOptions{Memory: 1 << 60}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if rt, err := OpenSoftware(tt.o); err == nil {
				t.Error("no error", rt.Close())
			}
		})
	}
}

func TestSoftDescription(t *testing.T) {
	rt, err := OpenSoftware(SoftwareOptions{Devices: 3, Integrated: true}) // with the host's memory
	closeLater(t, rt, err)
	if n := value(rt.DeviceCount())(t); n != 3 {
		t.Errorf("%d devices, want 3", n)
	}
	if _, err := rt.Device(3); !errors.Is(err, ErrInvalidDevice) {
		t.Errorf("device 3: %v", err)
	}
	seen := map[string]bool{}
	for i := range 3 {
		d := value(rt.Device(i))(t)
		if d.Arch() != softArch || !d.Integrated() || d.TotalMemory() == 0 || d.Multiprocessors() == 0 || d.Name() == "" {
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
	if version, _, err := rt.Version(); err != nil || VersionString(version) != "6.2.0" {
		t.Errorf("version %d, %v", version, err)
	}
}

// Both layouts of the properties must agree, at the offsets that the headers of HIP give.
func TestSoftProperties(t *testing.T) {
	rt, d := openSoft(t, SoftwareOptions{})
	for _, tt := range []struct {
		name              string
		call              func(*byte, int32) Status
		size, total, arch int
	}{
		{name: "R0000", call: rt.api.hipGetDeviceProperties, size: 792, total: 256, arch: 396},
		{name: "R0600", call: rt.api.hipGetDevicePropertiesR0600, size: 1472, total: 288, arch: 1160},
	} {
		t.Run(tt.name, func(t *testing.T) {
			prop := bytes.Repeat([]byte{0xEE}, 2000)
			if st := tt.call(&prop[0], 0); st != Success {
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
			if st := tt.call(&prop[0], 1); st != ErrInvalidDevice {
				t.Errorf("of a device that does not exist: %v", st)
			}
		})
	}
}

func TestSoftText(t *testing.T) {
	rt, _ := openSoft(t, SoftwareOptions{})
	tests := []struct {
		name string
		call func(*byte, int32, int32) Status
		n    int32
		want string
		st   Status
	}{
		{"name", rt.api.hipDeviceGetName, 64, "Software device 0", Success},
		{"name cut", rt.api.hipDeviceGetName, 5, "Soft", Success},
		{"name without room", rt.api.hipDeviceGetName, 0, "", ErrInvalidValue},
		{"bus id", rt.api.hipDeviceGetPCIBusId, 13, "0000:01:00.0", Success},
		{"bus id cut", rt.api.hipDeviceGetPCIBusId, 12, "0000:01:00.", ErrInvalidValue},
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

func TestSoftRoundTrip(t *testing.T) {
	for _, tt := range []struct {
		name string
		host func(d *Device, n int) (*HostMemory, error)
		want int64 // unpinned copies
	}{
		{"pinned", (*Device).HostMalloc, 0},
		{"plain", (*Device).HostPlain, 1},
		{"registered", func(d *Device, n int) (*HostMemory, error) {
			b, err := mapAnonymous(n)
			if err != nil {
				return nil, err
			}
			t.Cleanup(func() { _ = unmapAnonymous(b) })
			return d.HostRegister(b)
		}, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			rt, d := openSoft(t, SoftwareOptions{})
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
			got := rt.Software().Stats()
			if got.UnpinnedCopies != tt.want || d.UnpinnedCopies() != tt.want || got.Copies != 2 || got.CopiedBytes != 2*n {
				t.Errorf("counted %+v, want %d unpinned of 2 copies of %d bytes", got, tt.want, n)
			}
		})
	}
}

func TestSoftCallsAndStats(t *testing.T) {
	rt, d := openSoft(t, SoftwareOptions{Memory: mib})
	b := value(mapAnonymous(8192))(t)
	t.Cleanup(func() { _ = unmapAnonymous(b) })
	s := value(d.NewStream())(t)
	e := value(d.NewEvent(EventOptions{}))(t)
	m := value(d.Malloc(1000))(t)
	h := value(d.HostMalloc(100))(t)
	r := value(d.HostRegister(b))(t)
	noError(t, s.Memset(m.Ptr(), 1, 1000))
	noError(t, s.CopyToHost(h, 0, m.Ptr(), 100))
	noError(t, s.Synchronize())
	want := SoftwareStats{
		Allocations: 1, DeviceBytes: 1000, HostAllocations: 1, Registrations: 1, PinnedBytes: 8292,
		Streams: 1, Events: 1, PeakDeviceBytes: 1000, PeakPinnedBytes: 8292, Copies: 1, CopiedBytes: 100,
	}
	if diff := cmp.Diff(want, rt.Software().Stats()); diff != "" {
		t.Error("in use (-want +got):\n" + diff)
	}
	for _, c := range []interface{ Close() error }{s, e, m, h, r} {
		noError(t, c.Close())
	}
	want = SoftwareStats{PeakDeviceBytes: 1000, PeakPinnedBytes: 8292, Copies: 1, CopiedBytes: 100}
	if diff := cmp.Diff(want, rt.Software().Stats()); diff != "" {
		t.Error("released (-want +got):\n" + diff)
	}
	calls := rt.Software().Calls()
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
func TestSoftConcurrent(t *testing.T) {
	rt, d := openSoft(t, SoftwareOptions{Memory: 256 * mib, Devices: 2})
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
	if s := rt.Software().Stats(); s.Streams+s.Events+s.Allocations+s.HostAllocations != 0 || s.UnpinnedCopies != 0 {
		t.Errorf("left: %+v", s)
	}
}

// shuffle copies random ranges up and compares them with what comes down again.
func shuffle(d *Device, rnd *rand.Rand) (err error) {
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
	e, err := d.NewEvent(EventOptions{})
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
		p := m.Ptr() + DevicePtr(off)
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
