package loader

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// TestShards loads all ranks' shards in every way, puts what was read back together, and compares it with the whole model.
func TestShards(t *testing.T) {
	byRule := []ShardRule{mustShardRule(t, `down_exps=rows`)}
	for _, model := range []struct {
		name  string
		m     *gguf.Model
		by    ShardBy
		world int
		rules []ShardRule
	}{
		{"llama", llama(t), ShardTensors, 4, nil},
		{"llama", llama(t), ShardTensors, 1, nil},
		{"llama", llama(t), ShardLayers, 3, nil},
		{"llama", llama(t), ShardLayers, 4, []ShardRule{mustShardRule(t, "token_embd=replicate")}},
		{"fused", fused(t), ShardTensors, 4, byRule},
		{"tiny-llama", openModel(t, sample), ShardTensors, 2, []ShardRule{mustShardRule(t, "attn_output|ffn_down=rows")}},
		{"tiny-llama", openModel(t, sample), ShardLayers, 2, nil},
		{"all-types", openModel(t, "../testdata/gguf/all-types.gguf"), ShardTensors, 2, []ShardRule{mustShardRule(t, "shape=replicate"), mustShardRule(t, ".=experts")}},
	} {
		for _, d := range DTypes() {
			want := wanted(t, model.m, Options{DType: d})
			for _, way := range []struct {
				name string
				load loadFunc
				o    Options
			}{
				{"default", Load, Options{}},
				{"tight", Load, tight},
				{"direct", Load, Options{IO: IODirect, Chunk: 100_000}},
				{"hashed", Load, Options{IO: IOMapped, Hash: true, Chunk: 64 << 10}},
				{"sync", LoadSync, Options{}},
				{"gpu", Load, Options{Dequant: DequantGPU, Chunk: 128 << 10}},
			} {
				if d != Raw && d != F16 && way.o.Chunk != 0 && way.o.Dequant == DequantAuto {
					continue // these differ in how bytes are read, not in what becomes of them
				}
				t.Run(fmt.Sprintf("%s/%v of %d/%v/%s", model.name, model.by, model.world, d, way.name), func(t *testing.T) {
					dev, _ := openDevice(t, amdhip.SoftwareOptions{Poison: true})
					var files []safetensorsFile
					var read, replicated uint64
					for rank := range model.world {
						o := way.o
						o.DType, o.Shard = d, Shard{Rank: rank, World: model.world, By: model.by, Rules: model.rules}
						w, err := way.load(t.Context(), dev, model.m, o)
						if err != nil {
							t.Fatal(err)
						}
						if err := w.Verify(t.Context()); err != nil {
							t.Error(err)
						}
						files = append(files, safetensorsOf(t, w))
						r := w.Report()
						if r.MappedBytes+r.DirectBytes != r.ReadBytes {
							t.Errorf("%d bytes mapped and %d direct, want %d together", r.MappedBytes, r.DirectBytes, r.ReadBytes)
						}
						if r.FetchedBytes < r.DirectBytes {
							t.Errorf("%d bytes fetched for %d", r.FetchedBytes, r.DirectBytes)
						}
						if read += r.ReadBytes; rank > 0 && model.world > 1 {
							replicated += replicatedBytes(w, o.Shard)
						}
						for i, h := range w.Hashes() {
							var buf []byte
							x := &w.plan.Tensors[i]
							if b, err := w.plan.data(t.Context(), &buf, x, 0, int(x.Size)); err != nil || h.Sum != sha256.Sum256(b) {
								t.Errorf("%s: another hash", h.Name)
							}
						}
						mustClose(t, w)
					}
					var whole uint64
					for _, x := range model.m.Tensors() {
						whole += uint64(x.Size)
					}
					if read != whole+replicated {
						t.Errorf("%d bytes read by all, want %d and %d that several ranks have", read, whole, replicated)
					}
					p, err := NewPlan(model.m, Options{DType: d})
					if err != nil {
						t.Fatal(err)
					}
					same(t, p, together(t, files), want)
				})
			}
		}
	}
}

// replicatedBytes is the size in the file of what w has as every rank does.
func replicatedBytes(w *Model, s Shard) (n uint64) {
	for i := range w.plan.Tensors {
		x := &w.plan.Tensors[i]
		_, ruled := s.rule(x.Name)
		if x.Slice == nil && (s.By == ShardTensors || ruled) {
			n += uint64(x.Size)
		}
	}
	return n
}

func mustShardRule(t testing.TB, s string) ShardRule {
	t.Helper()
	r, err := ParseShardRule(s)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestShardDivisions wants tensors divided as their names say.
func TestShardDivisions(t *testing.T) {
	var p *Plan
	for _, x := range []struct {
		m    func(testing.TB) *gguf.Model
		name string
		want string // shape, dimension and ranges of rank 1 of 4
	}{
		{llama, "token_embd.weight", "[256 26] 1 [[26 52]]"}, // 103 rows: one more for the first three
		{nil, "output.weight", "[256 26] 1 [[26 52]]"},
		{nil, "blk.1.attn_q.weight", "[256 16] 1 [[16 32]]"},
		{nil, "blk.1.attn_q.bias", "[16] 0 [[16 32]]"},
		{nil, "blk.1.attn_k.weight", "[256 4] 1 [[4 8]]"},
		{nil, "blk.1.attn_output.weight", "[256 32] 0 [[256 512]]"},
		{nil, "blk.1.attn_output.bias", "whole"},
		{nil, "blk.1.attn_norm.weight", "whole"},
		{nil, "blk.1.ffn_gate.weight", "[256 16] 1 [[16 32]]"},
		{nil, "blk.1.ffn_down.weight", "[256 32] 0 [[256 512]]"},
		{nil, "rope_freqs.weight", "whole"},
		{fused, "blk.0.attn_qkv.weight", "[256 64] 1 [[32 64] [144 160] [208 224]]"},
		{nil, "blk.0.attn_qkv.bias", "[64] 0 [[32 64] [144 160] [208 224]]"},
		{nil, "blk.0.ffn_up.weight", "[256 64] 1 [[32 64] [160 192]]"},
		{nil, "blk.0.ffn_gate_inp.weight", "whole"},
		{nil, "blk.0.ffn_gate_exps.weight", "[256 16 2] 2 [[2 4]]"},
		{nil, "blk.0.ffn_gate_exps.bias", "[16 2] 1 [[2 4]]"},
		{nil, "blk.0.attn_k_b.weight", "[64 32 2] 2 [[2 4]]"},
	} {
		if x.m != nil {
			var err error
			if p, err = NewPlan(x.m(t), Options{Shard: Shard{Rank: 1, World: 4, By: ShardTensors}}); err != nil {
				t.Fatal(err)
			}
		}
		i := slices.IndexFunc(p.Tensors, func(y PlannedTensor) bool { return y.Name == x.name })
		got := "whole"
		if s := p.Tensors[i].Slice; s != nil {
			got = fmt.Sprint(p.Tensors[i].Shape, s.Dim, s.Ranges)
		}
		if got != x.want {
			t.Errorf("%s: %s, want %s", x.name, got, x.want)
		}
	}
}

// TestShardRefused wants shards that cannot be to be refused, and a way out to be named.
func TestShardRefused(t *testing.T) {
	m, f := llama(t), fused(t)
	odd := makeModel(t, map[string]any{"general.architecture": "llama", "llama.attention.head_count": uint32(16)}, []made{
		{"blk.0.attn_output.weight", gguf.Q4_K, []uint64{11008, 16}}, {"blk.0.ffn_gate.weight", gguf.Q4_K, []uint64{256, 11008}},
		{"blk.0.ffn_down.weight", gguf.Q4_K, []uint64{11008, 256}},
	})
	vague := makeModel(t, map[string]any{"general.architecture": "llama"}, []made{
		{"blk.0.attn_q.weight", gguf.F16, []uint64{64, 64}}, {"blk.0.attn_qkv.weight", gguf.F16, []uint64{64, 64}},
	})
	for _, x := range []struct {
		m     *gguf.Model
		shard Shard
		want  string
	}{
		{m, Shard{World: 8, By: ShardTensors}, `"blk.0.attn_k.weight" cannot be divided evenly among 8 ranks: it has 4 key-value heads; for this model, worlds of 1, 2, 4 work, and others may with the shard rule 'attn_[kv]\.=replicate'`},
		{m, Shard{World: 3, By: ShardTensors}, `"blk.0.attn_q.weight"`},
		{m, Shard{World: 5, By: ShardLayers}, "4 layers cannot be divided among 5"},
		{f, Shard{World: 16, By: ShardTensors}, "worlds of 1, 2, 4 work"},
		{odd, Shard{World: 2, By: ShardTensors}, `"blk.0.attn_output.weight" cannot be divided evenly among 2 ranks: it has 43 blocks of 256 in a row; for this model, worlds of 1 work`},
		{odd, Shard{World: 2, By: ShardTensors, Rules: []ShardRule{mustShardRule(t, "attn_output|ffn_down=rows")}}, ""},
		{vague, Shard{World: 2, By: ShardTensors}, `"blk.0.attn_q.weight" cannot be divided among ranks: the metadata says 0 heads`},
		{vague, Shard{World: 2, By: ShardTensors, Rules: []ShardRule{mustShardRule(t, "attn_q\\.=rows")}}, `"blk.0.attn_qkv.weight" cannot be divided among ranks: its 64 rows are q, k and v in one`},
		{m, Shard{World: 2}, "by layer or by tensor"},
		{m, Shard{World: 2, Rank: 2, By: ShardLayers}, "rank 2 of a world of 2"},
		{m, Shard{World: -1, By: ShardLayers}, "a world of -1 ranks"},
		{m, Shard{World: 2, By: ShardLayers, Rules: []ShardRule{mustShardRule(t, "x=rows")}}, "whole tensors"},
		{m, Shard{World: 1 << 20, By: ShardLayers}, "a world of 1048576 ranks"},
		{m, Shard{By: 9}, "shard 9"},
	} {
		_, err := NewPlan(x.m, Options{Shard: x.shard})
		switch {
		case x.want == "" && err != nil:
			t.Errorf("%+v: %v", x.shard, err)
		case x.want != "" && (err == nil || !strings.Contains(err.Error(), x.want) || !errors.Is(err, ErrBadOption)):
			t.Errorf("%+v: %v, want %q", x.shard, err, x.want)
		}
	}
}

func TestParseShard(t *testing.T) {
	for _, s := range []string{"none", "layer", "tensor"} {
		if by, err := ParseShardBy(s); err != nil || by.String() != s {
			t.Errorf("%s: %v, %v", s, by, err)
		}
	}
	if _, err := ParseShardBy("row"); err == nil || !strings.Contains(err.Error(), "none, layer, tensor") {
		t.Errorf("row: %v", err)
	}
	for _, s := range []string{"a=b=rows", `attn_[kv]\.=replicate`, "x=experts", "x=columns"} {
		if r, err := ParseShardRule(s); err != nil || r.String() != s {
			t.Errorf("%s: %v, %v", s, r, err)
		}
	}
	for _, s := range []string{"rows", "=rows", "x=row", "(=rows", ""} {
		if _, err := ParseShardRule(s); err == nil {
			t.Errorf("%q was taken", s)
		}
	}
}
