package loader

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels"
)

// ErrMismatch is matched by the error of Verify when device memory is not what it should be.
var ErrMismatch = errors.New("device memory differs from the file")

// MismatchError says where device memory differs from the reference.
type MismatchError struct {
	Tensor string
	Type   gguf.Type // element type on the device
	Offset int64     // of the first differing element (or block of a quantized type), in the tensor's bytes on the device
	Got    []byte    // what the device holds there: one element, or the differing byte of a block and those after it
	Want   []byte
}

// Error names the tensor, the byte offset and both values.
func (e *MismatchError) Error() string {
	return fmt.Sprintf("%v: tensor %q, byte %d: device has %s, the file gives %s (little-endian %v)", ErrMismatch, e.Tensor,
		e.Offset, inHex(e.Got), inHex(e.Want), e.Type)
}

// Unwrap makes the error match ErrMismatch.
func (e *MismatchError) Unwrap() error { return ErrMismatch }

func inHex(b []byte) string { return fmt.Sprintf("%#x", b) }

// Verify reads every tensor back from the device and compares it with what the generic kernels make of the file's bytes. Any
// NaN equals any other. Of a remote model, the file's bytes are fetched a second time. An attached model, and a Holder's, needs
// Use before. The error is a *MismatchError when they differ.
func (w *Model) Verify(ctx context.Context) error {
	w.mu.RLock()
	known := w.plan.model != nil
	w.mu.RUnlock()
	if !known {
		return errors.New("loader: the model's file is not open: Use tells it")
	}
	ref, err := kernels.For(kernels.Generic)
	if err != nil {
		return err
	}
	return w.readBack(ctx, func() visitor {
		var want, gathered []byte
		return func(c *chunk, s *segment, got []byte) error {
			t := &w.plan.Tensors[s.tensor]
			if cap(want) < len(got) {
				want = make([]byte, len(got))
			}
			want = want[:len(got)]
			src, err := w.plan.data(ctx, &gathered, t, s.src, s.srcBytes)
			if err == nil {
				err = w.plan.model.Guard(func() error {
					if t.Target == t.Type {
						copy(want, src)
						return nil
					}
					return ref.Dequantize(want, t.Target, src, t.Type)
				})
			}
			if err != nil {
				return &TensorError{Tensor: t.Name, Op: "read", Offset: s.src, Bytes: s.srcBytes, Err: err}
			}
			w.plan.letGo(t, s.src, s.srcBytes)
			if i := firstDifference(got, want, t.Target); i >= 0 {
				n := min(i+t.Target.BlockBytes(), len(got), i+8)
				return &MismatchError{
					Tensor: t.Name, Type: t.Target, Offset: int64(w.plan.tensorOffset(s)) + int64(i),
					Got: bytes.Clone(got[i:n]), Want: bytes.Clone(want[i:n]),
				}
			}
			return nil
		}
	})
}

// firstDifference is the index of the first element of type t (byte, for a quantized one) in which a and b differ, -1 if
// there is none. NaNs of any kind are equal.
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
