package main

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/cmd/gguf2gpu/internal/synth"
	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// samplePath is the sample model.
var samplePath = filepath.Join("..", "..", "testdata", "tiny-llama.gguf")

// partsOfPairs is how many parts the models of TestPairs have where they are split.
const partsOfPairs = 3

// modelPath returns the name of a model's file in the directory of models.
func modelPath(model string) string { return model + ".gguf" }

// partPath is the name of one of the parts.
func partPath(model string, part int) string {
	return fmt.Sprintf("%s-%05d-of-%05d.gguf", model, part+1, partsOfPairs)
}

// writePairsModels writes the models, each whole and in parts.
func writePairsModels(tb testing.TB, dir string) {
	tb.Helper()
	for _, v := range dimensions[numberOf("model")].values {
		whole := filepath.Join(dir, modelPath(v.name))
		var err error
		if v.name == "tiny" {
			var b []byte
			if b, err = os.ReadFile(samplePath); err == nil {
				err = os.WriteFile(whole, b, 0o666)
			}
		} else {
			metadata, tensors := made(v.name)
			err = writeModel(whole, metadata, tensors)
		}
		if err == nil {
			err = writeParts(dir, v.name)
		}
		if err != nil {
			tb.Fatalf("model %s: %v", v.name, err)
		}
	}
}

// madeTensor is a tensor of a model that is written.
type madeTensor struct {
	name  string
	typ   gguf.Type
	shape []uint64
	data  []byte // nil: finite weights
}

// metadataOf is what a model says about itself.
type metadataOf map[string]any

// made returns the model of that name.
func made(name string) (metadataOf, []madeTensor) {
	var all []madeTensor
	add := func(name string, typ gguf.Type, shape ...uint64) {
		all = append(all, madeTensor{name: name, typ: typ, shape: shape})
	}
	switch name {
	case "llama": // 12 heads, 6 of them of keys and values
		add("token_embd.weight", gguf.Q6_K, 256, 103)
		add("rope_freqs.weight", gguf.F32, 48)
		for l := range 3 {
			blk := fmt.Sprintf("blk.%d.", l)
			add(blk+"attn_norm.weight", gguf.F32, 256)
			add(blk+"attn_q.weight", gguf.Q4_K, 256, 192)
			add(blk+"attn_q.bias", gguf.F32, 192)
			add(blk+"attn_k.weight", gguf.Q8_0, 256, 96)
			add(blk+"attn_v.weight", gguf.F16, 256, 96)
			add(blk+"attn_output.weight", gguf.Q4_0, 192, 256)
			add(blk+"ffn_norm.weight", gguf.BF16, 256)
			add(blk+"ffn_gate.weight", gguf.Q4_K, 256, 192)
			add(blk+"ffn_up.weight", gguf.Q6_K, 256, 192)
			add(blk+"ffn_down.weight", gguf.Q8_0, 192, 256)
		}
		add("output_norm.weight", gguf.F32, 256)
		add("output.weight", gguf.Q4_K, 256, 103)
		return metadataOf{
			"general.architecture": "llama", "llama.attention.head_count": uint32(12), "llama.attention.head_count_kv": uint32(6),
		}, all
	case "fused":
		add("token_embd.weight", gguf.Q8_0, 256, 50)
		for l := range 2 {
			blk := fmt.Sprintf("blk.%d.", l)
			add(blk+"attn_qkv.weight", gguf.Q4_K, 256, 384)
			add(blk+"attn_qkv.bias", gguf.F32, 384)
			add(blk+"attn_output.weight", gguf.Q8_0, 192, 256)
			add(blk+"attn_k_b.weight", gguf.F16, 64, 32, 12)
			add(blk+"ffn_up.weight", gguf.Q8_0, 256, 384)
			add(blk+"ffn_up.bias", gguf.BF16, 384)
			add(blk+"ffn_down.weight", gguf.Q4_0, 192, 256)
			add(blk+"ffn_gate_inp.weight", gguf.F32, 256, 6)
			add(blk+"ffn_gate_exps.weight", gguf.Q4_K, 256, 16, 6)
			add(blk+"ffn_gate_exps.bias", gguf.F32, 16, 6)
			add(blk+"ffn_down_exps.weight", gguf.Q6_K, 256, 12, 6)
		}
		add("output_norm.weight", gguf.F32, 256)
		return metadataOf{
			"general.architecture": "phi3", "phi3.attention.head_count": uint32(12), "phi3.attention.head_count_kv": uint32(6),
			"phi3.attention.key_length": uint32(16),
		}, all
	default: // without layers, with tensors without dimensions and without elements
		add("token_embd.weight", gguf.F32, 256, 50)
		add("mm.0.weight", gguf.Q8_0, 256, 64)
		add("mm.0.bias", gguf.F32, 64)
		add("scale", gguf.F32)
		add("mm.1.weight", gguf.IQ4_XS, 256, 9)
		add("empty", gguf.Q8_0, 32, 0)
		add("ids", gguf.I32, 33)
		add("mm.norm", gguf.F16, 77)
		if name == "fork" {
			add("mm.2.weight", 137, 256, 11) // an IQ2_K of ik_llama.cpp
			all[len(all)-1].data = slices.Repeat([]byte("opaque bytes"), 70)[:76*11]
		}
		if name == "nan" {
			t := &all[0]
			n, _ := t.typ.Bytes(256 * 50)
			t.data = make([]byte, n)
			synth.Fill(t.data, t.typ, 1)
			copy(t.data[4*(256*17+5):], "\x01\x00\xc0\x7f") // a NaN that the CPU's conversions change
		}
		return metadataOf{"general.architecture": "flat", "pi": math.Pi}, all
	}
}

// writeModel writes a file. Tensors without data get weights.
func writeModel(path string, metadata metadataOf, tensors []madeTensor) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := gguf.NewWriter(f, gguf.WriterOptions{})
	for _, key := range slices.Sorted(maps.Keys(metadata)) {
		if err := w.Set(key, metadata[key]); err != nil {
			return err
		}
	}
	for _, t := range tensors {
		if err := w.AddTensor(t.name, t.typ, t.shape...); err != nil {
			return err
		}
	}
	if err := w.WriteHeader(); err != nil {
		return err
	}
	for i, t := range tensors {
		if err := w.WriteTensor(t.name, t.bytes(uint64(i))); err != nil {
			return err
		}
	}
	return w.Close()
}

// bytes returns the tensor's data; the seed decides on weights.
func (t *madeTensor) bytes(seed uint64) []byte {
	if t.data != nil {
		return t.data
	}
	elems := uint64(1)
	for _, n := range t.shape {
		elems *= n
	}
	n, _ := t.typ.Bytes(elems)
	b := make([]byte, n)
	if t.typ.Integer() {
		rng := rand.New(rand.NewPCG(seed, 0))
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
	} else {
		synth.Fill(b, t.typ, seed)
	}
	return b
}

// writeParts writes a model that is there in one file also in parts, with about the same number of tensors each.
func writeParts(dir, model string) (err error) {
	m, err := gguf.Open(filepath.Join(dir, modelPath(model)))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	all := m.Tensors()
	for part := range partsOfPairs {
		metadata := metadataOf{
			"split.no": uint16(part), "split.count": uint16(partsOfPairs), "split.tensors.count": int32(len(all)),
		}
		if part == 0 {
			for key, v := range m.Metadata().All() {
				metadata[key] = v
			}
		}
		var tensors []madeTensor
		for i := part * len(all) / partsOfPairs; i < (part+1)*len(all)/partsOfPairs; i++ {
			tensors = append(tensors, madeTensor{all[i].Name, all[i].Type, all[i].Shape, m.Data(&all[i])})
		}
		if err := writeModel(filepath.Join(dir, partPath(model, part)), metadata, tensors); err != nil {
			return err
		}
	}
	return nil
}

// modelOf returns what the command line has for MODEL: the path or the address of the file or of a part.
func (r *pairsRig) modelOf(c combination) string {
	name := modelPath(c.value("model"))
	if c.is("source", "parts", "http-parts") {
		name = partPath(c.value("model"), partsOfPairs-2) // any of them will do
	}
	if strings.HasPrefix(c.value("source"), "http") {
		return r.server + "/" + name
	}
	return filepath.Join(r.models, name)
}
