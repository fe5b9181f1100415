package loader

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

// WriteSafetensors reads every tensor back from the device and writes a safetensors file to out, several parts of it at a
// time and in any order. Tensors keep their GGUF names; shapes are row-major, so the reverse of ggml's; raw quantized blocks become
// U8 with one dimension, their byte count. After an error, out holds no usable file.
//
// With Options.Shard, the file's metadata has shard ("layer" or "tensor"), rank and world, and slices: a JSON object with an entry
// for every tensor that is a slice, {"dim", "ranges", "shape", "type"}. Dim counts row-major, shape is that of the whole tensor,
// ranges are those of [Slice], and type is ggml's name of the elements' type.
func (w *Model) WriteSafetensors(ctx context.Context, out io.WriterAt) error {
	header, starts, err := w.safetensorsHeader()
	if err != nil {
		return err
	}
	if _, err := out.WriteAt(header, 0); err != nil {
		return err
	}
	for i := range starts {
		starts[i] += uint64(len(header))
	}
	return w.writeData(ctx, out, starts)
}

// writeData reads every tensor back and writes it to out, at the place in starts that has its number in the plan.
func (w *Model) writeData(ctx context.Context, out io.WriterAt, starts []uint64) error {
	return w.readBack(ctx, func() visitor {
		return func(c *chunk, s *segment, device []byte) error {
			_, err := out.WriteAt(device, int64(starts[s.tensor]+w.plan.tensorOffset(s)))
			return err
		}
	})
}

// safetensorsHeader is safetensorsHeader for all of w.
func (w *Model) safetensorsHeader() (header []byte, starts []uint64, err error) {
	tensors := make([]*PlannedTensor, len(w.plan.Tensors))
	for i := range tensors {
		tensors[i] = &w.plan.Tensors[i]
	}
	return safetensorsHeader(w.plan.opts.Shard, tensors)
}

// safetensorsHeader returns everything before the data (length, JSON, padding), and where in the data each tensor begins.
func safetensorsHeader(shard Shard, tensors []*PlannedTensor) (header []byte, starts []uint64, err error) {
	metadata, err := safetensorsMetadata(shard, tensors)
	if err != nil {
		return nil, nil, err
	}
	var b bytes.Buffer
	b.Write(make([]byte, 8))
	b.WriteString(`{"__metadata__":`)
	b.Write(metadata)
	var at uint64
	for _, t := range tensors {
		e := safetensorsEntry{DType: safetensorsTypes[t.Target], Shape: slices.Clone(t.Shape), Offsets: [2]uint64{at, at + t.Bytes}}
		slices.Reverse(e.Shape)
		if e.DType == "" {
			e.DType, e.Shape = "U8", []uint64{t.Bytes}
		}
		if t.Name == "__metadata__" {
			return nil, nil, fmt.Errorf("loader: tensor %q: safetensors reserves that name", t.Name)
		}
		name, err := json.Marshal(t.Name)
		if err != nil {
			return nil, nil, err
		}
		entry, err := json.Marshal(e)
		if err != nil {
			return nil, nil, err
		}
		b.WriteByte(',')
		b.Write(name)
		b.WriteByte(':')
		b.Write(entry)
		starts = append(starts, at)
		at += t.Bytes
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
func safetensorsMetadata(shard Shard, tensors []*PlannedTensor) ([]byte, error) {
	all := map[string]string{"format": "gguf2gpu"}
	if shard.By != ShardNone {
		parts := make(map[string]safetensorsSlice)
		for _, t := range tensors {
			if t.Slice != nil {
				shape := slices.Clone(t.Slice.Shape)
				slices.Reverse(shape)
				parts[t.Name] = safetensorsSlice{len(shape) - 1 - t.Slice.Dim, t.Slice.Ranges, shape, t.Target.String()}
			}
		}
		text, err := json.Marshal(parts)
		if err != nil {
			return nil, err
		}
		all["shard"], all["rank"], all["world"] = shard.By.String(), strconv.Itoa(shard.Rank), strconv.Itoa(shard.World)
		all["slices"] = string(text)
	}
	return json.Marshal(all)
}
