package readback

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// names are those of f, or the end of the test.
func names(t *testing.T, f *gguf.File) map[string][]plan.HFTensor {
	t.Helper()
	n, err := plan.HFTensors(f)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// export is what WriteSafetensors makes of f on two devices.
func export(t *testing.T, f *gguf.File, s plan.Spec, e Export) file {
	t.Helper()
	out := new(memory)
	if err := e.WriteSafetensors(t.Context(), load(t, f, s, devices(t, 2)...), out); err != nil {
		t.Fatal(err)
	}
	return decode(t, out.b)
}

// asConverter gives rows the order that llama.cpp's converter gives them: heads of two halves become heads of pairs.
func asConverter(b []byte, heads, rows int) []byte {
	row, half := len(b)/rows, rows/heads/2
	var out []byte
	for h := range heads {
		for j := range half {
			for i := range 2 {
				at := (h*2*half + i*half + j) * row
				out = append(out, b[at:at+row]...)
			}
		}
	}
	return out
}

// TestExportsOfHF: the names are those of transformers, and what the converter did is undone.
func TestExportsOfHF(t *testing.T) {
	t.Parallel()
	f := open(t, sample)
	for _, policy := range []plan.Policy{plan.F16, plan.F32, plan.BF16} {
		plain, hf := export(t, f, plan.Spec{Policy: policy}, Export{}), export(t, f, plan.Spec{Policy: policy},
			Export{HF: names(t, f)})
		count := 0
		for name, as := range names(t, f) {
			for _, x := range as {
				if x.Tied {
					continue
				}
				count++
				got, want := hf.bytes(x.Name), plain.bytes(name)
				if x.HeadRows != 0 {
					shape := hf.tensors[x.Name].Shape
					got = asConverter(got, int(shape[0]/x.HeadRows), int(shape[0]))
				}
				if !bytes.Equal(got, want) || len(got) == 0 || !slices.Equal(hf.tensors[x.Name].Shape, plain.tensors[name].Shape) {
					t.Errorf("%v: %s is not %s", policy, x.Name, name)
				}
			}
		}
		if count != len(hf.tensors) || hf.metadata["format"] != "pt" {
			t.Errorf("%d tensors, want %d; metadata %v", len(hf.tensors), count, hf.metadata)
		}
		q, plainQ := hf.bytes("model.layers.0.self_attn.q_proj.weight"), plain.bytes("blk.0.attn_q.weight")
		if bytes.Equal(q, plainQ) {
			t.Error("the rows of q have the order of the GGUF file")
		}
	}
}

// TestExportsOfParts: one tensor becomes several, norms lose what was added to them, and biases are put in order, too.
func TestExportsOfParts(t *testing.T) {
	t.Parallel()
	one := math.Float32bits(1)
	norm := floats(one, math.Float32bits(3), math.Float32bits(1.5), math.Float32bits(0.25))
	for _, x := range []struct {
		arch string
		made []made
		want map[string]string // name: shape
		also func(t *testing.T, d file, f *gguf.File)
	}{
		{
			"phi2",
			[]made{{"blk.0.attn_qkv.bias", gguf.F32, []uint64{8}, nil}, {"blk.0.attn_qkv.weight", gguf.F32, []uint64{4, 8}, nil}},
			map[string]string{
				"model.layers.0.self_attn.q_proj.weight": "[4 4]", "model.layers.0.self_attn.k_proj.weight": "[2 4]",
				"model.layers.0.self_attn.v_proj.weight": "[2 4]", "model.layers.0.self_attn.q_proj.bias": "[4]",
				"model.layers.0.self_attn.k_proj.bias": "[2]", "model.layers.0.self_attn.v_proj.bias": "[2]",
			},
			func(t *testing.T, d file, f *gguf.File) {
				all := d.bytes("model.layers.0.self_attn.q_proj.weight")
				all = append(slices.Clone(all), d.bytes("model.layers.0.self_attn.k_proj.weight")...)
				all = append(all, d.bytes("model.layers.0.self_attn.v_proj.weight")...)
				whole, _ := f.Tensor("blk.0.attn_qkv.weight")
				if !bytes.Equal(all, f.Data(whole)) {
					t.Error("q, k and v together are not the fused tensor")
				}
			},
		},
		{"llama", []made{
			{"blk.3.ffn_gate_exps.weight", gguf.F32, []uint64{4, 3, 2}, nil},
			{"blk.3.attn_k.bias", gguf.F32, []uint64{4}, floats(1, 2, 3, 4)},
			{"rope_freqs.weight", gguf.F32, []uint64{2}, nil},
			{"blk.4.ffn_down.1.weight", gguf.F32, []uint64{2, 2}, nil},
		}, map[string]string{
			"model.layers.3.block_sparse_moe.experts.0.w1.weight": "[3 4]", "model.layers.3.block_sparse_moe.experts.1.w1.weight": "[3 4]",
			"model.layers.3.self_attn.k_proj.bias": "[4]", "model.layers.4.block_sparse_moe.experts.1.w2.weight": "[2 2]",
		}, func(t *testing.T, d file, _ *gguf.File) {
			if got := d.bytes("model.layers.3.self_attn.k_proj.bias"); !bytes.Equal(got, floats(1, 3, 2, 4)) {
				t.Errorf("the bias of k is % x", got)
			}
		}},
		{
			"gemma",
			[]made{{"output_norm.weight", gguf.F32, []uint64{4}, norm}, {"token_embd.weight", gguf.F32, []uint64{4, 5}, nil}},
			map[string]string{"model.norm.weight": "[4]", "model.embed_tokens.weight": "[5 4]"},
			func(t *testing.T, d file, _ *gguf.File) {
				for i, want := range []float32{0, 2, 0.5, -0.75} {
					if got := math.Float32frombits(binary.LittleEndian.Uint32(d.bytes("model.norm.weight")[4*i:])); got != want {
						t.Errorf("element %d of the norm is %v, want %v", i, got, want)
					}
				}
			},
		},
	} {
		heads := map[string]any{
			"general.architecture": x.arch, x.arch + ".attention.head_count": uint32(2), x.arch + ".attention.head_count_kv": uint32(1),
		}
		f := write(t, heads, x.made)
		d := export(t, f, plan.Spec{Policy: plan.F32}, Export{HF: names(t, f)})
		got := make(map[string]string)
		for name, e := range d.tensors {
			got[name] = fmt.Sprint(e.Shape)
		}
		if fmt.Sprint(got) != fmt.Sprint(x.want) {
			t.Errorf("%s: %v, want %v", x.arch, got, x.want)
		}
		x.also(t, d, f)
	}
}

// TestRefusedExportsOfHF: what transformers cannot have, and what names do not fit, writes nothing.
func TestRefusedExportsOfHF(t *testing.T) {
	t.Parallel()
	f := open(t, sample)
	const q = "blk.0.attn_q.weight"
	for name, x := range map[string]struct {
		policy plan.Policy
		spoil  func(map[string][]plan.HFTensor)
		want   error
	}{
		"blocks":    {plan.Raw, func(map[string][]plan.HFTensor) {}, loader.ErrBadOption},
		"no name":   {plan.F16, func(n map[string][]plan.HFTensor) { delete(n, q) }, plan.ErrUnknownNames},
		"odd heads": {plan.F16, func(n map[string][]plan.HFTensor) { n[q] = []plan.HFTensor{{Name: "x", HeadRows: 3}} }, nil},
		"half a part": {plan.F16, func(n map[string][]plan.HFTensor) {
			n[q] = []plan.HFTensor{{Name: "x", Rows: 1}, {Name: "y", First: 1, Rows: 2}}
		}, nil},
		"a huge part":    {plan.F16, func(n map[string][]plan.HFTensor) { n[q] = []plan.HFTensor{{Name: "x", Rows: math.MaxUint64}} }, nil},
		"the same twice": {plan.F16, func(n map[string][]plan.HFTensor) { n[q] = n["blk.1.attn_q.weight"] }, nil},
		"no expert":      {plan.F16, func(n map[string][]plan.HFTensor) { n[q] = []plan.HFTensor{{Name: "x", Experts: true}} }, nil},
		"reserved":       {plan.F16, func(n map[string][]plan.HFTensor) { n[q] = []plan.HFTensor{{Name: "__metadata__"}} }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			n, out := names(t, f), new(memory)
			x.spoil(n)
			err := Export{HF: n}.WriteSafetensors(t.Context(), load(t, f, plan.Spec{Policy: x.policy}, devices(t, 1)...), out)
			if err == nil || x.want != nil && !errors.Is(err, x.want) || out.n != 0 {
				t.Errorf("%v after %d writes", err, out.n)
			}
		})
	}
}

// TestIndex: the index of ranks that have layers names every tensor once, and those of slices are refused.
func TestIndex(t *testing.T) {
	t.Parallel()
	f := open(t, sample)
	for _, e := range []Export{{}, {HF: names(t, f)}} {
		var files []IndexedFile
		for rank := range 3 {
			shard := plan.Shard{By: plan.ShardLayers, Rank: rank, World: 3}
			p, err := plan.New(f, plan.Spec{Shard: shard}, []uint64{1})
			if err != nil {
				t.Fatal(err)
			}
			files = append(files, IndexedFile{fmt.Sprintf("model-%d.safetensors", rank), p})
		}
		var out bytes.Buffer
		if err := e.WriteIndex(&out, files); err != nil {
			t.Fatal(err)
		}
		var index struct {
			Metadata  map[string]uint64
			WeightMap map[string]string `json:"weight_map"`
		}
		if err := json.Unmarshal(out.Bytes(), &index); err != nil {
			t.Fatal(err)
		}
		whole := export(t, f, plan.Spec{}, e)
		sum := uint64(0)
		for name, x := range whole.tensors {
			if sum += x.Offsets[1] - x.Offsets[0]; index.WeightMap[name] == "" {
				t.Errorf("the index lacks %s", name)
			}
		}
		if len(index.WeightMap) != len(whole.tensors) || index.Metadata["total_size"] != sum {
			t.Errorf("%d tensors of %d bytes in the index, want %d of %d", len(index.WeightMap), index.Metadata["total_size"],
				len(whole.tensors), sum)
		}
		files[1] = files[0]
		if err := e.WriteIndex(&out, files); !errors.Is(err, loader.ErrBadOption) || !strings.Contains(err.Error(), "model-0") {
			t.Errorf("a tensor in two files: %v", err)
		}
	}
	p, err := plan.New(sliced(t, false), plan.Spec{Shard: plan.Shard{By: plan.ShardTensors, World: 2}}, []uint64{1})
	if err != nil {
		t.Fatal(err)
	}
	if err := (Export{}).WriteIndex(new(bytes.Buffer), []IndexedFile{{"x", p}}); !errors.Is(err, loader.ErrBadOption) {
		t.Errorf("an index of slices: %v", err)
	}
}
