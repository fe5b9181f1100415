package loader

import (
	"cmp"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strconv"
)

var (
	// layerName finds the number of a layer, and what distinguishes the layers of an encoder from those of a decoder.
	layerName = regexp.MustCompile(`^(?:(.+)\.)?blk\.(\d+)\.`)
	// endName is of tensors that are used behind the last layer. What is not of a layer and not of these is used before the first.
	endName = regexp.MustCompile(`^(?:.+\.)?(?:output|output_norm|cls|dense_\d+|altup_unembd_proj)(?:\.|$)`)
)

// stack is the order in which a model's tensors are used, as far as names tell: what precedes the layers, the layers, what
// follows them.
type stack struct {
	layer []int // of each tensor; headLayer or tailLayer
	bytes []uint64
	head  uint64 // bytes before the layers
	tail  uint64 // and behind
}

const headLayer, tailLayer = -1, -2

// maxLayersTimesParts bounds the work of dividing layers: far above any real model's, and a second at most for a hostile one's.
const maxLayersTimesParts = 1 << 24

// newStack finds the layers of tensors, with their bytes on the device.
func newStack(tensors []PlannedTensor) *stack {
	type key struct{ group, number int }
	s := &stack{layer: make([]int, len(tensors))}
	groups := make(map[string]int) // in order of appearance
	keys := make([]key, len(tensors))
	index := make(map[key]int)
	var order []key
	for i := range tensors {
		name := tensors[i].Name
		m := layerName.FindStringSubmatch(name)
		if m != nil {
			if n, err := strconv.Atoi(m[2]); err == nil {
				g, ok := groups[m[1]]
				if !ok {
					g = len(groups)
					groups[m[1]] = g
				}
				keys[i] = key{g, n}
				if _, ok := index[keys[i]]; !ok {
					index[keys[i]] = 0
					order = append(order, keys[i])
				}
				continue
			}
		}
		if s.layer[i] = headLayer; endName.MatchString(name) {
			s.layer[i] = tailLayer
		}
	}
	slices.SortFunc(order, func(a, b key) int { return cmp.Or(cmp.Compare(a.group, b.group), cmp.Compare(a.number, b.number)) })
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

// Layers returns the lowest and the highest number of the layers that the plan's tensors belong to; ok is false if there are none.
func (p *Plan) Layers() (first, last int, ok bool) {
	for i := range p.Tensors {
		m := layerName.FindStringSubmatch(p.Tensors[i].Name)
		if m == nil {
			continue
		}
		n, err := strconv.Atoi(m[2])
		if err != nil {
			continue
		}
		if !ok || n < first {
			first = n
		}
		if !ok || n > last {
			last = n
		}
		ok = true
	}
	return first, last, ok
}

// assignLayers gives every part a run of whole layers, at least one, and returns which part each tensor belongs to. What precedes
// the layers goes to the first part, what follows to the last. weights has an entry for every part: the parts' bytes divided by
// their weights, which are above 0, come out as equal as can be.
func assignLayers(tensors []PlannedTensor, weights []float64) ([]int, error) {
	s := newStack(tensors)
	if len(s.bytes) < len(weights) {
		return nil, fmt.Errorf("%d layers cannot be divided among %d: use at most as many as there are layers", len(s.bytes), len(weights))
	}
	if len(s.bytes) > maxLayersTimesParts/len(weights) {
		return nil, fmt.Errorf("%d layers are too many to be divided among %d", len(s.bytes), len(weights))
	}
	ends := s.divide(weights)
	owners := make([]int, len(tensors))
	for i, l := range s.layer {
		switch l {
		case headLayer:
		case tailLayer:
			owners[i] = len(weights) - 1
		default:
			owners[i], _ = slices.BinarySearch(ends, l+1) // the first part that ends behind l
		}
	}
	return owners, nil
}

// divide returns behind which layer each part ends. It finds the least load, in bytes by weight, with which the parts can take all
// layers, and then places the ends as near to even shares as that load allows.
func (s *stack) divide(weights []float64) []int {
	n, parts := len(s.bytes), len(weights)
	sums := make([]float64, n+1) // bytes before a layer, and at last of all
	sums[0] = float64(s.head)
	for i, b := range s.bytes {
		sums[i+1] = sums[i] + float64(b)
	}
	sums[n] += float64(s.tail)
	even, all := make([]float64, parts), 0.0 // bytes up to a part's end, if layers could be cut
	for i, w := range weights {
		all += w
		even[i] = all
	}
	for i := range even {
		even[i] *= sums[n] / all
	}
	sums[0] = 0 // the first part has what precedes the layers

	// fill says for every part, last to first, which layers it can begin with, so that it and those behind it take the rest.
	can := make([][]bool, parts+1)
	for i := range can {
		can[i] = make([]bool, n+1)
	}
	can[parts][n] = true
	fill := func(load float64) bool {
		for part := parts - 1; part >= 0; part-- {
			end, ends := 0, 0 // how far it gets from first, and how many good ends are on the way
			for first := range n {
				if first > 0 && end >= first && can[part+1][first] {
					ends-- // it is not on the way any more: a part has a layer
				}
				for end = max(end, first); end < n && sums[end+1]-sums[first] <= load*weights[part]; end++ {
					if can[part+1][end+1] {
						ends++
					}
				}
				can[part][first] = ends > 0
			}
		}
		return can[0][0]
	}
	low, high := 0.0, sums[n]/slices.Min(weights)
	for range 64 {
		if mid := (low + high) / 2; fill(mid) {
			high = mid
		} else {
			low = mid
		}
	}
	fill(high)
	ends := make([]int, parts)
	first := 0
	for part := range parts {
		for end := first + 1; end <= n && sums[end]-sums[first] <= high*weights[part]; end++ {
			if can[part+1][end] && (ends[part] == 0 || math.Abs(sums[end]-even[part]) < math.Abs(sums[ends[part]]-even[part])) {
				ends[part] = end
			}
		}
		first = ends[part]
	}
	return ends
}
