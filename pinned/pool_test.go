package pinned_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/pinned"
)

func TestBudget(t *testing.T) { inBubble(t, testBudget) }

func testBudget(t *testing.T) {
	dev, sw := device(t, soft.Options{})
	p := newPool(t, dev, pinned.Options{Budget: 4*buf + buf/2, BufferBytes: buf})
	var got []*pinned.Buffer
	for range 4 {
		got = append(got, acquire(t, p))
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
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
		must(t, p.Close())
	}
	if _, err := p.Acquire(t.Context()); !errors.Is(err, pinned.ErrClosed) {
		t.Errorf("Acquire after Close: %v, want ErrClosed", err)
	}
	if s := p.Stats(); s.PinnedBytes != 0 {
		t.Errorf("stats after Close: %+v, want nothing pinned", s)
	}
}

// TestReuse runs far more copies than there are buffers over a device that reads its source late, and looks at what has
// arrived: a buffer set free too early would show.
func TestReuse(t *testing.T) { inBubble(t, testReuse) }

func testReuse(t *testing.T) {
	const n = 200
	dev, _ := device(t, soft.Options{LinkBytesPerSecond: 1e9, Poison: true})
	p := newPool(t, dev, pinned.Options{Budget: 3 * buf, BufferBytes: buf, Timing: true})
	mem := newMemory(t, dev, n*buf)
	streams := []*amdhip.Stream{newStream(t, dev), newStream(t, dev)}
	rec := newRecorder()
	for i := range n {
		b := acquire(t, p)
		fill(b, byte(i))
		s := streams[i%2]
		must(t, b.CopyToDevice(s, mem.Ptr()+amdhip.DevicePtr(i*buf), buf), b.ReleaseAfter(s, rec, i))
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
	for i := range n {
		if !seen[i] {
			t.Fatalf("copy %d was not reported", i)
		}
		if !holds(t, p, streams[0], mem.Ptr()+amdhip.DevicePtr(i*buf), byte(i)) {
			t.Fatalf("chunk %d holds other bytes than were sent", i)
		}
	}
	must(t, p.Close())
}

// TestFallback covers the ladder: fewer buffers, smaller ones, plain memory.
func TestFallback(t *testing.T) {
	t.Parallel()
	fail := func(n int) []soft.Fault { // the nth attempt to pin, 0: every one
		return []soft.Fault{
			{Func: "hipHostRegister", N: n, Code: amdhip.ErrInvalidValue},
			{Func: "hipHostMalloc", N: n, Code: amdhip.ErrOutOfMemory},
		}
	}
	for _, test := range []struct {
		name    string
		fault   []soft.Fault
		buffers int
		bytes   int
		pinned  int64
		warns   string
	}{
		{"all well", nil, 4, 4 * buf, 16 * buf, ""},
		{"no registering", []soft.Fault{{Func: "hipHostRegister", Code: amdhip.ErrInvalidValue}}, 4, 4 * buf, 16 * buf, ""},
		{"smaller", slices.Concat(fail(1), fail(2)), 4, buf, 4 * buf, "small pieces"},
		{"plain", fail(0), 4, 4 * buf, 0, "cannot be pinned"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			dev, sw := device(t, soft.Options{})
			for _, f := range test.fault {
				sw.Inject(f)
			}
			var log bytes.Buffer
			p := newPool(t, dev, pinned.Options{
				Budget: 16 * buf, BufferBytes: 4 * buf, Logger: slog.New(slog.NewTextHandler(&log, nil)),
			})
			for range test.buffers { // waits for the background pinning
				acquire(t, p)
			}
			must(t, p.Close()) // the log is complete after it
			if got := p.BufferBytes(); got != test.bytes {
				t.Errorf("buffers of %d bytes, want %d", got, test.bytes)
			}
			if got := int64(sw.Stats().PeakPinnedBytes); got != test.pinned {
				t.Errorf("%d bytes pinned, want %d", got, test.pinned)
			}
			lines := strings.Count(log.String(), "\n")
			if test.warns == "" && lines > 0 || !strings.Contains(log.String(), test.warns) || lines > 1 {
				t.Errorf("log %q, want one line with %q", log.String(), test.warns)
			}
		})
	}
}

// TestFailedCopy wants the error of an asynchronous failure, and the buffer back.
func TestFailedCopy(t *testing.T) { inBubble(t, testFailedCopy) }

func testFailedCopy(t *testing.T) {
	dev, sw := device(t, soft.Options{})
	p := newPool(t, dev, pinned.Options{Budget: buf, BufferBytes: buf})
	mem, s, rec := newMemory(t, dev, buf), newStream(t, dev), newRecorder()
	sw.Inject(soft.Fault{Func: "hipMemcpyAsync", N: 1, Code: amdhip.ErrIllegalAddress, Async: true})
	b := acquire(t, p)
	must(t, b.CopyToDevice(s, mem.Ptr(), buf), b.ReleaseAfter(s, rec, 7))
	<-rec.told
	if rec.tags[0] != 7 || !errors.Is(rec.errs[0], amdhip.ErrIllegalAddress) {
		t.Errorf("told %v %v, want copy 7 to fail with ErrIllegalAddress", rec.tags, rec.errs)
	}
	acquire(t, p).Release()
	must(t, p.Close())
}

// TestFewer lets pinning fail after the first buffers.
func TestFewer(t *testing.T) { inBubble(t, testFewer) }

func testFewer(t *testing.T) {
	dev, sw := device(t, soft.Options{})
	sw.Inject(soft.Fault{Func: "hipHostRegister", N: 1, Code: amdhip.ErrInvalidValue})
	for n := range 3 {
		sw.Inject(soft.Fault{Func: "hipHostMalloc", N: n + 2, Code: amdhip.ErrOutOfMemory})
	}
	var log bytes.Buffer
	p := newPool(t, dev, pinned.Options{
		Budget: 16 * buf, BufferBytes: buf, Logger: slog.New(slog.NewTextHandler(&log, nil)),
	})
	synctest.Wait() // the background has tried for 4, 2 and 1 buffers
	if got := sw.Calls()["hipHostMalloc"]; got != 4 {
		t.Errorf("%d calls of hipHostMalloc, want 4", got)
	}
	must(t, p.Close())
	if got := sw.Stats().PeakPinnedBytes; got != 4*buf {
		t.Errorf("%d bytes pinned, want those of the first 4 buffers", got)
	}
	if !strings.Contains(log.String(), "fewer staging buffers") || strings.Count(log.String(), "\n") != 1 {
		t.Errorf("log %q, want one line", log.String())
	}
}

func TestTooSmall(t *testing.T) {
	t.Parallel()
	dev, _ := device(t, soft.Options{})
	_, err := pinned.New(dev, pinned.Options{BufferBytes: 100})
	if err == nil || !strings.Contains(err.Error(), "at least 65536") {
		t.Errorf("buffers of 100 bytes: %v, want an error that says what is the least", err)
	}
}

// TestTimingToHost: a copy to the host is timed as well, from its first copy to its last.
func TestTimingToHost(t *testing.T) { inBubble(t, testTimingToHost) }

func testTimingToHost(t *testing.T) {
	dev, _ := device(t, soft.Options{LinkBytesPerSecond: 1e9})
	p := newPool(t, dev, pinned.Options{Budget: buf, BufferBytes: buf, Timing: true})
	mem, s, rec := newMemory(t, dev, buf), newStream(t, dev), newRecorder()
	b := acquire(t, p)
	must(t, b.CopyToDevice(s, mem.Ptr(), buf), b.CopyToHost(s, mem.Ptr(), buf), b.ReleaseAfter(s, rec, 1))
	<-rec.told
	b = acquire(t, p)
	must(t, b.CopyToHost(s, mem.Ptr(), buf), b.ReleaseAfter(s, rec, 2))
	<-rec.told
	b = acquire(t, p) // and nothing at all takes no time
	must(t, b.ReleaseAfter(s, rec, 3))
	<-rec.told
	for i, want := range []time.Duration{2 * buf, buf, 0} {
		if got := rec.took[i]; got < want-time.Microsecond || got > want+time.Microsecond || rec.errs[i] != nil {
			t.Errorf("copies of buffer %d took %v (%v), want %v", i+1, got, rec.errs[i], want)
		}
	}
	must(t, p.Close())
}

// TestCopyTooLong: buffers are neighbours in one slab, so HIP would take a copy that goes on into the next one.
func TestCopyTooLong(t *testing.T) {
	t.Parallel()
	dev, sw := device(t, soft.Options{})
	p := newPool(t, dev, pinned.Options{Budget: 4 * buf, BufferBytes: buf})
	mem, s := newMemory(t, dev, 2*buf), newStream(t, dev)
	for range 4 {
		b := acquire(t, p)
		defer b.Release()
		for _, n := range []int{-1, buf + 1, 2 * buf} {
			for call, err := range map[string]error{
				"CopyToDevice": b.CopyToDevice(s, mem.Ptr(), n), "CopyToHost": b.CopyToHost(s, mem.Ptr(), n),
				"CopyRangeToDevice": b.CopyRangeToDevice(s, mem.Ptr(), 1, buf),
				"from before":       b.CopyRangeToDevice(s, mem.Ptr(), -1, 1),
				"from behind":       b.CopyRangeToDevice(s, mem.Ptr(), buf+1, 0),
			} {
				if !errors.Is(err, amdhip.ErrInvalidValue) || !strings.Contains(err.Error(), "the buffer has 65536") {
					t.Errorf("%s of %d bytes: %v, want an error that says the size of the buffer", call, n, err)
				}
			}
		}
	}
	if got := sw.Calls()["hipMemcpyAsync"]; got != 0 {
		t.Errorf("%d copies were started", got)
	}
	must(t, p.Close())
}
