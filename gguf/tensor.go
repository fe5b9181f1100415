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
	Shape  []uint64 // in ggml's order (ne): the first dimension is contiguous in memory
	Part   int      // index into Model.Parts
	Offset int64    // of its bytes in that part's file
	Size   int64    // in bytes
}

// Elems returns the number of elements.
func (t *Tensor) Elems() uint64 {
	n := uint64(1)
	for _, d := range t.Shape {
		n *= d // Open has checked it
	}
	return n
}

// shapeSize returns the bytes of a tensor. The error says which rule is broken, field by which part of the tensor's record.
func shapeSize(t Type, shape []uint64) (size int64, field string, err error) {
	if len(shape) == 0 || len(shape) > maxDims {
		return 0, "dims", fmt.Errorf("%d dimensions; 1 to %d are allowed", len(shape), maxDims)
	}
	if !t.Valid() {
		return 0, "type", fmt.Errorf("%w: tensor %v is unknown, or retired from ggml", ErrUnsupported, t)
	}
	elems := uint64(1)
	for i, d := range shape {
		// ggml's writer stores an empty tensor as [0]. A zero among other dimensions would hide any overflow.
		if d > math.MaxInt64 || d == 0 && len(shape) > 1 {
			return 0, "dims", fmt.Errorf("dimension %d is %d", i, d)
		}
		hi, lo := bits.Mul64(elems, d)
		if hi != 0 || lo > math.MaxInt64 {
			return 0, "dims", fmt.Errorf("%v has more than 2^63 elements", shape)
		}
		elems = lo
	}
	if shape[0]%uint64(t.BlockElems()) != 0 {
		return 0, "dims", fmt.Errorf(
			"rows of %d elements are not whole blocks of %d, as %v needs", shape[0], t.BlockElems(), t)
	}
	n, ok := t.Bytes(elems)
	if !ok {
		return 0, "dims", fmt.Errorf("%v of %v has more than 2^63 bytes", shape, t)
	}
	return int64(n), "", nil
}

// readTensors decodes the tensor records of part number no, which scan has checked, appends them to all, and sees that they
// lie in the file, aligned and apart, and that no name is in index already. They need not be in order, and there may be gaps.
func (p *Part) readTensors(all []Tensor, no int, index *names) ([]Tensor, error) {
	dims := 0
	for i := range p.records() {
		rec := p.header[p.infos[i]:p.infos[i+1]]
		dims += int(le(rec[8+le(rec[:8]):][:4]))
	}
	shapes := make([]uint64, 0, dims) // one allocation for all
	start := len(all)
	for i := range p.records() {
		var t Tensor
		var ferr *FormatError
		t, shapes, ferr = p.readTensor(p.header[p.infos[i]:p.infos[i+1]], shapes)
		t.Part = no
		all = append(all, t) // has room: index asks for the name there
		if ferr == nil && !index.add(len(all)-1) {
			ferr = &FormatError{Field: "name", Err: errDuplicateTensor}
		}
		if ferr != nil {
			ferr.Path, ferr.Tensor = p.Path, t.Name
			ferr.Offset += int64(p.infos[i])
			return nil, ferr
		}
	}
	p.tensors = all[start:len(all):len(all)]
	slices.SortStableFunc(p.tensors, func(a, b Tensor) int {
		return cmp.Or(cmp.Compare(a.Offset, b.Offset), cmp.Compare(a.Size, b.Size))
	})
	for i := 1; i < len(p.tensors); i++ {
		if a, b := &p.tensors[i-1], &p.tensors[i]; b.Offset < a.Offset+a.Size {
			return nil, &FormatError{Path: p.Path, Offset: b.Offset, Tensor: b.Name, Field: "offset", Err: fmt.Errorf(
				"its data overlaps that of tensor %q, which lies at %#x to %#x", a.Name, a.Offset, a.Offset+a.Size)}
		}
	}
	return all, nil
}

// readTensor decodes one record; its shape is appended to shapes. The offset of its error is relative to the record.
func (p *Part) readTensor(rec string, shapes []uint64) (Tensor, []uint64, *FormatError) {
	nameEnd := 8 + int(le(rec[:8]))
	dims := int(le(rec[nameEnd : nameEnd+4]))
	dimsEnd := nameEnd + 4 + 8*dims
	t := Tensor{Name: rec[8:nameEnd], Type: Type(le(rec[dimsEnd : dimsEnd+4]))}
	first := len(shapes)
	for i := range dims {
		shapes = append(shapes, le(rec[nameEnd+4+8*i:][:8]))
	}
	t.Shape = shapes[first:len(shapes):len(shapes)]
	var field string
	var err error
	if t.Size, field, err = shapeSize(t.Type, t.Shape); err != nil {
		at := nameEnd
		if field == "type" {
			at = dimsEnd
		}
		return t, shapes, &FormatError{Offset: int64(at), Field: field, Err: err}
	}
	if t.Offset, err = p.place(le(rec[dimsEnd+4:]), t.Size); err != nil {
		return t, shapes, &FormatError{Offset: int64(dimsEnd + 4), Field: "offset", Err: err}
	}
	return t, shapes, nil
}

// place turns a tensor's offset in the data section into one in the file.
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
