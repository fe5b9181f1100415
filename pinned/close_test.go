package pinned_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/pinned"
)

// left returns what a Close has left, and fails the test if it was not a *LeftError of so many bytes that matches
// cause.
func left(t *testing.T, err error, bytes int64, cause error) *pinned.LeftError {
	t.Helper()
	var l *pinned.LeftError
	if !errors.As(err, &l) || !errors.Is(err, pinned.ErrLeft) || cause != nil && !errors.Is(err, cause) {
		t.Fatalf("%v, want a LeftError because of %v", err, cause)
	}
	if l.Bytes != bytes {
		t.Errorf("%v, want %d bytes", err, bytes)
	}
	return l
}

// stalled makes a pool of two buffers with one in flight behind a copy that does not end.
func stalled(t *testing.T, rec *recorder) (*pinned.Pool, *soft.Software) {
	t.Helper()
	dev, sw := device(t, soft.Options{})
	t.Cleanup(sw.ClearFaults)
	p := newPool(t, dev, pinned.Options{Budget: 2 * buf, BufferBytes: buf})
	mem, s := newMemory(t, dev, buf), newStream(t, dev)
	sw.Inject(soft.Fault{Func: "hipMemcpyAsync", N: 1, Stall: true})
	b := acquire(t, p)
	must(t, b.CopyToDevice(s, mem.Ptr(), buf), b.ReleaseAfter(s, rec, 1))
	return p, sw
}

// TestCloseWaits: Close waits for the copy in flight, and its Completion is told.
func TestCloseWaits(t *testing.T) { inBubble(t, testCloseWaits) }

func testCloseWaits(t *testing.T) {
	rec := newRecorder()
	p, sw := stalled(t, rec)
	var err error
	closed := make(chan struct{})
	go func() {
		err = p.Close()
		close(closed)
	}()
	time.Sleep(time.Hour)
	synctest.Wait()
	select {
	case <-closed:
		t.Fatalf("Close ended with %v before the copy", err)
	default:
	}
	sw.ClearFaults()
	<-closed
	must(t, err)
	if len(rec.told) != 1 {
		t.Error("Close ended before the Completion was told")
	}
}

// TestCloseDeadline: a copy does not end, so Close ends with its context and frees nothing. When the copy ends at last,
// the rest is freed, and a second Close says so.
func TestCloseDeadline(t *testing.T) { inBubble(t, testCloseDeadline) }

func testCloseDeadline(t *testing.T) {
	rec := newRecorder()
	p, sw := stalled(t, rec)
	for range 2 {
		start := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		l := left(t, p.CloseContext(ctx), 2*buf, context.DeadlineExceeded)
		if took := time.Since(start); took != time.Second {
			t.Errorf("CloseContext took %v, want a second", took)
		}
		if want := "131072 bytes of staging memory are left, 1 buffers in flight: "; l.InFlight != 1 ||
			!strings.Contains(l.Error(), want) {
			t.Errorf("%v, want it to say %q", l, want)
		}
		if got := sw.Stats(); got.PinnedBytes != 2*buf || got.Events != 2 {
			t.Errorf("the device has %+v, want all that the pool made", got)
		}
	}
	if _, err := p.Acquire(t.Context()); !errors.Is(err, pinned.ErrClosed) {
		t.Errorf("Acquire after Close: %v, want ErrClosed", err)
	}
	sw.ClearFaults()
	must(t, p.Close())
	if got := sw.Stats(); got.PinnedBytes != 0 || got.Events != 0 || len(rec.told) != 1 {
		t.Errorf("left on the device: %+v, told %d times", got, len(rec.told))
	}
}

// TestCloseStuckInHIP: no copy of the pool is in flight, but the device hangs with somebody else's work, so that
// unlocking memory does not come back. With a deadline and with Abandon, Close does.
func TestCloseStuckInHIP(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name               string
		register, abandons bool
	}{
		{"registered memory, deadline", true, false},
		{"registered memory, Abandon", true, true},
		{"hipHostMalloc, deadline", false, false},
		{"hipHostMalloc, Abandon", false, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) { testCloseStuckInHIP(t, test.register, test.abandons) })
		})
	}
}

func testCloseStuckInHIP(t *testing.T, register, abandons bool) {
	dev, sw := leakyDevice(t, soft.Options{})
	slabs := 1
	if !register {
		slabs = 2
		sw.Inject(soft.Fault{Func: "hipHostRegister", N: 1, Code: amdhip.ErrInvalidValue})
	}
	p := newPool(t, dev, pinned.Options{Budget: 2 * buf, BufferBytes: buf})
	synctest.Wait() // for the background pinning
	if got := sw.Stats(); got.Registrations+got.HostAllocations != slabs {
		t.Fatalf("%+v, want %d slabs", got, slabs)
	}
	mem, s := newMemory(t, dev, buf), newStream(t, dev)
	sw.Inject(soft.Fault{Func: "hipMemsetAsync", N: 1, Stall: true})
	must(t, s.Memset(mem.Ptr(), 0, buf))
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if abandons { // while Close is inside HIP
		ctx = t.Context()
		time.AfterFunc(time.Second, p.Abandon)
	}
	start := time.Now()
	l := left(t, p.CloseContext(ctx), 2*buf, ctx.Err())
	if took := time.Since(start); took != time.Second || l.InFlight != 0 {
		t.Errorf("%v after %v, want it after a second, with nothing in flight", l, took)
	}
	sw.ClearFaults() // what is inside HIP comes back; after Abandon the rest stays
	synctest.Wait()
	switch err := p.Close(); {
	case abandons && slabs == 2:
		left(t, err, buf, nil)
	default:
		must(t, err)
		slabs = 0
	}
	if got := sw.Stats(); got.PinnedBytes > 0 != (slabs > 0) {
		t.Errorf("the device has %+v, which is not what Close said", got)
	}
}

// TestAbandon: nothing is freed, whoever waits is let go, nobody is told any more, and every Close says what is left.
func TestAbandon(t *testing.T) { inBubble(t, testAbandon) }

func testAbandon(t *testing.T) {
	dev, sw := leakyDevice(t, soft.Options{})
	p := newPool(t, dev, pinned.Options{Budget: 2 * buf, BufferBytes: buf})
	mem, s, rec := newMemory(t, dev, buf), newStream(t, dev), newRecorder()
	sw.Inject(soft.Fault{Func: "hipMemcpyAsync", N: 1, Stall: true})
	a, b := acquire(t, p), acquire(t, p)
	must(t, a.CopyToDevice(s, mem.Ptr(), buf), a.ReleaseAfter(s, rec, 1))

	var acquireErr, closeErr error
	ended := make(chan struct{})
	go func() {
		_, acquireErr = p.Acquire(t.Context())
		closeErr = p.Close()
		close(ended)
	}()
	synctest.Wait()
	for range 2 {
		p.Abandon()
	}
	<-ended
	if !errors.Is(acquireErr, pinned.ErrClosed) {
		t.Errorf("Acquire: %v, want ErrClosed", acquireErr)
	}
	left(t, closeErr, 2*buf, nil)
	if err := b.ReleaseAfter(s, rec, 2); !errors.Is(err, pinned.ErrClosed) {
		t.Errorf("ReleaseAfter of an abandoned pool: %v, want ErrClosed", err)
	}
	sw.ClearFaults()
	must(t, s.Synchronize())
	if l := left(t, p.Close(), 2*buf, nil); l.InFlight != 1 || !strings.Contains(l.Error(), "given up") {
		t.Errorf("%v, want it to say that the device was given up", l)
	}
	if got := sw.Stats(); got.PinnedBytes != 2*buf || len(rec.told) != 0 {
		t.Errorf("the device has %+v, and %d were told; want the pool's memory and nobody", got, len(rec.told))
	}
}

// TestAbandonAfterClose has nothing to leave.
func TestAbandonAfterClose(t *testing.T) {
	t.Parallel()
	dev, _ := device(t, soft.Options{})
	p := newPool(t, dev, pinned.Options{Budget: 2 * buf, BufferBytes: buf})
	must(t, p.Close())
	p.Abandon()
	must(t, p.Close())
}

// TestCloseAgain closes from several goroutines, and with a context that has ended long ago.
func TestCloseAgain(t *testing.T) { inBubble(t, testCloseAgain) }

func testCloseAgain(t *testing.T) {
	dev, _ := device(t, soft.Options{})
	p := newPool(t, dev, pinned.Options{Budget: 2 * buf, BufferBytes: buf})
	errs := make(chan error)
	for range 3 {
		go func() { errs <- p.Close() }()
	}
	for range 3 {
		must(t, <-errs)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for range 20 {
		must(t, p.CloseContext(ctx))
	}
}

// TestUnpinFails: HIP refuses to give memory back. Close says how much that is, with HIP's error.
func TestUnpinFails(t *testing.T) { inBubble(t, testUnpinFails) }

func testUnpinFails(t *testing.T) {
	dev, sw := leakyDevice(t, soft.Options{})
	sw.Inject(soft.Fault{Func: "hipHostRegister", N: 1, Code: amdhip.ErrInvalidValue})
	p := newPool(t, dev, pinned.Options{Budget: 8 * buf, BufferBytes: buf})
	synctest.Wait() // two slabs, of 2 and of 2 buffers, then others
	before := sw.Stats().HostAllocations
	sw.Inject(soft.Fault{Func: "hipHostFree", N: 1, Code: amdhip.ErrUnknown})
	for range 2 {
		left(t, p.Close(), 2*buf, amdhip.ErrUnknown)
	}
	got, stats := sw.Stats(), p.Stats()
	if before < 2 || got.HostAllocations != 1 || got.PinnedBytes != 2*buf || stats.PinnedBytes != 2*buf {
		t.Errorf("%d slabs became %+v and %+v, want the first one to be left", before, got, stats)
	}
}

// TestReleaseAfterClose: the reaper is gone, so nobody would ever set the buffer free or tell its Completion.
func TestReleaseAfterClose(t *testing.T) { inBubble(t, testReleaseAfterClose) }

func testReleaseAfterClose(t *testing.T) {
	rec := newRecorder()
	dev, _ := device(t, soft.Options{})
	p := newPool(t, dev, pinned.Options{Budget: 2 * buf, BufferBytes: buf})
	s, b := newStream(t, dev), acquire(t, p)
	must(t, p.Close())
	if err := b.ReleaseAfter(s, rec, 1); err == nil {
		t.Error("ReleaseAfter takes a buffer that nobody will set free")
	}
}
