package loader

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels"
)

// made is a tensor of a made-up model.
type made struct {
	name  string
	typ   gguf.Type
	shape []uint64
}

// makeModel writes a model with random weights, of which few are not finite, and opens it.
func makeModel(t testing.TB, metadata map[string]any, tensors []made) *gguf.File {
	t.Helper()
	path := filepath.Join(t.TempDir(), "made.gguf")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := gguf.NewWriter(f, gguf.WriterOptions{})
	for _, key := range slices.Sorted(maps.Keys(metadata)) {
		if err := w.Set(key, metadata[key]); err != nil {
			t.Fatal(err)
		}
	}
	for _, x := range tensors {
		if err := w.AddTensor(x.name, x.typ, x.shape...); err != nil {
			t.Fatal(x.name, err)
		}
	}
	err = w.WriteHeader()
	rng := rand.New(rand.NewPCG(1, 2))
	for _, x := range tensors {
		elems := uint64(1)
		for _, n := range x.shape {
			elems *= n
		}
		err = errors.Join(err, w.WriteTensor(x.name, weights(rng, x.typ, elems)))
	}
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return openModel(t, path)
}

// weights returns random elements. Numbers, and the scales of blocks, are between 1/16 and 1, or negative, but for one
// in 200: random bytes as they are would mostly be infinite or NaN somewhere.
func weights(rng *rand.Rand, typ gguf.Type, elems uint64) []byte {
	n, _ := typ.Bytes(elems)
	data := make([]byte, n)
	for i := range data {
		data[i] = byte(rng.Uint32())
	}
	scales := kernels.Scales(typ)
	le := binary.LittleEndian
	for b := data; len(b) > 0; b = b[typ.BlockBytes():] {
		if rng.IntN(200) == 0 {
			continue
		}
		x := (1.0/16 + rng.Float64()*15/16) * float64(1-2*rng.IntN(2))
		half := uint16(11+rng.IntN(4))<<10 | uint16(rng.Uint32())&0x83ff
		switch typ {
		case gguf.F32:
			le.PutUint32(b, math.Float32bits(float32(x)))
		case gguf.F64:
			le.PutUint64(b, math.Float64bits(x))
		case gguf.F16:
			le.PutUint16(b, half)
		case gguf.BF16:
			le.PutUint16(b, uint16(math.Float32bits(float32(x))>>16))
		}
		for _, s := range scales {
			switch s.Format {
			case kernels.ScaleF16:
				le.PutUint16(b[s.Offset:], half)
			case kernels.ScaleF32:
				le.PutUint32(b[s.Offset:], math.Float32bits(float32(x)))
			case kernels.ScaleSplitF16: // the upper four bits of each word
				for i := range 4 {
					at := b[s.Offset+2*i+1:]
					at[0] = at[0]&0x0f | byte(half>>(4*i))<<4
				}
			case kernels.ScaleE8M0:
				b[s.Offset] = byte(124 + rng.IntN(4))
			}
		}
	}
	return data
}

// llama is a model with the tensors of a llama with biases, in all types of ggml by turns, that can be divided among
// four.
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
	for l := range 4 {
		blk := fmt.Sprintf("blk.%d.", l)
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
	return makeModel(t, map[string]any{
		"general.architecture": "llama", "llama.attention.head_count": uint32(16), "llama.attention.head_count_kv": uint32(4),
	}, all)
}

// fused is a model with everything that lies in the file in several pieces: q, k and v in one, gate and up in one,
// experts.
func fused(t testing.TB) *gguf.File {
	var all []made
	add := func(name string, typ gguf.Type, shape ...uint64) { all = append(all, made{name, typ, shape}) }
	add("token_embd.weight", gguf.Q6_K, 256, 103)
	for l := range 4 {
		blk := fmt.Sprintf("blk.%d.", l)
		add(blk+"attn_qkv.weight", gguf.Q4_K, 256, 256)
		add(blk+"attn_qkv.bias", gguf.F32, 256)
		add(blk+"attn_output.weight", gguf.Q5_K, 1024, 32)
		add(blk+"ffn_up.weight", gguf.Q8_0, 256, 256)
		add(blk+"ffn_up.bias", gguf.BF16, 256)
		add(blk+"ffn_down.weight", gguf.Q8_0, 128, 32)
		add(blk+"ffn_gate_inp.weight", gguf.F32, 256, 8)
		add(blk+"ffn_gate_exps.weight", gguf.Q4_K, 256, 16, 8)
		add(blk+"ffn_gate_exps.bias", gguf.F32, 16, 8)
		add(blk+"ffn_down_exps.weight", gguf.Q6_K, 256, 12, 8) // divided by a rule
		add(blk+"attn_k_b.weight", gguf.F16, 64, 32, 8)
	}
	add("output_norm.weight", gguf.F32, 256)
	return makeModel(t, map[string]any{
		"general.architecture": "phi3", "phi3.attention.head_count": uint32(8), "phi3.attention.head_count_kv": []uint32{4, 4, 4, 4},
		"phi3.attention.key_length": uint32(16),
	}, all)
}

// flatModel has n layers of 8 MiB each.
func flatModel(t testing.TB, n int) *gguf.File {
	var all []made
	for l := range n {
		all = append(all, made{fmt.Sprintf("blk.%d.x", l), gguf.F16, []uint64{4096, 1024}})
	}
	return makeModel(t, nil, all)
}
