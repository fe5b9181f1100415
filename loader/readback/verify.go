package readback

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/internal/read"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// ErrMismatch is matched by the error of Verify when device memory is not what it should be.
var ErrMismatch = errors.New("device memory differs from the file")

// MismatchError says where device memory differs from the reference.
type MismatchError struct {
	Tensor string
	Type   gguf.Type // element type on the device
	Offset int64     // of the first differing element (or byte, of a quantized type), in the tensor's bytes on the device
	Got    []byte    // what the device holds there: one element, or the differing byte of a block and those after it
	Want   []byte
}

// Error names the tensor, the byte offset and both values.
func (e *MismatchError) Error() string {
	return fmt.Sprintf("%v: tensor %q, byte %d: device has %#x, the file gives %#x (little-endian %v)", ErrMismatch,
		e.Tensor, e.Offset, e.Got, e.Want, e.Type)
}

// Unwrap makes the error match ErrMismatch.
func (e *MismatchError) Unwrap() error { return ErrMismatch }

// Result says what Verify has compared.
type Result struct {
	Tensors int    // that were compared and found equal, on every device that they are on
	Of      int    // tensors of the file
	Bytes   uint64 // of device memory that were compared
}

// String says of how many tensors the result is.
func (r Result) String() string { return fmt.Sprintf("%d of %d tensors", r.Tensors, r.Of) }

// Verify reads every tensor of m back from every device that it is on, and compares it with what the generic kernels
// make of the bytes in f, the model's file or a copy of it. Any NaN equals any other. Of a remote model, the file's
// bytes are fetched a second time. The result says how much was compared; a tensor that was read back only in part is
// an error and never a success.
//
// The error is a *MismatchError for the first difference that was found. It matches ErrMismatch, too, if f does not
// have a tensor of m with the same type and shape. It is a *loader.TensorError for bytes that could not be read.
func Verify(ctx context.Context, m *loader.Model, f *gguf.File) (Result, error) {
	v := &verifier{
		ctx: ctx, file: f, seen: make(map[*plan.Tensor]*atomic.Uint64), inFile: make(map[*plan.Tensor]*plan.Tensor),
	}
	var err error
	if v.reference, err = kernels.For(kernels.Generic); err != nil {
		return Result{}, err
	}
	p := m.Plan()
	copies := make(map[*plan.Tensor]uint64) // devices that a tensor is on
	for i := range p.Groups {
		g := &p.Groups[i]
		for j := range g.Tensors {
			t := &g.Tensors[j]
			if v.inFile[t], err = t.In(f); err != nil {
				return Result{}, fmt.Errorf("%w: %w", ErrMismatch, err)
			}
			v.seen[t], copies[t] = new(atomic.Uint64), uint64(len(g.Devices))
		}
	}
	if err := m.ReadBack(ctx, loader.ReadOptions{EveryCopy: true}, v.visitor); err != nil {
		return Result{}, err
	}
	r := Result{Of: len(f.Tensors())}
	for t, seen := range v.seen {
		if n := seen.Load(); n != t.Bytes*copies[t] {
			return Result{}, fmt.Errorf("readback: internal error: tensor %q: %d bytes were compared of %d on %d devices",
				t.Name, n, t.Bytes, copies[t])
		}
		r.Tensors++
		r.Bytes += t.Bytes * copies[t]
	}
	return r, nil
}

// verifier compares pieces.
type verifier struct {
	ctx       context.Context
	file      *gguf.File
	reference *kernels.Kernels
	seen      map[*plan.Tensor]*atomic.Uint64 // bytes that were found equal
	inFile    map[*plan.Tensor]*plan.Tensor   // with its place in file: a model that another process holds may not know it
}

// visitor returns what compares the pieces that one worker reads.
func (v *verifier) visitor() func(loader.Piece) error {
	var want, gathered []byte
	return func(p loader.Piece) error {
		if cap(want) < len(p.Bytes) {
			want = make([]byte, len(p.Bytes))
		}
		want = want[:len(p.Bytes)]
		if err := v.expected(p, &gathered, want); err != nil {
			return err
		}
		t := p.Tensor
		if i := firstDifference(p.Bytes, want, t.Target); i >= 0 {
			n := min(i+max(1, t.Target.BlockBytes()), len(want), i+8)
			return &MismatchError{
				Tensor: t.Name, Type: t.Target, Offset: p.Offset + int64(i),
				Got: bytes.Clone(p.Bytes[i:n]), Want: bytes.Clone(want[i:n]),
			}
		}
		v.seen[t].Add(uint64(len(want)))
		return nil
	}
}

// expected makes of the file's bytes what a piece should be.
func (v *verifier) expected(p loader.Piece, gathered *[]byte, want []byte) error {
	t := v.inFile[p.Tensor]
	src, err := read.Tensor(v.ctx, v.file, gathered, t, p.Src, p.SrcBytes)
	if err == nil {
		err = v.file.Guard(func() error {
			if t.Target == t.Type {
				copy(want, src)
				return nil
			}
			return v.reference.Dequantize(want, t.Target, src, t.Type)
		})
	}
	if err != nil {
		return &loader.TensorError{Tensor: t.Name, Op: "read", Offset: p.Src, Bytes: p.SrcBytes, Err: err}
	}
	read.LetGo(v.file, t, p.Src, p.SrcBytes)
	return nil
}

// firstDifference is the index of the first element of type t (byte, for a quantized one) in which a and b differ, -1
// if there is none. NaNs of any kind are equal.
func firstDifference(a, b []byte, t gguf.Type) int {
	if bytes.Equal(a, b) {
		return -1
	}
	size := 1
	var nan func(p []byte) bool
	switch t {
	case gguf.F32:
		size, nan = 4, func(p []byte) bool { return binary.LittleEndian.Uint32(p)&0x7fffffff > 0x7f800000 }
	case gguf.F16:
		size, nan = 2, func(p []byte) bool { return binary.LittleEndian.Uint16(p)&0x7fff > 0x7c00 }
	case gguf.BF16:
		size, nan = 2, func(p []byte) bool { return binary.LittleEndian.Uint16(p)&0x7fff > 0x7f80 }
	}
	for i := 0; i < len(a); i += size {
		x, y := a[i:i+size], b[i:i+size]
		if !bytes.Equal(x, y) && (nan == nil || !nan(x) || !nan(y)) {
			return i
		}
	}
	return -1
}

// Tensor returns the bytes of one tensor as they are in device memory; of one that is on several devices, on the first.
func Tensor(ctx context.Context, m *loader.Model, name string) ([]byte, error) {
	t, err := m.Tensor(name)
	if err != nil {
		return nil, err
	}
	all := make([]byte, t.Bytes)
	only := loader.ReadOptions{Tensors: func(s string) bool { return s == name }}
	err = m.ReadBack(ctx, only, func() func(loader.Piece) error {
		return func(p loader.Piece) error {
			copy(all[p.Offset:], p.Bytes)
			return nil
		}
	})
	if err != nil {
		return nil, err
	}
	return all, nil
}
