package loader

import (
	"fmt"
	"math"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// ValueError is what Request.Check finds: an element that is no finite number, or would be none on the device.
type ValueError struct {
	Tensor  string
	Type    gguf.Type // in the file
	Target  gguf.Type // on the device
	Offset  int64     // of the element, or of the block that it is in, in the tensor's bytes in the file
	Element uint64    // counted from the beginning of the tensor, in the order of the file
	Value   float64   // NaN also stands for a block whose scale is NaN by its format
}

// Error says which element is what.
func (e *ValueError) Error() string {
	where := fmt.Sprintf("element %d of tensor %q, in the %v block at byte %d of its data,", e.Element, e.Tensor, e.Type, e.Offset)
	if math.IsNaN(e.Value) || math.IsInf(e.Value, 0) {
		return fmt.Sprintf("%s is %v", where, e.Value)
	}
	return fmt.Sprintf("%s is %v, which is infinite as %v", where, e.Value, e.Target)
}

// checkValues looks for elements in src, which begins at offset off of tensor t's bytes in the file, that are not
// finite on the device. The error is a *TensorError that wraps a *ValueError.
func checkValues(t *plan.Tensor, off int64, src []byte) error {
	if t.Opaque() {
		return nil // nobody here knows what its numbers are
	}
	elem, value, found, err := kernels.FirstNonFinite(src, t.Type, t.Target)
	if err == nil && !found {
		return nil
	}
	block, elems := t.Type.BlockBytes(), t.Type.BlockElems()
	at := off + int64(elem/elems*block) // of the block
	if err == nil {
		start := t.InWhole(at)
		err = &ValueError{
			Tensor: t.Name, Type: t.Type, Target: t.Target, Offset: start, Value: value,
			Element: uint64(start/int64(block))*uint64(elems) + uint64(elem%elems),
		}
	}
	return &TensorError{Tensor: t.Name, Op: "check", Offset: at, Bytes: block, Err: err}
}
