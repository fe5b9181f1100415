package loader

import (
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/gguf2gpu/gguf2gpu/kernels"
	"github.com/gguf2gpu/gguf2gpu/loader/internal/read"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
	"github.com/gguf2gpu/gguf2gpu/pinned"
)

// worker fills buffers.
type worker struct {
	p       *pipeline
	track   string
	read    *read.Reader // nil: the plan is loaded from an Image
	fill    filler
	buf     *pinned.Buffer // when the transport is staged: the one being filled
	shift   int            // where in buf the chunk begins
	flight  *flight        // when the transport is imaged: for the chunk that is to be copied
	joined  []byte         // scratch of fillBuffer
	filling atomic.Int64   // chunk that is being read, -1: none
	after   int            // of a run: the chunk that is next
	end     int            // of a run
}

func newWorker(p *pipeline, i int) *worker {
	wk := &worker{p: p, track: fmt.Sprintf("%sworker %d", p.label, i)}
	wk.fill = filler{group: p.part.group, kernels: p.loader.kernelsOfCPU, around: p.transport.uncached(), round: p.round}
	wk.fill.image = p.request.Keep
	wk.fill.inspect = newInspector(p.part.group, p.request, p.part.hashes)
	if p.src != nil {
		wk.read = p.src.Reader(&wk.fill, fmt.Sprintf("%sreader %d", p.label, i))
	}
	wk.filling.Store(-1)
	return wk
}

// run works until there is no chunk left or the load's context ends.
func (wk *worker) run() {
	p := wk.p
	if wk.read != nil {
		defer wk.read.Close()
	}
	for {
		t0 := wk.now()
		if err := p.transport.acquire(wk); err != nil {
			p.cancel(err) // without effect when it is the context's own cause
			return
		}
		i, ahead := wk.take()
		if i >= len(p.chunks) {
			p.transport.release(wk)
			return
		}
		c := &p.chunks[i]
		t1 := wk.now()
		wk.filling.Store(int64(i))
		err := p.transport.fill(wk, c, ahead)
		wk.filling.Store(-1)
		if err != nil {
			p.transport.release(wk)
			p.cancel(readError(err))
			return
		}
		t2 := wk.now()
		if err := p.transport.submit(wk, i, c); err != nil {
			p.cancel(p.chunkError(c, err))
			return
		}
		if tr := p.request.Trace; tr != nil {
			tr.Add(wk.track, "wait", t0, t1, p.name(c), c.Bytes)
			tr.Add(wk.track, p.stageName(c), t1, t2, p.name(c), c.Bytes)
			tr.Add(wk.track, "issue", t2, time.Now(), p.name(c), c.Bytes)
		}
	}
}

// fillBuffer puts into buf what the devices get for c. ahead is the chunks that the worker reads next.
func (wk *worker) fillBuffer(buf []byte, c *plan.Chunk, ahead []plan.Chunk) error {
	wk.fill.ends = wk.p.ctx.Done()
	wk.fill.begin(buf, c.Expand, wk.p.round.of(int(wk.filling.Load())))
	if wk.read != nil {
		err := wk.read.Read(wk.p.ctx, c.Segs, ahead)
		if err == nil {
			wk.fill.end(c)
		}
		return err
	}
	for i := range c.Segs {
		s := &c.Segs[i]
		src := wk.p.plan.image.segment(&wk.p.part.group.Tensors[s.Tensor], s, &wk.joined)
		if err := wk.fill.Put(s, src); err != nil {
			return err
		}
	}
	return wk.fill.Flush()
}

// now is the time when a trace wants it.
func (wk *worker) now() (t time.Time) {
	if wk.p.request.Trace != nil {
		t = time.Now()
	}
	return t
}

// take returns the number of the chunk that the worker is to read next, and the chunks that it will read after that.
// There is no chunk of that number when all are taken, or others have their turn.
func (wk *worker) take() (i int, ahead []plan.Chunk) {
	p := wk.p
	if p.runs == nil {
		return int(p.next.Add(1)) - 1, nil
	}
	if wk.after == wk.end { // begin another run
		if !p.hasTurn() {
			return len(p.chunks), nil
		}
		i := int(p.next.Add(1)) - 1
		if i >= len(p.runs) {
			return len(p.chunks), nil
		}
		wk.after, wk.end = p.runs[i], len(p.chunks)
		if i+1 < len(p.runs) {
			wk.end = p.runs[i+1]
		}
	}
	wk.after++
	return wk.after - 1, p.chunks[wk.after:wk.end]
}

// filler turns the file's bytes of a chunk's segments into what the devices get. It is the sink of its worker's reader.
type filler struct {
	group   *plan.Group
	kernels *kernels.Kernels
	inspect *inspector
	image   *Image          // to be filled on the way; nil: none is
	ends    <-chan struct{} // closed when the load is to end
	around  bool            // write around the caches
	round   *round          // nil: nothing is proved
	slots   []segmentSums   // of the segments of the chunk
	bounce  []byte          // what convert needs
	expand  bool            // the devices convert: blocks are copied as they are
	buf     []byte
	filled  int // up to here
	short   shortRuns
}

// begin starts a new chunk, which buf is to hold. slots are those of its segments if the load is proved.
func (f *filler) begin(buf []byte, expand bool, slots []segmentSums) {
	f.buf, f.filled, f.expand, f.slots = buf, 0, expand, slots
	f.short.bytes = f.short.bytes[:0]
}

// end sums up what was too scattered to be summed up on its way.
func (f *filler) end(c *plan.Chunk) {
	for i := range f.slots {
		if s := &c.Segs[i]; f.scattered(&f.group.Tensors[s.Tensor]) {
			f.round.write(f.slots[i].travel, f.slots[i].travel.at, f.buf[s.Dst:s.Dst+s.DstBytes])
		}
	}
}

// scattered reports whether the bytes of t come in runs that may be a few bytes long.
func (f *filler) scattered(t *plan.Tensor) bool { return t.Pieces() && f.asIs(t) }

// proves returns the slots of a tensor whose bytes are to be summed up on their way; nil: they are not. Those of an
// Image that stay as they are have been summed up when it was filled.
func (f *filler) proves(tensor int) *segmentSums {
	t := &f.group.Tensors[tensor]
	if len(f.slots) == 0 || f.scattered(t) || f.round.image != nil && f.asIs(t) {
		return nil
	}
	i := slices.IndexFunc(f.slots, func(x segmentSums) bool { return x.tensor == tensor })
	return &f.slots[i]
}

// place returns where a segment goes, and clears the padding before it. Segments are to be placed in order.
func (f *filler) place(s *plan.Segment) []byte {
	clear(f.buf[f.filled:s.Dst])
	f.filled = s.Dst + s.DstBytes
	return f.buf[s.Dst:f.filled]
}

// asIs reports whether the devices get the bytes of t as they are in the file.
func (f *filler) asIs(t *plan.Tensor) bool { return f.expand || t.Target == t.Type }

// perPiece is how many blocks of t are worked on in one go. in and out are the bytes of a block in the file and here.
func perPiece(in, out int) int { return read.PieceBytes / max(in, out) }

// Put puts a segment in its place, src being its bytes in the file.
func (f *filler) Put(s *plan.Segment, src []byte) error {
	t := &f.group.Tensors[s.Tensor]
	in, out := t.Block()
	most := perPiece(in, out)
	if t.Pieces() && !f.asIs(t) && len(src) <= most*in/2 {
		return f.collect(s, src, most*in)
	}
	if err := f.Flush(); err != nil {
		return err
	}
	return f.PutPart(s, s.Src, f.place(s), src)
}

// AsIs reports whether the devices get a segment's bytes as they are in the file.
func (f *filler) AsIs(s *plan.Segment) bool { return f.asIs(&f.group.Tensors[s.Tensor]) }

// Room returns where a segment goes.
func (f *filler) Room(s *plan.Segment) ([]byte, error) {
	err := f.Flush()
	return f.place(s), err
}

// Looks reports whether somebody wants to see bytes that have been read to their places.
func (f *filler) Looks() bool { return f.inspect != nil || f.round != nil || f.image != nil }

// PutPart turns src, which begins at byte at of the segment's tensor, into dst.
func (f *filler) PutPart(s *plan.Segment, at int64, dst, src []byte) error {
	t := &f.group.Tensors[s.Tensor]
	in, out := t.Block()
	if f.expand {
		out = in
	}
	most := perPiece(in, out)
	for len(src) > 0 {
		n := min(len(src)/in, most)
		if err := f.piece(s.Tensor, at, dst[:n*out], src[:n*in]); err != nil {
			return err
		}
		dst, src, at = dst[n*out:], src[n*in:], at+int64(n*in)
	}
	return nil
}

// piece turns src, which begins at byte at of a tensor, into dst.
func (f *filler) piece(tensor int, at int64, dst, src []byte) error {
	t := &f.group.Tensors[tensor]
	sums := f.proves(tensor)
	if f.asIs(t) {
		switch inPlace := len(src) == 0 || &dst[0] == &src[0]; { // it has been read there
		case sums == nil && !inPlace:
			kernels.Copy(dst, src)
		case sums != nil && inPlace:
			f.round.write(sums.travel, at, dst)
		case sums != nil:
			f.round.copy(sums.travel, at, dst, src)
		}
		f.image.keep(t, at, dst, f.ends)
		return f.inspect.see(tensor, at, dst)
	}
	f.image.keep(t, at, src, f.ends)
	if err := f.inspect.see(tensor, at, src); err != nil {
		return err
	}
	if err := f.convert(t, at, dst, src, sums); err != nil {
		return &TensorError{Tensor: t.Name, Op: "dequantize", Offset: at, Bytes: len(src), Err: err}
	}
	if sums != nil && sums.source.slots > 0 {
		f.round.write(sums.source, at, src)
	}
	return nil
}

// bounceBytes is how much is converted at a time, where it is summed up and then written around the caches: so much
// stays in those that a core has for itself.
const bounceBytes = 64 << 10

// convert converts src, which begins at byte at of t, to dst, and sums up what becomes of it if it has slots.
func (f *filler) convert(t *plan.Tensor, at int64, dst, src []byte, sums *segmentSums) error {
	if sums == nil {
		if f.around {
			return f.kernels.DequantizeNT(dst, t.Target, src, t.Type)
		}
		return f.kernels.Dequantize(dst, t.Target, src, t.Type)
	}
	in, out := t.Block()
	to := at / int64(in) * int64(out)
	if !f.around {
		err := f.kernels.Dequantize(dst, t.Target, src, t.Type)
		f.round.write(sums.travel, to, dst)
		return err
	}
	if f.bounce == nil {
		f.bounce = read.AlignedBytes(bounceBytes)
	}
	for len(src) > 0 {
		n := min(len(src)/in, max(1, bounceBytes/out))
		piece := f.bounce[:n*out]
		if err := f.kernels.Dequantize(piece, t.Target, src[:n*in], t.Type); err != nil {
			return err
		}
		f.round.copy(sums.travel, to, dst[:n*out], piece)
		dst, src, to = dst[n*out:], src[n*in:], to+int64(n*out)
	}
	return nil
}

// shortRuns is bytes of a slice that lie in short runs in the file. They are put together before they are converted,
// since a kernel is not worth calling for each run.
type shortRuns struct {
	tensor int
	at     int64 // of the first byte, in the slice
	dst    int   // in the chunk
	bytes  []byte
}

// collect keeps the bytes of a segment, and converts those that were kept before if they do not go on here or become
// more than most bytes.
func (f *filler) collect(s *plan.Segment, src []byte, most int) error {
	r := &f.short
	if len(r.bytes)+len(src) > most || r.tensor != s.Tensor || r.at+int64(len(r.bytes)) != s.Src {
		if err := f.Flush(); err != nil {
			return err
		}
	}
	f.place(s)
	if len(r.bytes) == 0 {
		r.tensor, r.at, r.dst = s.Tensor, s.Src, s.Dst
	}
	r.bytes = append(r.bytes, src...)
	return nil
}

// Flush converts what has been kept.
func (f *filler) Flush() error {
	r := &f.short
	if len(r.bytes) == 0 {
		return nil
	}
	src := r.bytes
	r.bytes = r.bytes[:0]
	return f.piece(r.tensor, r.at, f.buf[r.dst:f.filled], src)
}
