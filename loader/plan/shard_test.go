package plan

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

func shardRule(t testing.TB, text string) ShardRule {
	t.Helper()
	var r ShardRule
	if err := r.UnmarshalText([]byte(text)); err != nil {
		t.Fatal(err)
	}
	return r
}

// TestShardDivisions wants tensors divided as their names say.
func TestShardDivisions(t *testing.T) {
	t.Parallel()
	type wants struct {
		name string
		want string // shape, dimension and ranges of rank 1 of 4
	}
	check := func(f *gguf.File, all ...wants) {
		t.Helper()
		p := one(t, f, Spec{Shard: Shard{Rank: 1, World: 4, By: ShardTensors}})
		for _, x := range all {
			_, i, ok := p.Find(x.name)
			if !ok {
				t.Fatal(x.name)
			}
			got := "whole"
			if s := p.Groups[0].Tensors[i].Slice; s != nil {
				got = fmt.Sprint(p.Groups[0].Tensors[i].Shape, s.Dim, s.Ranges)
			}
			if got != x.want {
				t.Errorf("%s: %s, want %s", x.name, got, x.want)
			}
		}
	}
	check(llama(t),
		wants{"token_embd.weight", "[256 26] 1 [[26 52]]"}, // 103 rows: one more for the first three
		wants{"output.weight", "[256 26] 1 [[26 52]]"},
		wants{"blk.1.attn_q.weight", "[256 16] 1 [[16 32]]"},
		wants{"blk.1.attn_q.bias", "[16] 0 [[16 32]]"},
		wants{"blk.1.attn_k.weight", "[256 4] 1 [[4 8]]"},
		wants{"blk.1.attn_output.weight", "[256 32] 0 [[256 512]]"},
		wants{"blk.1.attn_output.bias", "whole"},
		wants{"blk.1.attn_norm.weight", "whole"},
		wants{"blk.1.ffn_gate.weight", "[256 16] 1 [[16 32]]"},
		wants{"blk.1.ffn_down.weight", "[256 32] 0 [[256 512]]"},
		wants{"rope_freqs.weight", "whole"},
	)
	check(fused(t),
		wants{"blk.0.attn_qkv.weight", "[256 64] 1 [[32 64] [144 160] [208 224]]"},
		wants{"blk.0.attn_qkv.bias", "[64] 0 [[32 64] [144 160] [208 224]]"},
		wants{"blk.0.ffn_up.weight", "[256 64] 1 [[32 64] [160 192]]"},
		wants{"blk.0.ffn_gate_inp.weight", "whole"},
		wants{"blk.0.ffn_gate_exps.weight", "[256 16 2] 2 [[2 4]]"},
		wants{"blk.0.ffn_gate_exps.bias", "[16 2] 1 [[2 4]]"},
		wants{"blk.0.attn_k_b.weight", "[64 32 2] 2 [[2 4]]"},
	)
}

// TestShardRefused wants shards that cannot be to be refused, and a way out to be named.
func TestShardRefused(t *testing.T) {
	t.Parallel()
	m, f := llama(t), fused(t)
	odd := described(t, map[string]any{"general.architecture": "llama", "llama.attention.head_count": uint32(16)}, []made{
		{"blk.0.attn_output.weight", gguf.Q4_K, []uint64{11008, 16}},
		{"blk.0.ffn_gate.weight", gguf.Q4_K, []uint64{256, 11008}},
		{"blk.0.ffn_down.weight", gguf.Q4_K, []uint64{11008, 256}},
	})
	vague := described(t, map[string]any{"general.architecture": "llama"}, []made{
		{"blk.0.attn_q.weight", gguf.F16, []uint64{64, 64}}, {"blk.0.attn_qkv.weight", gguf.F16, []uint64{64, 64}},
	})
	byRows := []ShardRule{shardRule(t, "attn_output|ffn_down=rows")}
	for _, x := range []struct {
		f     *gguf.File
		world int
		rules []ShardRule
		want  string
	}{
		{m, 8, nil, `"blk.0.attn_k.weight" cannot be divided evenly among 8 ranks: it has 4 key-value heads; ` +
			`for this model, worlds of 1, 2, 4 work, and others may with the shard rule 'attn_[kv]\.=replicate'`},
		{m, 3, nil, `"blk.0.attn_q.weight"`},
		{f, 16, nil, "worlds of 1, 2, 4 work"},
		{odd, 2, nil, `"blk.0.attn_output.weight" cannot be divided evenly among 2 ranks: it has 43 blocks of 256 ` +
			`in a row; for this model, worlds of 1 work`},
		{odd, 2, byRows, ""},
		{vague, 2, nil, `"blk.0.attn_q.weight" cannot be divided among ranks: the metadata says 0 heads`},
		{
			vague, 2,
			[]ShardRule{shardRule(t, `attn_q\.=rows`)},
			`"blk.0.attn_qkv.weight" cannot be divided among ranks: its 64 rows are q, k and v in one`,
		},
	} {
		s := Shard{World: x.world, By: ShardTensors, Rules: x.rules}
		_, err := New(x.f, Spec{Shard: s}, []uint64{1})
		switch {
		case x.want == "" && err != nil:
			t.Errorf("%+v: %v", s, err)
		case x.want != "" && (err == nil || !strings.Contains(err.Error(), x.want) || !errors.Is(err, ErrBadOption)):
			t.Errorf("%+v: %v, want %q", s, err, x.want)
		}
	}
}

// TestShardRules: the first rule that matches comes before what a name says, also with layers.
func TestShardRules(t *testing.T) {
	t.Parallel()
	var all []made
	for _, name := range []string{"token_embd", "blk.0.ffn_up", "blk.1.ffn_up", "blk.2.ffn_up"} {
		all = append(all, made{name + ".weight", gguf.F32, []uint64{64, 64}})
	}
	f := described(t, map[string]any{"general.architecture": "x"}, all)
	rules := []ShardRule{shardRule(t, `blk\.0=replicate`), shardRule(t, `blk\.[01]=columns`)}
	p := one(t, f, Spec{Shard: Shard{World: 2, By: ShardTensors, Rules: rules}})
	for i, want := range []int{1, -1, 0, 1} { // dimensions
		x := p.Tensors()[i]
		if got := x.Slice; (got == nil) != (want < 0) || got != nil && got.Dim != want {
			t.Errorf("%s is divided as %+v, want dimension %d", x.Name, got, want)
		}
	}
	layers := Shard{Rank: 2, World: 3, By: ShardLayers, Rules: []ShardRule{shardRule(t, "token_embd=replicate")}}
	if _, _, ok := one(t, f, Spec{Shard: layers}).Find("token_embd.weight"); !ok {
		t.Error("the last rank does not have what every rank is to have")
	}
}

// TestCoverage: ranges that leave a gap, or overlap, are found.
func TestCoverage(t *testing.T) {
	t.Parallel()
	for _, x := range []struct {
		d        division
		n, world uint64
		ok       bool
	}{
		{division{}, 12, 3, true},
		{division{}, 12, 1, true},
		{division{}, 13, 3, false},
		{division{uneven: true}, 13, 3, true},
		{division{uneven: true}, 2, 3, true},
		{division{fused: []uint64{6, 3, 3}}, 12, 3, true},
		{division{fused: []uint64{6, 3, 3}}, 12, 1, true},
		{division{fused: []uint64{6, 3, 4}}, 12, 1, false},
		{division{fused: []uint64{7, 3, 3}}, 13, 3, false},
		{division{fused: []uint64{6, 3, 2}}, 11, 3, false},
	} {
		if err := x.d.covers(x.n, x.world); (err == nil) != x.ok {
			t.Errorf("%+v: %d among %d: %v", x.d, x.n, x.world, err)
		}
	}
}
