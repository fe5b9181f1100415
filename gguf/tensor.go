package gguf

import (
	"cmp"
	"fmt"
	"math"
	"math/bits"
	"slices"
)

// Tensor says what a tensor is and where its bytes are.
type Tensor struct {
	Name   string
	Type   Type
	Shape  []uint64 // in ggml's order (ne): the first dimension is contiguous in memory; empty for a scalar
	Part   int      // index into File.Parts
	Offset int64    // of the first byte, in that part's file
	Size   int64    // in bytes; -1 if it is not known, see Sized
}

// Sized reports whether the tensor's size is known. It is for all types of ggml, and for those of forks whose layout is
// known, unless the file has no room for a tensor of that size. Nothing can be read of a tensor of unknown size, and
// [File.TypeError] says what it is.
func (t *Tensor) Sized() bool { return t.Size >= 0 }

// Elems returns the number of elements: 1 for a scalar without dimensions, 0 if a dimension is 0.
func (t *Tensor) Elems() uint64 {
	n := uint64(1)
	for _, d := range t.Shape {
		n *= d // Open has checked the product
	}
	return n
}

// end returns the offset behind the tensor's last byte, or its beginning if its size is not known.
func (t *Tensor) end() int64 { return t.Offset + max(t.Size, 0) }

// unknownSize is Tensor.Size where it is not known.
const unknownSize = -1

// checkShape returns the number of elements of a shape, if all are legal: at most maxDims dimensions, and less than
// 2^63 elements. Dimensions of 0 are left out of that count first, so that they do not hide an overflow.
func checkShape(shape []uint64) (elems uint64, err error) {
	if len(shape) > maxDims {
		return 0, fmt.Errorf("%d dimensions; 0 to %d are allowed", len(shape), maxDims)
	}
	elems = 1
	empty := false
	for i, d := range shape {
		if d > math.MaxInt64 {
			return 0, fmt.Errorf("dimension %d is %d", i, d)
		}
		if d == 0 {
			empty = true
			continue
		}
		hi, lo := bits.Mul64(elems, d)
		if hi != 0 || lo > math.MaxInt64 {
			return 0, fmt.Errorf("%v has more than 2^63 elements", shape)
		}
		elems = lo
	}
	if empty {
		return 0, nil
	}
	return elems, nil
}

// shapeSize returns the size of a tensor in bytes, or unknownSize. The error says which rule is broken.
func shapeSize(t Type, shape []uint64) (size int64, err error) {
	elems, err := checkShape(shape)
	if err != nil {
		return 0, err
	}
	row := uint64(1) // elements of a row
	if len(shape) > 0 {
		row = shape[0]
	}
	if !t.Valid() {
		if n, ok := otherTypes[t].size(elems/max(row, 1), row); ok {
			return int64(n), nil
		}
		return unknownSize, nil
	}
	if row%uint64(t.BlockElems()) != 0 {
		return 0, fmt.Errorf("rows of %d elements are not whole blocks of %d, as %v needs", row, t.BlockElems(), t)
	}
	n, ok := t.Bytes(elems)
	if !ok {
		return 0, fmt.Errorf("%v of %v has more than 2^63 bytes", shape, t)
	}
	return int64(n), nil
}

// readTensors decodes the tensor records of part number no, which scan has checked, and appends them to all, which has
// room for them. Each must lie in the file, aligned, must not overlap another, and must have a name that index does not
// have yet. They need not be in order, and there may be gaps between them.
func (p *Part) readTensors(all []Tensor, no int, index *names) ([]Tensor, error) {
	shapes := make([]uint64, 0, p.dims) // one allocation for all shapes
	start := len(all)
	rest := p.header[p.tensorInfo:]
	for range p.infos {
		var t Tensor
		var n int
		var ferr *FormatError
		t, shapes, n, ferr = p.readTensor(rest, shapes)
		t.Part = no
		all = append(all, t) // before index.add, which looks for the name there
		if ferr == nil && !index.add(len(all)-1) {
			ferr = &FormatError{Field: "name", Err: errDuplicateTensor}
		}
		if ferr != nil {
			ferr.Path, ferr.Tensor = p.Path, t.Name
			ferr.Offset += int64(len(p.header) - len(rest))
			return nil, ferr
		}
		rest = rest[n:]
	}
	p.tensors = all[start:len(all):len(all)]
	slices.SortStableFunc(p.tensors, func(a, b Tensor) int {
		return cmp.Or(cmp.Compare(a.Offset, b.Offset), cmp.Compare(a.Size, b.Size))
	})
	for i := 1; i < len(p.tensors); i++ {
		a, b := &p.tensors[i-1], &p.tensors[i]
		if b.Offset < a.end() && !a.Type.Valid() {
			a.Size = unknownSize // the number of the type may be used by yet another program
		}
		if b.Offset < a.end() {
			return nil, &FormatError{Path: p.Path, Offset: b.Offset, Tensor: b.Name, Field: "offset", Err: fmt.Errorf(
				"its data overlaps that of tensor %q, which lies at %#x to %#x", shorten(a.Name), a.Offset, a.end())}
		}
	}
	return all, nil
}

// readTensor decodes the record at the beginning of rec, and returns the record's length n. The shape is appended to
// shapes. The offset of the error is relative to the record.
func (p *Part) readTensor(rec string, shapes []uint64) (t Tensor, all []uint64, n int, ferr *FormatError) {
	nameEnd := 8 + int(le(rec[:8]))
	dims := int(le(rec[nameEnd : nameEnd+4]))
	dimsEnd := nameEnd + 4 + 8*dims
	n = dimsEnd + 4 + 8 // the type and the offset
	t = Tensor{Name: rec[8:nameEnd], Type: Type(le(rec[dimsEnd : dimsEnd+4]))}
	first := len(shapes)
	for i := range dims {
		shapes = append(shapes, le(rec[nameEnd+4+8*i:][:8]))
	}
	t.Shape = shapes[first:len(shapes):len(shapes)]
	var err error
	if t.Size, err = shapeSize(t.Type, t.Shape); err != nil {
		return t, shapes, n, &FormatError{Offset: int64(nameEnd), Field: "dims", Err: err}
	}
	at := le(rec[dimsEnd+4 : n])
	t.Offset, err = p.place(at, max(t.Size, 0))
	if err != nil && !t.Type.Valid() {
		t.Size = unknownSize // as what is known of the type may be wrong
		t.Offset, err = p.place(at, 0)
	}
	if err != nil {
		return t, shapes, n, &FormatError{Offset: int64(dimsEnd + 4), Field: "offset", Err: err}
	}
	return t, shapes, n, nil
}

// place turns the offset of size bytes in the data section into one in the file.
func (p *Part) place(offset uint64, size int64) (int64, error) {
	room := uint64(p.Size - p.DataOffset)
	switch {
	case offset&uint64(p.Alignment-1) != 0:
		return 0, fmt.Errorf("%#x is not a multiple of the alignment, %d", offset, p.Alignment)
	case offset > room || uint64(size) > room-offset:
		return 0, fmt.Errorf("%w: %d bytes at %#x of a data section of %d bytes", ErrTruncated, size, offset, room)
	}
	return p.DataOffset + int64(offset), nil
}
