package plan

import (
	"fmt"
	"math"
	"slices"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

const (
	// Align is the alignment of every tensor in device memory, in bytes: what hipMalloc itself guarantees, and a
	// multiple of what the widest vector loads of GPU kernels want.
	Align = 256
	// arenaBytes is the size from which on a new device allocation is begun: few enough allocations for the largest
	// models, none so large that it must find half the device in one piece.
	arenaBytes = 4 << 30
	// maxBytes bounds every sum of sizes, so that offsets fit an int64.
	maxBytes = math.MaxInt64
)

// Plan says which tensors go where, and as what. It is made by New, or by FromGroups, and not changed after that.
type Plan struct {
	Spec         Spec // with its open fields filled
	Groups       []Group
	Devices      int    // how many devices the plan is for; every one is in exactly one group
	ModelTensors int    // tensors of the whole model
	FileBytes    uint64 // of all parts of the model

	order []ref // every tensor once, in file order
	index map[string]ref
}

// Group is the devices that get the same bytes, and what these are. It is loaded by one pipeline.
type Group struct {
	Devices     []int    // numbers of the devices, from 0 on
	Tensors     []Tensor // in file order, which is also their order in device memory; empty: the devices get nothing
	Arenas      []uint64 // bytes of each allocation on each of the devices
	DeviceBytes uint64   // size of all allocations on one device: the tensors, and the padding between them
	ReadBytes   uint64   // size of the tensors in the file
}

// Tensor is one tensor, or slice of one, with its place in device memory.
type Tensor struct {
	// Tensor says what is in the file. That of a slice has the slice's Shape and Size, and the Offset of its first byte.
	*gguf.Tensor
	Target       gguf.Type // element type on the device
	Bytes        uint64    // size on the device
	Slice        *Slice    // the part of the tensor that the rank has; nil: all of it
	Arena        int       // which allocation of its device it is in
	DeviceOffset uint64    // where in that allocation; Offset is where in the file

	whole *gguf.Tensor // the tensor that this is a slice of; nil: it is no slice
	comb  *comb        // how the bytes of a slice lie in the file; nil: in one piece
}

// bytes is the size on the device; false if it overflows, or cannot be known. Tensors of types that ggml does not have
// can only stay what they are: opaque bytes.
func (t *Tensor) bytes() (uint64, bool) {
	if t.Opaque() {
		return uint64(max(0, t.Size)), t.Size >= 0 && t.Target == t.Type
	}
	return t.Target.Bytes(t.Elems())
}

// Opaque reports whether the tensor's type is one that ggml does not have, so that its bytes can be copied and nothing
// else.
func (t *Tensor) Opaque() bool { return !t.Type.Valid() }

// Block is the bytes of one block of the tensor in the file, and of what becomes of it on the device. An opaque tensor
// is divided at any byte.
func (t *Tensor) Block() (src, dst int) {
	if t.Opaque() {
		return 1, 1
	}
	return t.Type.BlockBytes(), t.Target.BlockBytes() * t.Type.BlockElems() / t.Target.BlockElems()
}

// ref names a tensor of a plan.
type ref struct{ group, tensor int }

// New plans the tensors of f that s selects for len(free) devices, whose free bytes decide on the devices' shares where
// s.Split leaves that open. It reads nothing but the header. Errors match ErrBadOption where s asks for what cannot be,
// and are a *gguf.FormatError for a tensor of a type that ggml does not have, unless its bytes stay as they are.
func New(f *gguf.File, s Spec, free []uint64) (*Plan, error) {
	s, err := s.check(len(free))
	if err != nil {
		return nil, err
	}
	share, err := s.share(f)
	if err != nil {
		return nil, err
	}
	p := &Plan{Spec: s, Devices: len(free), ModelTensors: len(f.Tensors()), FileBytes: f.Size()}
	if s.Split.By == SplitNone || len(free) == 1 {
		g := Group{Tensors: share}
		for i := range free {
			g.Devices = append(g.Devices, i)
		}
		p.Groups = []Group{g}
	} else if p.Groups, err = s.Split.groups(share, free); err != nil {
		return nil, err
	}
	for i := range p.Groups {
		if err := p.Groups[i].layOut(); err != nil {
			return nil, err
		}
	}
	if err := p.finish(); err != nil {
		return nil, err
	}
	if err := p.covers(share); err != nil {
		return nil, err
	}
	return p, nil
}

// share is what the rank has of the model: the selected tensors, with their types on the device, divided among ranks.
func (s *Spec) share(f *gguf.File) ([]Tensor, error) {
	all := f.Tensors()
	selected := make([]Tensor, 0, len(all))
	var total uint64
	for i := range all {
		t := &all[i]
		if s.Tensors != nil && !s.Tensors.MatchString(t.Name) {
			continue
		}
		planned := Tensor{Tensor: t, Target: s.target(t.Name, t.Type)}
		var ok bool
		if planned.Bytes, ok = planned.bytes(); !ok && !t.Type.Valid() {
			return nil, f.TypeError(t)
		} else if !ok {
			return nil, fmt.Errorf("tensor %q: %d elements as %v overflow", t.Name, t.Elems(), planned.Target)
		}
		if planned.Bytes > maxBytes-total {
			return nil, fmt.Errorf("tensor %q: the tensors' sizes as %v overflow together", t.Name, s.Policy)
		}
		total += planned.Bytes
		selected = append(selected, planned)
	}
	if len(selected) == 0 && len(all) > 0 {
		return nil, fmt.Errorf("no tensor's name matches %q; the model has %d", s.Tensors, len(all))
	}
	return s.Shard.share(f, selected)
}

// groups gives each device whole layers, in proportion to the ratio or to free memory. Devices may get nothing.
func (s Split) groups(share []Tensor, free []uint64) ([]Group, error) {
	among := s.Among(len(free))
	weights := make([]float64, len(among))
	for i, d := range among {
		if weights[i] = float64(max(free[d], 1)); s.Ratio != nil {
			weights[i] = s.Ratio[d]
		}
	}
	owners, err := assignLayers(share, weights)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBadOption, err)
	}
	groups := make([]Group, len(free))
	for i := range groups {
		groups[i].Devices = []int{i}
	}
	for i, owner := range owners {
		d := among[owner]
		groups[d].Tensors = append(groups[d].Tensors, share[i])
	}
	return groups, nil
}

// layOut gives every tensor of the group its place, and counts bytes.
func (g *Group) layOut() error {
	var at uint64 // end of the current arena
	for i := range g.Tensors {
		t := &g.Tensors[i]
		if len(g.Arenas) == 0 || at > 0 && at+t.Bytes > arenaBytes {
			g.Arenas = append(g.Arenas, 0)
			at = 0
		}
		t.Arena, t.DeviceOffset = len(g.Arenas)-1, at
		if t.Bytes > maxBytes-Align-at {
			return fmt.Errorf("tensor %q: the tensors' sizes together overflow", t.Name)
		}
		at = alignUp(at+max(t.Bytes, 1), Align) // a tensor without elements has a place, too
		g.Arenas[t.Arena] = at
	}
	return nil
}

func (p *Plan) at(r ref) *Tensor { return &p.Groups[r.group].Tensors[r.tensor] }

// Tensors returns every tensor of the plan once, in file order, whatever device it is on.
func (p *Plan) Tensors() []*Tensor {
	all := make([]*Tensor, len(p.order))
	for i, r := range p.order {
		all[i] = p.at(r)
	}
	return all
}

// Len is the number of tensors in the plan.
func (p *Plan) Len() int { return len(p.order) }

// Find returns which group the tensor of that name is in, and its number there.
func (p *Plan) Find(name string) (group, tensor int, ok bool) {
	r, ok := p.index[name]
	return r.group, r.tensor, ok
}

// DeviceBytes is what the allocations on all devices take together.
func (p *Plan) DeviceBytes() (n uint64) {
	for i := range p.Groups {
		n += p.Groups[i].DeviceBytes * uint64(len(p.Groups[i].Devices))
	}
	return n
}

// ReadBytes is the size of the plan's tensors in the file. Bytes that go to several devices are read once.
func (p *Plan) ReadBytes() (n uint64) {
	for i := range p.Groups {
		n += p.Groups[i].ReadBytes
	}
	return n
}

// TensorBytes is the size of the plan's tensors on one device each, without padding: what a load delivers.
func (p *Plan) TensorBytes() (n uint64) {
	for _, r := range p.order {
		n += p.at(r).Bytes
	}
	return n
}

// GroupOf returns the group that device number d is in.
func (p *Plan) GroupOf(d int) *Group {
	for i := range p.Groups {
		if slices.Contains(p.Groups[i].Devices, d) {
			return &p.Groups[i]
		}
	}
	return nil
}

// alignUp is the least multiple of align, a power of two, that is not below n.
func alignUp(n, align uint64) uint64 { return (n + align - 1) &^ (align - 1) }
