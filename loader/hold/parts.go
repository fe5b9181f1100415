package hold

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// A model that is divided among several ranks of a host, see Options.Ranks, is held in parts. Each part is a held model
// of its own, with a tier, an image and attached processes of its own. The name of the whole model stands for all of
// its parts; who attaches says for which rank.

// partName is what a rank's part of a model is held under.
func partName(model string, rank int) string { return fmt.Sprintf("%s@%d", model, rank) }

// base is the name of the model that m is, or is a part of.
func (m *held) base() string {
	if s := m.spec.Shard; s.By != plan.ShardNone {
		return strings.TrimSuffix(m.name, partName("", s.Rank))
	}
	return m.name
}

// of says which part of a model m is, in words.
func (m *held) of() string {
	return fmt.Sprintf("rank %d of %d", m.spec.Shard.Rank, max(1, m.spec.Shard.World))
}

// checkRanks refuses ranks whose parts so many devices cannot hold.
func (o *Options) checkRanks(devices int) error {
	if len(o.Ranks) == 0 {
		return nil
	}
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: Ranks: "+format, append([]any{loader.ErrBadOption}, args...)...)
	}
	s := &o.Spec
	for i, rank := range o.Ranks {
		switch {
		case s.Shard.By == plan.ShardNone:
			return bad("nothing says how the model is divided: by layer or by tensor")
		case rank < 0 || rank >= max(1, s.Shard.World):
			return bad("rank %d of a world of %d: ranks are numbered from 0 to %d", rank, max(1, s.Shard.World),
				max(1, s.Shard.World)-1)
		case slices.Contains(o.Ranks[:i], rank):
			return bad("rank %d is there twice", rank)
		}
	}
	switch n := len(o.Ranks); {
	case n == 1:
	case devices != 1 && devices != n:
		return bad("parts of %d ranks on %d devices: use a device for each rank, or one for all", n, devices)
	case s.Split.By != plan.SplitLayers || s.Split.Ratio != nil:
		return bad("a split over devices: each of several ranks has all of its part on one device")
	}
	return nil
}

// parts are the parts of a model that s describes, in the order of Options.Ranks.
func (h *Holder) parts(s plan.Spec) []plan.Spec {
	ranks := h.options.Ranks
	if len(ranks) == 0 {
		return []plan.Spec{s}
	}
	all := make([]plan.Spec, len(ranks))
	for i, rank := range ranks {
		all[i] = s
		all[i].Shard.Rank = rank
		if len(ranks) > 1 && len(h.devices) > 1 { // to the i-th device all of it, to the others nothing
			all[i].Split.Ratio = make([]float64, len(h.devices))
			all[i].Split.Ratio[i] = 1
		}
	}
	return all
}

// add begins to load a model, or its parts, and returns its name. All of them are held then, or none is.
func (h *Holder) add(ctx context.Context, name, path string, s plan.Spec, r loader.Request) (_ string, err error) {
	if name == "" {
		name = DefaultName(path)
	}
	specs := h.parts(s)
	progress := sharedProgress(r.Progress, len(specs))
	var fresh, begun []*held
	for i, spec := range specs {
		as := name
		if len(specs) > 1 {
			as = partName(name, spec.Shard.Rank)
		}
		m, bad := newHeld(as, path, h.options.opens(path))
		if bad == nil {
			m.spec, m.request = spec, r
			m.request.Progress = progress(i)
			m, bad = h.enroll(m)
		}
		if err = bad; err != nil {
			break
		}
		if m != nil {
			fresh = append(fresh, m)
		}
	}
	for _, m := range fresh {
		if err == nil {
			err = h.begin(ctx, m)
		} else {
			h.abandon(m)
			continue
		}
		if err == nil {
			begun = append(begun, m)
		}
	}
	if err == nil {
		return name, nil
	}
	for _, m := range begun { // a part is no use without the others
		err = errors.Join(err, h.drop(m.name))
	}
	return "", err
}

// sharedProgress returns what tells f about each of n loads that are about one model: their sums.
func sharedProgress(f func(done, total int64), n int) func(i int) func(done, total int64) {
	if f == nil || n == 1 {
		return func(int) func(int64, int64) { return f }
	}
	var mu sync.Mutex
	dones, totals := make([]int64, n), make([]int64, n)
	return func(i int) func(done, total int64) {
		return func(done, total int64) {
			mu.Lock()
			defer mu.Unlock()
			dones[i], totals[i] = done, total
			done, total = 0, 0
			for i := range n {
				done, total = done+dones[i], total+totals[i]
			}
			f(done, total)
		}
	}
}

// enroll enters m, so that its name is taken and Close waits. Nil without an error: it was adopted, and is there
// already. The caller must call begin or abandon.
func (h *Holder) enroll(m *held) (*held, error) {
	have, err := h.reserve(m)
	switch {
	case err == nil:
		return m, nil
	case have == nil || !have.adopted:
		return nil, err
	case h.isAsWanted(have, m):
		return nil, nil
	}
	h.log.Info("what was taken over is not what is wanted, so it is dropped", "model", m.name)
	if err := h.drop(m.name); err != nil { // it is of another time
		return nil, err
	}
	_, err = h.reserve(m)
	return m, err
}

// abandon gives up a model that was enrolled.
func (h *Holder) abandon(m *held) {
	defer h.adding.Done()
	h.forget(m)
	close(m.opened)
	h.tell()
}

// begin begins to load a model that was enrolled.
func (h *Holder) begin(ctx context.Context, m *held) (err error) {
	defer h.adding.Done()
	defer func() {
		if err != nil {
			h.forget(m)
		}
		close(m.opened)
		h.tell()
	}()
	m.turn <- struct{}{}
	defer func() { <-m.turn }()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err := h.load(ctx, m); err != nil {
		return errors.Join(err, h.giveBack(m))
	}
	return nil
}

// meant returns what a name stands for: the model of that name, or the parts of the model of that name, by rank. ""
// stands for the only model, or its parts.
func (h *Holder) meant(name string) ([]*held, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return nil, loader.ErrClosed
	}
	if m := h.models[name]; m != nil && !m.dropping {
		return []*held{m}, nil
	}
	var all []*held
	for _, m := range h.models {
		if !m.dropping && (name == "" || m.base() == name) {
			all = append(all, m)
		}
	}
	slices.SortFunc(all, func(a, b *held) int { return a.spec.Shard.Rank - b.spec.Shard.Rank })
	switch {
	case len(h.models) == 0:
		return nil, fmt.Errorf("hold: %q: %w: none is", name, ErrUnknownModel)
	case len(all) == 0:
		return nil, fmt.Errorf("hold: %q: %w; held are %s", name, ErrUnknownModel, h.names())
	case slices.ContainsFunc(all, func(m *held) bool { return m.base() != all[0].base() }):
		return nil, fmt.Errorf("hold: several models are held: name one of %s: %w", h.names(), ErrUnknownModel)
	}
	return all, nil
}

// reserved is what a name stands for, where it has to be one model or part; it may be being opened still.
func (h *Holder) reserved(name string) (*held, error) {
	all, err := h.meant(name)
	if err == nil && len(all) > 1 {
		err = fmt.Errorf("hold: %q is held in parts, for %s: say for which rank: %w", all[0].base(), ranksOf(all), ErrUnknownModel)
	}
	if err != nil {
		return nil, err
	}
	return all[0], nil
}

// ranksOf lists the ranks whose parts those are.
func ranksOf(all []*held) string {
	texts := make([]string, len(all))
	for i, m := range all {
		texts[i] = m.of()
	}
	return strings.Join(texts, ", ")
}

// partFor is reserved for who attaches: with a rank, and the world that it is of unless that is 0, it is that rank's
// part. What is whole is for all ranks.
func (h *Holder) partFor(name string, rank *int, world int) (*held, error) {
	if rank == nil {
		return h.reserved(name)
	}
	all, err := h.meant(name)
	if err != nil {
		return nil, err
	}
	for _, m := range all {
		s := m.spec.Shard
		if s.By == plan.ShardNone || s.Rank == *rank && (world == 0 || max(1, s.World) == world) {
			return m, nil
		}
	}
	which := fmt.Sprintf("rank %d", *rank)
	if world > 0 {
		which += fmt.Sprintf(" of %d", world)
	}
	return nil, fmt.Errorf("hold: %q is held for %s, and not for %s: %w", all[0].base(), ranksOf(all), which, ErrUnknownModel)
}

// each does something with all that a name stands for, at the same time.
func (h *Holder) each(name string, f func(name string) error) error {
	all, err := h.meant(name)
	if err != nil {
		return err
	}
	if len(all) == 1 {
		return f(all[0].name)
	}
	errs := make([]error, len(all))
	var parts sync.WaitGroup
	for i, m := range all {
		parts.Go(func() { errs[i] = f(m.name) })
	}
	parts.Wait()
	return errors.Join(errs...)
}

// unused refuses what would take device memory away from one of the parts of a model that processes are attached to:
// the others go only together with that.
func (h *Holder) unused(name string) error {
	all, err := h.meant(name)
	if err != nil {
		return err
	}
	if len(all) == 1 { // whoever has its turn sees
		return nil
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, m := range all {
		if m.attached > 0 {
			return fmt.Errorf("hold: %q: %w, %d of them", m.name, ErrAttached, m.attached)
		}
	}
	return nil
}
