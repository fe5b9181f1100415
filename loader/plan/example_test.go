package plan_test

import (
	"errors"
	"fmt"
	"log"
	"regexp"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

func open() *gguf.File {
	f, err := gguf.Open("../../testdata/tiny-llama.gguf")
	if err != nil {
		log.Fatal(err)
	}
	return f
}

// What a model takes on one device, with some tensors kept more exact than the others.
func ExampleNew() {
	file := open()
	defer file.Close()
	spec := plan.Spec{
		Policy:  plan.BF16,
		Rules:   []plan.Rule{{Name: regexp.MustCompile("norm"), Policy: plan.F32}},
		Tensors: regexp.MustCompile(`^blk\.0\.attn`),
	}
	p, err := plan.New(file, spec, []uint64{16 << 30})
	if err != nil {
		log.Fatal(err)
	}
	for _, t := range p.Tensors() {
		fmt.Println(t.Name, t.Type, "becomes", t.Target, t.Bytes, "bytes")
	}
	fmt.Println(p.Len(), "of", p.ModelTensors, "tensors,", p.DeviceBytes(), "bytes with padding")
	// Output:
	// blk.0.attn_norm.weight F32 becomes F32 1024 bytes
	// blk.0.attn_k.weight Q4_K becomes BF16 65536 bytes
	// blk.0.attn_output.weight Q4_K becomes BF16 131072 bytes
	// blk.0.attn_q.weight Q4_K becomes BF16 131072 bytes
	// blk.0.attn_v.weight Q4_K becomes BF16 65536 bytes
	// 5 of 40 tensors, 394240 bytes with padding
}

// A model over three devices, the first of which takes twice as much as the others.
func ExampleSplit() {
	file := open()
	defer file.Close()
	spec := plan.Spec{Split: plan.Split{Ratio: []float64{2, 1, 1}}}
	p, err := plan.New(file, spec, []uint64{16 << 30, 16 << 30, 16 << 30})
	if err != nil {
		log.Fatal(err)
	}
	for _, g := range p.Groups {
		if first, last, ok := g.Layers(); ok {
			fmt.Println("device", g.Devices, "gets layers", first, "to", last, "in", len(g.Tensors), "tensors")
		} else {
			fmt.Println("device", g.Devices, "gets", len(g.Tensors), "tensors")
		}
	}
	// Output:
	// device [0] gets layers 0 to 1 in 20 tensors
	// device [1] gets layers 2 to 2 in 9 tensors
	// device [2] gets layers 3 to 3 in 11 tensors
}

// The slice that the second of two ranks has of a matrix.
func ExampleShard() {
	file := open()
	defer file.Close()
	var byRows plan.ShardRule // rows of this model are one block, which cannot be divided
	if err := byRows.UnmarshalText([]byte("attn_output|ffn_down=rows")); err != nil {
		log.Fatal(err)
	}
	shard := plan.Shard{Rank: 1, World: 2, By: plan.ShardTensors, Rules: []plan.ShardRule{byRows}}
	p, err := plan.New(file, plan.Spec{Shard: shard}, []uint64{16 << 30})
	if err != nil {
		log.Fatal(err)
	}
	group, i, _ := p.Find("blk.0.attn_q.weight")
	t := p.Groups[group].Tensors[i]
	fmt.Println(t.Shape, "of", t.Slice.Shape, "dimension", t.Slice.Dim, "indices", t.Slice.Ranges)
	// Output:
	// [256 128] of [256 256] dimension 1 indices [[128 256]]
}

// A plan that does not fit says what would.
func ExamplePlan_Fits() {
	file := open()
	defer file.Close()
	p, err := plan.New(file, plan.Spec{Policy: plan.F32}, []uint64{2 << 20})
	if err != nil {
		log.Fatal(err)
	}
	if e, ok := errors.AsType[*plan.MemoryError](p.Fits(0, 2<<20, 0)); ok {
		fmt.Println(e.Policy, "needs", e.Needed, "bytes,", e.Free, "are free; it would fit as", e.Fitting)
	}
	// Output:
	// f32 needs 13247744 bytes, 2097152 are free; it would fit as [raw]
}

// The chunks in which a group travels.
func ExampleGroup_Cut() {
	file := open()
	defer file.Close()
	p, err := plan.New(file, plan.Spec{Policy: plan.Raw}, []uint64{16 << 30})
	if err != nil {
		log.Fatal(err)
	}
	g := &p.Groups[0]
	for _, c := range g.Cut(plan.CutOptions{Bytes: 256 << 10}) {
		first, last := g.Tensors[c.Segs[0].Tensor].Name, g.Tensors[c.Segs[len(c.Segs)-1].Tensor].Name
		fmt.Println(c.Bytes, "bytes at", c.Offset, "from", first, "to", last)
	}
	// Output:
	// 262064 bytes at 0 from rope_freqs.weight to blk.0.ffn_gate.weight
	// 262112 bytes at 262064 from blk.0.ffn_gate.weight to blk.1.ffn_down.weight
	// 262080 bytes at 524176 from blk.1.ffn_down.weight to blk.1.ffn_up.weight
	// 262076 bytes at 786256 from blk.1.ffn_up.weight to blk.2.ffn_down.weight
	// 262116 bytes at 1048332 from blk.2.ffn_down.weight to blk.2.ffn_up.weight
	// 262016 bytes at 1310448 from blk.2.ffn_up.weight to blk.3.ffn_down.weight
	// 262144 bytes at 1572464 from blk.3.ffn_down.weight to blk.3.attn_k.weight
	// 175888 bytes at 1834608 from blk.3.attn_k.weight to output.weight
}
