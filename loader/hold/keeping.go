package hold

import (
	"context"
	"errors"
	"time"
)

// keepLook is how often a Holder looks whether somebody still keeps its models.
const keepLook = 2 * time.Second

// An instanceKeeper can tell which process it is that keeps. Another answer than before means that what was kept is not
// kept any more.
type instanceKeeper interface {
	Instance(ctx context.Context) (string, error)
}

// anyKeeper is the instance of Keepers that cannot tell.
const anyKeeper = "-"

// keeperIs is the instance of the Keeper, "" if there is none at present.
func (h *Holder) keeperIs(ctx context.Context) string {
	k, ok := h.options.Keep.(instanceKeeper)
	if !ok {
		return anyKeeper
	}
	ctx, cancel := context.WithTimeout(ctx, keepTime)
	defer cancel()
	is, err := k.Instance(ctx)
	if err != nil {
		return ""
	}
	return is
}

// keep gives what r has to the Keeper, unless r was given up meanwhile.
func (h *Holder) keep(m *held, r *residence) {
	if h.options.Keep == nil || r.memory == nil {
		return
	}
	by := h.keeperIs(h.ctx)
	d := description{Version: wireVersion, Manifest: r.manifest, Ratio: m.spec.Split.Ratio}
	for _, rule := range m.spec.Rules {
		d.Rules = append(d.Rules, rule.String())
	}
	for _, rule := range m.spec.Shard.Rules {
		d.Shard = append(d.Shard, rule.String())
	}
	if m.spec.Tensors != nil {
		d.Tensors = m.spec.Tensors.String()
	}
	h.keeping.Lock()
	defer h.keeping.Unlock()
	if r.unkept {
		return
	}
	ctx, cancel := context.WithTimeout(h.ctx, keepTime)
	defer cancel()
	err := h.withPrints(ctx, m, r, d)
	switch {
	case err == nil:
		if r.keepFailed {
			h.log.Info("the model is kept again", "model", m.name)
		}
		r.keptBy, r.keepFailed = by, false
	case h.ctx.Err() == nil && !r.keepFailed:
		h.log.Warn("nobody keeps the model when this process ends: it is tried again", "model", m.name, "error", err)
		r.keptBy, r.keepFailed = "", true
	}
}

// unkeep makes the Keeper give up r.
func (h *Holder) unkeep(m *held, r *residence) {
	if h.options.Keep == nil || r.memory == nil {
		return
	}
	h.keeping.Lock()
	defer h.keeping.Unlock()
	r.unkept = true
	if err := h.forgetKept(r.id); err != nil && !r.keepFailed {
		h.log.Warn("the keeper goes on keeping the model's memory", "model", m.name, "error", err)
	}
}

func (h *Holder) forgetKept(id string) error {
	ctx, cancel := context.WithTimeout(context.Background(), keepTime)
	defer cancel()
	return h.options.Keep.Forget(ctx, id)
}

// keepOn gives models to the Keeper again when it could not have them, or is another one than it was: one that has died
// has lost them. It ends with the Holder.
func (h *Holder) keepOn() {
	tick := time.NewTicker(h.options.keepLook)
	defer tick.Stop()
	for {
		select {
		case <-h.ctx.Done():
			return
		case <-tick.C:
		}
		by := h.keeperIs(h.ctx)
		for m, r := range h.unkeptBy(by) {
			if by == "" {
				h.lostKeeper(m, r)
			} else {
				h.keep(m, r)
			}
		}
	}
}

// unkeptBy returns what that keeper does not have of what is in device memory.
func (h *Holder) unkeptBy(by string) map[*held]*residence {
	all := make(map[*held]*residence)
	h.mu.Lock()
	for _, m := range h.models {
		if r := m.now; r != nil && r.memory != nil && r.finished && r.err == nil && !m.dropping {
			all[m] = r
		}
	}
	h.mu.Unlock()
	h.keeping.Lock()
	defer h.keeping.Unlock()
	for m, r := range all {
		if r.unkept || by != "" && r.keptBy == by {
			delete(all, m)
		}
	}
	return all
}

// lostKeeper says once that nobody keeps r any more.
func (h *Holder) lostKeeper(m *held, r *residence) {
	h.keeping.Lock()
	defer h.keeping.Unlock()
	if r.unkept || r.keepFailed {
		return
	}
	r.keptBy, r.keepFailed = "", true
	h.log.Warn("nobody keeps the model when this process ends: it is tried again", "model", m.name, "error", errKeeperGone)
}

var errKeeperGone = errors.New("the keeper is gone")
