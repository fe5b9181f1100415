package main

import (
	"fmt"
	"strings"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// shape is the architecture of a llama model. It prints as its name.
type shape struct {
	name    string
	context uint32 // tokens
	width   uint64 // embedding length
	layers  int
	ffn     uint64 // feed-forward length
	heads   uint64
	kvHeads uint64
	vocab   int
}

// presets are the shapes that synth makes. Every row length is a multiple of 256, the largest block, so that each type fits
// each matrix.
var presets = []shape{
	{name: "tiny", context: 512, width: 256, layers: 2, ffn: 512, heads: 4, kvHeads: 2, vocab: 512}, // for tests
	{name: "llama-1b", context: 2048, width: 2048, layers: 22, ffn: 5632, heads: 32, kvHeads: 4, vocab: 32000},
	{name: "llama-7b", context: 4096, width: 4096, layers: 32, ffn: 11008, heads: 32, kvHeads: 32, vocab: 32000},
	{name: "llama-70b", context: 4096, width: 8192, layers: 80, ffn: 28672, heads: 64, kvHeads: 8, vocab: 32000},
	// For tests of shards: four ranks have each a layer, a block of every row, a head of k and v; the vocabulary is not so even.
	{name: "small", context: 512, width: 1024, layers: 4, ffn: 1024, heads: 16, kvHeads: 4, vocab: 1003},
}

func (s shape) String() string { return s.name }

// presetNames lists the words that --preset takes.
func presetNames() string {
	var names []string
	for _, s := range presets {
		names = append(names, s.name)
	}
	return strings.Join(names, ", ")
}

func parsePreset(name string) (shape, error) {
	for _, s := range presets {
		if s.name == name {
			return s, nil
		}
	}
	return shape{}, fmt.Errorf("allowed are %s", presetNames())
}

// synthTensor is a tensor to be made up.
type synthTensor struct {
	name  string
	typ   gguf.Type
	shape []uint64 // ggml's order
	norm  bool
}

// weights returns what makes up the tensor's bytes.
func (t *synthTensor) weights(seed uint64) *weights {
	if t.norm {
		return newNormWeights(seed)
	}
	return newWeights(t.typ, seed)
}

// bytes is the tensor's size.
func (t *synthTensor) bytes() int64 {
	elems := uint64(1)
	for _, n := range t.shape {
		elems *= n
	}
	size, _ := t.typ.Bytes(elems) // the presets' rows are whole blocks and far from an overflow
	return int64(size)
}

// tensors lists the model's tensors under llama.cpp's names.
func (m *synthModel) tensors() []synthTensor {
	s := m.shape
	kv := s.width / s.heads * s.kvHeads
	var all []synthTensor
	matrix := func(layer int, name string, cols, rows uint64) {
		full := name + ".weight"
		if layer >= 0 {
			full = fmt.Sprintf("blk.%d.%s.weight", layer, name)
		}
		all = append(all, synthTensor{name: full, typ: m.types.pick(s, layer, name), shape: []uint64{cols, rows}})
	}
	norm := func(name string) {
		all = append(all, synthTensor{name: name, typ: gguf.F32, shape: []uint64{s.width}, norm: true})
	}
	matrix(-1, "token_embd", s.width, uint64(s.vocab))
	for l := range s.layers {
		norm(fmt.Sprintf("blk.%d.attn_norm.weight", l))
		matrix(l, "attn_q", s.width, s.width)
		matrix(l, "attn_k", s.width, kv)
		matrix(l, "attn_v", s.width, kv)
		matrix(l, "attn_output", s.width, s.width)
		norm(fmt.Sprintf("blk.%d.ffn_norm.weight", l))
		matrix(l, "ffn_gate", s.width, s.ffn)
		matrix(l, "ffn_up", s.width, s.ffn)
		matrix(l, "ffn_down", s.ffn, s.width)
	}
	norm("output_norm.weight")
	matrix(-1, "output", s.width, uint64(s.vocab))
	return all
}

// declare sets the metadata, under the keys of a real model, and declares the tensors. The writer keeps the first error.
func (m *synthModel) declare(w *gguf.Writer, tensors []synthTensor) {
	tokens, scores, types := vocabulary(m.vocab)
	for _, kv := range []struct {
		key   string
		value any
	}{
		{"general.architecture", "llama"},
		{"general.type", "model"},
		{"general.name", fmt.Sprintf("synthetic %v %v, seed %d", m.shape, m.types, m.seed)},
		{"general.quantization_version", uint32(2)},
		{"llama.block_count", uint32(m.layers)},
		{"llama.context_length", m.context},
		{"llama.embedding_length", uint32(m.width)},
		{"llama.feed_forward_length", uint32(m.ffn)},
		{"llama.attention.head_count", uint32(m.heads)},
		{"llama.attention.head_count_kv", uint32(m.kvHeads)},
		{"llama.attention.layer_norm_rms_epsilon", float32(1e-5)},
		{"llama.rope.dimension_count", uint32(m.width / m.heads)},
		{"llama.rope.freq_base", float32(10000)},
		{"llama.vocab_size", uint32(m.vocab)},
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
		_ = w.AddTensor(t.name, t.typ, t.shape...)
	}
}

// synthTypes is the value of --type: which type a matrix gets by its layer (-1: outside the layers) and its name. It prints
// as its name.
type synthTypes struct {
	name string
	pick func(s shape, layer int, name string) gguf.Type
}

// mixQ4KM is the mix of types that llama.cpp calls Q4_K_M.
var mixQ4KM = synthTypes{"q4_k_m", pickQ4KM}

func (t synthTypes) String() string { return t.name }

func parseSynthTypes(name string) (synthTypes, error) {
	if strings.EqualFold(name, mixQ4KM.name) {
		return mixQ4KM, nil
	}
	t, err := gguf.ParseType(name)
	if err != nil || t.Integer() {
		allowed := []string{mixQ4KM.name}
		for _, t := range gguf.Types() {
			if !t.Integer() {
				allowed = append(allowed, strings.ToLower(t.String()))
			}
		}
		return synthTypes{}, fmt.Errorf("allowed are %s; integer types hold no weights", strings.Join(allowed, ", "))
	}
	return synthTypes{strings.ToLower(name), func(shape, int, string) gguf.Type { return t }}, nil
}

// pickQ4KM spends more bits where llama.cpp's Q4_K_M does: on the output, and on attn_v and ffn_down in the first and the
// last eighth of the layers and every third one between. The 70B model gives the rest of attn_v Q5_K, because it is small
// there: eight heads share it.
func pickQ4KM(s shape, layer int, name string) gguf.Type {
	eighth := s.layers / 8
	important := layer < eighth || layer >= 7*s.layers/8 || (layer-eighth)%3 == 2
	switch {
	case name == "output":
		return gguf.Q6_K
	case (name == "attn_v" || name == "ffn_down") && important:
		return gguf.Q6_K
	case name == "attn_v" && s.name == "llama-70b":
		return gguf.Q5_K
	}
	return gguf.Q4_K
}

// Token types of tokenizer.ggml.token_type.
const (
	tokenNormal  = 1
	tokenUnknown = 2
	tokenControl = 3
	tokenByte    = 6
)

// vocabulary makes up the tokens of a SentencePiece tokenizer: three special ones, the 256 bytes, and words.
func vocabulary(n int) (tokens []string, scores []float32, types []int32) {
	add := func(token string, typ int32) {
		tokens = append(tokens, token)
		scores = append(scores, -float32(len(scores)))
		types = append(types, typ)
	}
	add("<unk>", tokenUnknown)
	add("<s>", tokenControl)
	add("</s>", tokenControl)
	for b := range 256 {
		add(fmt.Sprintf("<0x%02X>", b), tokenByte)
	}
	for i := 0; len(tokens) < n; i++ {
		add(word(i), tokenNormal)
	}
	return tokens, scores, types
}

// word returns the i-th made-up word: the digits of i as syllables. Every other word starts with the mark of a space.
func word(i int) string {
	const consonants, vowels = "bdfgklmnprstvz", "aeiou"
	var b strings.Builder
	if i%2 == 0 {
		b.WriteString("\u2581")
	}
	for i /= 2; ; i = i/(len(consonants)*len(vowels)) - 1 {
		digit := i % (len(consonants) * len(vowels))
		b.WriteByte(consonants[digit/len(vowels)])
		b.WriteByte(vowels[digit%len(vowels)])
		if i < len(consonants)*len(vowels) {
			return b.String()
		}
	}
}
