package plan

import (
	"cmp"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strconv"
)

var (
	// layerName finds the number of a layer, and the prefix that tells the layers of an encoder from those of a decoder.
	layerName = regexp.MustCompile(`^(?:(.+)\.)?blk\.(\d+)\.`)
	// endName matches tensors that are used after the last layer. What is in no layer and does not match is used before
	// the first.
	endName = regexp.MustCompile(`^(?:.+\.)?(?:output|output_norm|cls|dense_\d+|altup_unembd_proj)(?:\.|$)`)
)

// stack is the order in which a model's tensors are used, as far as names tell: what precedes the layers, the layers,
// what follows them. A model without layers is a stack in which every tensor is a layer.
type stack struct {
	layer []int    // of each tensor: its number in bytes, or headLayer or tailLayer
	bytes []uint64 // of each layer, on the device
	head  uint64   // bytes before the layers
	tail  uint64   // bytes after them
}

const headLayer, tailLayer = -1, -2

// maxLayersTimesParts bounds the work of dividing layers: far above any real model's, and a second at most for a
// hostile one's.
const maxLayersTimesParts = 1 << 24

// layerKey is what tells one layer from another: which stack of layers of the model, and which number.
type layerKey struct{ group, number int }

// newStack finds the layers of tensors, with their bytes on the device.
func newStack(tensors []Tensor) *stack {
	s := &stack{layer: make([]int, len(tensors))}
	groups := make(map[string]int) // by prefix, in order of appearance
	keys := make([]layerKey, len(tensors))
	index := make(map[layerKey]int)
	var order []layerKey
	for i := range tensors {
		prefix, number, ok := layerOf(tensors[i].Name)
		if !ok {
			if s.layer[i] = headLayer; endName.MatchString(tensors[i].Name) {
				s.layer[i] = tailLayer
			}
			continue
		}
		if _, known := groups[prefix]; !known {
			groups[prefix] = len(groups)
		}
		keys[i] = layerKey{groups[prefix], number}
		if _, known := index[keys[i]]; !known {
			index[keys[i]] = 0
			order = append(order, keys[i])
		}
	}
	if len(order) == 0 { // a projector, a control vector, a vocabulary: whole tensors are divided
		for i := range tensors {
			s.layer[i] = i
			s.bytes = append(s.bytes, tensors[i].Bytes)
		}
		return s
	}
	slices.SortFunc(order, func(a, b layerKey) int {
		return cmp.Or(cmp.Compare(a.group, b.group), cmp.Compare(a.number, b.number))
	})
	for n, k := range order {
		index[k] = n
	}
	s.bytes = make([]uint64, len(order))
	for i := range tensors {
		switch b := tensors[i].Bytes; s.layer[i] {
		case headLayer:
			s.head += b
		case tailLayer:
			s.tail += b
		default:
			s.layer[i] = index[keys[i]]
			s.bytes[s.layer[i]] += b
		}
	}
	return s
}

// layerOf returns the prefix and the number in the name of a layer's tensor.
func layerOf(name string) (prefix string, number int, ok bool) {
	m := layerName.FindStringSubmatch(name)
	if m == nil {
		return "", 0, false
	}
	number, err := strconv.Atoi(m[2])
	return m[1], number, err == nil
}

// Layers returns the lowest and the highest number of the layers that tensors of the group belong to; ok is false if
// there are none.
func (g *Group) Layers() (first, last int, ok bool) {
	for i := range g.Tensors {
		_, n, isLayer := layerOf(g.Tensors[i].Name)
		if !isLayer {
			continue
		}
		if !ok {
			first, last, ok = n, n, true
		}
		first, last = min(first, n), max(last, n)
	}
	return first, last, ok
}

// assignLayers gives every part a run of whole layers and returns which part each tensor belongs to. What precedes the
// layers goes to the first part, what follows to the last. weights has an entry for every part, each above 0: the
// parts' bytes divided by their weights come out as equal as can be. Parts get at least one layer each as long as there
// are enough; with fewer layers than parts, some get nothing.
func assignLayers(tensors []Tensor, weights []float64) ([]int, error) {
	s := newStack(tensors)
	if len(s.bytes) > maxLayersTimesParts/len(weights) {
		return nil, fmt.Errorf("%d layers are too many to be divided among %d", len(s.bytes), len(weights))
	}
	ends := s.divide(weights)
	if !slices.IsSorted(ends) || ends[len(ends)-1] != len(s.bytes) {
		return nil, fmt.Errorf("internal error: %d layers are divided at %v", len(s.bytes), ends)
	}
	owners := make([]int, len(tensors))
	for i, l := range s.layer {
		switch l {
		case headLayer:
			owners[i] = 0
		case tailLayer:
			owners[i] = len(weights) - 1
		default:
			owners[i], _ = slices.BinarySearch(ends, l+1) // the first part that ends behind l
		}
	}
	return owners, nil
}

// divider divides a stack among parts. The load of a run of layers on a part is its bytes divided by the part's weight.
// All decisions compare loads that were computed by the same expression from exact sums of bytes, so that rounding
// cannot make one step contradict another.
type divider struct {
	sums    []uint64  // bytes of the layers before each layer, and at last of all
	head    uint64    // on the first part
	tail    uint64    // on the last
	weights []float64 // of the parts
	left    []float64 // of each part and those after it, the sum of weights
	least   int       // layers that a part must have: 1, or 0 if there are too few
	can     [][]bool  // scratch of reachable: its result
	good    []int     // likewise: how many of the ends before an end the next part can begin with
}

// divide returns after which layer each part ends. It finds the least greatest load that any division has. Within that
// load, each part, from the first on, ends as near as can be to its share of what is left.
func (s *stack) divide(weights []float64) []int {
	n, parts := len(s.bytes), len(weights)
	d := &divider{sums: make([]uint64, n+1), head: s.head, tail: s.tail, weights: weights}
	for i, b := range s.bytes {
		d.sums[i+1] = d.sums[i] + b
	}
	if n >= parts {
		d.least = 1
	}
	d.left = slices.Clone(weights)
	for part := parts - 2; part >= 0; part-- {
		d.left[part] += d.left[part+1]
	}
	limit := d.leastLoad()
	rest := d.reachable(limit)
	ends := make([]int, parts)
	first := 0
	for part := range parts {
		best, even := -1, d.evenEnd(part, first)
		for end := first + d.least; end <= n && d.load(part, first, end) <= limit; end++ {
			better := best < 0 || math.Abs(float64(d.sums[end])-even) < math.Abs(float64(d.sums[best])-even)
			if rest[part+1][end] && better {
				best = end
			}
		}
		ends[part], first = best, best
	}
	return ends
}

// load is that of the layers from first to before end on a part.
func (d *divider) load(part, first, end int) float64 {
	bytes := d.sums[end] - d.sums[first]
	if part == 0 {
		bytes += d.head
	}
	if part == len(d.weights)-1 {
		bytes += d.tail
	}
	return float64(bytes) / d.weights[part]
}

// leastLoad is the least limit that a division can keep to. Loads are not negative, and such floating-point numbers are
// ordered as their bits are, so bisection over the bits ends at the very number, whatever the weights.
func (d *divider) leastLoad() float64 {
	low, high := uint64(0), math.Float64bits(math.Inf(1)) // without a limit every division will do
	for low < high {
		mid := low + (high-low)/2
		if d.reachable(math.Float64frombits(mid))[0][0] {
			high = mid
		} else {
			low = mid + 1
		}
	}
	return math.Float64frombits(low)
}

// reachable answers for every part p and every layer l: if part p begins with layer l, can it and the parts after it
// take all layers that are left, with loads of at most limit? The answer is result[p][l]. There is one row more, for no
// part, which can take what is left when nothing is. The next call overwrites the result.
func (d *divider) reachable(limit float64) [][]bool {
	n, parts := len(d.sums)-1, len(d.weights)
	if d.can == nil {
		for range parts + 1 {
			d.can = append(d.can, make([]bool, n+1))
		}
		d.good = make([]int, n+2)
	}
	can, good := d.can, d.good
	can[parts][n] = true
	for part := parts - 1; part >= 0; part-- {
		after := can[part+1]
		for end, ok := range after {
			if good[end+1] = good[end]; ok {
				good[end+1]++
			}
		}
		end := 0 // how far the part gets from first, at most; it never falls as first rises
		for first := range n + 1 {
			can[part][first] = false
			end = max(end, first)
			if d.load(part, first, end) > limit {
				continue // not even nothing but what comes before or after the layers
			}
			for end < n && d.load(part, first, end+1) <= limit {
				end++
			}
			if low := first + d.least; low <= end {
				can[part][first] = good[end+1] > good[low]
			}
		}
	}
	return can
}

// evenEnd returns where a part that begins with layer first would end if layers could be cut: with its share, by
// weight, of what is left for it and those after it.
func (d *divider) evenEnd(part, first int) float64 {
	rest := float64(d.sums[len(d.sums)-1]-d.sums[first]) + float64(d.tail)
	begin := float64(d.sums[first])
	if part == 0 {
		rest += float64(d.head)
		begin -= float64(d.head)
	}
	return begin + rest*(d.weights[part]/d.left[part])
}
