package plan

import (
	"fmt"
	"slices"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// Slice says which part of a tensor a rank has.
type Slice struct {
	Dim    int         // that is divided, in ggml's order: 0 is that of a row's elements
	Ranges [][2]uint64 // of its indices, each from the first to the one behind the last, in ascending order; usually one
	Shape  []uint64    // of the whole tensor, in ggml's order
}

// comb is how the bytes of a slice lie in the file: like the teeth of a comb, the same pattern again at every stride.
// Take a matrix of 4 by 3 bytes. The slice with columns 0 and 1 of each row of 4 has one tooth of 2 bytes, a period of
// 2, and a stride of 4: byte 5 of the slice is at 2*4 + 1 = 9 in the file.
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

// slice makes t the slice of itself that has the given ranges of dimension dim. Ranges of the first dimension must be
// whole blocks.
func (t *Tensor) slice(dim int, ranges [][2]uint64) {
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

// InFile returns where in the part's file byte off of t is, and how many bytes from there on are neighbours in both.
func (t *Tensor) InFile(off int64) (at, n int64) {
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

// Span is the range in the part's file that n bytes from byte off of t on reach over; other bytes may be between them.
func (t *Tensor) Span(off, n int64) (lo, hi int64) {
	lo, run := t.InFile(off)
	if run >= n {
		return lo, lo + n
	}
	last, _ := t.InFile(off + n - 1)
	return lo, last + 1
}

// InWhole is where in the whole tensor's bytes in the file byte off of t is.
func (t *Tensor) InWhole(off int64) int64 {
	if t.whole == nil {
		return off
	}
	at, _ := t.InFile(off)
	return at - t.whole.Offset
}

// Spread returns segs with those whose bytes are not neighbours in the file divided into one segment for each run of
// neighbours. It appends them to buf, or returns segs itself where there is nothing to divide.
func (g *Group) Spread(buf, segs []Segment) []Segment {
	if !slices.ContainsFunc(segs, func(s Segment) bool { return g.Tensors[s.Tensor].comb != nil }) {
		return segs
	}
	for _, s := range segs {
		t := &g.Tensors[s.Tensor]
		if t.comb == nil {
			buf = append(buf, s)
			continue
		}
		src, _ := t.Block()
		dst := s.DstBytes / (s.SrcBytes / src) // of one block; the same as src when the device expands it
		for s.SrcBytes > 0 {
			_, n := t.InFile(s.Src)
			run := s
			run.SrcBytes = int(min(int64(s.SrcBytes), n))
			run.DstBytes = run.SrcBytes / src * dst
			buf = append(buf, run)
			s.Src, s.SrcBytes = s.Src+int64(run.SrcBytes), s.SrcBytes-run.SrcBytes
			s.Dst, s.DstBytes = s.Dst+run.DstBytes, s.DstBytes-run.DstBytes
		}
	}
	return buf
}

// Pieces reports whether t is a slice whose bytes lie in several pieces in the file.
func (t *Tensor) Pieces() bool { return t.comb != nil }

// In returns t with its place in f, a file of the model that t was planned from. Some plans do not know that place:
// those that FromGroups made of what another process said. The error says what f has instead.
func (t *Tensor) In(f *gguf.File) (*Tensor, error) {
	x, ok := f.Tensor(t.Name)
	if !ok {
		return nil, fmt.Errorf("%v has no tensor %q", f, t.Name)
	}
	if x.Type != t.Type {
		return nil, fmt.Errorf("tensor %q of %v has the type %v and not %v", t.Name, f, x.Type, t.Type)
	}
	shape := t.Shape
	if t.Slice != nil {
		shape = t.Slice.Shape
	}
	if !slices.Equal(x.Shape, shape) {
		return nil, fmt.Errorf("tensor %q of %v has the shape %v and not %v", t.Name, f, x.Shape, shape)
	}
	placed := *t
	placed.Tensor, placed.Slice, placed.whole, placed.comb = x, nil, nil, nil
	if t.Slice == nil {
		return &placed, nil
	}
	if err := placed.Restrict(t.Slice.Dim, t.Slice.Ranges); err != nil {
		return nil, fmt.Errorf("tensor %q: %w", t.Name, err)
	}
	if !slices.Equal(placed.Shape, t.Shape) {
		return nil, fmt.Errorf("tensor %q: %v of dimension %d of %v has the shape %v and not %v", t.Name, t.Slice.Ranges,
			t.Slice.Dim, x.Shape, placed.Shape, t.Shape)
	}
	return &placed, nil
}

// Clone returns a copy that shares nothing with s; that of nil is nil.
func (s *Slice) Clone() *Slice {
	if s == nil {
		return nil
	}
	return &Slice{Dim: s.Dim, Ranges: slices.Clone(s.Ranges), Shape: slices.Clone(s.Shape)}
}

// Whole returns the tensor of the file that t is, or is a slice of.
func (t *Tensor) Whole() *gguf.Tensor {
	if t.whole != nil {
		return t.whole
	}
	return t.Tensor
}
