package pinned_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/pinned"
)

// TestMisuse uses a buffer that is no longer the caller's in every way there is. Each has to panic and to say what was
// wrong, and the pool has to be as good as before.
func TestMisuse(t *testing.T) {
	t.Parallel()
	for _, state := range []struct {
		name, says string
		lost       int // buffers
		enter      func(t *testing.T, m *misuse)
	}{
		{"released", "released already", 0, func(t *testing.T, m *misuse) { m.buf.Release() }},
		{"released, and acquired by another", "released already", 0, func(t *testing.T, m *misuse) {
			m.buf.Release()
			m.other = acquire(t, m.pool) // the same memory
		}},
		{"in flight", "in flight", 0, func(t *testing.T, m *misuse) {
			m.sw.Inject(soft.Fault{Func: "hipEventRecord", N: 1, Stall: true})
			must(t, m.buf.ReleaseAfter(m.stream, nil, 0))
		}},
		{"back from a copy", "released already", 0, func(t *testing.T, m *misuse) {
			rec := newRecorder()
			must(t, m.buf.ReleaseAfter(m.stream, rec, 0))
			<-rec.told
		}},
		{"lost", "is lost", 1, func(t *testing.T, m *misuse) {
			m.sw.Inject(soft.Fault{Func: "hipEventRecord", N: 1, Code: amdhip.ErrOutOfMemory})
			if err := m.buf.ReleaseAfter(m.stream, nil, 0); !errors.Is(err, amdhip.ErrOutOfMemory) {
				t.Fatalf("ReleaseAfter: %v, want ErrOutOfMemory", err)
			}
		}},
	} {
		for call, use := range map[string]func(m *misuse){
			"Release":      func(m *misuse) { m.buf.Release() },
			"ReleaseAfter": func(m *misuse) { _ = m.buf.ReleaseAfter(m.stream, nil, 0) },
			"Bytes":        func(m *misuse) { m.buf.Bytes() },
			"CopyToDevice": func(m *misuse) { _ = m.buf.CopyToDevice(m.stream, m.mem.Ptr(), buf) },
			"CopyToHost":   func(m *misuse) { _ = m.buf.CopyToHost(m.stream, m.mem.Ptr(), buf) },
		} {
			t.Run(state.name+"/"+call, func(t *testing.T) {
				inBubble(t, func(t *testing.T) { testMisuse(t, state.says, state.lost, call, state.enter, use) })
			})
		}
	}
}

// misuse is what a case of TestMisuse works with.
type misuse struct {
	sw         *soft.Software
	pool       *pinned.Pool
	stream     *amdhip.Stream
	mem        *amdhip.Memory
	buf, other *pinned.Buffer
}

func testMisuse(t *testing.T, says string, lost int, call string, enter func(*testing.T, *misuse), use func(*misuse)) {
	const buffers = 2
	dev, sw := device(t, soft.Options{})
	m := &misuse{
		sw: sw, pool: newPool(t, dev, pinned.Options{Budget: buffers * buf, BufferBytes: buf}),
		stream: newStream(t, dev), mem: newMemory(t, dev, buf),
	}
	m.buf = acquire(t, m.pool)
	enter(t, m)
	calls := sw.Calls()
	said := recovered(func() { use(m) })
	if !strings.HasPrefix(said, "pinned: "+call+" of a buffer that ") || !strings.Contains(said, says) {
		t.Errorf("%s: panic %q, want one that says %q", call, said, says)
	}
	for _, f := range []string{"hipMemcpyAsync", "hipEventRecord"} {
		if n := sw.Calls()[f] - calls[f]; n != 0 {
			t.Errorf("%s called %s", call, f)
		}
	}
	if m.other != nil {
		m.other.Release()
	}
	sw.ClearFaults()
	seen := map[*byte]bool{}
	for range buffers - lost { // each memory once
		seen[&acquire(t, m.pool).Bytes()[0]] = true
	}
	if len(seen) != buffers-lost {
		t.Errorf("%d owners share %d buffers", buffers-lost, len(seen))
	}
	must(t, m.pool.Close())
}

// recovered calls f and returns what it panicked with.
func recovered(f func()) (said string) {
	defer func() {
		if r := recover(); r != nil {
			said = fmt.Sprint(r)
		}
	}()
	f()
	return ""
}

// TestLost: a buffer with a copy that is not observed is given to nobody, although the copy ends, and the pool without
// it goes on. When all are lost, nobody waits.
func TestLost(t *testing.T) { inBubble(t, testLost) }

func testLost(t *testing.T) {
	dev, sw := device(t, soft.Options{})
	p := newPool(t, dev, pinned.Options{Budget: 2 * buf, BufferBytes: buf})
	mem, s, rec := newMemory(t, dev, buf), newStream(t, dev), newRecorder()
	lose := func() *byte {
		b := acquire(t, p)
		first := &b.Bytes()[0]
		fill(b, 1)
		must(t, b.CopyToDevice(s, mem.Ptr(), buf))
		sw.Inject(soft.Fault{Func: "hipEventRecord", N: 1, Code: amdhip.ErrOutOfMemory})
		if err := b.ReleaseAfter(s, rec, 0); !errors.Is(err, amdhip.ErrOutOfMemory) {
			t.Fatalf("ReleaseAfter: %v, want ErrOutOfMemory", err)
		}
		must(t, s.Synchronize())
		return first
	}
	gone := lose()
	for i := range 5 {
		b := acquire(t, p)
		if &b.Bytes()[0] == gone {
			t.Fatal("the lost buffer has a new owner")
		}
		must(t, b.CopyToDevice(s, mem.Ptr(), buf), b.ReleaseAfter(s, rec, i))
		<-rec.told
	}
	var err error
	waits := make(chan struct{})
	b := acquire(t, p)
	go func() { // waits for the only other buffer
		_, err = p.Acquire(t.Context())
		close(waits)
	}()
	synctest.Wait()
	b.Release()
	<-waits
	must(t, err)
	if st := p.Stats(); st.Lost != 1 || st.InFlight != 0 {
		t.Errorf("stats %+v, want one buffer lost, none in flight", st)
	}
	must(t, p.Close())
}

// TestAllLost: when there is no buffer left that could become free, Acquire says so, also if it waits already.
func TestAllLost(t *testing.T) { inBubble(t, testAllLost) }

func testAllLost(t *testing.T) {
	dev, sw := device(t, soft.Options{})
	p := newPool(t, dev, pinned.Options{Budget: 2 * buf, BufferBytes: buf})
	s := newStream(t, dev)
	a, b := acquire(t, p), acquire(t, p)
	var err error
	waits := make(chan struct{})
	go func() {
		_, err = p.Acquire(t.Context())
		close(waits)
	}()
	sw.Inject(soft.Fault{Func: "hipEventRecord", Code: amdhip.ErrOutOfMemory})
	for _, b := range []*pinned.Buffer{a, b} {
		synctest.Wait()
		select {
		case <-waits:
			t.Fatalf("Acquire ended with %v although a buffer may come back", err)
		default:
		}
		if err := b.ReleaseAfter(s, nil, 0); err == nil {
			t.Fatal("ReleaseAfter without an event has no error")
		}
	}
	<-waits
	if !errors.Is(err, pinned.ErrExhausted) {
		t.Errorf("Acquire: %v, want ErrExhausted", err)
	}
	must(t, p.Close())
}

// TestUnknownEnd: the event of a copy cannot be asked. Who is told so must not make the buffer somebody else's while
// the device may still write to it; that it reads it harms nobody else.
func TestUnknownEnd(t *testing.T) {
	t.Parallel()
	for name, lost := range map[string]int{"read by the device": 0, "written by the device": 1} {
		t.Run(name, func(t *testing.T) { inBubble(t, func(t *testing.T) { testUnknownEnd(t, lost) }) })
	}
}

func testUnknownEnd(t *testing.T, lost int) {
	dev, sw := device(t, soft.Options{})
	p := newPool(t, dev, pinned.Options{Budget: 2 * buf, BufferBytes: buf})
	mem, s, rec := newMemory(t, dev, buf), newStream(t, dev), newRecorder()
	sw.Inject(soft.Fault{Func: "hipMemcpyAsync", N: 1, Stall: true})
	sw.Inject(soft.Fault{Func: "hipEventQuery", N: 1, Code: amdhip.ErrUnknown})
	b := acquire(t, p)
	start := b.CopyToDevice
	if lost == 1 {
		start = b.CopyToHost
	}
	must(t, start(s, mem.Ptr(), buf), b.ReleaseAfter(s, rec, 5))
	<-rec.told
	if rec.tags[0] != 5 || !errors.Is(rec.errs[0], amdhip.ErrUnknown) {
		t.Errorf("told %v %v, want the error of copy 5", rec.tags, rec.errs)
	}
	if st := p.Stats(); st.Lost != lost || st.InFlight != 0 {
		t.Errorf("stats %+v, want %d buffers lost, none in flight", st, lost)
	}
	for range 2 - lost {
		acquire(t, p)
	}
	sw.ClearFaults()
	must(t, s.Synchronize(), p.Close())
}
