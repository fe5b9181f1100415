package readback

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strconv"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// safetensorsTypes are the dtypes of the safetensors format for the types that it knows.
var safetensorsTypes = map[gguf.Type]string{
	gguf.F32: "F32", gguf.F16: "F16", gguf.BF16: "BF16", gguf.F64: "F64",
	gguf.I8: "I8", gguf.I16: "I16", gguf.I32: "I32", gguf.I64: "I64",
}

// safetensorsEntry describes a tensor in a safetensors header.
type safetensorsEntry struct {
	DType   string    `json:"dtype"`
	Shape   []uint64  `json:"shape"` // row-major: the slowest dimension first
	Offsets [2]uint64 `json:"data_offsets"`
}

// Export says how tensors are written.
type Export struct {
	// HF gives the tensors the names and the order of rows that they have in Hugging Face's transformers; see
	// [plan.HFTensors]. Nil: they keep what they have in the GGUF file.
	HF map[string][]plan.HFTensor
}

// WriteSafetensors writes m with the names of its GGUF file; see [Export.WriteSafetensors].
func WriteSafetensors(ctx context.Context, m *loader.Model, out io.WriterAt) error {
	return Export{}.WriteSafetensors(ctx, m, out)
}

// WriteSafetensors reads every tensor of m back and writes a safetensors file to out, several parts of it at a time and
// in any order. Tensors that are on several devices are taken from the first. Shapes are row-major, so the reverse of
// ggml's; raw quantized blocks become U8 with one dimension, their byte count. The metadata has format "pt", which
// transformers wants; the values are those of the devices, so BF16 stays BF16. After an error, out holds no usable
// file.
//
// With e.HF, tensors that transformers computes itself are left out, and so is a second name of the same tensor: the
// model's config.json says which are tied. Raw quantized blocks are then refused with an error that matches
// [loader.ErrBadOption], as transformers has no such tensors, and so are slices that do not have whole heads.
//
// With a shard, the file's metadata has shard ("layer" or "tensor"), rank and world, and slices: a JSON object with an
// entry for every tensor that is a slice, {"dim", "ranges", "shape", "type"}. Dim counts row-major, shape is that of
// the whole tensor, ranges are those of [plan.Slice], and type is ggml's name of the elements' type.
func (e Export) WriteSafetensors(ctx context.Context, m *loader.Model, out io.WriterAt) error {
	p := m.Plan()
	all, err := e.tensors(p.Tensors())
	if err != nil {
		return err
	}
	header, starts, err := safetensorsHeader(p.Spec.Shard, all)
	if err != nil {
		return err
	}
	if _, err := out.WriteAt(header, 0); err != nil {
		return err
	}
	wanted := make(map[string]bool, len(all))
	for i := range all {
		wanted[all[i].Name] = true
		starts[all[i].Tensor] += int64(len(header))
	}
	orders := make(map[*plan.Tensor]*reordered)
	for i := range all {
		if r := all[i].reordered(); r != nil {
			orders[all[i].Tensor] = r
		}
	}
	if len(all) == 0 {
		return nil
	}
	o := loader.ReadOptions{Tensors: func(name string) bool { return wanted[name] }}
	return m.ReadBack(ctx, o, func() func(loader.Piece) error {
		return func(p loader.Piece) error {
			if r := orders[p.Tensor]; r != nil {
				return r.write(out, p, starts[p.Tensor])
			}
			_, err := out.WriteAt(p.Bytes, starts[p.Tensor]+p.Offset)
			return err
		}
	})
}

// exported is a tensor of an export, with its entries in the order of its bytes.
type exported struct {
	*plan.Tensor
	entries []exportedEntry
	hf      plan.HFTensor // how the values differ; the zero value: not at all
}

// exportedEntry is one entry of the header.
type exportedEntry struct {
	name  string
	dtype string
	shape []uint64 // row-major
	bytes uint64
	inner bool // the shape lacks the slowest dimension of the tensor
}

// tensors says what is written of the tensors of a plan.
func (e Export) tensors(tensors []*plan.Tensor) ([]exported, error) {
	var all []exported
	seen := make(map[string]bool)
	for _, t := range tensors {
		x := exported{Tensor: t}
		if e.HF == nil {
			x.entries = []exportedEntry{entryOf(t)}
		} else if err := x.asHF(e.HF); err != nil {
			return nil, fmt.Errorf("readback: tensor %q: %w", t.Name, err)
		}
		for _, y := range x.entries {
			switch {
			case y.name == "__metadata__":
				return nil, fmt.Errorf("readback: tensor %q: safetensors reserves that name", t.Name)
			case seen[y.name]:
				return nil, fmt.Errorf("readback: two tensors would have the name %q", y.name)
			}
			seen[y.name] = true
		}
		if len(x.entries) > 0 {
			all = append(all, x)
		}
	}
	return all, nil
}

// entryOf is the entry of t under its own name.
func entryOf(t *plan.Tensor) exportedEntry {
	e := exportedEntry{name: t.Name, dtype: safetensorsTypes[t.Target], shape: slices.Clone(t.Shape), bytes: t.Bytes}
	slices.Reverse(e.shape)
	if e.dtype == "" {
		e.dtype, e.shape = "U8", []uint64{t.Bytes}
	}
	return e
}

// safetensorsHeader returns everything before the data (length, JSON, padding), and where in the data each tensor
// begins.
func safetensorsHeader(shard plan.Shard, all []exported) (header []byte, starts map[*plan.Tensor]int64, err error) {
	metadata, err := safetensorsMetadata(shard, all)
	if err != nil {
		return nil, nil, err
	}
	var b bytes.Buffer
	b.Write(make([]byte, 8))
	b.WriteString(`{"__metadata__":`)
	b.Write(metadata)
	starts = make(map[*plan.Tensor]int64, len(all))
	var at uint64
	for i := range all {
		starts[all[i].Tensor] = int64(at)
		for _, e := range all[i].entries {
			name, err := json.Marshal(e.name)
			if err != nil {
				return nil, nil, err
			}
			entry, err := json.Marshal(safetensorsEntry{e.dtype, e.shape, [2]uint64{at, at + e.bytes}})
			if err != nil {
				return nil, nil, err
			}
			b.WriteByte(',')
			b.Write(name)
			b.WriteByte(':')
			b.Write(entry)
			at += e.bytes
		}
	}
	b.WriteByte('}')
	for b.Len()%8 != 0 { // the format wants data aligned, and pads the JSON with spaces
		b.WriteByte(' ')
	}
	header = b.Bytes()
	binary.LittleEndian.PutUint64(header, uint64(len(header)-8))
	return header, starts, nil
}

// safetensorsSlice says in the metadata which part of a tensor a slice is.
type safetensorsSlice struct {
	Dim    int         `json:"dim"` // row-major
	Ranges [][2]uint64 `json:"ranges"`
	Shape  []uint64    `json:"shape"` // of the whole, row-major
	Type   string      `json:"type"`
}

// safetensorsMetadata is the JSON of the header's metadata, whose values must all be texts.
func safetensorsMetadata(shard plan.Shard, all []exported) ([]byte, error) {
	metadata := map[string]string{"format": "pt"}
	if shard.By != plan.ShardNone {
		parts := make(map[string]safetensorsSlice)
		for _, t := range all {
			if t.Slice == nil {
				continue
			}
			for _, e := range t.entries {
				shape := slices.Clone(t.Slice.Shape)
				slices.Reverse(shape)
				dim := len(shape) - 1 - t.Slice.Dim
				if e.inner {
					shape, dim = shape[1:], dim-1
				}
				parts[e.name] = safetensorsSlice{dim, t.Slice.Ranges, shape, t.Target.String()}
			}
		}
		text, err := json.Marshal(parts)
		if err != nil {
			return nil, err
		}
		metadata["shard"], metadata["slices"] = shard.By.String(), string(text)
		metadata["rank"], metadata["world"] = strconv.Itoa(shard.Rank), strconv.Itoa(shard.World)
	}
	return json.Marshal(metadata)
}
