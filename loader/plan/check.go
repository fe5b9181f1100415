package plan

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
)

// FromGroups makes a plan of groups that somebody else laid out, for memory that exists already. It keeps groups.
// modelTensors and fileBytes are those of the whole model. What New promises of devices, places and sizes is checked,
// so that the groups may come from another process. Where the tensors are in the file is not; see [Tensor.In].
func FromGroups(s Spec, groups []Group, devices, modelTensors int, fileBytes uint64) (*Plan, error) {
	s, err := s.check(devices)
	if err != nil {
		return nil, err
	}
	p := &Plan{Spec: s, Groups: groups, Devices: devices, ModelTensors: modelTensors, FileBytes: fileBytes}
	if err := p.finish(); err != nil {
		return nil, err
	}
	return p, nil
}

// finish sums up the groups, and finds the order and the names of all tensors. It refuses what cannot be a plan:
// devices in no group or in two, tensors outside of their allocation or over each other, tensors whose size is not that
// of their elements, and names that are there twice.
func (p *Plan) finish() error {
	if err := p.checkDevices(); err != nil {
		return err
	}
	p.index = make(map[string]ref)
	for n := range p.Groups {
		g := &p.Groups[n]
		if err := g.finish(); err != nil {
			return err
		}
		for i := range g.Tensors {
			name := g.Tensors[i].Name
			if _, twice := p.index[name]; twice {
				return fmt.Errorf("tensor %q is there twice", name)
			}
			p.index[name] = ref{n, i}
			p.order = append(p.order, ref{n, i})
		}
	}
	slices.SortStableFunc(p.order, func(a, b ref) int {
		x, y := p.at(a), p.at(b)
		return cmp.Or(cmp.Compare(x.Part, y.Part), cmp.Compare(x.Offset, y.Offset))
	})
	return nil
}

// checkDevices sees that every device is in one group, and no group without a device.
func (p *Plan) checkDevices() error {
	var all []int
	for i := range p.Groups {
		if len(p.Groups[i].Devices) == 0 {
			return fmt.Errorf("group %d of %d has no device", i, len(p.Groups))
		}
		all = append(all, p.Groups[i].Devices...)
	}
	slices.Sort(all)
	for i, d := range all {
		switch {
		case d < 0 || d >= p.Devices:
			return fmt.Errorf("a group has device %d; the plan has %d devices", d, p.Devices)
		case i > 0 && all[i-1] == d:
			return fmt.Errorf("device %d is in two groups", d)
		}
	}
	if len(all) != p.Devices {
		return fmt.Errorf("%d of %d devices are in no group", p.Devices-len(all), p.Devices)
	}
	return nil
}

// finish sums up the group and checks its tensors.
func (g *Group) finish() error {
	g.DeviceBytes, g.ReadBytes = 0, 0
	for _, n := range g.Arenas {
		if n > maxBytes-g.DeviceBytes {
			return errors.New("the allocations' sizes together overflow")
		}
		g.DeviceBytes += n
	}
	arena, end := 0, uint64(0) // of the tensors so far
	for i := range g.Tensors {
		t := &g.Tensors[i]
		if err := t.check(); err != nil {
			return err
		}
		switch {
		case t.Arena < 0 || t.Arena >= len(g.Arenas) || t.Bytes > g.Arenas[t.Arena] ||
			t.DeviceOffset > g.Arenas[t.Arena]-t.Bytes:
			return fmt.Errorf("tensor %q: %d bytes at %d are not in allocation %d", t.Name, t.Bytes, t.DeviceOffset, t.Arena)
		case t.DeviceOffset%Align != 0:
			return fmt.Errorf("tensor %q: byte %d of an allocation is no multiple of %d", t.Name, t.DeviceOffset, Align)
		case t.Arena < arena || t.Arena == arena && t.DeviceOffset < end:
			return fmt.Errorf("tensor %q: byte %d of allocation %d is before the end of another tensor", t.Name,
				t.DeviceOffset, t.Arena)
		case uint64(t.Size) > maxBytes-g.ReadBytes:
			return fmt.Errorf("tensor %q: the tensors' sizes in the file together overflow", t.Name)
		}
		arena, end = t.Arena, t.DeviceOffset+t.Bytes
		g.ReadBytes += uint64(t.Size)
	}
	return nil
}

// check refuses a tensor whose sizes are not those of its elements.
func (t *Tensor) check() error {
	if t.Tensor == nil {
		return errors.New("a tensor has no description")
	}
	elems, ok := t.count()
	if !ok {
		return fmt.Errorf("tensor %q: a shape of %v overflows", t.Name, t.Shape)
	}
	if size, ok := t.Type.Bytes(elems); !t.Opaque() && (!ok || int64(size) != t.Size) {
		return fmt.Errorf("tensor %q: %v of %v in %d bytes cannot be", t.Name, t.Shape, t.Type, t.Size)
	}
	if n, ok := t.bytes(); !ok || n != t.Bytes {
		return fmt.Errorf("tensor %q: %v of %v in %d bytes on the device cannot be", t.Name, t.Shape, t.Target, t.Bytes)
	}
	if t.Target != t.Type && t.Target.Quantized() {
		return fmt.Errorf("tensor %q: %v cannot become %v: nothing is converted to blocks", t.Name, t.Type, t.Target)
	}
	if t.Slice != nil {
		if err := t.Slice.check(t.Type); err != nil {
			return fmt.Errorf("tensor %q: %w", t.Name, err)
		}
		if part := t.Slice.part(); !slices.Equal(part, t.Shape) {
			return fmt.Errorf("tensor %q: %v of dimension %d of %v has the shape %v and not %v", t.Name, t.Slice.Ranges,
				t.Slice.Dim, t.Slice.Shape, part, t.Shape)
		}
	}
	return nil
}

// count is the number of elements; false if it has more than 63 bits.
func (t *Tensor) count() (n uint64, ok bool) {
	n = 1
	empty := false
	for _, d := range t.Shape {
		switch {
		case d == 0:
			empty = true // goes on, so that an overflow is not hidden
		case n > maxBytes/d:
			return 0, false
		default:
			n *= d
		}
	}
	if empty {
		n = 0
	}
	return n, true
}

// covers checks that no tensor is lost or changed: those of all groups together are those of the share, once each.
func (p *Plan) covers(share []Tensor) error {
	if len(p.order) != len(share) {
		return fmt.Errorf("internal error: the devices get %d tensors of %d", len(p.order), len(share))
	}
	for i := range share {
		r, ok := p.index[share[i].Name]
		if !ok {
			return fmt.Errorf("internal error: tensor %q is on no device", share[i].Name)
		}
		if t := p.at(r); t.Bytes != share[i].Bytes || t.Size != share[i].Size {
			return fmt.Errorf("internal error: tensor %q has %d bytes on the device and not %d", t.Name, t.Bytes,
				share[i].Bytes)
		}
	}
	return nil
}
