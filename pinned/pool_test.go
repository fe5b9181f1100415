package pinned_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/pinned"
)

const buf = pinned.MinBufferBytes

// device opens a software device and fails the test if anything of it is left at the end.
func device(t *testing.T, o amdhip.SoftwareOptions) (*amdhip.Device, *amdhip.Software) {
	t.Helper()
	rt, err := amdhip.OpenSoftware(o)
	if err != nil {
		t.Fatal(err)
	}
	dev, err := rt.Device(0)
	if err != nil {
		t.Fatal(err)
	}
	sw := rt.Software()
	t.Cleanup(func() {
		if s := sw.Stats(); s.PinnedBytes != 0 || s.Events != 0 || s.Streams != 0 || s.DeviceBytes != 0 {
			t.Errorf("left on the device: %+v", s)
		}
		if err := rt.Close(); err != nil {
			t.Error(err)
		}
	})
	return dev, sw
}

// recorder is a Completion that keeps what it was told.
type recorder struct {
	mu   sync.Mutex
	tags []int
	took []time.Duration
	errs []error
	told chan struct{}
}

func newRecorder() *recorder { return &recorder{told: make(chan struct{}, 1024)} }

func (r *recorder) Done(tag int, took time.Duration, err error) {
	r.mu.Lock()
	r.tags, r.took, r.errs = append(r.tags, tag), append(r.took, took), append(r.errs, err)
	r.mu.Unlock()
	r.told <- struct{}{}
}

// newStream and newMemory make what a copy needs and close it with the test.
func newStream(t *testing.T, dev *amdhip.Device) *amdhip.Stream {
	t.Helper()
	s, err := dev.NewStream()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func newMemory(t *testing.T, dev *amdhip.Device, n uint64) *amdhip.Memory {
	t.Helper()
	m, err := dev.Malloc(n)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

func TestBudget(t *testing.T) {
	dev, sw := device(t, amdhip.SoftwareOptions{})
	p, err := pinned.New(dev, pinned.Options{Budget: 4*buf + buf/2, BufferBytes: buf})
	if err != nil {
		t.Fatal(err)
	}
	var got []*pinned.Buffer
	for range 4 {
		b, err := p.Acquire(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, b)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := p.Acquire(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a fifth buffer: %v, want a wait until the deadline", err)
	}
	if s := p.Stats(); s.Buffers != 4 || s.PinnedBytes != 4*buf || sw.Stats().PinnedBytes != 4*buf {
		t.Errorf("stats %+v, device %+v; want 4 buffers of %d bytes, pinned", s, sw.Stats(), buf)
	}
	for _, b := range got {
		b.Release()
	}
	for range 2 { // idempotent
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := p.Acquire(t.Context()); !errors.Is(err, pinned.ErrClosed) {
		t.Errorf("Acquire after Close: %v, want ErrClosed", err)
	}
}

// TestReuse runs far more copies than there are buffers over a device that reads its source late, and looks at what has
// arrived: a buffer set free too early would show.
func TestReuse(t *testing.T) {
	const n = 200
	dev, _ := device(t, amdhip.SoftwareOptions{LinkBytesPerSecond: 1e9, Poison: true})
	p, err := pinned.New(dev, pinned.Options{Budget: 3 * buf, BufferBytes: buf, Timing: true})
	if err != nil {
		t.Fatal(err)
	}
	mem := newMemory(t, dev, n*buf)
	streams := []*amdhip.Stream{newStream(t, dev), newStream(t, dev)}
	rec := newRecorder()
	for i := range n {
		b, err := p.Acquire(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for j := range b.Bytes() {
			b.Bytes()[j] = byte(i)
		}
		s := streams[i%2]
		if err := b.CopyToDevice(s, mem.Ptr()+amdhip.DevicePtr(i*buf), buf); err != nil {
			t.Fatal(err)
		}
		if err := b.ReleaseAfter(s, rec, i); err != nil {
			t.Fatal(err)
		}
	}
	for range n {
		<-rec.told
	}
	seen := make([]bool, n)
	for i, tag := range rec.tags {
		if rec.errs[i] != nil {
			t.Errorf("copy %d: %v", tag, rec.errs[i])
		}
		if want := buf * time.Nanosecond; rec.took[i] < want-time.Microsecond { // at 10^9 bytes per second
			t.Errorf("copy %d took %v, want at least %v", tag, rec.took[i], want)
		}
		seen[tag] = true
	}
	b, err := p.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for i := range n {
		if !seen[i] {
			t.Fatalf("copy %d was not reported", i)
		}
		if err := b.CopyToHost(streams[0], mem.Ptr()+amdhip.DevicePtr(i*buf), buf); err != nil {
			t.Fatal(err)
		}
		if err := streams[0].Synchronize(); err != nil {
			t.Fatal(err)
		}
		if want := bytes.Repeat([]byte{byte(i)}, buf); !bytes.Equal(b.Bytes(), want) {
			t.Fatalf("chunk %d holds other bytes than were sent", i)
		}
	}
	b.Release()
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}

// TestFallback covers the ladder: fewer buffers, smaller ones, plain memory.
func TestFallback(t *testing.T) {
	fail := func(n int) []amdhip.Fault { // the nth attempt to pin, 0: every one
		return []amdhip.Fault{
			{Func: "hipHostRegister", N: n, Code: amdhip.ErrInvalidValue},
			{Func: "hipHostMalloc", N: n, Code: amdhip.ErrOutOfMemory},
		}
	}
	for _, test := range []struct {
		name    string
		fault   []amdhip.Fault
		buffers int
		bytes   int
		pinned  int64
		warns   string
	}{
		{"all well", nil, 4, 4 * buf, 16 * buf, ""},
		{"no registering", []amdhip.Fault{{Func: "hipHostRegister", Code: amdhip.ErrInvalidValue}}, 4, 4 * buf, 16 * buf, ""},
		{"smaller", slices.Concat(fail(1), fail(2)), 4, buf, 4 * buf, "small pieces"},
		{"plain", fail(0), 4, 4 * buf, 0, "cannot be pinned"},
	} {
		t.Run(test.name, func(t *testing.T) {
			dev, sw := device(t, amdhip.SoftwareOptions{})
			for _, f := range test.fault {
				sw.Inject(f)
			}
			var log bytes.Buffer
			p, err := pinned.New(dev, pinned.Options{
				Budget: 16 * buf, BufferBytes: 4 * buf, Logger: slog.New(slog.NewTextHandler(&log, nil)),
			})
			if err != nil {
				t.Fatal(err)
			}
			for range test.buffers { // waits for the background pinning
				if _, err := p.Acquire(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			if err := p.Close(); err != nil { // the log is complete after it
				t.Error(err)
			}
			if got := p.BufferBytes(); got != test.bytes {
				t.Errorf("buffers of %d bytes, want %d", got, test.bytes)
			}
			if got := int64(sw.Stats().PeakPinnedBytes); got != test.pinned {
				t.Errorf("%d bytes pinned, want %d", got, test.pinned)
			}
			if test.warns == "" && log.Len() > 0 || strings.Count(log.String(), test.warns) < 1 || strings.Count(log.String(), "\n") > 1 {
				t.Errorf("log %q, want one line with %q", log.String(), test.warns)
			}
		})
	}
}

// TestFailedCopy wants the error of an asynchronous failure, and the buffer back.
func TestFailedCopy(t *testing.T) {
	dev, sw := device(t, amdhip.SoftwareOptions{})
	p, err := pinned.New(dev, pinned.Options{Budget: buf, BufferBytes: buf})
	if err != nil {
		t.Fatal(err)
	}
	mem, s, rec := newMemory(t, dev, buf), newStream(t, dev), newRecorder()
	sw.Inject(amdhip.Fault{Func: "hipMemcpyAsync", N: 1, Code: amdhip.ErrIllegalAddress, Async: true})
	b, err := p.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := b.CopyToDevice(s, mem.Ptr(), buf); err != nil {
		t.Fatal(err)
	}
	if err := b.ReleaseAfter(s, rec, 7); err != nil {
		t.Fatal(err)
	}
	<-rec.told
	if rec.tags[0] != 7 || !errors.Is(rec.errs[0], amdhip.ErrIllegalAddress) {
		t.Errorf("told %v %v, want copy 7 to fail with ErrIllegalAddress", rec.tags, rec.errs)
	}
	if b, err = p.Acquire(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.Release()
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}

// TestFewer lets pinning fail after the first buffers.
func TestFewer(t *testing.T) {
	dev, sw := device(t, amdhip.SoftwareOptions{})
	sw.Inject(amdhip.Fault{Func: "hipHostRegister", N: 1, Code: amdhip.ErrInvalidValue})
	for n := range 3 {
		sw.Inject(amdhip.Fault{Func: "hipHostMalloc", N: n + 2, Code: amdhip.ErrOutOfMemory})
	}
	var log bytes.Buffer
	p, err := pinned.New(dev, pinned.Options{Budget: 16 * buf, BufferBytes: buf, Logger: slog.New(slog.NewTextHandler(&log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	for sw.Calls()["hipHostMalloc"] < 4 { // the background tries for 4, 2 and 1 buffers
		time.Sleep(time.Millisecond)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	if got := sw.Stats().PeakPinnedBytes; got != 4*buf {
		t.Errorf("%d bytes pinned, want those of the first 4 buffers", got)
	}
	if !strings.Contains(log.String(), "fewer staging buffers") || strings.Count(log.String(), "\n") != 1 {
		t.Errorf("log %q, want one line", log.String())
	}
}

func TestTooSmall(t *testing.T) {
	dev, _ := device(t, amdhip.SoftwareOptions{})
	if _, err := pinned.New(dev, pinned.Options{BufferBytes: 100}); err == nil || !strings.Contains(err.Error(), "at least 65536") {
		t.Errorf("buffers of 100 bytes: %v, want an error that says what is the least", err)
	}
}
