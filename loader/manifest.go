package loader

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// manifest describes a model in device memory to another process.
type manifest struct {
	Name         string           `json:"name"`
	Architecture string           `json:"architecture"`
	DType        string           `json:"dtype"`
	Device       manifestDevice   `json:"device"`
	Files        []FileIdentity   `json:"files"`
	Arenas       []manifestArena  `json:"arenas"`
	Tensors      []manifestTensor `json:"tensors"` // in file order
}

// manifestDevice says where the memory is. Numbers of devices mean nothing to other processes, which may see others.
type manifestDevice struct {
	Kind  string `json:"kind"` // of the runtime
	Index int    `json:"index"`
	UUID  string `json:"uuid"`
	PCI   string `json:"pci"`
	Name  string `json:"name"`
}

// manifestArena is one allocation.
type manifestArena struct {
	Handle []byte `json:"handle"` // hipIpcMemHandle_t
	Bytes  uint64 `json:"bytes"`
}

type manifestTensor struct {
	Name   string   `json:"name"`
	Type   string   `json:"type"`  // in the file
	DType  string   `json:"dtype"` // on the device
	Shape  []uint64 `json:"shape"`
	Size   int64    `json:"size"` // in the file
	Bytes  uint64   `json:"bytes"`
	Arena  int      `json:"arena"`
	Offset uint64   `json:"offset"` // in the arena
}

// FileIdentity tells a model's file from another one, and from what it is after a change.
type FileIdentity struct {
	Path         string `json:"path"` // absolute
	Size         int64  `json:"size"`
	ModTime      int64  `json:"mtime_ns"`      // of the last change, nanoseconds since 1970
	HeaderSHA256 string `json:"header_sha256"` // of everything before the tensors' bytes
}

// identify describes the files of m.
func identify(m *gguf.Model) ([]FileIdentity, error) {
	var files []FileIdentity
	for _, p := range m.Parts() {
		info, err := p.File().Stat()
		if err != nil {
			return nil, err
		}
		path, err := filepath.Abs(p.Path)
		if err != nil {
			return nil, err
		}
		id := FileIdentity{Path: path, Size: p.Size, ModTime: info.ModTime().UnixNano()}
		err = m.Guard(func() error {
			sum := sha256.Sum256(p.Bytes()[:min(p.DataOffset, p.Size)])
			id.HeaderSHA256 = hex.EncodeToString(sum[:])
			return nil
		})
		if err != nil {
			return nil, err
		}
		files = append(files, id)
	}
	return files, nil
}

// manifest describes w, whose arenas must be device allocations.
func (w *Model) manifest(name string, files []FileIdentity) (*manifest, error) {
	m := &manifest{
		Name: name, Architecture: w.plan.model.Architecture(), DType: w.plan.opts.DType.String(), Files: files,
		Device: manifestDevice{
			Kind: w.dev.Runtime().Kind(), Index: w.dev.Index(), UUID: w.dev.UUID(), PCI: w.dev.PCIBusID(), Name: w.dev.Name(),
		},
	}
	w.mu.RLock()
	defer w.mu.RUnlock()
	for i, a := range w.arenas {
		mem, ok := a.mem.(*amdhip.Memory)
		if !ok {
			return nil, fmt.Errorf("loader: memory of this device cannot be shared with other processes: %w", amdhip.ErrUnsupported)
		}
		h, err := mem.IPCHandle()
		if err != nil {
			return nil, err
		}
		b, err := h.MarshalBinary()
		if err != nil {
			return nil, err
		}
		m.Arenas = append(m.Arenas, manifestArena{Handle: b, Bytes: w.plan.arenas[i]})
	}
	for i := range w.plan.Tensors {
		t := &w.plan.Tensors[i]
		m.Tensors = append(m.Tensors, manifestTensor{
			Name: t.Name, Type: t.Type.String(), DType: t.Target.String(), Shape: t.Shape, Size: t.Size, Bytes: t.Bytes,
			Arena: t.arena, Offset: t.offset,
		})
	}
	return m, nil
}

// plan is that of the model that m describes. Nothing of m is trusted: the result has no tensor outside its arena.
func (m *manifest) plan() (*Plan, error) {
	o, err := Options{}.withDefaults()
	if err != nil {
		return nil, err
	}
	if o.DType, err = ParseDType(m.DType); err != nil {
		return nil, err
	}
	p := &Plan{opts: o}
	for _, a := range m.Arenas {
		if a.Bytes > math.MaxInt64-p.DeviceBytes {
			return nil, errors.New("the arenas' sizes overflow")
		}
		p.arenas = append(p.arenas, a.Bytes)
		p.DeviceBytes += a.Bytes
	}
	for i := range m.Tensors {
		t := &m.Tensors[i]
		planned, err := t.plan(p.arenas)
		if err != nil {
			return nil, fmt.Errorf("tensor %q: %w", t.Name, err)
		}
		p.Tensors = append(p.Tensors, planned)
		p.ReadBytes += uint64(t.Size)
	}
	return p, nil
}

// plan checks t.
func (t *manifestTensor) plan(arenas []uint64) (p PlannedTensor, err error) {
	p = PlannedTensor{Tensor: &gguf.Tensor{Name: t.Name, Shape: t.Shape, Size: t.Size}, Bytes: t.Bytes, arena: t.Arena, offset: t.Offset}
	if p.Type, err = gguf.ParseType(t.Type); err != nil {
		return p, err
	}
	if p.Target, err = gguf.ParseType(t.DType); err != nil {
		return p, err
	}
	elems := uint64(1)
	for _, n := range t.Shape {
		if n > 0 && elems > math.MaxInt64/n {
			return p, errors.New("its shape overflows")
		}
		elems *= n
	}
	size, ok := p.Type.Bytes(elems)
	bytes, ok2 := p.Target.Bytes(elems)
	switch {
	case !ok || !ok2 || size != uint64(t.Size) || bytes != t.Bytes:
		return p, fmt.Errorf("%d bytes of %v and %d of %v are not %d elements", t.Size, p.Type, t.Bytes, p.Target, elems)
	case t.Arena < 0 || t.Arena >= len(arenas) || t.Offset > arenas[t.Arena] || t.Bytes > arenas[t.Arena]-t.Offset:
		return p, fmt.Errorf("%d bytes at %d are not in allocation %d", t.Bytes, t.Offset, t.Arena)
	}
	return p, nil
}

// check compares the identity of m's files with what they are now.
func (f *FileIdentity) check() error {
	info, err := os.Stat(f.Path)
	if err != nil {
		return err
	}
	if info.Size() != f.Size || info.ModTime().UnixNano() != f.ModTime {
		return fmt.Errorf("%s has changed since it was loaded: %w", f.Path, ErrMismatch)
	}
	return nil
}
