package plan

import (
	"bytes"
	"context"
	"io"
	"maps"
	"slices"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

const sample = "../../testdata/tiny-llama.gguf"

func openFile(t testing.TB, path string) *gguf.File {
	t.Helper()
	f, err := gguf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

// made is a tensor of a made-up model.
type made struct {
	name  string
	typ   gguf.Type
	shape []uint64
}

// described is a model that has a header and, instead of weights, zeros: enough for a plan, however large it is.
func described(t testing.TB, metadata map[string]any, tensors []made) *gguf.File {
	t.Helper()
	var b bytes.Buffer
	w := gguf.NewWriter(&b, gguf.WriterOptions{})
	for _, key := range slices.Sorted(maps.Keys(metadata)) {
		if err := w.Set(key, metadata[key]); err != nil {
			t.Fatal(err)
		}
	}
	size := int64(0)
	for _, x := range tensors {
		if err := w.AddTensor(x.name, x.typ, x.shape...); err != nil {
			t.Fatal(x.name, err)
		}
		elems := uint64(1)
		for _, n := range x.shape {
			elems *= n
		}
		n, ok := x.typ.Bytes(elems)
		if !ok {
			n = 4 * elems // of a type that ggml does not have: enough
		}
		size += int64(alignUp(n, 32))
	}
	if err := w.WriteHeader(); err != nil {
		t.Fatal(err)
	}
	header := headerOnly{b.Bytes(), int64(alignUp(uint64(b.Len()), 32)) + size}
	f, err := gguf.OpenSource(t.Context(), "made.gguf", func(context.Context, string) (gguf.Source, error) {
		return header, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// headerOnly is a source with zeros behind a header.
type headerOnly struct {
	header []byte
	size   int64
}

func (h headerOnly) Path() string { return "made.gguf" }
func (h headerOnly) Size() int64  { return h.size }
func (h headerOnly) Close() error { return nil }

func (h headerOnly) Range(_ context.Context, off, n int64) io.ReadCloser {
	front := h.header[min(off, int64(len(h.header))):]
	return io.NopCloser(io.LimitReader(io.MultiReader(bytes.NewReader(front), zeros{}), n))
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

// llama is a model with the tensors of a llama with biases, in all floating types of ggml by turns. It can be divided
// among four ranks.
func llama(t testing.TB) *gguf.File {
	types := slices.DeleteFunc(gguf.Types(), func(x gguf.Type) bool { return x.Integer() })
	next := 0
	var all []made
	add := func(name string, shape ...uint64) {
		typ := gguf.F32
		if len(shape) > 1 {
			typ = types[next%len(types)]
			next++
		}
		all = append(all, made{name, typ, shape})
	}
	add("token_embd.weight", 256, 103)
	add("rope_freqs.weight", 32)
	for _, blk := range []string{"blk.0.", "blk.1.", "blk.2.", "blk.3."} {
		add(blk+"attn_norm.weight", 256)
		add(blk+"attn_q.weight", 256, 64)
		add(blk+"attn_q.bias", 64)
		add(blk+"attn_k.weight", 256, 16)
		add(blk+"attn_k.bias", 16)
		add(blk+"attn_v.weight", 256, 16)
		add(blk+"attn_output.weight", 1024, 32)
		add(blk+"attn_output.bias", 256)
		add(blk+"ffn_gate.weight", 256, 64)
		add(blk+"ffn_up.weight", 256, 64)
		add(blk+"ffn_up.bias", 64)
		add(blk+"ffn_down.weight", 1024, 32)
	}
	add("output_norm.weight", 256)
	add("output.weight", 256, 103)
	return described(t, map[string]any{
		"general.architecture": "llama", "llama.attention.head_count": uint32(16), "llama.attention.head_count_kv": uint32(4),
	}, all)
}

// fused is a model with all that lies in the file in several pieces when it is sliced: q, k and v in one tensor, gate
// and up in one, experts, a matrix for each head.
func fused(t testing.TB) *gguf.File {
	var all []made
	add := func(name string, typ gguf.Type, shape ...uint64) { all = append(all, made{name, typ, shape}) }
	add("token_embd.weight", gguf.Q6_K, 256, 103)
	for _, blk := range []string{"blk.0.", "blk.1.", "blk.2.", "blk.3."} {
		add(blk+"attn_qkv.weight", gguf.Q4_K, 256, 256)
		add(blk+"attn_qkv.bias", gguf.F32, 256)
		add(blk+"attn_output.weight", gguf.Q5_K, 1024, 32)
		add(blk+"ffn_up.weight", gguf.Q8_0, 256, 256)
		add(blk+"ffn_up.bias", gguf.BF16, 256)
		add(blk+"ffn_down.weight", gguf.Q8_0, 128, 32)
		add(blk+"ffn_gate_inp.weight", gguf.F32, 256, 8)
		add(blk+"ffn_gate_exps.weight", gguf.Q4_K, 256, 16, 8)
		add(blk+"ffn_gate_exps.bias", gguf.F32, 16, 8)
		add(blk+"ffn_down_exps.weight", gguf.Q6_K, 256, 12, 8)
		add(blk+"attn_k_b.weight", gguf.F16, 64, 32, 8)
	}
	add("output_norm.weight", gguf.F32, 256)
	return described(t, map[string]any{
		"general.architecture": "phi3", "phi3.attention.head_count": uint32(8),
		"phi3.attention.head_count_kv": []uint32{4, 4, 4, 4}, "phi3.attention.key_length": uint32(16),
	}, all)
}

// one is a plan for one device.
func one(t testing.TB, f *gguf.File, s Spec) *Plan {
	t.Helper()
	p, err := New(f, s, []uint64{1 << 40})
	if err != nil {
		t.Fatal(err)
	}
	return p
}
