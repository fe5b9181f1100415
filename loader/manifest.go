package loader

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"path/filepath"
	"unicode/utf8"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// maxHeldBytes is far above any device's memory. It bounds what reading a model back can make this process allocate.
const maxHeldBytes = 1 << 44

// manifest describes a model in device memory to another process. Sizes and offsets are in bytes.
type manifest struct {
	Name         string           `json:"name"`
	Architecture string           `json:"architecture"`
	DType        string           `json:"dtype"`
	Device       manifestDevice   `json:"device"`
	Files        []FileIdentity   `json:"files"`
	Arenas       []manifestArena  `json:"arenas"`
	Tensors      []manifestTensor `json:"tensors"` // in file order, which is that of their places
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
	Handle []byte `json:"handle"` // hipIpcMemHandle_t: 64 bytes, as base64
	Bytes  uint64 `json:"bytes"`
}

type manifestTensor struct {
	Name   string   `json:"name"`
	Type   string   `json:"type"`  // in the file, as ggml names it
	DType  string   `json:"dtype"` // on the device, likewise
	Shape  []uint64 `json:"shape"` // in ggml's order: the first varies fastest
	Size   int64    `json:"size"`  // in the file
	Bytes  uint64   `json:"bytes"` // on the device
	Arena  int      `json:"arena"`
	Offset uint64   `json:"offset"` // in the arena, a multiple of 256
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
		if p.File() == nil {
			return nil, fmt.Errorf("loader: %s: a remote model is not identified as a file is; load it from a file", p.Path)
		}
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
	w.files = files
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
		if !utf8.ValidString(t.Name) { // JSON has no way to say it
			return nil, fmt.Errorf("loader: tensor %q: only models whose tensors have names of UTF-8 can be held: %w", t.Name, ErrBadModel)
		}
		m.Tensors = append(m.Tensors, manifestTensor{
			Name: t.Name, Type: t.Type.String(), DType: t.Target.String(), Shape: t.Shape, Size: t.Size, Bytes: t.Bytes,
			Arena: t.arena, Offset: t.offset,
		})
	}
	return m, nil
}

// fits refuses what is too large for a message.
func (m *manifest) fits() error {
	b, err := frame(reply{Version: wireVersion, Manifest: m, Ready: len(m.Tensors), Loaded: true})
	if err == nil && len(b) > maxReply {
		err = fmt.Errorf("loader: %d tensors are too many to be described in %d bytes, so the model cannot be held", len(m.Tensors), maxReply)
	}
	return err
}

// plan is that of the model that m describes. Nothing of m is trusted: tensors are in their arenas, one after the other, and all
// that is computed from their sizes is right.
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
		if a.Bytes > maxHeldBytes-p.DeviceBytes {
			return nil, fmt.Errorf("allocations of more than %d bytes", uint64(maxHeldBytes))
		}
		p.arenas = append(p.arenas, a.Bytes)
		p.DeviceBytes += a.Bytes
	}
	names := make(map[string]bool, len(m.Tensors))
	arena, end := 0, uint64(0) // of the tensors so far
	for i := range m.Tensors {
		t := &m.Tensors[i]
		planned, err := t.plan(p.arenas)
		switch {
		case err != nil:
		case names[t.Name]:
			err = errors.New("it is there twice")
		case t.Arena < arena || t.Arena == arena && t.Offset < end:
			err = fmt.Errorf("byte %d of allocation %d is before the end of another tensor", t.Offset, t.Arena)
		case uint64(t.Size) > math.MaxInt64-p.ReadBytes:
			err = errors.New("the tensors' sizes overflow")
		}
		if err != nil {
			return nil, fmt.Errorf("tensor %q: %w", t.Name, err)
		}
		names[t.Name] = true
		arena, end = t.Arena, t.Offset+t.Bytes
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
	bytes, fits := p.Target.Bytes(elems)
	switch {
	case !ok || !fits || t.Size < 0 || size != uint64(t.Size) || bytes != t.Bytes:
		return p, fmt.Errorf("%d bytes of %v and %d of %v are not %d elements", t.Size, p.Type, t.Bytes, p.Target, elems)
	case p.Target != p.Type && p.Target.BlockElems() != 1: // nothing is ever converted to blocks
		return p, fmt.Errorf("%v cannot become %v", p.Type, p.Target)
	case t.Arena < 0 || t.Arena >= len(arenas) || t.Offset > arenas[t.Arena] || t.Bytes > arenas[t.Arena]-t.Offset:
		return p, fmt.Errorf("%d bytes at %d are not in allocation %d", t.Bytes, t.Offset, t.Arena)
	case t.Offset%deviceAlign != 0:
		return p, fmt.Errorf("byte %d of an allocation is no multiple of %d", t.Offset, deviceAlign)
	}
	return p, nil
}
