package hold

import (
	"encoding/json"
	"fmt"
	"slices"
	"unicode/utf8"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// manifest describes a model in device memory to another process. Sizes and offsets are in bytes.
type manifest struct {
	Name         string                   `json:"name"`
	Architecture string                   `json:"architecture"`
	Policy       plan.Policy              `json:"policy"`
	Files        list[FileIdentity]       `json:"files"`
	FileBytes    uint64                   `json:"file_bytes"`    // of all parts
	ModelTensors int                      `json:"model_tensors"` // of the file, held or not
	Split        plan.SplitBy             `json:"split"`
	Shard        manifestShard            `json:"shard"`
	Residence    string                   `json:"residence"` // of this stay in device memory, 32 hexadecimal digits; see wire.go
	Share        Share                    `json:"share"`     // "fd" or "ipc"
	Devices      list[manifestDevice]     `json:"devices"`
	Allocations  list[manifestAllocation] `json:"allocations"`  // by device, and then in the order in which tensors name them
	Groups       list[manifestGroup]      `json:"-"`            // see MarshalJSON and decode
	Encoded      json.RawMessage          `json:"groups"`       // what Groups are to be decoded from
	HF           *manifestHF              `json:"hf,omitempty"` // since later than version 2 began: missing, nothing is known
}

// MarshalJSON encodes m with its groups.
func (m *manifest) MarshalJSON() ([]byte, error) {
	type plain manifest
	x := plain(*m)
	if m.Groups != nil {
		var err error
		if x.Encoded, err = json.Marshal(m.Groups); err != nil {
			return nil, err
		}
	}
	return json.Marshal(&x)
}

// decode decodes the groups, which are most of a manifest. Whoever attaches starts the runtime meanwhile.
func (m *manifest) decode() error {
	if m.Groups != nil || m.Encoded == nil {
		return nil
	}
	err := json.Unmarshal(m.Encoded, &m.Groups)
	m.Encoded = nil
	return err
}

// manifestHF says whether the names of the tensors in Hugging Face's transformers are known; manifestTensor has them.
type manifestHF struct {
	Unknown string `json:"unknown,omitempty"` // why they are not known
}

// manifestShard is the share of the model that is held.
type manifestShard struct {
	By    plan.ShardBy `json:"by"`
	Rank  int          `json:"rank"`
	World int          `json:"world"`
}

// manifestDevice names a device. The index means little to other processes, which may number devices differently.
type manifestDevice struct {
	Kind  string `json:"kind"` // of the runtime
	Index int    `json:"index"`
	UUID  string `json:"uuid"`
	PCI   string `json:"pci"`
	Name  string `json:"name"`

	Runtime int `json:"runtime_version,omitempty"` // as amdhip.Runtime.Version has it; 0: an older Holder
}

// manifestAllocation is a piece of device memory. With descriptors, the n-th piece is what the n-th descriptor is for.
type manifestAllocation struct {
	Device  int    `json:"device"`            // position in manifest.Devices
	Handle  []byte `json:"handle,omitempty"`  // with "ipc", hipIpcMemHandle_t: 64 bytes, as base64
	Bytes   uint64 `json:"bytes"`             // that tensors are in
	Size    uint64 `json:"size,omitempty"`    // with "fd", of the memory: a multiple of 2 MiB
	Address uint64 `json:"address,omitempty"` // with "fd", where it is mapped in the Holder, and should be everywhere
}

// manifestGroup is the devices that have the same tensors, and these.
type manifestGroup struct {
	Devices []int                `json:"devices"` // positions in manifest.Devices
	Tensors list[manifestTensor] `json:"tensors"` // in the order of their places
}

type manifestTensor struct {
	Name   string         `json:"name"`
	Type   gguf.Type      `json:"type"`            // in the file, as ggml names it
	Shape  numbers        `json:"shape"`           // in the file, in ggml's order: the first varies fastest
	Part   int            `json:"part"`            // position in manifest.Files
	Offset int64          `json:"offset"`          // in that file
	Size   int64          `json:"size"`            // in that file
	Slice  *manifestSlice `json:"slice,omitempty"` // the part of the tensor that is held; missing: all of it

	HF []plan.HFTensor `json:"hf,omitempty"` // what it is in transformers; missing: nothing, or it is not known

	Target     gguf.Type `json:"target"` // type on the device
	Bytes      uint64    `json:"bytes"`  // on the device, of the slice where it is one
	Allocation int       `json:"allocation"`
	At         uint64    `json:"at"` // in the allocation, a multiple of 256
}

// manifestSlice is the part of a tensor that one of several ranks has.
type manifestSlice struct {
	Dim    int       `json:"dim"`    // that is divided
	Ranges rangeList `json:"ranges"` // of its indices, each from the first to the one behind the last
}

// describe makes the manifest of a model that is being loaded. It names the devices that may have something of it: who
// attaches needs no others.
func describe(h *held, r *residence, model *loader.Model) (*manifest, error) {
	p := model.Plan()
	m := &manifest{
		Name: h.name, Architecture: h.arch, Policy: p.Spec.Policy, Files: h.files, FileBytes: p.FileBytes,
		ModelTensors: p.ModelTensors, Split: p.Spec.Split.By,
		Shard:     manifestShard{By: p.Spec.Shard.By, Rank: p.Spec.Shard.Rank, World: p.Spec.Shard.World},
		Residence: r.id, Share: ShareIPC,
	}
	among := p.Spec.Split.Among(p.Devices)
	for _, d := range among {
		dev := model.Devices()[d]
		version, _, err := dev.Runtime().Version()
		if err != nil {
			return nil, err
		}
		m.Devices = append(m.Devices, manifestDevice{
			Kind: dev.Runtime().Kind(), Index: dev.Index(), UUID: dev.UUID(), PCI: dev.PCIBusID(), Name: dev.Name(),
			Runtime: version,
		})
	}
	share := m.shareHandles
	if r.memory != nil {
		m.Share, share = ShareFD, func(model *loader.Model) error { return m.shareDescriptors(model, r.memory) }
	}
	if err := share(model); err != nil {
		return nil, err
	}
	for i := range m.Allocations {
		m.Allocations[i].Device = slices.Index(among, m.Allocations[i].Device)
	}
	for i := range p.Groups {
		g := manifestGroup{Tensors: make([]manifestTensor, 0, len(p.Groups[i].Tensors))}
		for _, d := range p.Groups[i].Devices {
			if at := slices.Index(among, d); at >= 0 {
				g.Devices = append(g.Devices, at)
			}
		}
		if len(g.Devices) == 0 {
			continue
		}
		for j := range p.Groups[i].Tensors {
			t, err := describeTensor(&p.Groups[i].Tensors[j])
			if err != nil {
				return nil, err
			}
			g.Tensors = append(g.Tensors, t)
		}
		m.Groups = append(m.Groups, g)
	}
	m.nameHF(h.hf, h.hfError)
	return m, nil
}

// shareDescriptors lists the model's allocations, which are those of memory.
func (m *manifest) shareDescriptors(model *loader.Model, memory *sharedMemory) error {
	all, err := model.Allocations()
	if err != nil {
		return err
	}
	pieces := memory.pieces()
	if len(all) != len(pieces) {
		return fmt.Errorf("hold: internal error: %d allocations, %d descriptors", len(all), len(pieces))
	}
	if len(all) > maxDescriptors {
		return fmt.Errorf("hold: the model has %d allocations, of which %d can be shared by descriptors: use --share ipc: %w", len(all),
			maxDescriptors, amdhip.ErrUnsupported)
	}
	for i, a := range all {
		m.Allocations = append(m.Allocations, manifestAllocation{
			Device: a.Device, Bytes: a.Bytes, Size: pieces[i].physical.Size(), Address: uint64(pieces[i].rng.Ptr()),
		})
	}
	return nil
}

// shareHandles exports the model's allocations as IPC handles.
func (m *manifest) shareHandles(model *loader.Model) error {
	all, err := model.Allocations()
	if err != nil {
		return err
	}
	for _, a := range all {
		if a.Memory == nil {
			return fmt.Errorf("hold: memory of this device cannot be shared with other processes: %w", amdhip.ErrUnsupported)
		}
		h, err := a.Memory.IPCHandle()
		if err != nil {
			return err
		}
		b, err := h.MarshalBinary()
		if err != nil {
			return err
		}
		m.Allocations = append(m.Allocations, manifestAllocation{Device: a.Device, Handle: b, Bytes: a.Bytes})
	}
	return nil
}

// describeTensor describes t, a tensor of a file or a slice of one.
func describeTensor(t *plan.Tensor) (manifestTensor, error) {
	whole := t.Whole()
	if !utf8.ValidString(t.Name) { // JSON cannot express it
		return manifestTensor{}, fmt.Errorf("hold: tensor %q: only models whose tensors have names in UTF-8 can be held: %w", t.Name,
			ErrBadModel)
	}
	d := manifestTensor{
		Name: t.Name, Type: t.Type, Shape: whole.Shape, Part: whole.Part, Offset: whole.Offset, Size: whole.Size,
		Target: t.Target, Bytes: t.Bytes, Allocation: t.Arena, At: t.DeviceOffset,
	}
	if t.Slice != nil {
		d.Slice = &manifestSlice{Dim: t.Slice.Dim, Ranges: t.Slice.Ranges}
	}
	return d, nil
}

// fits refuses what a process that attaches would refuse: what is too large for a message, and what breaks a rule of
// plan.
func (m *manifest) fits() error {
	b, err := frame(reply{Version: wireVersion, Manifest: m, Ready: m.tensors(), Loaded: true})
	if err != nil {
		return err
	}
	if len(b) > maxReply {
		return fmt.Errorf("hold: the %d tensors of the model cannot be described in %d bytes, so it cannot be held", m.tensors(), maxReply)
	}
	if _, err := m.plan(); err != nil {
		return fmt.Errorf("hold: the model cannot be held: %w", err)
	}
	return nil
}

// tensors is the number of tensors that are held.
func (m *manifest) tensors() (n int) {
	for i := range m.Groups {
		n += len(m.Groups[i].Tensors)
	}
	return n
}
