package loader

import (
	"bytes"
	"context"
	"errors"
	"io"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/internal/read"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// stub is a gguf.Source of zeros behind a header. read is called before every read of what is not the header.
type stub struct {
	header []byte
	size   int64
	read   func(ctx context.Context, first bool)

	ranges, open, most atomic.Int64
	longest            atomic.Int64
}

// newStub returns a model of n tensors of plan.F16, each of so many elements.
func newStub(t *testing.T, n int, elems uint64) (*stub, *gguf.File) {
	local := openModel(t, sparse(t, n, elems))
	p := local.Parts()[0]
	s := &stub{header: bytes.Clone(p.Bytes()[:p.DataOffset]), size: p.Size}
	m, err := gguf.OpenSource(t.Context(), "x.gguf", func(context.Context, string) (gguf.Source, error) { return s, nil })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	s.ranges.Store(0)
	return s, m
}

func (s *stub) Path() string { return "far://x" }
func (s *stub) Size() int64  { return s.size }
func (s *stub) Close() error { return nil }

func (s *stub) Range(ctx context.Context, off, n int64) io.ReadCloser {
	s.ranges.Add(1)
	atomicMax(&s.most, s.open.Add(1))
	atomicMax(&s.longest, n)
	return &stubReader{s: s, ctx: ctx, at: off, end: off + n, first: true}
}

func atomicMax(to *atomic.Int64, n int64) {
	for old := to.Load(); n > old && !to.CompareAndSwap(old, n); old = to.Load() {
	}
}

type stubReader struct {
	s       *stub
	ctx     context.Context
	at, end int64
	first   bool
}

func (r *stubReader) Read(b []byte) (int, error) {
	if r.at == r.end {
		return 0, io.EOF
	}
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	b = b[:min(int64(len(b)), r.end-r.at)]
	clear(b)
	if head := int64(len(r.s.header)); r.at < head {
		copy(b, r.s.header[r.at:])
	} else if r.s.read != nil {
		r.s.read(r.ctx, r.first)
	}
	r.first = false
	r.at += int64(len(b))
	return len(b), nil
}

func (r *stubReader) Close() error { r.s.open.Add(-1); return nil }

// TestConnections: as many ranges are in flight as are asked for, though there are fewer threads, and each is large.
func TestConnections(t *testing.T) {
	t.Parallel()
	dev, _ := openDevice(t, soft.Options{})
	s, m := newStub(t, 8, 8<<20)
	for _, d := range []plan.Policy{plan.Raw, plan.BF16} {
		const connections = 12
		var all sync.WaitGroup
		all.Add(connections)
		var waiting atomic.Int64
		s.read = func(ctx context.Context, first bool) {
			if first && waiting.Add(1) <= connections { // nobody goes on until that many are there
				all.Done()
				done := make(chan struct{})
				go func() { all.Wait(); close(done) }()
				select {
				case <-done:
				case <-ctx.Done():
				}
			}
		}
		s.ranges.Store(0)
		s.most.Store(0)
		w, err := load(t.Context(), m, options{Policy: d, Connections: connections, Threads: 2}, dev)
		if err != nil {
			t.Fatal(err)
		}
		r := w.Report()
		if n := s.most.Load(); n != connections || r.Connections != connections || r.Threads != 2 {
			t.Errorf("%v: %d ranges in flight, %+v", d, n, r)
		}
		if n := s.ranges.Load(); n > 64 || s.longest.Load() > maxRange || s.open.Load() != 0 {
			t.Errorf("%v: %d ranges of up to %d bytes for %d, %d are open still", d, n, s.longest.Load(), r.ReadBytes, s.open.Load())
		}
		mustClose(t, w)
	}
}

// maxRange is the most that one request asks for; see package read.
const maxRange = 8 << 20

// TestRemoteMemory: what a load from a server takes is its staging memory, and a little for each connection.
func TestRemoteMemory(t *testing.T) {
	t.Parallel()
	if !alone(t) {
		return
	}
	dev, _ := openDevice(t, soft.Options{})
	_, m := newStub(t, 8, 8<<20)
	for _, o := range []options{
		{Policy: plan.Raw}, {Policy: plan.F32}, {Policy: plan.F32, Staging: 16 << 20, Connections: 64}, {
			Policy: plan.F32,
			Hash:   true,
		},
	} {
		boundedMemory(t, dev, m, o)
	}
}

// boundedMemory loads m, which must be much larger than what it may take. The test must be alone in its process.
func boundedMemory(t *testing.T, dev *amdhip.Device, m *gguf.File, o options) {
	t.Helper()
	var before, now runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	var most uint64
	calls := 0
	o.Progress = func(int64, int64) {
		if calls++; calls%8 == 0 {
			runtime.ReadMemStats(&now)
			most = max(most, now.HeapAlloc)
		}
	}
	w, err := load(t.Context(), m, o, dev)
	if err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, w)
	r := w.Report()
	budget := o.Staging
	if budget == 0 {
		budget = maxDefaultStaging
	}
	if r.PinnedBytes > budget || r.PinnedBytes == 0 {
		t.Errorf("%+v: %d bytes are pinned, the budget is %d", o, r.PinnedBytes, budget)
	}
	// The device's own memory is not in the heap.
	if limit := before.HeapAlloc + uint64(r.Connections)*(read.PieceBytes+64<<10) + 4<<20; most > limit || most == 0 {
		t.Errorf("%d connections: %d bytes of heap, %d before", r.Connections, most, before.HeapAlloc)
	}
}

// TestSlowIsNotStalled: bytes that come slowly are progress, though no chunk is complete for longer than Stall.
func TestSlowIsNotStalled(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		dev, _ := openDevice(t, soft.Options{})
		s, m := newStub(t, 1, 2<<20)
		var reads atomic.Int64
		s.read = func(context.Context, bool) { reads.Add(1); time.Sleep(100 * time.Millisecond) }
		o := options{Policy: plan.Raw, Threads: 1, Connections: 1, Chunk: 8 << 20, Stall: time.Second}
		w, err := load(t.Context(), m, o, dev)
		if err != nil {
			t.Fatal(err)
		}
		if reads.Load() < 12 {
			t.Errorf("only %d reads: the test does not last longer than Stall", reads.Load())
		}
		mustClose(t, w)
		s.read = func(ctx context.Context, _ bool) { <-ctx.Done() }
		w, err = load(t.Context(), m, options{Policy: plan.Raw, Stall: 300 * time.Millisecond}, dev)
		if w != nil || !errors.Is(err, ErrStalled) || !strings.Contains(err.Error(), "server") {
			t.Errorf("got %v, want %v", err, ErrStalled)
		}
	})
}
