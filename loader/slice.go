package loader

import (
	"context"
	"errors"
	"slices"
)

// Slice says which part of a tensor a rank has.
type Slice struct {
	Dim    int         // that is divided, in ggml's order: 0 is that of a row's elements
	Ranges [][2]uint64 // of its indices, each from the first to the one behind the last, in ascending order; usually one
	Shape  []uint64    // of the whole tensor, in ggml's order
}

// comb is how the bytes of a slice lie in the file: teeth, which repeat at every stride.
type comb struct {
	stride int64 // in the file
	period int64 // in the slice: the teeth of one stride together
	teeth  []tooth
}

// tooth is a run of bytes that are neighbours in the slice as well as in the file.
type tooth struct {
	at   int64 // in the period
	file int64 // in the stride, counted from the slice's first byte
	n    int64
}

// cut makes t the slice of itself that has the given ranges of dimension dim. Ranges of the first dimension must be whole blocks.
func (t *PlannedTensor) cut(dim int, ranges [][2]uint64) {
	whole := t.Tensor
	if len(ranges) == 1 && ranges[0] == [2]uint64{0, whole.Shape[dim]} {
		return
	}
	unit := int64(1) // indices of the dimension per step
	step := int64(whole.Type.BlockBytes())
	if dim == 0 {
		unit = int64(whole.Type.BlockElems())
	} else {
		step *= int64(whole.Shape[0] / uint64(whole.Type.BlockElems()))
		for _, n := range whole.Shape[1:dim] {
			step *= int64(n)
		}
	}
	part := *whole
	part.Shape = slices.Clone(whole.Shape)
	part.Shape[dim] = 0
	c := comb{stride: int64(whole.Shape[dim]) / unit * step}
	first := int64(ranges[0][0]) / unit * step
	for _, r := range ranges {
		part.Shape[dim] += r[1] - r[0]
		c.teeth = append(c.teeth, tooth{at: c.period, file: int64(r[0])/unit*step - first, n: int64(r[1]-r[0]) / unit * step})
		c.period += int64(r[1]-r[0]) / unit * step
	}
	part.Offset += first
	part.Size = whole.Size / c.stride * c.period
	t.Bytes, _ = t.Target.Bytes(part.Elems()) // whole blocks, and a part of what fits
	t.Tensor, t.whole = &part, whole
	t.Slice = &Slice{Dim: dim, Ranges: ranges, Shape: whole.Shape}
	if len(c.teeth) > 1 || c.period < part.Size {
		t.comb = &c
	}
}

// inFile returns where in the part's file byte off of t is, and how many bytes from there on are neighbours in both.
func (t *PlannedTensor) inFile(off int64) (at, n int64) {
	if t.comb == nil {
		return t.Offset + off, t.Size - off
	}
	row, off := off/t.comb.period, off%t.comb.period
	i := len(t.comb.teeth) - 1
	for t.comb.teeth[i].at > off {
		i--
	}
	c := &t.comb.teeth[i]
	off -= c.at
	return t.Offset + row*t.comb.stride + c.file + off, c.n - off
}

// span is the range in the part's file that n bytes from byte off of t on reach over; other bytes may be between them.
func (t *PlannedTensor) span(off, n int64) (lo, hi int64) {
	lo, run := t.inFile(off)
	if run >= n {
		return lo, lo + n
	}
	last, _ := t.inFile(off + n - 1)
	return lo, last + 1
}

// inWhole is where in the whole tensor's bytes in the file byte off of t is.
func (t *PlannedTensor) inWhole(off int64) int64 {
	if t.whole == nil {
		return off
	}
	at, _ := t.inFile(off)
	return at - t.whole.Offset
}

// spread appends segs to to, with those whose bytes are not neighbours in the file in as many segments as there are runs. Nothing is
// appended, and segs returned, where there are none.
func (p *Plan) spread(to, segs []segment) []segment {
	if !p.combed {
		return segs
	}
	for _, s := range segs {
		t := &p.Tensors[s.tensor]
		if t.comb == nil {
			to = append(to, s)
			continue
		}
		out := s.dstBytes / (s.srcBytes / t.Type.BlockBytes()) // per block
		for s.srcBytes > 0 {
			_, n := t.inFile(s.src)
			run := s
			run.srcBytes = int(min(int64(s.srcBytes), n))
			run.dstBytes = run.srcBytes / t.Type.BlockBytes() * out
			to = append(to, run)
			s.src, s.srcBytes = s.src+int64(run.srcBytes), s.srcBytes-run.srcBytes
			s.dst, s.dstBytes = s.dst+run.dstBytes, s.dstBytes-run.dstBytes
		}
	}
	return to
}

// data returns n bytes of tensor t from byte off on, as they are in the file: a slice of the mapping, to be used inside
// [gguf.Model.Guard], where they are neighbours there, else a copy in buf, which grows as needed.
func (p *Plan) data(ctx context.Context, buf *[]byte, t *PlannedTensor, off int64, n int) (_ []byte, err error) {
	if p.model.Remote() {
		*buf, err = p.fetch(ctx, (*buf)[:0], t, off, n)
		return *buf, err
	}
	file := p.model.Parts()[t.Part].Bytes()
	if file == nil {
		return nil, errors.New("the file is closed")
	}
	if at, run := t.inFile(off); run >= int64(n) {
		return file[at : at+int64(n)], nil
	}
	b := (*buf)[:0]
	err = p.model.Guard(func() error {
		for len(b) < n {
			at, run := t.inFile(off + int64(len(b)))
			b = append(b, file[at:at+min(run, int64(n-len(b)))]...)
		}
		return nil
	})
	*buf = b
	return b, err
}

// letGo lets go of the mapping's pages that n bytes from byte off of t on reach over.
func (p *Plan) letGo(t *PlannedTensor, off int64, n int) {
	if p.model.Remote() {
		return
	}
	lo, hi := t.span(off, int64(n))
	letGo(p.model.Parts()[t.Part].Bytes()[lo:hi])
}

// shortRuns are runs of a slice that are collected before they are converted: a kernel is not worth calling for each.
type shortRuns struct {
	tensor int
	at     int64 // in the slice
	dst    int   // in the chunk
	bytes  []byte
}

// collect adds a segment to those that are collected, at most so many bytes, and is from for it.
func (f *filler) collect(s *segment, src []byte, most int) error {
	r := &f.short
	if len(r.bytes)+len(src) > most || r.tensor != s.tensor || r.at+int64(len(r.bytes)) != s.src {
		if err := f.flush(); err != nil {
			return err
		}
	}
	f.place(s)
	if len(r.bytes) == 0 {
		r.tensor, r.at, r.dst = s.tensor, s.src, s.dst
	}
	r.bytes = append(r.bytes, src...)
	return nil
}

// flush converts what has been collected.
func (f *filler) flush() error {
	r := &f.short
	if len(r.bytes) == 0 {
		return nil
	}
	src := r.bytes
	r.bytes = r.bytes[:0]
	return f.piece(r.tensor, r.at, f.buf[r.dst:f.end], src)
}
