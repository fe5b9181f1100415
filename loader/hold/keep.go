package hold

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/internal/watch"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// Keeper keeps the device memory of loaded models when the Holder ends, however it ends: it has descriptors of it. The
// next Holder takes the models over with Adopt. [KeeperClient] is one, and systemd's store of descriptors another.
type Keeper interface {
	// Keep keeps a model until Forget. The files stay the caller's: a Keeper duplicates their descriptors.
	Keep(ctx context.Context, k Kept) error
	// Forget gives up a model. One that is not kept is no error.
	Forget(ctx context.Context, id string) error
	// Kept returns all that is kept. The caller closes the files.
	Kept(ctx context.Context) ([]Kept, error)
}

// Kept is a model that a Keeper has.
type Kept struct {
	ID          string     // of its stay in device memory: 32 hexadecimal digits
	Description []byte     // JSON, for Holders
	Files       []*os.File // descriptors of its device memory
}

// keepTime is how long a Keeper may take.
const keepTime = 10 * time.Second

// description is Kept.Description.
type description struct {
	Version  int       `json:"version"` // wireVersion
	Manifest *manifest `json:"manifest"`
	Rules    []string  `json:"rules,omitempty"`   // of plan.Spec
	Tensors  string    `json:"tensors,omitempty"` // likewise
	Ratio    []float64 `json:"ratio,omitempty"`   // likewise
	Shard    []string  `json:"shard,omitempty"`   // its rules, likewise
}

// Adopt takes over the models that Options.Keep has, and returns their names. Nothing is copied, and processes that are
// attached to them notice nothing. What does not fit its own description, this Holder's devices or the names that are
// taken is given up, and the log says so; the error is that of asking the Keeper.
func (h *Holder) Adopt(ctx context.Context) (names []string, err error) {
	if h.options.Keep == nil {
		return nil, nil
	}
	by := h.keeperIs(ctx)
	all, err := h.options.Keep.Kept(ctx)
	if err != nil {
		return nil, fmt.Errorf("hold: asking the keeper: %w", err)
	}
	for _, k := range all {
		began := time.Now()
		m, err := h.adopt(k, by)
		if err != nil {
			err = errors.Join(err, h.forgetKept(k.ID))
			h.log.Warn("a model that was kept cannot be taken over, and is given up", "id", k.ID, "error", err)
			continue
		}
		names = append(names, m.name)
		h.log.Info("taken over", "model", m.name, "bytes", m.plan.DeviceBytes(), "seconds", time.Since(began).Seconds())
	}
	h.tell()
	return names, nil
}

// adopt takes over one model, which that keeper has. It closes the files that it does not take over.
func (h *Holder) adopt(k Kept, by string) (_ *held, err error) {
	files := k.Files
	defer func() { closeAll(files) }()
	var d description
	if err := json.Unmarshal(k.Description, &d); err != nil {
		return nil, fmt.Errorf("hold: its description is not one: %w", err)
	}
	man := d.Manifest
	if man == nil || d.Version != wireVersion {
		return nil, fmt.Errorf("hold: its description is of version %d, this is version %d", d.Version, wireVersion)
	}
	p, err := man.plan()
	if err != nil {
		return nil, fmt.Errorf("hold: its manifest: %w", err)
	}
	switch {
	case h.share != ShareFD || man.Share != ShareFD:
		return nil, fmt.Errorf("hold: it is shared by %v, this holder shares by %v", man.Share, h.share)
	case man.Residence != k.ID:
		return nil, fmt.Errorf("hold: its manifest is of %.40q", man.Residence)
	case len(files) != len(man.Allocations):
		return nil, fmt.Errorf("hold: there are %d descriptors for %d allocations", len(files), len(man.Allocations))
	}
	if err := h.hasDevices(man.Devices); err != nil {
		return nil, err
	}
	path := cmp.Or(man.Files[0].Name, man.Files[0].Path)
	m, err := newHeld(man.Name, path, man.Files[0].Source != nil)
	if err != nil {
		return nil, err
	}
	if m.spec, err = d.spec(p.Spec); err != nil {
		return nil, err
	}
	if _, err := h.reserve(m); err != nil {
		return nil, err
	}
	defer h.adding.Done()
	m.adopted, m.files, m.arch = true, man.Files, man.Architecture
	r := &residence{
		id: k.ID, manifest: man, memory: newSharedMemory(h.devices, &m.ranges), claimed: h.need(p), began: time.Now(),
		ended: make(chan struct{}), finished: true, keptBy: by,
	}
	r.arrivals.changed = make(chan struct{})
	mine := files
	files = nil // mapKept closes those that it does not take over
	memory, err := watch.Do(h.ctx, h.calls.Limit(h.stall()), "mapping the memory of a model that was kept",
		func() ([][]loader.Mapping, error) { return h.mapKept(man, r.memory, mine) },
		func(memory [][]loader.Mapping) { _ = unmap(memory) })
	if err != nil {
		h.forget(m)
		close(m.opened)
		return nil, errors.Join(err, h.giveBack(m))
	}
	var feed *loader.Feed
	r.model, feed = loader.Adopt(p, h.devices, memory, h.options.Config.Stall, func() error { return nil })
	feed.Loaded()
	r.arrivals.set(arrival{tensors: p.Len(), ended: true})
	close(r.ended)
	h.mu.Lock()
	m.plan, m.now, m.loaded = p, r, true
	h.touch(m)
	for d, n := range r.claimed {
		h.claimed[d] += n
	}
	h.mu.Unlock()
	close(m.opened)
	h.refill(m)
	return m, nil
}

// mapKept maps the memory of a model that was kept.
func (h *Holder) mapKept(man *manifest, to *sharedMemory, files []*os.File) ([][]loader.Mapping, error) {
	memory := make([][]loader.Mapping, len(h.devices))
	defer func() { closeAll(files) }()
	for i, a := range man.Allocations {
		file := files[0]
		files = files[1:]
		x, err := to.adopt(a.Device, len(memory[a.Device]), file, a.Size, amdhip.DevicePtr(a.Address))
		if err != nil {
			return nil, errors.Join(fmt.Errorf("hold: its allocation %d: %w", i+1, err), unmap(memory))
		}
		memory[a.Device] = append(memory[a.Device], x)
	}
	return memory, nil
}

// hasDevices refuses a model that is on other devices than the Holder's, or on these in another order.
func (h *Holder) hasDevices(named []manifestDevice) error {
	same := len(named) == len(h.devices)
	for i := range named {
		same = same && named[i].among(h.devices) == h.devices[i]
	}
	if !same {
		return fmt.Errorf("hold: it is on %d devices, which are not those of this holder: %w", len(named), amdhip.ErrInvalidDevice)
	}
	return nil
}

// spec is what the model became, with p what its manifest says of that.
func (d *description) spec(p plan.Spec) (plan.Spec, error) {
	for _, text := range d.Rules {
		var rule plan.Rule
		if err := rule.UnmarshalText([]byte(text)); err != nil {
			return p, err
		}
		p.Rules = append(p.Rules, rule)
	}
	for _, text := range d.Shard {
		var rule plan.ShardRule
		if err := rule.UnmarshalText([]byte(text)); err != nil {
			return p, err
		}
		p.Shard.Rules = append(p.Shard.Rules, rule)
	}
	p.Split.Ratio = d.Ratio
	var err error
	if d.Tensors != "" {
		p.Tensors, err = regexp.Compile(d.Tensors)
	}
	return p, err
}

// refill makes an image of a model that has none, if its file is still there and the same.
func (h *Holder) refill(m *held) {
	if h.pool == nil {
		return
	}
	file, err := h.options.open(h.ctx, m.path)
	if err != nil {
		h.log.Info("the model's file cannot be read, so it gets no page-locked memory", "model", m.name, "error", err)
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if SameFile(m.files, file) != nil || h.closed || !h.wantImage(m, file) {
		_ = file.Close() // it was only read
	}
}

// isAsWanted reports whether a model that is held already was adopted and is what somebody wants to add.
func (h *Holder) isAsWanted(have, want *held) bool {
	h.mu.Lock()
	open := have.isOpen()
	h.mu.Unlock()
	if !open || have.path != want.path {
		return false
	}
	a, b := have.spec, want.spec
	text := func(s plan.Spec) (all []string) {
		for _, r := range s.Rules {
			all = append(all, r.String())
		}
		for _, r := range s.Shard.Rules {
			all = append(all, "shard "+r.String())
		}
		if s.Tensors != nil {
			all = append(all, "tensors "+s.Tensors.String())
		}
		return all
	}
	if a.Policy != b.Policy || a.Split.By != b.Split.By || a.Shard.By != b.Shard.By || a.Shard.Rank != b.Shard.Rank ||
		max(1, a.Shard.World) != max(1, b.Shard.World) || !slices.Equal(text(a), text(b)) {
		return false
	}
	file, err := h.options.open(h.ctx, want.path)
	if err != nil {
		return errors.Is(err, os.ErrNotExist) // what is in device memory is all that is left of it
	}
	defer file.Close()
	return SameFile(have.files, file) == nil
}
