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
	Files       []*os.File // descriptors of its device memory, and at last of its fingerprints where they are known
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
	Prints   bool      `json:"prints,omitempty"`  // the last descriptor is of its fingerprints
}

// Adopt takes over the models that Options.Keep has, and returns their names. Nothing is copied, and processes that are
// attached to them notice nothing. What does not fit its own description, this Holder's devices or the names that are
// taken is given up, and the log says so; the error is that of asking the Keeper. Where fingerprints are kept, too, the
// models are compared with them in the background, unless Request.Prove is ProveOff: see Model.Proved, and Model.Scrub
// for what is done about damage.
func (h *Holder) Adopt(ctx context.Context) (names []string, err error) {
	if h.options.Keep == nil {
		return nil, nil
	}
	by := h.keeperIs(ctx)
	all, err := h.options.Keep.Kept(ctx)
	if err != nil {
		return nil, fmt.Errorf("hold: asking the keeper: %w", err)
	}
	var adopted []*held
	for _, k := range all {
		began := time.Now()
		m, err := h.adopt(k, by)
		if err != nil {
			err = errors.Join(err, h.forgetKept(k.ID))
			h.log.Warn("a model that was kept cannot be taken over, and is given up", "id", k.ID, "error", err)
			continue
		}
		names, adopted = append(names, m.name), append(adopted, m)
		h.log.Info("taken over", "model", m.name, "bytes", m.plan.DeviceBytes(), "seconds", time.Since(began).Seconds())
	}
	h.compareAdopted(adopted)
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
	}
	files, prints, err := splitKept(files, d.Prints, len(man.Allocations))
	if err != nil {
		return nil, err
	}
	if prints != nil {
		defer prints.Close()
	}
	path := cmp.Or(man.Files[0].Name, man.Files[0].Path)
	m, err := newHeld(man.Name, path, man.Files[0].Source != nil || man.Files[0].Once)
	if err != nil {
		return nil, err
	}
	if m.spec, err = d.spec(p.Spec); err != nil {
		return nil, err
	}
	among, err := h.among(man.Devices, m.spec.Split)
	if err != nil {
		return nil, err
	}
	if p, err = widen(p, m.spec, among, len(h.devices)); err != nil {
		return nil, err
	}
	if _, err := h.reserve(m); err != nil {
		return nil, err
	}
	defer h.adding.Done()
	m.adopted, m.files, m.arch, m.once = true, man.Files, man.Architecture, man.Files[0].Once
	r := &residence{
		id: k.ID, manifest: man, memory: newSharedMemory(h.devices, &m.ranges), claimed: h.need(p), began: time.Now(),
		ended: make(chan struct{}), finished: true, keptBy: by,
	}
	r.arrivals.changed = make(chan struct{})
	mine := files
	files = nil // mapKept closes those that it does not take over
	memory, err := watch.Do(h.ctx, h.calls.Limit(h.stall()), "mapping the memory of a model that was kept",
		func() ([][]loader.Mapping, error) { return h.mapKept(man, among, r.memory, mine) },
		func(memory [][]loader.Mapping) { _ = unmap(memory) })
	if err != nil {
		h.forget(m)
		close(m.opened)
		return nil, errors.Join(err, h.giveBack(m))
	}
	var feed *loader.Feed
	r.model, feed = loader.Adopt(p, h.devices, memory, h.options.Config.Stall, func() error { return nil })
	feed.Loaded()
	if prints != nil {
		err = h.knowPrints(r, feed, prints)
	}
	switch {
	case err != nil:
		h.log.Warn("what the model has in device memory cannot be compared with what was loaded", "model", m.name, "error", err)
	case prints == nil && h.options.Request.Prove == loader.ProveOn:
		h.log.Warn("the model was not proved when it was loaded, so it is taken over as it is", "model", m.name)
	}
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

// mapKept maps the memory of a model that was kept. among are the numbers of the manifest's devices here.
func (h *Holder) mapKept(man *manifest, among []int, to *sharedMemory, files []*os.File) ([][]loader.Mapping, error) {
	memory := make([][]loader.Mapping, len(h.devices))
	defer func() { closeAll(files) }()
	for i, a := range man.Allocations {
		d, file := among[a.Device], files[0]
		files = files[1:]
		x, err := to.adopt(d, len(memory[d]), file, a.Size, amdhip.DevicePtr(a.Address))
		if err != nil {
			return nil, errors.Join(fmt.Errorf("hold: its allocation %d: %w", i+1, err), unmap(memory))
		}
		memory[d] = append(memory[d], x)
	}
	return memory, nil
}

// among returns the numbers of the devices that a model is on by its manifest. It refuses a model that is on others
// than those of the Holder's that s puts it on, or on these in another order.
func (h *Holder) among(named []manifestDevice, s plan.Split) ([]int, error) {
	var among []int
	same := s.Ratio == nil || len(s.Ratio) == len(h.devices)
	if same {
		among = s.Among(len(h.devices))
		same = len(named) == len(among)
	}
	for i := range named {
		same = same && named[i].among(h.devices) == h.devices[among[i]]
	}
	if !same {
		return nil, fmt.Errorf("hold: it is on %d devices, which are not those of this holder: %w", len(named), amdhip.ErrInvalidDevice)
	}
	return among, nil
}

// widen makes a plan for some of so many devices one for all of them: the others get nothing.
func widen(p *plan.Plan, s plan.Spec, among []int, devices int) (*plan.Plan, error) {
	var groups []plan.Group
	for _, g := range p.Groups {
		var on []int
		for _, d := range g.Devices {
			on = append(on, among[d])
		}
		g.Devices = on
		groups = append(groups, g)
	}
	for d := range devices {
		if !slices.Contains(among, d) {
			groups = append(groups, plan.Group{Devices: []int{d}})
		}
	}
	slices.SortFunc(groups, func(a, b plan.Group) int { return a.Devices[0] - b.Devices[0] })
	return plan.FromGroups(s, groups, devices, p.ModelTensors, p.FileBytes)
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
	if h.pool == nil || m.once {
		return
	}
	file, err := h.options.open(h.ctx, m.path)
	if err != nil {
		h.log.Info("the model's file cannot be read, so it gets no page-locked memory", "model", m.name, "error", err)
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if SameFile(m.files, file) != nil || h.closed || !h.wantImage(m, file, nil) {
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
		max(1, a.Shard.World) != max(1, b.Shard.World) || !slices.Equal(text(a), text(b)) ||
		!slices.Equal(a.Split.Ratio, b.Split.Ratio) {
		return false
	}
	file, err := h.options.open(h.ctx, want.path)
	if err != nil {
		return errors.Is(err, os.ErrNotExist) // what is in device memory is all that is left of it
	}
	defer file.Close()
	return SameFile(have.files, file) == nil
}
