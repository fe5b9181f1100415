package plan

import (
	"errors"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// namesOf are the names of a model that has these tensors, whose head counts are 4 and 2.
func namesOf(t *testing.T, arch string, tensors ...string) (map[string][]HFTensor, error) {
	t.Helper()
	all := make([]made, 0, len(tensors))
	for _, name := range tensors {
		shape := []uint64{8, 16}
		if strings.HasSuffix(name, "bias") || strings.Contains(name, "norm") {
			shape = shape[1:]
		}
		all = append(all, made{name, gguf.F32, shape})
	}
	return HFTensors(described(t, map[string]any{
		"general.architecture": arch, arch + ".attention.head_count": uint32(4), arch + ".attention.head_count_kv": uint32(2),
	}, all))
}

// TestHFTensors compares with what llama.cpp's converter makes of the names of transformers.
func TestHFTensors(t *testing.T) {
	t.Parallel()
	const layer = "model.layers.7."
	for _, x := range []struct {
		arch, tensor string
		want         HFTensor
	}{
		{"llama", "token_embd.weight", HFTensor{Name: "model.embed_tokens.weight"}},
		{"llama", "output.weight", HFTensor{Name: "lm_head.weight"}},
		{"llama", "blk.7.attn_q.weight", HFTensor{Name: layer + "self_attn.q_proj.weight", HeadRows: 4}},
		{"llama", "blk.7.attn_k.bias", HFTensor{Name: layer + "self_attn.k_proj.bias", HeadRows: 8}},
		{"llama", "blk.7.attn_v.weight", HFTensor{Name: layer + "self_attn.v_proj.weight"}},
		{"llama", "blk.7.ffn_norm.weight", HFTensor{Name: layer + "post_attention_layernorm.weight"}},
		{"llama", "blk.7.ffn_up_exps.weight", HFTensor{Name: layer + "block_sparse_moe.experts.{}.w3.weight", Experts: true}},
		{"llama", "blk.7.ffn_gate.5.weight", HFTensor{Name: layer + "block_sparse_moe.experts.5.w1.weight"}},
		{"llama", "blk.7.ffn_gate_inp.weight", HFTensor{Name: layer + "block_sparse_moe.gate.weight"}},
		{"qwen2", "blk.7.attn_q.bias", HFTensor{Name: layer + "self_attn.q_proj.bias"}},
		{"qwen3", "blk.7.attn_q_norm.weight", HFTensor{Name: layer + "self_attn.q_norm.weight"}},
		{"qwen3moe", "blk.7.ffn_down_exps.weight", HFTensor{Name: layer + "mlp.experts.{}.down_proj.weight", Experts: true}},
		{"gemma", "blk.7.ffn_norm.weight", HFTensor{Name: layer + "post_attention_layernorm.weight", Add: -1}},
		{"gemma2", "blk.7.ffn_norm.weight", HFTensor{Name: layer + "pre_feedforward_layernorm.weight", Add: -1}},
		{"gemma2", "blk.7.post_ffw_norm.weight", HFTensor{Name: layer + "post_feedforward_layernorm.weight", Add: -1}},
		{"gemma3", "blk.7.attn_k_norm.weight", HFTensor{Name: layer + "self_attn.k_norm.weight", Add: -1}},
		{"gemma3", "blk.7.attn_k.weight", HFTensor{Name: layer + "self_attn.k_proj.weight"}},
		{"phi2", "output_norm.bias", HFTensor{Name: "model.final_layernorm.bias"}},
		{"phi2", "blk.7.ffn_up.bias", HFTensor{Name: layer + "mlp.fc1.bias"}},
		{"phi3", "blk.7.attn_qkv.weight", HFTensor{Name: layer + "self_attn.qkv_proj.weight"}},
		{"phi3", "blk.7.ffn_up.weight", HFTensor{Name: layer + "mlp.gate_up_proj.weight"}},
	} {
		n, err := namesOf(t, x.arch, x.tensor, "output_norm.weight")
		if err != nil || len(n[x.tensor]) == 0 || n[x.tensor][0] != x.want {
			t.Errorf("%s of %s: %+v, %v; want %+v", x.tensor, x.arch, n[x.tensor], err, x.want)
		}
	}
}

// TestTiedAndLeftOut: an embedding that is the output, too, has both names, and what transformers computes has none.
func TestTiedAndLeftOut(t *testing.T) {
	t.Parallel()
	n, err := namesOf(t, "llama", "token_embd.weight", "rope_freqs.weight")
	if err != nil {
		t.Fatal(err)
	}
	if e := n["token_embd.weight"]; len(e) != 2 || e[1] != (HFTensor{Name: "lm_head.weight", Tied: true}) {
		t.Errorf("a tied embedding: %+v", e)
	}
	if x, ok := n["rope_freqs.weight"]; !ok || len(x) != 0 {
		t.Errorf("rope_freqs: %+v, %v", x, ok)
	}
	n, err = namesOf(t, "llama", "token_embd.weight", "output.weight")
	if err != nil || len(n["token_embd.weight"]) != 1 {
		t.Errorf("an embedding of its own: %+v, %v", n, err)
	}
}

// TestUnknownNames: nothing is guessed.
func TestUnknownNames(t *testing.T) {
	t.Parallel()
	for _, x := range [][2]string{
		{"mamba", "token_embd.weight"},
		{"llama", "blk.0.ssm_a.weight"},
		{"llama", "blk.0.attn_q.scale"},
		{"llama", "x"},
		{"llama", "v.blk.0.attn_q.weight"},
		{"qwen2", "blk.0.ffn_gate.1.weight"},
		{"gemma", "blk.0.post_ffw_norm.weight"},
	} {
		if n, err := namesOf(t, x[0], x[1]); !errors.Is(err, ErrUnknownNames) {
			t.Errorf("%s of %s: %v, %v", x[1], x[0], n, err)
		}
	}
	odd := []made{{"blk.0.attn_q.weight", gguf.F32, []uint64{2, 6}}}
	f := described(t, map[string]any{"general.architecture": "llama", "llama.attention.head_count": uint32(2)}, odd)
	if _, err := HFTensors(f); !errors.Is(err, ErrUnknownNames) {
		t.Errorf("heads of three rows: %v", err)
	}
	if _, err := HFTensors(described(t, map[string]any{"general.architecture": "llama"}, odd)); !errors.Is(err, ErrUnknownNames) {
		t.Errorf("no number of heads: %v", err)
	}
}
