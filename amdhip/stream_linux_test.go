package amdhip

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"
)

// bench is a stream with 64 bytes on either side.
type bench struct {
	d *Device
	s *Stream
	m *Memory
	h *HostMemory
	e *Event
}

func newBench(t *testing.T, d *Device) *bench {
	t.Helper()
	return &bench{
		d: d,
		m: closing(t, must(d.Malloc(64))(t), nil),
		h: closing(t, must(d.HostMalloc(64))(t), nil),
		s: closing(t, must(d.NewStream())(t), nil),
		e: closing(t, must(d.NewEvent(EventOptions{Timing: true}))(t), nil),
	}
}

// TestCopyIsDeferred overwrites the source after the copy was started: the device must get the later bytes.
func TestCopyIsDeferred(t *testing.T) {
	rt, sim := openSim(t)
	b := newBench(t, device(t, rt, 0))
	if done, err := b.e.Query(); !done || err != nil {
		t.Errorf("never recorded: got %v, %v, want done", done, err)
	}
	sim.set("HOLD", "1")
	for i := range b.h.Bytes() {
		b.h.Bytes()[i] = 1
	}
	check(t, b.s.CopyToDevice(b.m.Ptr(), b.h, 0, 64))
	check(t, b.s.Record(b.e))
	if done, err := b.e.Query(); done || err != nil {
		t.Errorf("event: got %v, %v, want not done", done, err)
	}
	if done, err := b.s.Query(); done || err != nil {
		t.Errorf("stream: got %v, %v, want not done", done, err)
	}
	_, err := b.e.Elapsed(b.e)
	wantCode(t, err, "hipEventElapsedTime", ErrNotReady)
	for i := range b.h.Bytes() {
		b.h.Bytes()[i] = 2
	}
	sim.set("HOLD", "0")
	check(t, b.e.Synchronize())
	if done, err := b.e.Query(); !done || err != nil {
		t.Errorf("event: got %v, %v, want done", done, err)
	}
	check(t, b.s.CopyToHost(b.h, 0, b.m.Ptr(), 64))
	check(t, b.s.Synchronize())
	if done, err := b.s.Query(); !done || err != nil {
		t.Errorf("stream: got %v, %v, want done", done, err)
	}
	if !bytes.Equal(b.h.Bytes(), bytes.Repeat([]byte{2}, 64)) {
		t.Errorf("got % x, want the bytes at the time of execution", b.h.Bytes())
	}
	sim.wantStat("misuses", 0)
}

// TestOrder lets two streams write the same memory in turns, ordered by events only.
func TestOrder(t *testing.T) {
	rt, sim := openSim(t, "DEVICES=2", "DELAY_US=300")
	d := device(t, rt, 0)
	a, b := newBench(t, d), newBench(t, d)
	for i := range 40 {
		check(t, a.s.Memset(a.m.Ptr(), byte(i), 64))
		check(t, a.s.Record(a.e))
		check(t, b.s.Wait(a.e))
		check(t, b.s.Memset(a.m.Ptr(), byte(i+100), 32))
		check(t, b.s.Record(b.e))
		check(t, a.s.Wait(b.e))
	}
	check(t, a.s.CopyToHost(a.h, 0, a.m.Ptr(), 64))
	check(t, a.s.Synchronize())
	want := append(bytes.Repeat([]byte{139}, 32), bytes.Repeat([]byte{39}, 32)...)
	if !bytes.Equal(a.h.Bytes(), want) {
		t.Errorf("got % x", a.h.Bytes())
	}
	// Across devices a stream can wait, but not record.
	other := newBench(t, device(t, rt, 1))
	check(t, other.s.Wait(a.e))
	wantCode(t, other.s.Record(a.e), "hipEventRecord", ErrInvalidHandle)
	sim.wantStat("misuses", 1)
}

func TestElapsed(t *testing.T) {
	rt, _ := openSim(t)
	b := newBench(t, device(t, rt, 0))
	start := closing(t, must(b.d.NewEvent(EventOptions{Timing: true, BlockingSync: true}))(t), nil)
	_, err := b.e.Elapsed(start)
	wantCode(t, err, "hipEventElapsedTime", ErrInvalidHandle)
	check(t, b.s.Record(start))
	check(t, b.s.Memset(b.m.Ptr(), 1, 64))
	check(t, b.s.Record(b.e))
	check(t, b.e.Synchronize())
	forth, err := b.e.Elapsed(start)
	if forth <= 0 || forth > time.Minute || err != nil {
		t.Errorf("got %v, %v", forth, err)
	}
	if back, err := start.Elapsed(b.e); back != -forth || err != nil {
		t.Errorf("backwards: got %v, %v, want %v", back, err, -forth)
	}
	if zero, err := b.e.Elapsed(b.e); zero != 0 || err != nil {
		t.Errorf("itself: got %v, %v", zero, err)
	}
	untimed := closing(t, must(b.d.NewEvent(EventOptions{}))(t), nil)
	check(t, b.s.Record(untimed))
	check(t, untimed.Synchronize())
	_, err = untimed.Elapsed(start)
	wantCode(t, err, "hipEventElapsedTime", ErrInvalidHandle)
}

func TestCopyBounds(t *testing.T) {
	rt, sim := openSim(t)
	b := newBench(t, device(t, rt, 0))
	for _, tt := range []struct {
		name   string
		off, n int
	}{
		{"too long", 0, 65},
		{"past the end", 60, 5},
		{"negative offset", -1, 4},
		{"negative length", 4, -1},
		{"overflow", 1, int(^uint(0) >> 1)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			wantIs(t, b.s.CopyToDevice(b.m.Ptr(), b.h, tt.off, tt.n), ErrInvalidValue)
			wantIs(t, b.s.CopyToHost(b.h, tt.off, b.m.Ptr(), tt.n), ErrInvalidValue)
		})
	}
	check(t, b.s.CopyToDevice(b.m.Ptr(), b.h, 64, 0))
	check(t, b.s.Memset(b.m.Ptr(), 0, 0))
	sim.wantStat("hipMemcpyAsync", 0)
	// The device's side is HIP's to check.
	wantCode(t, b.s.CopyToDevice(b.m.Ptr()+1, b.h, 0, 64), "hipMemcpyAsync", ErrInvalidValue)
	wantCode(t, b.s.Memset(b.m.Ptr(), 0, 65), "hipMemsetAsync", ErrInvalidValue)
}

func TestUnpinnedCopies(t *testing.T) {
	rt, sim := openSim(t)
	b := newBench(t, device(t, rt, 0))
	plain := closing(t, must(b.d.HostPlain(64))(t), nil)
	plain.Bytes()[63] = 9
	check(t, b.s.CopyToDevice(b.m.Ptr(), b.h, 0, 64))
	check(t, b.s.CopyToDevice(b.m.Ptr(), plain, 0, 64))
	check(t, b.s.CopyToHost(plain, 0, b.m.Ptr()+63, 1))
	check(t, b.s.Synchronize())
	if plain.Bytes()[0] != 9 {
		t.Errorf("got %d, want 9", plain.Bytes()[0])
	}
	if got := b.d.UnpinnedCopies(); got != 2 {
		t.Errorf("got %d unpinned copies, want 2", got)
	}
	sim.wantStat("unpinned_copies", 2)
	sim.wantStat("copies", 3)
}

// TestClosed: HIP 7 crashes on a stale stream, so no call may get through.
func TestClosed(t *testing.T) {
	rt, sim := openSim(t, "VERSION=7")
	d := device(t, rt, 0)
	b := newBench(t, d)
	s, e, h, m := must(d.NewStream())(t), must(d.NewEvent(EventOptions{}))(t), must(d.HostMalloc(8))(t),
		must(d.Malloc(8))(t)
	for range 2 {
		check(t, errors.Join(s.Close(), e.Close(), h.Close(), m.Close()))
	}
	calls := sim.stat("calls")
	for name, err := range map[string]error{
		"CopyToDevice":    s.CopyToDevice(b.m.Ptr(), b.h, 0, 8),
		"CopyToHost":      s.CopyToHost(b.h, 0, b.m.Ptr(), 8),
		"CopyPeer":        s.CopyPeer(b.m.Ptr(), b.m.Ptr(), d, 8),
		"Memset":          s.Memset(b.m.Ptr(), 0, 8),
		"Wait":            s.Wait(b.e),
		"Record":          s.Record(b.e),
		"Synchronize":     s.Synchronize(),
		"FreeAsync":       s.FreeAsync(b.m),
		"closed host":     b.s.CopyToDevice(b.m.Ptr(), h, 0, 8),
		"closed event":    b.s.Record(e),
		"wait for closed": b.s.Wait(e),
		"event":           e.Synchronize(),
		"Query":           second(s.Query()),
		"event Query":     second(e.Query()),
		"Elapsed":         second(e.Elapsed(b.e)),
		"Elapsed since":   second(b.e.Elapsed(e)),
		"MallocAsync":     second(s.MallocAsync(8)),
		"IPCHandle":       second(m.IPCHandle()),
		"device pointer":  second(h.DevicePtr()),
	} {
		if !errors.Is(err, ErrClosed) {
			t.Errorf("%s: got %v, want ErrClosed", name, err)
		}
	}
	sim.wantStat("calls", calls)

	// After the runtime's Close nothing is created any more, but what exists can be used and closed.
	check(t, rt.Close())
	calls = sim.stat("calls")
	for name, err := range map[string]error{
		"NewStream":    second(d.NewStream()),
		"NewEvent":     second(d.NewEvent(EventOptions{})),
		"Malloc":       second(d.Malloc(8)),
		"HostMalloc":   second(d.HostMalloc(8)),
		"HostPlain":    second(d.HostPlain(8)),
		"HostRegister": second(d.HostRegister(b.h.Bytes()[:0:0])),
		"Synchronize":  d.Synchronize(),
		"MallocAsync":  second(b.s.MallocAsync(8)),
		"OpenIPC":      second(d.OpenIPC(IPCHandle{})),
		"peer":         second(d.CanAccessPeer(d)),
	} {
		if name != "HostRegister" && !errors.Is(err, ErrClosed) || err == nil {
			t.Errorf("%s: got %v, want ErrClosed", name, err)
		}
	}
	sim.wantStat("calls", calls)
	check(t, b.s.Memset(b.m.Ptr(), 0, 8))
	check(t, b.s.Synchronize())
}

func second[T any](_ T, err error) error { return err }

// TestOtherRuntime: raw handles of one library must not reach another.
func TestOtherRuntime(t *testing.T) {
	rt1, sim1 := openSim(t)
	rt2, _ := openSim(t)
	a, b := newBench(t, device(t, rt1, 0)), newBench(t, device(t, rt2, 0))
	wantIs(t, a.s.Record(b.e), ErrInvalidHandle)
	wantIs(t, a.s.Wait(b.e), ErrInvalidHandle)
	wantIs(t, a.s.FreeAsync(b.m), ErrInvalidHandle)
	_, err := a.e.Elapsed(b.e)
	wantIs(t, err, ErrInvalidHandle)
	sim1.wantStat("misuses", 0)
	// Host memory is memory, but page-locked only where it was locked.
	check(t, a.s.CopyToDevice(a.m.Ptr(), b.h, 0, 64))
	if got := a.d.UnpinnedCopies(); got != 1 {
		t.Errorf("got %d unpinned copies, want 1", got)
	}
}

// TestConcurrentClose closes handles under the calls of other goroutines: each call either works or reports ErrClosed.
func TestConcurrentClose(t *testing.T) {
	rt, sim := openSim(t, "VERSION=7", "DELAY_US=20")
	d := device(t, rt, 0)
	b := newBench(t, d)
	for range 50 {
		s, e, e2 := must(d.NewStream())(t), must(d.NewEvent(EventOptions{Timing: true}))(t),
			must(d.NewEvent(EventOptions{Timing: true}))(t)
		h := must(d.HostMalloc(64))(t)
		var wg sync.WaitGroup
		for _, f := range []func() error{
			func() error { return s.CopyToDevice(b.m.Ptr(), h, 0, 64) },
			func() error { return s.Record(e) },
			func() error { return s.Wait(e2) },
			func() error { return second(s.Query()) },
			s.Synchronize,
			e.Synchronize,
			func() error { return second(e.Query()) },
			func() error { return second(e.Elapsed(e2)) },
			func() error { return second(e2.Elapsed(e)) },
		} {
			wg.Go(func() {
				for range 20 {
					err := f()
					if err != nil && !errors.Is(err, ErrClosed) && !errors.Is(err, ErrNotReady) && !errors.Is(err, ErrInvalidHandle) {
						t.Error(err)
					}
				}
			})
		}
		for _, c := range []interface{ Close() error }{s, e, e2, h, s, e, e2, h} {
			wg.Go(func() {
				if err := c.Close(); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}
	// ErrInvalidHandle came from Elapsed before anything was recorded: the only misuse there can be.
	if misuses, elapsed := sim.stat("misuses"), sim.stat("hipEventElapsedTime"); misuses > elapsed {
		t.Errorf("%d misuses, at most %d can come from Elapsed", misuses, elapsed)
	}
}

// TestStress sends random pieces through rings of buffers on two devices, as a loader does, and compares all of it.
func TestStress(t *testing.T) {
	rt, sim := openSim(t, "DEVICES=2", "DELAY_US=50")
	const size, piece, ring = 1 << 18, 1 << 12, 3
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			d, err := rt.Device(g % 2)
			if err == nil {
				err = stream(d, size, piece, ring, uint64(g))
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	sim.wantStat("misuses", 0)
	sim.wantStat("unpinned_copies", 0)
	sim.wantStat("copied_bytes", 8*2*size)
}

// stream copies size random bytes to d and back through a ring of page-locked buffers.
func stream(d *Device, size, piece, ring int, seed uint64) (err error) {
	closeAll := func(c interface{ Close() error }) { err = errors.Join(err, c.Close()) }
	m, err := d.Malloc(uint64(size))
	if err != nil {
		return err
	}
	defer closeAll(m)
	s, err := d.NewStream()
	if err != nil {
		return err
	}
	defer closeAll(s)
	var bufs []*HostMemory
	var events []*Event
	for range ring {
		h, err := d.HostMalloc(piece)
		if err != nil {
			return err
		}
		defer closeAll(h)
		e, err := d.NewEvent(EventOptions{BlockingSync: true})
		if err != nil {
			return err
		}
		defer closeAll(e)
		bufs, events = append(bufs, h), append(events, e)
	}
	data := make([]byte, size)
	r := rand.New(rand.NewPCG(seed, 1))
	for i := range data {
		data[i] = byte(r.Uint32())
	}
	for i := 0; i < size/piece; i++ {
		h, e := bufs[i%ring], events[i%ring]
		for done := false; !done; {
			if done, err = e.Query(); err != nil {
				return err
			}
		}
		copy(h.Bytes(), data[i*piece:])
		if err := errors.Join(s.CopyToDevice(m.Ptr()+DevicePtr(i*piece), h, 0, piece), s.Record(e)); err != nil {
			return err
		}
	}
	if err := s.Synchronize(); err != nil {
		return err
	}
	for i := 0; i < size/piece; i++ {
		if err := errors.Join(s.CopyToHost(bufs[0], 0, m.Ptr()+DevicePtr(i*piece), piece), s.Synchronize()); err != nil {
			return err
		}
		if !bytes.Equal(bufs[0].Bytes(), data[i*piece:(i+1)*piece]) {
			return fmt.Errorf("piece %d is wrong", i)
		}
	}
	return nil
}
