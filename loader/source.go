package loader

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

const (
	// windowBytes is the unit in which a file's pages are asked for, examined and let go: large enough that the system calls
	// do not count, small enough that the few windows in use at a time do not either.
	windowBytes = 8 << 20
	// directAlign is the alignment that direct reads need of offset, length and memory: the page size of common file systems.
	directAlign = 4096
	// maxGap is how many bytes that nobody wants are read along to save a read.
	maxGap = 64 << 10
)

// source gives the bytes of the model's file to the workers.
type source struct {
	model *gguf.Model
	plan  *Plan
	io    IO
	parts []partSource
	busy  chan struct{} // of a remote model: has room for those who may work at the same time on what has come

	mapped, direct, remote atomic.Int64 // bytes that came each way
	fetched                atomic.Int64 // by direct reads, with what nobody wants and lies between
}

// partSource is one part of the model.
type partSource struct {
	part    *gguf.Part
	bytes   []byte      // the mapping
	direct  *os.File    // for direct reads; nil: there are none, or they are not wanted
	remote  gguf.Source // instead of all that; else nil
	windows []window
}

// window is windowBytes of a part.
type window struct {
	left atomic.Int32 // segments in it that are still to be read
	how  atomic.Uint32
}

// States of window.how.
const (
	howUnknown = iota
	howMapped
	howDirect
	howRemote // of no window: remote parts have none
)

// newSource prepares reading the segments of chunks. The caller must close it.
func newSource(p *Plan, chunks []chunk) (*source, error) {
	s := &source{model: p.model, plan: p, io: p.opts.IO}
	if p.model.Remote() {
		s.busy = make(chan struct{}, p.opts.Threads)
	}
	for _, part := range p.model.Parts() {
		ps := partSource{part: part, bytes: part.Bytes(), remote: part.Source()}
		ps.windows = make([]window, (len(ps.bytes)+windowBytes-1)/windowBytes)
		if s.io != IOMapped && ps.remote == nil {
			f, err := openDirect(part.File())
			if err != nil {
				s.close()
				return nil, fmt.Errorf("loader: %s for direct reads: %w", part.Path, err)
			}
			ps.direct = f
		}
		s.parts = append(s.parts, ps)
	}
	for i := range chunks {
		for j := range chunks[i].segs {
			ps, lo, hi := s.extent(&chunks[i].segs[j])
			for w := lo / windowBytes; w <= (hi-1)/windowBytes && ps.remote == nil; w++ {
				ps.windows[w].left.Add(1)
			}
		}
	}
	return s, nil
}

func (s *source) close() {
	for i := range s.parts {
		if f := s.parts[i].direct; f != nil {
			f.Close()
		}
	}
}

// extent is the part and the byte range in it that a segment covers. A segment of a slice may have only some of these bytes.
func (s *source) extent(seg *segment) (ps *partSource, lo, hi int64) {
	t := &s.plan.Tensors[seg.tensor]
	lo, hi = t.span(seg.src, int64(seg.srcBytes))
	return &s.parts[t.Part], lo, hi
}

// how says in which way the extent beginning at lo is to be read. It decides once for every window, when the first worker
// comes to it.
func (s *source) how(ps *partSource, lo int64) uint32 {
	if ps.remote != nil {
		return howRemote
	}
	w := lo / windowBytes
	win := &ps.windows[w]
	how := win.how.Load()
	if how != howUnknown {
		return how
	}
	how = howDirect
	switch s.io {
	case IOMapped:
		how = howMapped
	case IOAuto:
		// A few pages that are not there are cheaper to wait for than all the others to read again.
		if residentShare(ps.window(w)) >= 0.9 {
			how = howMapped
		}
	}
	win.how.Store(how)
	return how
}

// window is the mapping of window number w.
func (ps *partSource) window(w int64) []byte {
	return ps.bytes[w*windowBytes : min((w+1)*windowBytes, int64(len(ps.bytes)))]
}

// consumed lets go of the windows of the mapping that no segment needs any more, so that the mapping's share of resident
// memory stays small.
func (s *source) consumed(seg *segment) {
	ps, lo, hi := s.extent(seg)
	for w := lo / windowBytes; w <= (hi-1)/windowBytes && ps.remote == nil; w++ {
		if ps.windows[w].left.Add(-1) == 0 && ps.windows[w].how.Load() != howDirect {
			letGo(ps.window(w))
		}
	}
}

// reader is one worker's way into a source. It is not safe for concurrent use.
type reader struct {
	src     *source
	fill    *filler
	track   string // in the trace
	scratch []byte // aligned, for direct reads, and for remote ones that are converted; made when first needed
	segs    []segment
	runs    []segment // scratch of read
	mapped  func() error
	stream  stream  // of a remote part
	ahead   []chunk // what the worker is going to read after this chunk
}

// newReader returns a reader that hands each segment's bytes to fill.
func newReader(src *source, fill *filler, track string) *reader {
	r := &reader{src: src, fill: fill, track: track}
	r.mapped = r.readMapped // made once: a method value is an allocation
	return r
}

// read fills all, which are in file order, one by one.
func (r *reader) read(ctx context.Context, all []segment) error {
	segs := r.src.plan.spread(r.runs[:0], all)
	if r.src.plan.combed {
		r.runs = segs
	}
	for len(segs) > 0 {
		ps, lo, _ := r.src.extent(&segs[0])
		var err error
		switch r.src.how(ps, lo) {
		case howMapped:
			r.segs = segs
			err = r.src.model.Guard(r.mapped)
		case howDirect:
			r.segs = r.run(segs)
			err = r.readDirect(ps, lo)
		case howRemote:
			r.segs = segs[:1]
			err = r.readRemote(ctx, segs)
		}
		if err != nil {
			return r.failed(err)
		}
		segs = segs[len(r.segs):]
	}
	for i := range all {
		r.src.consumed(&all[i])
	}
	return r.fill.flush()
}

// failed adds the tensor to an error that does not name one.
func (r *reader) failed(err error) error {
	if _, ok := errors.AsType[*TensorError](err); ok {
		return err
	}
	s := &r.segs[0]
	last := &r.segs[len(r.segs)-1]
	_, lo, _ := r.src.extent(s)
	_, _, hi := r.src.extent(last)
	return &TensorError{Tensor: r.src.plan.Tensors[s.tensor].Name, Op: "read", Offset: s.src, Bytes: int(hi - lo), Err: err}
}

// readMapped fills r.segs from the mapping, under the model's Guard.
func (r *reader) readMapped() error {
	var n int64
	for i := range r.segs {
		ps, lo, hi := r.src.extent(&r.segs[i])
		if err := r.fill.from(&r.segs[i], ps.bytes[lo:hi]); err != nil {
			return err
		}
		n += hi - lo
	}
	r.src.mapped.Add(n)
	return nil
}

// run is the longest beginning of segs that one direct read can fetch.
func (r *reader) run(segs []segment) []segment {
	first, lo, end := r.src.extent(&segs[0])
	n := 1
	for ; n < len(segs); n++ {
		next, ok := r.src.follows(&segs[n], first, lo, end, windowBytes)
		if !ok {
			break
		}
		end = next
	}
	return segs[:n]
}

// follows reports whether one read of at most so many bytes, from lo in ps on and up to end so far, is to fetch seg, too, and
// where it ends then.
func (s *source) follows(seg *segment, ps *partSource, lo, end, most int64) (next int64, ok bool) {
	own, l, h := s.extent(seg)
	return h, own == ps && l >= end && l-end <= maxGap && h-lo <= most
}

// readDirect reads the extent of r.segs into the scratch buffer and fills them from there.
func (r *reader) readDirect(ps *partSource, lo int64) error {
	_, _, hi := r.src.extent(&r.segs[len(r.segs)-1])
	start := lo &^ (directAlign - 1)
	need := int(hi - start)
	aligned := (need + directAlign - 1) &^ (directAlign - 1)
	if len(r.scratch) < aligned {
		r.scratch = alignedBytes(aligned + directAlign)
	}
	buf := r.scratch[:aligned]
	f := ps.direct
	if r.src.io == IOAuto && r.src.plan.Tensors[r.segs[0].tensor].comb != nil {
		f = ps.part.File() // other ranks of this host want what lies between, and find it in the page cache then
	}
	began := time.Now()
	if err := r.src.readFull(ps, f, buf, start, need); err != nil {
		return err
	}
	if t := r.src.plan.opts.Trace; t != nil {
		t.add(r.track, "read", began, time.Now(), r.src.plan.Tensors[r.segs[0].tensor].Name, need)
	}
	var n int64
	for i := range r.segs {
		_, l, h := r.src.extent(&r.segs[i])
		if err := r.fill.from(&r.segs[i], buf[l-start:h-start]); err != nil {
			return err
		}
		n += h - l
	}
	r.src.direct.Add(n)
	r.src.fetched.Add(int64(need))
	return nil
}

// readFull reads at least need bytes at off from f into buf; for direct reads both are aligned.
func (s *source) readFull(ps *partSource, f *os.File, buf []byte, off int64, need int) error {
	for got := 0; got < need; {
		if got%directAlign != 0 {
			f = ps.part.File() // behind a short read the rest is not aligned
		}
		n, err := s.plan.opts.readAt(f, buf[got:], off+int64(got))
		if got += n; got >= need {
			break
		}
		if errors.Is(err, io.EOF) {
			return &gguf.FormatError{
				Path: ps.part.Path, Offset: off + int64(got), Field: "tensor data",
				Err: fmt.Errorf("%w: the file has become shorter", gguf.ErrTruncated),
			}
		}
		if err != nil {
			return fmt.Errorf("at offset %#x: %w", off+int64(got), err)
		}
	}
	return nil
}

// alignedBytes returns n bytes on a page boundary, as direct reads need.
func alignedBytes(n int) []byte {
	b := make([]byte, n+directAlign)
	skip := -uintptr(unsafe.Pointer(unsafe.SliceData(b))) & (directAlign - 1)
	return b[skip : skip+uintptr(n) : skip+uintptr(n)]
}
