package synth

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// Model describes the model to write.
type Model struct {
	Preset Preset
	Types  Types
	Seed   uint64 // of the weights
}

// Tensor is one tensor of a model.
type Tensor struct {
	Name  string // as in llama.cpp's files
	Type  gguf.Type
	Shape []uint64 // in ggml's order: the length of a row first
	norm  bool     // the weights of a normalization
}

// Bytes is the tensor's size in the file.
func (t *Tensor) Bytes() int64 {
	elems := uint64(1)
	for _, n := range t.Shape {
		elems *= n
	}
	size, _ := t.Type.Bytes(elems) // the rows of all presets are whole blocks, and the sizes far from an overflow
	return int64(size)
}

// weights returns what makes up the tensor's bytes.
func (t *Tensor) weights(seed uint64) *weights {
	if t.norm {
		return newNormWeights(seed)
	}
	return newWeights(t.Type, seed)
}

// Write writes the model to w as a GGUF file and returns its size in bytes. progress, unless it is nil, is told now
// and then how many of the bytes of all tensors have been written. Errors are those of w, or of ctx when it is
// canceled.
func (m *Model) Write(ctx context.Context, w io.Writer, progress func(done, total int64)) (int64, error) {
	return m.write(ctx, w, runtime.GOMAXPROCS(0), progress)
}

func (m *Model) write(
	ctx context.Context, w io.Writer, cores int, progress func(done, total int64),
) (int64, error) {
	if m.Preset.layers == 0 || m.Types.pick == nil {
		return 0, errors.New("synth: a Model needs a Preset and Types")
	}
	tensors := m.Tensors()
	var total int64
	for _, t := range tensors {
		total += t.Bytes()
	}
	count := &countingWriter{w: w}
	if progress != nil {
		count.update = func(done int64) { progress(min(done, total), total) }
	}
	// The GGUF writer copies in small pieces. This makes them writes of whole chunks.
	buffered := bufio.NewWriterSize(count, chunkBytes)
	file := gguf.NewWriter(buffered, gguf.WriterOptions{})
	m.declare(file, tensors)
	if err := file.WriteHeader(); err != nil {
		return 0, err
	}
	err := generate(ctx, tensors, m.Seed, cores, func(r io.Reader) error {
		for _, t := range tensors {
			if err := file.CopyTensor(t.Name, r); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	if err := file.Close(); err != nil {
		return 0, err
	}
	err = buffered.Flush()
	return count.n, err
}

// Tensors lists the model's tensors in the order of the file.
func (m *Model) Tensors() []Tensor {
	p := m.Preset
	kv := p.width / p.heads * p.kvHeads
	var all []Tensor
	matrix := func(layer int, name string, cols, rows uint64) {
		full := name + ".weight"
		if layer >= 0 {
			full = fmt.Sprintf("blk.%d.%s.weight", layer, name)
		}
		all = append(all, Tensor{Name: full, Type: m.Types.pick(p, layer, name), Shape: []uint64{cols, rows}})
	}
	norm := func(name string) {
		all = append(all, Tensor{Name: name, Type: gguf.F32, Shape: []uint64{p.width}, norm: true})
	}
	matrix(-1, "token_embd", p.width, uint64(p.vocab))
	for l := range p.layers {
		norm(fmt.Sprintf("blk.%d.attn_norm.weight", l))
		matrix(l, "attn_q", p.width, p.width)
		matrix(l, "attn_k", p.width, kv)
		matrix(l, "attn_v", p.width, kv)
		matrix(l, "attn_output", p.width, p.width)
		norm(fmt.Sprintf("blk.%d.ffn_norm.weight", l))
		matrix(l, "ffn_gate", p.width, p.ffn)
		matrix(l, "ffn_up", p.width, p.ffn)
		matrix(l, "ffn_down", p.ffn, p.width)
	}
	norm("output_norm.weight")
	matrix(-1, "output", p.width, uint64(p.vocab))
	return all
}

// declare sets the metadata, under the keys of a real model, and declares the tensors. The writer keeps the first
// error and returns it from WriteHeader.
func (m *Model) declare(w *gguf.Writer, tensors []Tensor) {
	p := m.Preset
	tokens, scores, types := vocabulary(p.vocab)
	for _, kv := range []struct {
		key   string
		value any
	}{
		{"general.architecture", "llama"},
		{"general.type", "model"},
		{"general.name", fmt.Sprintf("synthetic %v %v, seed %d", p, m.Types, m.Seed)},
		{"general.quantization_version", uint32(2)},
		{"llama.block_count", uint32(p.layers)},
		{"llama.context_length", p.context},
		{"llama.embedding_length", uint32(p.width)},
		{"llama.feed_forward_length", uint32(p.ffn)},
		{"llama.attention.head_count", uint32(p.heads)},
		{"llama.attention.head_count_kv", uint32(p.kvHeads)},
		{"llama.attention.layer_norm_rms_epsilon", float32(1e-5)},
		{"llama.rope.dimension_count", uint32(p.width / p.heads)},
		{"llama.rope.freq_base", float32(10000)},
		{"llama.vocab_size", uint32(p.vocab)},
		{"tokenizer.ggml.model", "llama"},
		{"tokenizer.ggml.pre", "default"},
		{"tokenizer.ggml.tokens", tokens},
		{"tokenizer.ggml.scores", scores},
		{"tokenizer.ggml.token_type", types},
		{"tokenizer.ggml.bos_token_id", uint32(1)},
		{"tokenizer.ggml.eos_token_id", uint32(2)},
		{"tokenizer.ggml.unknown_token_id", uint32(0)},
		{"tokenizer.ggml.add_bos_token", true},
		{"tokenizer.ggml.add_eos_token", false},
	} {
		_ = w.Set(kv.key, kv.value)
	}
	for _, t := range tensors {
		_ = w.AddTensor(t.Name, t.Type, t.Shape...)
	}
}

// countingWriter counts the bytes that are written through it, and reports them to update unless that is nil.
type countingWriter struct {
	w      io.Writer
	n      int64
	update func(n int64)
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	if c.update != nil {
		c.update(c.n)
	}
	return n, err
}
