package plan

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// divisor is a built-in rule: how the tensors whose names match are divided.
type divisor struct {
	name *regexp.Regexp
	how  func(h *hints, t *gguf.Tensor) (division, error)
}

// divisors are the built-in rules, by llama.cpp's names of tensors. What matches none is replicated: norms, biases that
// are added to a sum over the ranks, routers, and whatever is not known.
var divisors = []divisor{
	{regexp.MustCompile(`_exps\.(?:weight|bias|scale)$`), (*hints).experts},
	{regexp.MustCompile(`attn_(?:k_b|v_b)\.weight$`), (*hints).headMatrices},
	{regexp.MustCompile(`attn_qkv\.(?:weight|bias)$`), (*hints).fusedHeads},
	{regexp.MustCompile(`attn_(?:q|q_b|kv_b)\.(?:weight|bias)$`), (*hints).headRows},
	{regexp.MustCompile(`attn_(?:k|v)\.(?:weight|bias)$`), (*hints).keyRows},
	{regexp.MustCompile(`attn_(?:output|out|o)\.weight$`), (*hints).headColumns},
	{regexp.MustCompile(`ffn_(?:gate|up)(?:_shexp|\.\d+)?\.(?:weight|bias)$`), (*hints).feedRows},
	{regexp.MustCompile(`ffn_down(?:_shexp|\.\d+)?\.weight$`), (*hints).columns},
	{regexp.MustCompile(`^(?:token_embd|per_layer_token_embd|output)\.(?:weight|bias)$`), (*hints).vocabulary},
}

// division is how a tensor is divided, whatever the world.
type division struct {
	dim    int      // -1: not at all
	fused  []uint64 // lengths of the matrices that lie one behind the other along dim; nil: it is one
	units  []unit   // that the borders between ranks must lie between
	uneven bool     // ranks may differ by one index
	detour string   // a shard rule that makes other worlds possible
}

// unit is what a dimension consists of so many of.
type unit struct {
	n    uint64
	name string
}

// whole is the division of what every rank has.
var whole = division{dim: -1}

// along divides dimension dim of t, between quantization blocks if it is that of a row.
func along(t *gguf.Tensor, dim int, name string) division {
	n := t.Shape[dim]
	if block := uint64(t.Type.BlockElems()); dim == 0 && block > 1 {
		n, name = n/block, fmt.Sprintf("blocks of %d in a row", block)
	}
	return division{dim: dim, units: []unit{{n, name}}}
}

// rowsOf divides along the second dimension, or the only one.
func rowsOf(t *gguf.Tensor) division { return along(t, min(1, len(t.Shape)-1), "rows") }

// hints is what a model's metadata says about how its tensors may be divided.
type hints struct {
	m      *gguf.File
	arch   string
	arrays map[string][]int64 // by key
}

// about returns the number that the metadata has under that key for the layer of tensor t. The metadata may have one
// number for all layers, or an array with one for each. 0 is returned where there is none.
func (h *hints) about(t *gguf.Tensor, key string) uint64 {
	v, _ := h.m.Metadata().Get(h.arch + "." + key)
	n, ok := v.Uint()
	if m := layerName.FindStringSubmatch(t.Name); !ok && m != nil {
		all, seen := h.arrays[key]
		if !seen {
			for _, n := range v.Ints() {
				all = append(all, n)
			}
			h.arrays[key] = all
		}
		if i, err := strconv.Atoi(m[2]); err == nil && i < len(all) && all[i] > 0 {
			n = uint64(all[i])
		}
	}
	if n > maxWorld {
		return 0 // keeps products far from an overflow
	}
	return n
}

func (h *hints) heads(t *gguf.Tensor) uint64 { return h.about(t, "attention.head_count") }

// keyHeads is the number of heads of k and v.
func (h *hints) keyHeads(t *gguf.Tensor) uint64 {
	if n := h.about(t, "attention.head_count_kv"); n > 0 {
		return n
	}
	return h.heads(t)
}

// between adds heads that must not be cut.
func (d *division) between(t *gguf.Tensor, heads uint64, name string) error {
	if n := t.Shape[d.dim]; heads == 0 || n%heads != 0 {
		return fmt.Errorf("the metadata says %d %s, and it is %d wide", heads, name, n)
	}
	d.units = append(d.units, unit{heads, name})
	return nil
}

func (h *hints) headRows(t *gguf.Tensor) (division, error) {
	d := rowsOf(t)
	return d, d.between(t, h.heads(t), "heads")
}

func (h *hints) keyRows(t *gguf.Tensor) (division, error) {
	d := rowsOf(t)
	d.detour = `attn_[kv]\.=replicate`
	return d, d.between(t, h.keyHeads(t), "key-value heads")
}

func (h *hints) columns(t *gguf.Tensor) (division, error) { return along(t, 0, "columns"), nil }

func (h *hints) headColumns(t *gguf.Tensor) (division, error) {
	d := along(t, 0, "columns")
	return d, d.between(t, h.heads(t), "heads")
}

func (h *hints) experts(t *gguf.Tensor) (division, error) {
	return along(t, len(t.Shape)-1, "experts"), nil
}

// headMatrices divides a tensor with a matrix for each head; in older files it is one matrix with rows for all.
func (h *hints) headMatrices(t *gguf.Tensor) (division, error) {
	d := along(t, len(t.Shape)-1, "rows")
	return d, d.between(t, h.heads(t), "heads")
}

// fusedHeads divides the rows of q, of k and of v, which are one tensor, each for itself.
func (h *hints) fusedHeads(t *gguf.Tensor) (division, error) {
	d := rowsOf(t)
	d.detour = `attn_qkv=replicate`
	q, kv, n := h.heads(t), h.keyHeads(t), t.Shape[d.dim]
	key, value := h.about(t, "attention.key_length"), h.about(t, "attention.value_length")
	if key == 0 && q > 0 {
		key = n / (q + 2*kv)
	}
	if value == 0 {
		value = key
	}
	d.fused = []uint64{q * key, kv * key, kv * value}
	if q == 0 || q%kv != 0 || d.fused[0]+d.fused[1]+d.fused[2] != n || d.dim == 0 && t.Type.BlockElems() > 1 {
		return d, fmt.Errorf("its %d rows are q, k and v in one, and the metadata (%d heads, %d for k and v) does not tell "+
			"them apart", n, q, kv)
	}
	d.units = []unit{{kv, "key-value heads"}} // of which q's are a multiple
	return d, nil
}

// feedRows divides the rows of gate or up, or of both in one, which shows in that down has half as many columns.
func (h *hints) feedRows(t *gguf.Tensor) (division, error) {
	d := rowsOf(t)
	base := strings.TrimSuffix(strings.TrimSuffix(t.Name, ".bias"), ".weight")
	down, ok := h.m.Tensor(strings.Replace(base, "ffn_up", "ffn_down", 1) + ".weight")
	n := t.Shape[d.dim]
	if ok && len(down.Shape) > 0 && n%2 == 0 && n/2 == down.Shape[0] && strings.Contains(t.Name, "ffn_up") {
		if d.dim == 0 && t.Type.BlockElems() > 1 {
			return d, fmt.Errorf("it is two matrices' %v blocks in one", t.Type)
		}
		d.fused, d.units[0].n = []uint64{n / 2, n / 2}, n/2
	}
	return d, nil
}

func (h *hints) vocabulary(t *gguf.Tensor) (division, error) {
	d := rowsOf(t)
	d.uneven = d.dim > 0 || t.Type.BlockElems() == 1
	return d, nil
}

// divisionOf says how the user's rules, and then the built-in ones, divide t. Every rank has what has no dimension to
// divide, and what is empty. What has blocks that are not known here can be on every rank, but not be divided.
func (s *Shard) divisionOf(h *hints, t *gguf.Tensor) (division, error) {
	if t.Size == 0 || len(t.Shape) == 0 {
		return whole, nil
	}
	divide := s.howTo(t.Name)
	switch {
	case divide == nil:
		return whole, nil
	case !t.Type.Valid():
		return whole, fmt.Errorf("%v is a type of %s, whose blocks are not known here", t.Type, t.Type.Origin())
	}
	return divide(h, t)
}

// howTo returns what divides the tensors of that name; nil: every rank has them.
func (s *Shard) howTo(name string) func(h *hints, t *gguf.Tensor) (division, error) {
	if as, ok := s.rule(name); ok {
		switch as {
		case DivideRows:
			return func(_ *hints, t *gguf.Tensor) (division, error) { return rowsOf(t), nil }
		case DivideColumns:
			return (*hints).columns
		case DivideExperts:
			return (*hints).experts
		default:
			return nil
		}
	}
	for _, d := range divisors {
		if d.name.MatchString(name) {
			return d.how
		}
	}
	return nil
}

// slices is the rank's share with ShardTensors.
func (s *Shard) slices(m *gguf.File, all []Tensor) ([]Tensor, error) {
	h := &hints{m: m, arch: m.Architecture(), arrays: make(map[string][]int64)}
	divisions := make([]division, len(all))
	common, most := uint64(0), uint64(maxWorld) // see worlds
	bad := -1
	for i := range all {
		t := all[i].Tensor
		d, err := s.divisionOf(h, t)
		if err != nil {
			return nil, fmt.Errorf("%w: tensor %q cannot be divided among ranks: %w; a shard rule can say how", ErrBadOption,
				t.Name, err)
		}
		divisions[i] = d
		for _, u := range d.units {
			if most = min(most, u.n); !d.uneven {
				common = gcd(common, u.n)
			}
		}
		if bad < 0 && d.obstacle(uint64(s.World)) != nil {
			bad = i
		}
	}
	if bad >= 0 {
		d := &divisions[bad]
		u := d.obstacle(uint64(s.World))
		text := fmt.Sprintf("it has %d %s; for this model, worlds of %s work", u.n, u.name, worlds(common, most))
		if d.detour != "" {
			text += ", and others may with the shard rule '" + d.detour + "'"
		}
		return nil, fmt.Errorf("%w: tensor %q cannot be divided evenly among %d ranks: %s", ErrBadOption, all[bad].Name,
			s.World, text)
	}
	mine := slices.Clone(all)
	checked := make(map[string]bool)
	for i := range mine {
		if d := &divisions[i]; d.dim >= 0 {
			n := mine[i].Shape[d.dim]
			alike := fmt.Sprint(n, d.fused, d.uneven) // divided the same way
			if !checked[alike] {
				if err := d.covers(n, uint64(s.World)); err != nil {
					return nil, fmt.Errorf("internal error: tensor %q: %w", mine[i].Name, err)
				}
				checked[alike] = true
			}
			mine[i].slice(d.dim, d.ranges(mine[i].Shape[d.dim], uint64(s.Rank), uint64(s.World)))
		}
	}
	return mine, nil
}

// obstacle returns the unit that keeps so many ranks from dividing the tensor; nil if nothing does.
func (d *division) obstacle(world uint64) *unit {
	for i := range d.units {
		if u := &d.units[i]; u.n < world || !d.uneven && u.n%world != 0 {
			return u
		}
	}
	return nil
}

// worlds lists the numbers of ranks that work for a model, for an error: those that divide common, up to most. A common
// of 0 is divided by all numbers.
func worlds(common, most uint64) string {
	if common == 0 {
		return fmt.Sprintf("up to %d", most)
	}
	var list []string
	for n := uint64(1); n <= min(common, most) && len(list) < 16; n++ {
		if common%n == 0 {
			list = append(list, fmt.Sprint(n))
		}
	}
	return strings.Join(list, ", ")
}

// ranges are the indices that a rank has of a dimension of n.
func (d *division) ranges(n, rank, world uint64) [][2]uint64 {
	if d.uneven { // the first ranks have one more
		share, more := n/world, n%world
		first := rank*share + min(rank, more)
		if rank < more {
			share++
		}
		return [][2]uint64{{first, first + share}}
	}
	parts := d.fused
	if parts == nil {
		parts = []uint64{n}
	}
	var all [][2]uint64
	var at uint64
	for _, n := range parts {
		first, last := at+n/world*rank, at+n/world*(rank+1)
		if k := len(all) - 1; k >= 0 && all[k][1] == first {
			all[k][1] = last // a world of one
		} else {
			all = append(all, [2]uint64{first, last})
		}
		at += n
	}
	return all
}

// covers checks that the ranges of all ranks together are the n indices of the dimension, each once.
func (d *division) covers(n, world uint64) error {
	parts := d.fused
	if parts == nil {
		parts = []uint64{n}
	}
	ends := make([]uint64, len(parts)) // of what the ranks so far have of each matrix
	for i := 1; i < len(parts); i++ {
		ends[i] = ends[i-1] + parts[i-1]
	}
	starts := slices.Clone(ends)
	for rank := range world {
		for _, r := range d.ranges(n, rank, world) {
			i := slices.Index(ends, r[0]) // the matrix that the range goes on with
			if i < 0 || r[1] < r[0] || r[1] > n {
				return fmt.Errorf("rank %d of %d has %d to %d of %d, which leaves a gap", rank, world, r[0], r[1], n)
			}
			ends[i] = r[1]
		}
	}
	for i, start := range starts {
		if next := start + parts[i]; ends[i] != next && world > 1 || world == 1 && ends[0] != n {
			return fmt.Errorf("the ranks have up to %d of %d", ends[i], next)
		}
	}
	return nil
}

// gcd is the greatest common divisor; that of 0 and n is n.
func gcd(a, b uint64) uint64 {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}
