package plan

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"regexp"
	"slices"
	"strings"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// ErrUnknownNames is matched by the error of HFTensors for a model whose names in Hugging Face's transformers are not
// known.
var ErrUnknownNames = errors.New("no names of transformers are known")

// HFTensor says what a tensor of a GGUF file, or a part of one, is in a checkpoint of Hugging Face's transformers, and
// how to undo what llama.cpp's converter did to it. Rows are indices of the slowest dimension. The JSON is part of the
// protocol of package loader/hold.
type HFTensor struct {
	// Name is the tensor's there. With Experts it has "{}" where the number of the expert belongs.
	Name string `json:"name"`
	// Experts: every row is a tensor of its own, which lacks the slowest dimension.
	Experts bool `json:"experts,omitempty"`
	// First and Rows are the part that this is, of a tensor that has several. Rows is 0 for all.
	First uint64 `json:"first,omitempty"`
	Rows  uint64 `json:"rows,omitempty"`
	// HeadRows is the number of rows of an attention head whose order differs: row 2j+i of a head in the GGUF file is row
	// i*HeadRows/2+j of the head there, for i of 0 and 1. It is 0 where the order is the same.
	HeadRows uint64 `json:"head_rows,omitempty"`
	// Add is to be added to every element.
	Add float32 `json:"add,omitempty"`
	// Tied: checkpoints do not have it, since it is another name of a tensor that they have.
	Tied bool `json:"tied,omitempty"`
}

// hfFamily is how models of one architecture are called. Names are without ".weight" or ".bias"; those of layers are
// behind "blk.N." and "model.layers.N.". An empty name is a tensor that transformers computes itself.
type hfFamily struct {
	top, layer map[string]string
	permuted   bool // the rows of attn_q and attn_k
	shifted    bool // norms have had 1 added
}

// hfNone is the name of what transformers computes itself.
const hfNone = ""

var (
	hfTop = map[string]string{
		"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head", "rope_freqs": hfNone,
		"rope_factors_long": hfNone, "rope_factors_short": hfNone,
	}
	hfPhiTop  = with(hfTop, map[string]string{"output_norm": "model.final_layernorm"})
	hfDefault = map[string]string{
		"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
		"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
		"attn_output": "self_attn.o_proj", "attn_rot_embd": hfNone, "rope_freqs": hfNone,
		"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
	}
	hfHeadNorms = map[string]string{"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
	hfMixtral   = map[string]string{
		"ffn_gate_inp": "block_sparse_moe.gate", "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
		"ffn_down_exps": "block_sparse_moe.experts.{}.w2", "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
	}
	hfQwenExperts = map[string]string{
		"ffn_gate_inp": "mlp.gate", "ffn_gate_exps": "mlp.experts.{}.gate_proj",
		"ffn_down_exps": "mlp.experts.{}.down_proj", "ffn_up_exps": "mlp.experts.{}.up_proj",
	}
	hfSandwich = map[string]string{
		"post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
		"post_ffw_norm": "post_feedforward_layernorm",
	}
	hfPhi2 = map[string]string{
		"attn_norm": "input_layernorm", "attn_qkv": "self_attn.{q,k,v}_proj", "attn_q": "self_attn.q_proj",
		"attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.dense",
		"ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2",
	}
	hfPhi3 = map[string]string{"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
)

// hfFamilies are the architectures whose names are known, by what GGUF calls them. Models of Mistral and Mixtral call
// themselves llama.
var hfFamilies = map[string]hfFamily{
	"llama":    {top: hfTop, layer: with(hfDefault, hfMixtral), permuted: true},
	"mistral3": {top: hfTop, layer: hfDefault, permuted: true},
	"qwen2":    {top: hfTop, layer: hfDefault},
	"qwen3":    {top: hfTop, layer: with(hfDefault, hfHeadNorms)},
	"qwen3moe": {top: hfTop, layer: with(hfDefault, hfHeadNorms, hfQwenExperts)},
	"gemma":    {top: hfTop, layer: hfDefault, shifted: true},
	"gemma2":   {top: hfTop, layer: with(hfDefault, hfSandwich), shifted: true},
	"gemma3":   {top: hfTop, layer: with(hfDefault, hfSandwich, hfHeadNorms), shifted: true},
	"phi2":     {top: hfPhiTop, layer: hfPhi2},
	"phi3":     {top: hfTop, layer: with(hfDefault, hfPhi3)},
}

// with is the union of maps; what is in several is as the last one has it.
func with(all ...map[string]string) map[string]string {
	sum := make(map[string]string)
	for _, m := range all {
		maps.Copy(sum, m)
	}
	return sum
}

// oneExpert matches the tensors of a single expert, which old files of Mixtral have.
var oneExpert = regexp.MustCompile(`^(ffn_(?:gate|up|down))\.(\d+)$`)

// HFTensors returns what each tensor of f is in transformers, by its name in f; nothing for one that transformers
// computes itself. The error matches ErrUnknownNames when the architecture, or a tensor of it, is not known.
func HFTensors(f *gguf.File) (map[string][]HFTensor, error) {
	arch := f.Architecture()
	family, ok := hfFamilies[arch]
	if !ok {
		return nil, fmt.Errorf("architecture %.100q: %w: those of %s are", arch, ErrUnknownNames,
			strings.Join(slices.Sorted(maps.Keys(hfFamilies)), ", "))
	}
	h := hfModel{hfFamily: family, arch: arch, metadata: f.Metadata()}
	all := f.Tensors()
	_, untied := f.Tensor("output.weight")
	names := make(map[string][]HFTensor, len(all))
	for i := range all {
		as, err := h.tensor(&all[i])
		if err != nil {
			return nil, fmt.Errorf("tensor %.100q of architecture %q: %w", all[i].Name, arch, err)
		}
		if all[i].Name == "token_embd.weight" && !untied {
			as = append(as, HFTensor{Name: "lm_head.weight", Tied: true})
		}
		names[all[i].Name] = as
	}
	return names, nil
}

// hfModel is a model whose tensors are named.
type hfModel struct {
	hfFamily
	arch     string
	metadata *gguf.Metadata
}

// tensor says what t is.
func (h *hfModel) tensor(t *gguf.Tensor) ([]HFTensor, error) {
	dot := strings.LastIndexByte(t.Name, '.')
	if dot < 0 || t.Name[dot:] != ".weight" && t.Name[dot:] != ".bias" {
		return nil, ErrUnknownNames
	}
	name, suffix := t.Name[:dot], t.Name[dot:]
	if len(t.Shape) == 0 {
		return nil, ErrUnknownNames
	}
	prefix, number, inLayer := layerOf(t.Name)
	if inLayer && prefix != "" {
		return nil, ErrUnknownNames // of another stack of layers
	}
	table, before := h.top, ""
	if inLayer {
		table, before = h.layer, fmt.Sprintf("model.layers.%d.", number)
		name = strings.TrimPrefix(name, fmt.Sprintf("blk.%d.", number))
		if m := oneExpert.FindStringSubmatch(name); m != nil && table[m[1]+"_exps"] != "" {
			return []HFTensor{{Name: before + strings.Replace(table[m[1]+"_exps"], "{}", m[2], 1) + suffix}}, nil
		}
	}
	as, ok := table[name]
	switch {
	case !ok:
		return nil, ErrUnknownNames
	case as == hfNone:
		return nil, nil
	case strings.Contains(as, "{q,k,v}"):
		return h.fused(t, before+as+suffix)
	}
	x := HFTensor{Name: before + as + suffix, Experts: strings.Contains(as, "{}")}
	if h.shifted && strings.HasSuffix(name, "norm") {
		x.Add = -1
	}
	var err error
	if h.permuted && (name == "attn_q" || name == "attn_k") {
		x.HeadRows, err = h.headRows(t, name == "attn_k")
	}
	return []HFTensor{x}, err
}

// heads returns the number of heads, of keys and values or of queries.
func (h *hfModel) heads(kv bool) (uint64, error) {
	n, ok := h.metadata.Uint(h.arch + ".attention.head_count")
	if kv {
		if m, has := h.metadata.Uint(h.arch + ".attention.head_count_kv"); has {
			n, ok = m, true
		}
	}
	if !ok || n == 0 || n > math.MaxUint32 {
		return 0, fmt.Errorf("%w: the file does not say how many heads it has", ErrUnknownNames)
	}
	return n, nil
}

// headRows is the number of rows of each head of t, which are in pairs.
func (h *hfModel) headRows(t *gguf.Tensor, kv bool) (uint64, error) {
	n, err := h.heads(kv)
	if err != nil {
		return 0, err
	}
	rows := t.Shape[len(t.Shape)-1]
	if rows%(2*n) != 0 {
		return 0, fmt.Errorf("%w: %d rows are not those of %d heads", ErrUnknownNames, rows, n)
	}
	return rows / n, nil
}

// fused divides a tensor that has the rows of queries, keys and values, one behind the other.
func (h *hfModel) fused(t *gguf.Tensor, name string) ([]HFTensor, error) {
	q, err := h.heads(false)
	if err != nil {
		return nil, err
	}
	kv, err := h.heads(true)
	if err != nil {
		return nil, err
	}
	rows := t.Shape[len(t.Shape)-1]
	if rows == 0 || rows%(q+2*kv) != 0 {
		return nil, fmt.Errorf("%w: %d rows are not those of %d and twice %d heads", ErrUnknownNames, rows, q, kv)
	}
	each := rows / (q + 2*kv)
	var parts []HFTensor
	first := uint64(0)
	for i, n := range []uint64{q, kv, kv} {
		parts = append(parts, HFTensor{
			Name: strings.Replace(name, "{q,k,v}", "qkv"[i:i+1], 1), First: first, Rows: n * each,
		})
		first += n * each
	}
	return parts, nil
}
