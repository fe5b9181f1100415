package loader

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// made is a tensor of a made-up model.
type made struct {
	name  string
	typ   gguf.Type
	shape []uint64
}

// makeModel writes a model with random weights, of which few are not finite, and opens it.
func makeModel(t testing.TB, metadata map[string]any, tensors []made) *gguf.Model {
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
		n, _ := x.typ.Bytes(elems)
		data := make([]byte, n)
		for i := 0; i+8 <= len(data); i += 8 {
			binary.LittleEndian.PutUint64(data[i:], rng.Uint64())
		}
		tame(rng, data, x.typ)
		err = errors.Join(err, w.WriteTensor(x.name, data))
	}
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return openModel(t, path)
}

// llama is a model with the tensors of a llama with biases, in all types of ggml by turns, that can be divided among four.
func llama(t testing.TB) *gguf.Model {
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

// fused is a model with everything that lies in the file in several pieces: q, k and v in one, gate and up in one, experts.
func fused(t testing.TB) *gguf.Model {
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

// safetensorsFile is a file that WriteSafetensors wrote.
type safetensorsFile struct {
	metadata map[string]string
	tensors  map[string]safetensorsEntry
	data     []byte
}

// decodeSafetensors decodes a file.
func decodeSafetensors(t *testing.T, b []byte) safetensorsFile {
	t.Helper()
	n := binary.LittleEndian.Uint64(b)
	var raw map[string]json.RawMessage
	if err := json.Unmarshal(b[8:8+n], &raw); err != nil {
		t.Fatal(err)
	}
	f := safetensorsFile{tensors: make(map[string]safetensorsEntry), data: b[8+n:]}
	for name, text := range raw {
		var err error
		if name == "__metadata__" {
			err = json.Unmarshal(text, &f.metadata)
		} else {
			var e safetensorsEntry
			err = json.Unmarshal(text, &e)
			f.tensors[name] = e
		}
		if err != nil {
			t.Fatal(name, err)
		}
	}
	return f
}

func (f *safetensorsFile) bytes(name string) []byte {
	e := f.tensors[name]
	return f.data[e.Offsets[0]:e.Offsets[1]]
}

// together is what the ranks' files, put together by what their metadata says, hold: the bytes of every tensor. Every byte must come
// from one rank, and what several have must be the same.
func together(t *testing.T, files []safetensorsFile) map[string][]byte {
	t.Helper()
	all, seen := make(map[string][]byte), make(map[string][]bool)
	for rank, f := range files {
		if f.metadata["rank"] != strconv.Itoa(rank) || f.metadata["world"] != strconv.Itoa(len(files)) {
			t.Fatalf("rank %s of %s, want %d of %d", f.metadata["rank"], f.metadata["world"], rank, len(files))
		}
		var parts map[string]safetensorsSlice
		if err := json.Unmarshal([]byte(f.metadata["slices"]), &parts); err != nil {
			t.Fatal(err)
		}
		for name := range f.tensors {
			b := f.bytes(name)
			part, ok := parts[name]
			if !ok {
				if was, ok := all[name]; ok && !bytes.Equal(was, b) {
					t.Errorf("%s differs between ranks", name)
				}
				all[name] = b
				continue
			}
			typ, err := gguf.ParseType(part.Type)
			if err != nil {
				t.Fatal(err)
			}
			inner, elems := uint64(1), uint64(1)
			for i, n := range part.Shape {
				if elems *= n; i > part.Dim {
					inner *= n
				}
			}
			size, _ := typ.Bytes(elems)
			if all[name] == nil {
				all[name], seen[name] = make([]byte, size), make([]bool, size)
			}
			perIndex := func(n uint64) uint64 { return n * inner * uint64(typ.BlockBytes()) / uint64(typ.BlockElems()) }
			row := perIndex(part.Shape[part.Dim])
			for at := uint64(0); at < size; at += row {
				for _, r := range part.Ranges {
					lo, hi := at+perIndex(r[0]), at+perIndex(r[1])
					for i := lo; i < hi; i++ {
						if seen[name][i] {
							t.Fatalf("%s: byte %d is twice there", name, i)
						}
						seen[name][i] = true
					}
					b = b[copy(all[name][lo:hi], b):]
				}
			}
			if len(b) != 0 {
				t.Errorf("%s: %d bytes too many", name, len(b))
			}
		}
	}
	for name, s := range seen {
		if i := slices.Index(s, false); i >= 0 {
			t.Errorf("%s: nobody has byte %d", name, i)
		}
	}
	return all
}

// safetensorsOf reads w back into a file and decodes it.
func safetensorsOf(t *testing.T, w *Model) safetensorsFile {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "x.safetensors"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := w.WriteSafetensors(t.Context(), f); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	return decodeSafetensors(t, b)
}
