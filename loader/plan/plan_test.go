package plan

import (
	"errors"
	"math"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

func TestRulesAndPolicies(t *testing.T) {
	t.Parallel()
	f := openFile(t, sample)
	rules := []Rule{
		{regexp.MustCompile(`norm`), F32},
		{regexp.MustCompile(`^blk\.0\.`), Raw},
		{regexp.MustCompile(`attn`), BF16},
	}
	p := one(t, f, Spec{Rules: rules})
	rules[0].Policy = Raw // a plan does not change with what it was made from
	if p.Spec.Rules[0].Policy != F32 {
		t.Error("the plan shares its rules with the caller")
	}
	for _, x := range p.Tensors() {
		want := gguf.F16
		switch {
		case strings.Contains(x.Name, "norm"):
			want = gguf.F32
		case strings.HasPrefix(x.Name, "blk.0."):
			want = x.Type
		case strings.Contains(x.Name, "attn"):
			want = gguf.BF16
		}
		if x.Target != want {
			t.Errorf("%s (%v) becomes %v, want %v", x.Name, x.Type, x.Target, want)
		}
	}
	for _, policy := range Policies() {
		if policy.Target(gguf.I32) != gguf.I32 {
			t.Errorf("%v converts integers", policy)
		}
	}
}

func TestSelection(t *testing.T) {
	t.Parallel()
	f := openFile(t, sample)
	p := one(t, f, Spec{Tensors: regexp.MustCompile(`^blk\.2\.`)})
	if p.Len() == 0 || p.Len() == len(f.Tensors()) || p.ModelTensors != len(f.Tensors()) {
		t.Errorf("%d of %d tensors are selected", p.Len(), p.ModelTensors)
	}
	for _, x := range p.Tensors() {
		if !strings.HasPrefix(x.Name, "blk.2.") {
			t.Errorf("%s is selected", x.Name)
		}
	}
	_, err := New(f, Spec{Tensors: regexp.MustCompile(`nothing`)}, []uint64{1})
	if err == nil || !strings.Contains(err.Error(), `"nothing"`) {
		t.Errorf("a selection without tensors: %v", err)
	}
}

// TestLayout wants tensors aligned, inside of their allocation, apart from each other and in file order.
func TestLayout(t *testing.T) {
	t.Parallel()
	f := openFile(t, sample)
	for _, policy := range Policies() {
		p := one(t, f, Spec{Policy: policy})
		g := &p.Groups[0]
		var end uint64
		arena := 0
		for i := range g.Tensors {
			x := &g.Tensors[i]
			if x.Arena != arena {
				arena, end = x.Arena, 0
			}
			if x.DeviceOffset%Align != 0 || x.DeviceOffset < end || x.DeviceOffset+x.Bytes > g.Arenas[x.Arena] {
				t.Errorf("%v: %s at %d, %d bytes, in an allocation of %d; the one before ends at %d", policy, x.Name,
					x.DeviceOffset, x.Bytes, g.Arenas[x.Arena], end)
			}
			end = x.DeviceOffset + x.Bytes
			if n, k, ok := p.Find(x.Name); !ok || n != 0 || k != i || p.Tensors()[i] != x {
				t.Errorf("%s is found as %d in group %d, %v", x.Name, k, n, ok)
			}
		}
		if p.DeviceBytes() != g.DeviceBytes || p.ReadBytes() != g.ReadBytes || p.TensorBytes() > g.DeviceBytes {
			t.Errorf("%v: sums of %d, %d and %d bytes", policy, p.DeviceBytes(), p.ReadBytes(), p.TensorBytes())
		}
	}
}

func TestArenas(t *testing.T) {
	t.Parallel()
	var all []made
	for i, n := range []uint64{3 << 30, 2 << 30, 5 << 30, 1, 1} {
		all = append(all, made{string(rune('a' + i)), gguf.I8, []uint64{n}})
	}
	p := one(t, described(t, nil, all), Spec{})
	g := &p.Groups[0]
	if want := []uint64{3 << 30, 2 << 30, 5 << 30, 2 * Align}; !slices.Equal(g.Arenas, want) {
		t.Errorf("allocations %v, want %v", g.Arenas, want)
	}
	for _, c := range g.Cut(CutOptions{Bytes: 16 << 20}) {
		if c.Offset+uint64(c.Bytes) > g.Arenas[c.Arena] {
			t.Fatalf("a chunk of %d bytes at %d leaves allocation %d", c.Bytes, c.Offset, c.Arena)
		}
	}
}

// TestOverflow: sizes that overflow only once they are converted, or only together, are refused wherever tensors go.
func TestOverflow(t *testing.T) {
	t.Parallel()
	layer := func(name string, elems uint64) made { return made{name, gguf.IQ1_S, []uint64{elems}} }
	const large = 1 << 60 // elements: 2^62 bytes as F32, 2^57.6 in the file
	alone := described(t, nil, []made{layer("blk.0.x", 1<<61)})
	together := described(t, nil, []made{
		layer("blk.0.x", large), layer("blk.1.x", large), layer("blk.2.x", large), layer("blk.3.x", large),
		layer("blk.4.x", large),
	})
	for _, f := range []*gguf.File{alone, together} {
		for _, free := range [][]uint64{{1}, {1, 1, 1}} {
			for _, s := range []Spec{
				{Policy: F32},
				{Policy: F32, Split: Split{By: SplitNone}},
				{Policy: F32, Shard: Shard{World: 2, By: ShardLayers}},
			} {
				if _, err := New(f, s, free); err == nil || !strings.Contains(err.Error(), "overflow") {
					t.Errorf("%d tensors, %d devices, %+v: %v, want an overflow", len(f.Tensors()), len(free), s, err)
				}
			}
		}
	}
	one(t, together, Spec{Policy: Raw})
}

// TestForeignTypes: a tensor of a type that ggml does not have can be copied. It cannot be converted or sliced, and is
// refused by name, unless it is not wanted.
func TestForeignTypes(t *testing.T) {
	t.Parallel()
	const iq4ks = gguf.Type(144) // of ik_llama.cpp
	f := described(t, map[string]any{"general.architecture": "x", "x.attention.head_count": uint32(2)},
		[]made{{"blk.0.a", gguf.F32, []uint64{256}}, {"blk.0.ffn_up.weight", iq4ks, []uint64{256, 256}}})
	for _, policy := range []Policy{F32, F16, BF16} {
		_, err := New(f, Spec{Policy: policy}, []uint64{1})
		if _, ok := errors.AsType[*gguf.FormatError](err); !ok || !errors.Is(err, gguf.ErrUnsupported) {
			t.Errorf("as %v: %v, want a FormatError about the type", policy, err)
		}
	}
	p := one(t, f, Spec{Policy: Raw})
	x := p.Tensors()[1]
	if src, dst := x.Block(); !x.Opaque() || x.Bytes != uint64(x.Size) || src != 1 || dst != 1 {
		t.Errorf("%+v", x)
	}
	checkCut(t, &p.Groups[0], CutOptions{Bytes: MinChunk})
	_, err := New(f, Spec{Policy: Raw, Shard: Shard{World: 2, By: ShardTensors}}, []uint64{1})
	if err == nil || !strings.Contains(err.Error(), `"blk.0.ffn_up.weight"`) {
		t.Errorf("a slice: %v", err)
	}
	for _, s := range []Spec{ // every rank has the tensor: the rule says so, or no rule divides such names
		{Policy: Raw, Shard: Shard{World: 2, By: ShardTensors, Rules: []ShardRule{shardRule(t, "up=replicate")}}},
		{Policy: Raw, Shard: Shard{World: 2, By: ShardTensors}, Tensors: regexp.MustCompile("router$")},
	} {
		router := described(t, nil, []made{{"blk.0.ffn_up.weight", iq4ks, []uint64{256, 256}}, {"router", iq4ks, []uint64{256, 2}}})
		for _, x := range one(t, router, s).Tensors() {
			if x.Slice != nil || x.Bytes != uint64(x.Size) {
				t.Errorf("%s is divided as %+v", x.Name, x.Slice)
			}
		}
	}
	if p := one(t, f, Spec{Tensors: regexp.MustCompile(`a$`)}); p.Len() != 1 {
		t.Errorf("%d tensors", p.Len())
	}
}

// TestShapes: scalars, empty tensors and tensors of many dimensions can be planned in every way.
func TestShapes(t *testing.T) {
	t.Parallel()
	f := described(t, map[string]any{"general.architecture": "x", "x.attention.head_count": uint32(2)}, []made{
		{"token_embd.weight", gguf.F32, nil},
		{"output.weight", gguf.I8, []uint64{0}},
		{"blk.0.ffn_down.weight", gguf.F16, nil},
		{"blk.0.ffn_up.weight", gguf.F16, []uint64{6, 4}},
		{"blk.0.attn_q.weight", gguf.F16, nil},
		{"blk.0.ffn_gate_exps.weight", gguf.F16, nil},
		{"blk.1.attn_qkv.bias", gguf.F16, []uint64{8, 0}},
		{"blk.1.x", gguf.BF16, []uint64{2, 2, 2, 2, 2, 2, 2, 2}},
	})
	for _, shard := range []Shard{
		{},
		{By: ShardLayers, World: 2},
		{By: ShardTensors, World: 2},
		{By: ShardTensors, World: 2, Rank: 1},
		{By: ShardTensors, World: 2, Rules: []ShardRule{{regexp.MustCompile(`embd|x`), DivideExperts}}},
		{By: ShardTensors, World: 2, Rules: []ShardRule{{regexp.MustCompile(`embd|x`), DivideRows}}},
		{By: ShardTensors, World: 2, Rules: []ShardRule{{regexp.MustCompile(`embd|x`), DivideColumns}}},
	} {
		for _, policy := range Policies() {
			p, err := New(f, Spec{Policy: policy, Shard: shard}, []uint64{1, 1})
			if err != nil {
				t.Errorf("%+v: %v", shard, err)
				continue
			}
			delivered := 0
			for i := range p.Groups {
				for _, c := range p.Groups[i].Cut(CutOptions{Bytes: MinChunk}) {
					delivered += c.Delivered
				}
			}
			if uint64(delivered) != p.TensorBytes() {
				t.Errorf("%+v: chunks deliver %d of %d bytes", shard, delivered, p.TensorBytes())
			}
		}
	}
}

func TestFits(t *testing.T) {
	t.Parallel()
	f := openFile(t, sample)
	raw := one(t, f, Spec{Policy: Raw})
	p := one(t, f, Spec{Policy: F32})
	if err := p.Fits(0, p.DeviceBytes()+100, 100); err != nil {
		t.Error(err)
	}
	for _, x := range []struct {
		free, more uint64
		want       string
		fitting    []Policy
	}{
		{raw.DeviceBytes(), 0, "it would fit as raw", []Policy{Raw}},
		{p.DeviceBytes() - 1, 0, "it would fit as raw or f16 or bf16", []Policy{Raw, F16, BF16}},
		{p.DeviceBytes() + 99, 100, "it would fit as raw or f16 or bf16", []Policy{Raw, F16, BF16}},
		{64 << 10, 0, "no dtype fits", nil},
	} {
		err := p.Fits(0, x.free, x.more)
		e, ok := errors.AsType[*MemoryError](err)
		if !ok || !errors.Is(err, ErrInsufficientMemory) || !strings.Contains(err.Error(), x.want) ||
			!slices.Equal(e.Fitting, x.fitting) || e.Needed != p.DeviceBytes()+x.more || e.Free != x.free ||
			e.Policy != F32 || !strings.Contains(err.Error(), "on device 0: f32 needs") {
			t.Errorf("%d free, %d more: %v, want %q", x.free, x.more, err, x.want)
		}
	}
	e := &MemoryError{Name: "hip:3", Policy: F16, Needed: 5 << 30, Free: 1 << 30}
	if s := e.Error(); !strings.Contains(s, "on hip:3: f16 needs 5.0 GiB (5368709120 bytes)") {
		t.Error(s)
	}
}

// TestBadSpecs wants every field that makes no sense to be refused before anything is planned.
func TestBadSpecs(t *testing.T) {
	t.Parallel()
	f := openFile(t, sample)
	re := regexp.MustCompile("x")
	for _, x := range []struct {
		s       Spec
		devices int
		want    string
	}{
		{Spec{}, 0, "no devices"},
		{Spec{Policy: 77}, 1, "no policy number 77: use f16, f32, bf16, raw"},
		{Spec{Rules: []Rule{{}}}, 1, "has no expression"},
		{Spec{Rules: []Rule{{re, F16}, {re, 9}}}, 1, "no policy number 9"},
		{Spec{Split: Split{By: 2}}, 2, "no split number 2: use layer, none"},
		{Spec{Split: Split{By: 2}}, 1, "no split number 2"},
		{Spec{Split: Split{Ratio: []float64{1}}}, 2, "a ratio of 1 numbers for 2 devices"},
		{Spec{Split: Split{Ratio: []float64{}}}, 2, "a ratio of 0 numbers for 2 devices"},
		{Spec{Split: Split{By: SplitNone, Ratio: []float64{1, 1}}}, 2, "nothing to share"},
		{Spec{Split: Split{Ratio: []float64{0, 0}}}, 2, "no device has a share above 0"},
		{Spec{Split: Split{Ratio: []float64{1, -1}}}, 2, "a share of -1"},
		{Spec{Split: Split{Ratio: []float64{1, math.NaN()}}}, 2, "a share of NaN"},
		{Spec{Split: Split{Ratio: []float64{math.Inf(1), 1}}}, 2, "a share of +Inf"},
		{Spec{Split: Split{Ratio: []float64{math.SmallestNonzeroFloat64, 1}}}, 2, "a share of 5e-324"},
		{Spec{Shard: Shard{By: 3}}, 1, "no shard number 3: use none, layer, tensor"},
		{Spec{Shard: Shard{By: ShardTensors, Rules: []ShardRule{{}}}}, 1, "has no expression"},
		{Spec{Shard: Shard{Rules: []ShardRule{{re, 8}}}}, 1, "no division number 8: use replicate, rows, columns, experts"},
		{Spec{Shard: Shard{By: ShardLayers, World: 2, Rules: []ShardRule{{re, DivideRows}}}}, 1, "shard rule x=rows"},
		{Spec{Shard: Shard{World: 2}}, 1, "by layer or by tensor"},
		{Spec{Shard: Shard{World: 2, Rank: 2, By: ShardLayers}}, 1, "rank 2 of a world of 2"},
		{Spec{Shard: Shard{World: 2, Rank: -1, By: ShardLayers}}, 1, "rank -1 of a world of 2"},
		{Spec{Shard: Shard{World: -1, By: ShardLayers}}, 1, "a world of -1 ranks"},
		{Spec{Shard: Shard{World: 1 << 20, By: ShardLayers}}, 1, "a world of 1048576 ranks"},
	} {
		p, err := New(f, x.s, slices.Repeat([]uint64{1 << 30}, x.devices))
		if p != nil || !errors.Is(err, ErrBadOption) || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%+v on %d devices: %v, want %q", x.s, x.devices, err, x.want)
		}
		if p, err := FromGroups(x.s, nil, x.devices, 0, 0); p != nil || !errors.Is(err, ErrBadOption) {
			t.Errorf("groups for %+v on %d devices: %v, want %q", x.s, x.devices, err, x.want)
		}
	}
}
