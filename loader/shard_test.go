package loader

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/internal/read"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// TestShards loads all ranks' shards in every way, puts what was read back together, and compares it with the whole
// model.
func TestShards(t *testing.T) {
	t.Parallel()
	tiny := openModel(t, sample)
	for _, model := range []struct {
		name  string
		m     *gguf.File
		by    plan.ShardBy
		world int
		rules []plan.ShardRule
	}{
		{"llama", llama(t), plan.ShardTensors, 4, nil},
		{"llama", llama(t), plan.ShardTensors, 1, nil},
		{"llama", llama(t), plan.ShardLayers, 3, nil},
		{"llama", llama(t), plan.ShardLayers, 4, mustShardRules(t, "token_embd=replicate")},
		{"fused", fused(t), plan.ShardTensors, 4, mustShardRules(t, "down_exps=rows")},
		{"tiny-llama", tiny, plan.ShardTensors, 2, mustShardRules(t, "attn_output|ffn_down=rows")},
		{"tiny-llama", tiny, plan.ShardLayers, 2, nil},
		{"all-types", openModel(t, allTypes), plan.ShardTensors, 2, mustShardRules(t, "shape=replicate", ".=experts")},
	} {
		for _, d := range plan.Policies() {
			want := wanted(t, model.m, options{Policy: d})
			for _, way := range []struct {
				name string
				load loadFunc
				o    options
			}{
				{"default", load, options{}},
				{"tight", load, tight},
				{"direct", load, options{IO: IODirect, Chunk: 100_000}},
				{"hashed", load, options{IO: IOMapped, Hash: true, Chunk: 64 << 10}},
				{"sync", loadSync, options{}},
				{"gpu", load, options{Dequant: DequantGPU, Chunk: 128 << 10}},
			} {
				if d != plan.Raw && d != plan.F16 && way.o.Chunk != 0 && way.o.Dequant == DequantAuto {
					continue // these differ in how bytes are read, not in what becomes of them
				}
				t.Run(fmt.Sprintf("%s/%v of %d/%v/%s", model.name, model.by, model.world, d, way.name), func(t *testing.T) {
					t.Parallel()
					dev, _ := openDevice(t, soft.Options{Poison: true})
					var ranks []rankHas
					var got, replicated uint64
					for rank := range model.world {
						o := way.o
						o.Policy, o.Shard = d, plan.Shard{Rank: rank, World: model.world, By: model.by, Rules: model.rules}
						w, err := way.load(t.Context(), model.m, o, dev)
						if err != nil {
							t.Fatal(err)
						}
						if err := verify(t.Context(), w, model.m); err != nil {
							t.Error(err)
						}
						ranks = append(ranks, rankHas{w.Tensors(), contents(t, w)})
						r := w.Report()
						if r.MappedBytes+r.DirectBytes != r.ReadBytes {
							t.Errorf("%d bytes mapped and %d direct, want %d together", r.MappedBytes, r.DirectBytes, r.ReadBytes)
						}
						if r.FetchedBytes < r.DirectBytes {
							t.Errorf("%d bytes fetched for %d", r.FetchedBytes, r.DirectBytes)
						}
						if got += r.ReadBytes; rank > 0 {
							replicated += replicatedBytes(w.Plan(), o.Shard)
						}
						checkHashes(t, w, model.m)
						mustClose(t, w)
					}
					var whole uint64
					for _, x := range model.m.Tensors() {
						whole += uint64(x.Size)
					}
					if got != whole+replicated {
						t.Errorf("%d bytes read by all, want %d and %d that several ranks have", got, whole, replicated)
					}
					same(t, planned(t, model.m, options{Policy: d}), together(t, ranks), want)
				})
			}
		}
	}
}

// replicatedBytes is the size in the file of what a rank has as every rank does.
func replicatedBytes(p *plan.Plan, s plan.Shard) (n uint64) {
	for _, x := range p.Tensors() {
		ruled := slices.ContainsFunc(s.Rules, func(r plan.ShardRule) bool { return r.Name.MatchString(x.Name) })
		if x.Slice == nil && (s.By == plan.ShardTensors || ruled) {
			n += uint64(x.Size)
		}
	}
	return n
}

// checkHashes compares the hashes of w, if there are any, with those of the file's bytes.
func checkHashes(t *testing.T, w *Model, m *gguf.File) {
	t.Helper()
	tensors := w.Plan().Tensors()
	for i, h := range w.Hashes() {
		var buf []byte
		x := tensors[i]
		b, err := read.Tensor(t.Context(), m, &buf, x, 0, int(x.Size))
		if err != nil || h.Sum != sha256.Sum256(b) || h.Name != x.Name {
			t.Errorf("%s: another hash", h.Name)
		}
	}
}

func mustShardRules(t testing.TB, texts ...string) (rules []plan.ShardRule) {
	t.Helper()
	for _, s := range texts {
		var r plan.ShardRule
		if err := r.UnmarshalText([]byte(s)); err != nil {
			t.Fatal(err)
		}
		rules = append(rules, r)
	}
	return rules
}

// rankHas is what one rank has on its device.
type rankHas struct {
	tensors []Tensor
	bytes   map[string][]byte
}

// together puts what the ranks have together by what their tensors say of themselves. Every byte must come from one
// rank, and what several have must be the same.
func together(t *testing.T, ranks []rankHas) map[string][]byte {
	t.Helper()
	all, seen := make(map[string][]byte), make(map[string][]bool)
	for _, rank := range ranks {
		for _, x := range rank.tensors {
			b := rank.bytes[x.Name]
			s := x.Slice
			if s == nil {
				if was, ok := all[x.Name]; ok && !bytes.Equal(was, b) {
					t.Errorf("%s differs between ranks", x.Name)
				}
				all[x.Name] = b
				continue
			}
			inner, elems := uint64(1), uint64(1) // inner: elements for each index of the dimension
			for i, n := range s.Shape {
				if elems *= n; i < s.Dim {
					inner *= n
				}
			}
			size, _ := x.Type.Bytes(elems)
			if all[x.Name] == nil {
				all[x.Name], seen[x.Name] = make([]byte, size), make([]bool, size)
			}
			perIndex := func(n uint64) uint64 { return n * inner * uint64(x.Type.BlockBytes()) / uint64(x.Type.BlockElems()) }
			row := perIndex(s.Shape[s.Dim])
			for at := uint64(0); at < size; at += row {
				for _, r := range s.Ranges {
					lo, hi := at+perIndex(r[0]), at+perIndex(r[1])
					for i := lo; i < hi; i++ {
						if seen[x.Name][i] {
							t.Fatalf("%s: byte %d is there twice", x.Name, i)
						}
						seen[x.Name][i] = true
					}
					b = b[copy(all[x.Name][lo:hi], b):]
				}
			}
			if len(b) != 0 {
				t.Errorf("%s: %d bytes too many", x.Name, len(b))
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

// TestSplitShard spreads each rank's shard over two devices.
func TestSplitShard(t *testing.T) {
	t.Parallel()
	m := llama(t)
	for _, by := range bothSplits {
		var ranks []rankHas
		for rank := range 2 {
			devs, _ := openDevices(t, 2, soft.Options{Poison: true})
			o := tight.on(2)
			o.Shard, o.Split.By = plan.Shard{Rank: rank, World: 2, By: plan.ShardTensors}, by
			w, err := load(t.Context(), m, o, devs...)
			if err != nil {
				t.Fatal(err)
			}
			ranks = append(ranks, rankHas{w.Tensors(), contents(t, w)})
			if err := errors.Join(verify(t.Context(), w, m), w.Close()); err != nil {
				t.Error(err)
			}
		}
		same(t, planned(t, m, options{}), together(t, ranks), wanted(t, m, options{}))
	}
}

// TestShardCheck wants a bad value in a slice to be told by where it is in the whole tensor.
func TestShardCheck(t *testing.T) {
	t.Parallel()
	m := makeModel(t, map[string]any{"general.architecture": "llama"}, []made{
		{"blk.0.ffn_down.weight", gguf.F32, []uint64{64, 8}},
	})
	f, err := os.OpenFile(m.Parts()[0].Path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	data := make([]byte, 64*8*4)
	binary.LittleEndian.PutUint32(data[4*(5*64+40):], math.Float32bits(float32(math.Inf(-1))))
	_, err = f.WriteAt(data, m.Tensors()[0].Offset)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	dev, _ := openDevice(t, soft.Options{})
	for _, load := range []loadFunc{load, loadSync} {
		for rank := range 4 {
			o := options{Policy: plan.F32, Check: true, Shard: plan.Shard{Rank: rank, World: 4, By: plan.ShardTensors}}
			w, err := load(t.Context(), m, o, dev)
			if rank != 2 {
				if err != nil {
					t.Fatal(err)
				}
				mustClose(t, w)
				continue
			}
			if e, ok := errors.AsType[*ValueError](err); !ok || e.Element != 5*64+40 || e.Offset != 4*(5*64+40) {
				t.Errorf("%v, want element %d", err, 5*64+40)
			}
		}
	}
}
