package readback

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// asHF gives x the entries that it has in transformers; none if it has none there. What the names say is checked
// against the tensor, as another process may have said it.
func (x *exported) asHF(names map[string][]plan.HFTensor) error {
	as, ok := names[x.Name]
	if !ok {
		return plan.ErrUnknownNames
	}
	whole := entryOf(x.Tensor)
	as = slices.DeleteFunc(slices.Clone(as), func(p plan.HFTensor) bool { return p.Tied })
	switch {
	case len(as) == 0:
		return nil
	case safetensorsTypes[x.Target] == "":
		return fmt.Errorf("%w: the names of transformers are for numbers, and this one is blocks of the type %v", loader.ErrBadOption,
			x.Target)
	case len(whole.shape) == 0:
		return errors.New("it has no dimensions")
	}
	rows := whole.shape[0]
	if len(as) == 1 && as[0].Rows == 0 {
		return x.whole(as[0], whole, rows)
	}
	if x.rowsCut() {
		return fmt.Errorf("%w: it is a slice of what transformers has as %d tensors", loader.ErrBadOption, len(as))
	}
	next := uint64(0)
	for _, p := range as {
		if p.First != next || p.Rows == 0 || p.Rows > rows-next || p.Experts || p.HeadRows != 0 || p.Add != 0 {
			return fmt.Errorf("%q is not the next part of %d rows", p.Name, rows)
		}
		part := whole
		part.name, part.shape = p.Name, slices.Clone(whole.shape)
		part.shape[0], part.bytes = p.Rows, whole.bytes/rows*p.Rows
		x.entries = append(x.entries, part)
		next += p.Rows
	}
	if next != rows {
		return fmt.Errorf("its parts have %d of %d rows", next, rows)
	}
	return nil
}

// rowsCut reports whether x has not all rows of its tensor.
func (x *exported) rowsCut() bool { return x.Slice != nil && x.Slice.Dim == len(x.Shape)-1 }

// whole makes x one entry, or one for each expert.
func (x *exported) whole(p plan.HFTensor, e exportedEntry, rows uint64) error {
	x.hf = p
	switch {
	case p.HeadRows != 0 && (p.HeadRows%2 != 0 || rows%p.HeadRows != 0):
		return fmt.Errorf("%w: its %d rows are not whole heads of %d", loader.ErrBadOption, rows, p.HeadRows)
	case p.Add != 0 && !(x.Target == gguf.F32 || x.Target == gguf.F16 || x.Target == gguf.BF16):
		return fmt.Errorf("%w: %v has to be added to it, which is not done for the type %v", loader.ErrBadOption, p.Add, x.Target)
	case !p.Experts:
		e.name = p.Name
		x.entries = []exportedEntry{e}
		return nil
	case x.rowsCut() || p.HeadRows != 0 || len(e.shape) < 2 || !strings.Contains(p.Name, "{}"):
		return fmt.Errorf("%w: it is not the experts that %q is", loader.ErrBadOption, p.Name)
	}
	for i := range rows {
		x.entries = append(x.entries, exportedEntry{
			name: strings.Replace(p.Name, "{}", strconv.FormatUint(i, 10), 1), dtype: e.dtype, shape: e.shape[1:],
			bytes: e.bytes / rows, inner: true,
		})
	}
	return nil
}

// reordered is a tensor whose bytes are not written as they are.
type reordered struct {
	headBytes, rowBytes int64 // 0: rows keep their order
	add                 float32
	typ                 gguf.Type
}

// reordered is nil if the bytes are written as they are.
func (x *exported) reordered() *reordered {
	if x.hf.HeadRows == 0 && x.hf.Add == 0 || x.Bytes == 0 {
		return nil
	}
	r := &reordered{add: x.hf.Add, typ: x.Target}
	if n := x.hf.HeadRows; n != 0 {
		r.rowBytes = int64(x.Bytes / x.Shape[len(x.Shape)-1])
		r.headBytes = int64(n) * r.rowBytes
	}
	return r
}

// write writes a piece of the tensor whose bytes begin at start.
func (r *reordered) write(out io.WriterAt, p loader.Piece, start int64) error {
	b := p.Bytes
	if r.add != 0 {
		b = slices.Clone(b)
		if err := addTo(b, r.typ, r.add); err != nil {
			return err
		}
	}
	for at := p.Offset; len(b) > 0; {
		to, n := r.place(at)
		n = min(n, int64(len(b)))
		if _, err := out.WriteAt(b[:n], start+to); err != nil {
			return err
		}
		b, at = b[n:], at+n
	}
	return nil
}

// place returns where byte at of the tensor is written, and how many bytes from there on stay neighbours.
func (r *reordered) place(at int64) (to, n int64) {
	if r.rowBytes == 0 {
		return at, math.MaxInt64
	}
	head, in := at/r.headBytes, at%r.headBytes
	row, in := in/r.rowBytes, in%r.rowBytes
	half := r.headBytes / r.rowBytes / 2
	return head*r.headBytes + (row%2*half+row/2)*r.rowBytes + in, r.rowBytes - in
}

// addTo adds x to every element of b, as 32-bit numbers, and rounds to the type again.
func addTo(b []byte, typ gguf.Type, x float32) error {
	k, err := kernels.For(kernels.Generic)
	if err != nil {
		return err
	}
	elems := len(b) / typ.BlockBytes()
	wide := make([]byte, 4*elems)
	if err := k.Dequantize(wide, gguf.F32, b, typ); err != nil {
		return err
	}
	for i := 0; i < len(wide); i += 4 {
		le := wide[i : i+4]
		bits := uint32(le[0]) | uint32(le[1])<<8 | uint32(le[2])<<16 | uint32(le[3])<<24
		bits = math.Float32bits(math.Float32frombits(bits) + x)
		le[0], le[1], le[2], le[3] = byte(bits), byte(bits>>8), byte(bits>>16), byte(bits>>24)
	}
	return k.Dequantize(b, typ, wide, gguf.F32)
}

// IndexedFile is a safetensors file of a checkpoint that has several.
type IndexedFile struct {
	Name string     // without a directory
	Plan *plan.Plan // of what is in it: whole tensors only
}

// WriteIndex writes the index of a checkpoint in several files, which is called model.safetensors.index.json: the size
// of all tensors, and which file each is in. The error matches [loader.ErrBadOption] for slices of tensors, which no
// index can put together again.
func (e Export) WriteIndex(out io.Writer, files []IndexedFile) error {
	var index struct {
		Metadata struct {
			TotalSize uint64 `json:"total_size"`
		} `json:"metadata"`
		WeightMap map[string]string `json:"weight_map"`
	}
	index.WeightMap = make(map[string]string)
	for _, f := range files {
		all, err := e.tensors(f.Plan.Tensors())
		if err != nil {
			return err
		}
		for _, x := range all {
			if x.Slice != nil {
				return fmt.Errorf("readback: tensor %q: %w: an index is for whole tensors, and this is a slice", x.Name, loader.ErrBadOption)
			}
			for _, y := range x.entries {
				if other, ok := index.WeightMap[y.name]; ok {
					return fmt.Errorf("readback: tensor %q: %w: it is in %s and in %s", x.Name, loader.ErrBadOption, other, f.Name)
				}
				index.WeightMap[y.name] = f.Name
				index.Metadata.TotalSize += y.bytes
			}
		}
	}
	b, err := json.MarshalIndent(index, "", "  ")
	if err != nil {
		return err
	}
	_, err = out.Write(append(b, '\n'))
	return err
}
