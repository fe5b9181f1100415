package plan

import (
	"cmp"
	"errors"
	"fmt"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// randomModel is a model with random layers, heads, experts and types, or one without layers.
func randomModel(t *testing.T, rng *rand.Rand) *gguf.File {
	types := []gguf.Type{gguf.F32, gguf.F16, gguf.BF16, gguf.Q4_0, gguf.Q8_0, gguf.Q6_K, gguf.I8, gguf.IQ4_NL}
	typ := func() gguf.Type { return types[rng.IntN(len(types))] }
	var all []made
	add := func(name string, shape ...uint64) {
		x := made{name, typ(), shape}
		if shape[0]%uint64(x.typ.BlockElems()) != 0 {
			x.typ = gguf.F32
		}
		all = append(all, x)
	}
	upTo := func(n int) uint64 { return uint64(1 + rng.IntN(n)) }
	kv := []uint64{1, 2, 3, 4, 6, 8, 9}[rng.IntN(7)]
	heads := kv * upTo(3)
	const width = 64
	head := 32 * upTo(2)
	if rng.IntN(3) > 0 {
		add("token_embd.weight", width, 9+upTo(30))
	}
	layers := rng.IntN(10)
	for l := range layers {
		blk := fmt.Sprintf("blk.%d.", l)
		if rng.IntN(2) == 0 {
			add(blk+"attn_qkv.weight", width, (heads+2*kv)*head)
		} else {
			add(blk+"attn_q.weight", width, heads*head)
			add(blk+"attn_q.bias", heads*head)
			add(blk+"attn_k.weight", width, kv*head)
			add(blk+"attn_v.weight", width, kv*head)
		}
		add(blk+"attn_output.weight", heads*head, width)
		add(blk+"attn_norm.weight", width)
		ffn := 32 * kv * upTo(3)
		if rng.IntN(2) == 0 {
			add(blk+"ffn_up.weight", width, 2*ffn) // gate and up in one
		} else {
			add(blk+"ffn_gate.weight", width, ffn)
			add(blk+"ffn_up.weight", width, ffn)
		}
		add(blk+"ffn_down.weight", ffn, width)
		if rng.IntN(3) == 0 {
			add(blk+"ffn_gate_exps.weight", width, upTo(4), kv*upTo(2))
		}
	}
	for i := range upTo(4) {
		add(fmt.Sprintf("other.%d", i), width, upTo(5))
	}
	if rng.IntN(3) > 0 {
		add("output_norm.weight", width)
		add("output.weight", width, 9+upTo(30))
	}
	if rng.IntN(3) == 0 {
		rng.Shuffle(len(all), func(i, k int) { all[i], all[k] = all[k], all[i] })
	}
	return described(t, map[string]any{
		"general.architecture": "x", "x.attention.head_count": uint32(heads), "x.attention.head_count_kv": uint32(kv),
		"x.attention.key_length": uint32(head),
	}, all)
}

// randomSpec is any shard of a world of up to 9, and any split over up to 9 devices.
func randomSpec(rng *rand.Rand) (s Spec, free []uint64) {
	policies := Policies()
	s.Policy = policies[rng.IntN(len(policies))]
	if rng.IntN(3) == 0 {
		s.Rules = []Rule{{regexp.MustCompile(`norm|_q`), policies[rng.IntN(len(policies))]}}
	}
	if rng.IntN(4) == 0 {
		s.Tensors = regexp.MustCompile(`[02468]\.|other|attn_q\.`)
	}
	if s.Shard.By = ShardBy(rng.IntN(3)); s.Shard.By != ShardNone {
		s.Shard.World = 1 + rng.IntN(9)
		if rng.IntN(3) == 0 {
			s.Shard.Rules = []ShardRule{{regexp.MustCompile(`attn_[kv]\.|embd`), Replicate}}
		}
	}
	for range 1 + rng.IntN(9) {
		free = append(free, rng.Uint64N(1<<40))
	}
	switch rng.IntN(3) {
	case 0:
		s.Split.By = SplitNone
	case 1:
		for range free {
			s.Split.Ratio = append(s.Split.Ratio, 0.1+rng.Float64())
		}
	}
	return s, free
}

// TestTogether wants the plans of all ranks and devices to be the model: each tensor once, of slices each byte once,
// and what is replicated as often as there are ranks.
func TestTogether(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(7, 8))
	planned := make(map[ShardBy]int)
	for range 600 {
		f := randomModel(t, rng)
		s, free := randomSpec(rng)
		var plans []*Plan
		var refused []error
		for rank := range max(1, s.Shard.World) {
			s.Shard.Rank = rank
			p, err := New(f, s, free)
			if err != nil {
				refused = append(refused, err)
				continue
			}
			plans = append(plans, p)
		}
		if len(refused) > 0 {
			if len(plans) > 0 || !errors.Is(refused[0], ErrBadOption) {
				t.Fatalf("%+v: %d ranks are refused and %d are not: %v", s, len(refused), len(plans), refused[0])
			}
			if s.Shard.By != ShardTensors && s.Tensors == nil {
				t.Fatalf("%+v: %v", s, refused[0])
			}
			continue
		}
		planned[s.Shard.By]++
		for _, p := range plans {
			checkGroups(t, p, len(free))
		}
		checkTogether(t, f, s, plans)
	}
	for by, n := range planned {
		if n < 50 {
			t.Errorf("%d plans by %v: the test has become empty", n, by)
		}
	}
}

// checkGroups wants every device in one group, layers whole and in order, and places that do not overlap.
func checkGroups(t *testing.T, p *Plan, devices int) {
	t.Helper()
	var all []int
	lastLayer := -1
	for i := range p.Groups {
		g := &p.Groups[i]
		all = append(all, g.Devices...)
		first, last, ok := g.Layers()
		if ok && first <= lastLayer {
			t.Fatalf("device %d has layers %d to %d, the one before up to %d", i, first, last, lastLayer)
		}
		if ok {
			lastLayer = last
		}
		end, arena := uint64(0), 0
		for k := range g.Tensors {
			x := &g.Tensors[k]
			if x.Arena != arena {
				end, arena = 0, x.Arena
			}
			if x.DeviceOffset < end || x.DeviceOffset%Align != 0 || x.DeviceOffset+x.Bytes > g.Arenas[x.Arena] {
				t.Fatalf("%s is at %d, behind %d", x.Name, x.DeviceOffset, end)
			}
			end = x.DeviceOffset + x.Bytes
		}
	}
	slices.Sort(all)
	for i, d := range all {
		if i != d || len(all) != devices || p.GroupOf(d) == nil {
			t.Fatalf("%d devices are in groups as %v", devices, all)
		}
	}
	if p.Spec.Split.By == SplitNone && len(p.Groups) != 1 {
		t.Fatalf("copies on each of %d devices are %d groups", devices, len(p.Groups))
	}
}

// checkTogether adds up what all ranks have.
func checkTogether(t *testing.T, f *gguf.File, s Spec, plans []*Plan) {
	t.Helper()
	type run struct{ lo, hi int64 }
	for _, x := range f.Tensors() {
		var runs []run
		var bytes uint64
		whole, slice := 0, 0
		for _, p := range plans {
			n := 0
			for i := range p.Groups {
				for k := range p.Groups[i].Tensors {
					y := &p.Groups[i].Tensors[k]
					if y.Name != x.Name {
						continue
					}
					n++
					bytes += y.Bytes
					if y.Slice == nil {
						whole++
					} else {
						slice++
					}
					for off := int64(0); off < y.Size; {
						at, len := y.InFile(off)
						runs = append(runs, run{at, at + len})
						off += len
					}
				}
			}
			if n > 1 {
				t.Fatalf("%+v: %s is on several devices of a rank", s, x.Name)
			}
		}
		copies := 1
		replicated := s.Shard.By == ShardTensors && slice == 0
		for _, r := range s.Shard.Rules {
			replicated = replicated || s.Shard.By == ShardLayers && r.Name.MatchString(x.Name)
		}
		if replicated {
			copies = len(plans)
		}
		if s.Tensors != nil && !s.Tensors.MatchString(x.Name) {
			copies = 0
		}
		if slice > 0 && (whole > 0 || slice != len(plans)) || slice == 0 && whole != copies {
			t.Fatalf("%+v: %s is whole %d times and in %d slices, want %d copies", s, x.Name, whole, slice, copies)
		}
		target, _ := s.target(x.Name, x.Type).Bytes(x.Elems())
		if bytes != uint64(copies)*target {
			t.Fatalf("%+v: %s has %d bytes on the devices, want %d times %d", s, x.Name, bytes, copies, target)
		}
		slices.SortFunc(runs, func(a, b run) int { return cmp.Compare(a.lo, b.lo) })
		if slice > 0 {
			at := x.Offset
			for _, r := range runs {
				if r.lo != at {
					t.Fatalf("%+v: %s: byte %d of the file is missing or there twice: next is %d", s, x.Name, at, r.lo)
				}
				at = r.hi
			}
			if at != x.Offset+x.Size {
				t.Fatalf("%+v: %s ends at %d, want %d", s, x.Name, at, x.Offset+x.Size)
			}
			continue
		}
		for _, r := range runs {
			if r.lo != x.Offset || r.hi != x.Offset+x.Size {
				t.Fatalf("%+v: %s is at %v", s, x.Name, r)
			}
		}
	}
}

// TestLost: New finds out when a tensor got lost, or became another, between the share and the devices.
func TestLost(t *testing.T) {
	t.Parallel()
	f := openFile(t, sample)
	s, err := Spec{}.check(2)
	if err != nil {
		t.Fatal(err)
	}
	share, err := s.share(f)
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		name   string
		change func(all []Tensor) []Tensor // what the devices get instead
		want   string
	}{
		{"nothing is lost", func(all []Tensor) []Tensor { return all }, ""},
		{"one is missing", func(all []Tensor) []Tensor { return all[1:] }, "the devices get 39 tensors of 40"},
		{"one is another", func(all []Tensor) []Tensor {
			other := *all[5].Tensor
			other.Name = "other"
			all[5].Tensor = &other
			return all
		}, `tensor "` + share[5].Name + `" is on no device`},
		{"one has another type", func(all []Tensor) []Tensor {
			all[7].Target, all[7].Bytes = gguf.F32, 4*all[7].Elems()
			return all
		}, `tensor "` + share[7].Name + `" has`},
	} {
		groups, err := s.Split.groups(x.change(slices.Clone(share)), []uint64{1, 1})
		if err != nil {
			t.Fatal(err)
		}
		p, err := FromGroups(s, laidOut(t, groups), 2, 40, 0)
		if err != nil {
			t.Fatal(err)
		}
		err = p.covers(share)
		if (err == nil) != (x.want == "") || err != nil && !strings.Contains(err.Error(), x.want) {
			t.Errorf("%s: %v, want %q", x.name, err, x.want)
		}
	}
}

// laidOut gives the tensors of groups their places.
func laidOut(t *testing.T, groups []Group) []Group {
	t.Helper()
	for i := range groups {
		if err := groups[i].layOut(); err != nil {
			t.Fatal(err)
		}
	}
	return groups
}
