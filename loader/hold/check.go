package hold

import (
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"path/filepath"
	"slices"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// Limits of a manifest. Together with that of its size they bound what it can make a process allocate.
const (
	maxHeldBytes  = 1 << 44 // of device memory: far above that of any host's devices
	maxDevices    = 1024    // far above what a host has
	maxDims       = 8       // ggml has 4
	maxTensorName = 1024    // bytes; ggml has 63
	handleBytes   = 64      // of hipIpcMemHandle_t
	maxText       = 4096    // bytes of what is shown to people; the longest path that Linux takes
)

// plan is that of the model that m describes. Nothing of m is trusted: afterwards tensors are inside of their
// allocations, one after the other, names are unique, and all sizes are those of the shapes.
func (m *manifest) plan() (*plan.Plan, error) {
	if err := m.check(); err != nil {
		return nil, err
	}
	if err := m.decode(); err != nil {
		return nil, err
	}
	if m.tensors() > m.ModelTensors {
		return nil, fmt.Errorf("%d tensors of a model that has %d", m.tensors(), m.ModelTensors)
	}
	memory, err := m.memory()
	if err != nil {
		return nil, err
	}
	if len(m.Groups) > len(m.Devices) { // so that comparing what their devices have takes no longer than reading it
		return nil, fmt.Errorf("%d groups of %d devices", len(m.Groups), len(m.Devices))
	}
	groups := make([]plan.Group, 0, len(m.Groups))
	for i := range m.Groups {
		g, err := m.group(&m.Groups[i], memory)
		if err != nil {
			return nil, err
		}
		groups = append(groups, g)
	}
	s := plan.Spec{
		Policy: m.Policy, Split: plan.Split{By: m.Split},
		Shard: plan.Shard{By: m.Shard.By, Rank: m.Shard.Rank, World: m.Shard.World},
	}
	return plan.FromGroups(s, groups, len(m.Devices), m.ModelTensors, m.FileBytes)
}

// check looks at everything but memory and tensors.
func (m *manifest) check() error {
	switch {
	case len(m.Files) == 0:
		return errors.New("it names no file that the model was loaded from")
	case len(m.Devices) == 0 || len(m.Devices) > maxDevices:
		return fmt.Errorf("a model on %d devices", len(m.Devices))
	case m.Share != ShareFD && m.Share != ShareIPC:
		return fmt.Errorf("a model that is shared by %v", m.Share)
	case m.Share == ShareFD && len(m.Allocations) > maxDescriptors:
		return fmt.Errorf("%d allocations shared by descriptors, the limit is %d", len(m.Allocations), maxDescriptors)
	case len(m.Residence) > 2*maxName:
		return fmt.Errorf("a residence of %d bytes", len(m.Residence))
	}
	if err := checkName(m.Name); err != nil {
		return err
	}
	texts := []string{m.Architecture}
	for _, d := range m.Devices {
		texts = append(texts, d.Kind, d.UUID, d.PCI, d.Name)
	}
	for _, text := range texts {
		if len(text) > maxText {
			return fmt.Errorf("a text of %d bytes, the limit is %d: %.100q", len(text), maxText, text)
		}
	}
	var sum uint64
	for _, f := range m.Files {
		if len(f.Path) > maxText || len(f.Name) > maxText {
			return fmt.Errorf("a path of %d bytes and a name of %d, the limit is %d", len(f.Path), len(f.Name), maxText)
		}
		hash, err := hex.DecodeString(f.HeaderSHA256)
		if !filepath.IsAbs(f.Path) && f.Source == nil && !f.Once || err != nil || len(hash) != 32 || f.Size < 0 {
			return fmt.Errorf("file %.300q of %d bytes with the hash %.100q: what is wanted is an absolute path, a size and a SHA-256",
				f.Path, f.Size, f.HeaderSHA256)
		}
		sum += uint64(f.Size) // it may overflow, and is then not the sum that is compared with
	}
	if sum != m.FileBytes {
		return fmt.Errorf("files of %d bytes together are said to have %d", sum, m.FileBytes)
	}
	type identity struct{ kind, uuid, pci string }
	seen := make(map[identity]bool)
	for _, d := range m.Devices {
		id := identity{d.Kind, d.UUID, d.PCI}
		switch {
		case seen[id]:
			return fmt.Errorf("device %.100q (%.100q) is there twice", d.Name, d.UUID)
		case d.Kind != m.Devices[0].Kind:
			return fmt.Errorf("devices of the kinds %.100q and %.100q", m.Devices[0].Kind, d.Kind)
		case d.Index < 0 || d.Index >= maxDevices:
			return fmt.Errorf("device number %d: devices are numbered from 0 to %d", d.Index, maxDevices-1)
		}
		seen[id] = true
	}
	return nil
}

// memory returns the sizes of the allocations of each device.
func (m *manifest) memory() ([][]uint64, error) {
	memory := make([][]uint64, len(m.Devices))
	var sum uint64
	for i, a := range m.Allocations {
		switch {
		case a.Device < 0 || a.Device >= len(m.Devices):
			return nil, fmt.Errorf("allocation %d is on device %d of %d", i, a.Device, len(m.Devices))
		case i > 0 && a.Device < m.Allocations[i-1].Device:
			return nil, fmt.Errorf("allocation %d is on device %d, the one before on device %d", i, a.Device, m.Allocations[i-1].Device)
		case a.Bytes > maxHeldBytes-sum:
			return nil, fmt.Errorf("allocations of more than %d bytes", uint64(maxHeldBytes))
		case m.Share == ShareIPC && len(a.Handle) != handleBytes:
			return nil, fmt.Errorf("allocation %d has an IPC handle of %d bytes, not %d", i, len(a.Handle), handleBytes)
		case m.Share == ShareFD && (a.Size > maxHeldBytes-sum || a.Size < a.Bytes || a.Size == 0 || a.Size%sharedAlign != 0 ||
			a.Address%4096 != 0):
			return nil, fmt.Errorf("allocation %d of %d bytes is shared as %d bytes at %#x", i, a.Bytes, a.Size, a.Address)
		}
		memory[a.Device] = append(memory[a.Device], a.Bytes)
		sum += max(a.Bytes, a.Size)
	}
	return memory, nil
}

// group checks g, whose devices have the given allocations, and its tensors. plan.FromGroups checks the tensors'
// places.
func (m *manifest) group(g *manifestGroup, memory [][]uint64) (plan.Group, error) {
	if len(g.Devices) == 0 || len(g.Devices) > len(m.Devices) {
		return plan.Group{}, fmt.Errorf("a group of %d devices", len(g.Devices))
	}
	seen := make([]bool, len(m.Devices))
	for _, d := range g.Devices {
		if d < 0 || d >= len(m.Devices) {
			return plan.Group{}, fmt.Errorf("a group on device %d of %d", d, len(m.Devices))
		}
		if seen[d] {
			return plan.Group{}, fmt.Errorf("device %d is in two groups", d)
		}
		seen[d] = true
		if !slices.Equal(memory[d], memory[g.Devices[0]]) {
			return plan.Group{}, fmt.Errorf("devices %d and %d have the same tensors, but not the same allocations", d, g.Devices[0])
		}
	}
	p := plan.Group{Devices: g.Devices, Arenas: memory[g.Devices[0]], Tensors: make([]plan.Tensor, 0, len(g.Tensors))}
	for i := range g.Tensors {
		t, err := g.Tensors[i].plan(m.Files)
		if err != nil {
			return plan.Group{}, fmt.Errorf("tensor %.100q: %w", g.Tensors[i].Name, err)
		}
		p.Tensors = append(p.Tensors, t)
	}
	return p, nil
}

// plan checks t, except for its place in device memory.
func (t *manifestTensor) plan(files []FileIdentity) (p plan.Tensor, err error) {
	elems := uint64(1)
	for _, n := range t.Shape {
		if n > 0 && elems > math.MaxInt64/n {
			return p, errors.New("its shape overflows")
		}
		elems *= n
	}
	size, ok := t.Type.Bytes(elems)
	bytes, fits := t.Target.Bytes(elems)
	if !t.Type.Valid() && t.Target == t.Type && t.Slice == nil { // not ggml's: bytes that are copied as they are
		size, bytes, ok, fits = uint64(t.Size), uint64(t.Size), true, true
	}
	switch {
	case len(t.Name) > maxTensorName:
		return p, fmt.Errorf("its name has %d bytes, the limit is %d", len(t.Name), maxTensorName)
	case len(t.Shape) > maxDims:
		return p, fmt.Errorf("it has %d dimensions, the limit is %d", len(t.Shape), maxDims)
	case !ok || !fits || t.Size < 0 || size != uint64(t.Size):
		return p, fmt.Errorf("%d bytes of %v are not %d elements", t.Size, t.Type, elems)
	case t.Part < 0 || t.Part >= len(files) || t.Offset < 0 || t.Offset > files[t.Part].Size ||
		t.Size > files[t.Part].Size-t.Offset:
		return p, fmt.Errorf("%d bytes at %d are not in file %d of %d", t.Size, t.Offset, t.Part, len(files))
	case t.Target != t.Type && (t.Target.BlockElems() != 1 || t.Target.Integer() || t.Type.Integer()):
		return p, fmt.Errorf("%v cannot become %v", t.Type, t.Target)
	}
	p = plan.Tensor{
		Tensor: &gguf.Tensor{Name: t.Name, Type: t.Type, Shape: t.Shape, Part: t.Part, Offset: t.Offset, Size: t.Size},
		Target: t.Target, Bytes: bytes, Arena: t.Allocation, DeviceOffset: t.At,
	}
	if t.Slice != nil {
		if err := p.Restrict(t.Slice.Dim, t.Slice.Ranges); err != nil {
			return p, err
		}
	}
	if p.Bytes != t.Bytes {
		return p, fmt.Errorf("%d bytes of %v are not %d elements", t.Bytes, t.Target, p.Elems())
	}
	return p, nil
}
