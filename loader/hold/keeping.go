package hold

import (
	"context"
	"errors"
	"os"
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

// keepSoon is keep, but does not wait for long: whoever loads a model is not to wait for a keeper that is stopped.
func (h *Holder) keepSoon(m *held, r *residence) {
	if h.options.Keep == nil || r.memory == nil {
		return
	}
	done := make(chan struct{})
	h.background.Go(func() { defer close(done); h.keep(m, r) })
	if !h.within(done, waitingTime) {
		h.log.Warn("the model is loaded, and its keeper does not answer yet", "model", m.name, "keeper", h.keeperWho())
	}
}

// within waits until done is closed, but for so long at most, and not after the Holder's end.
func (h *Holder) within(done <-chan struct{}, d time.Duration) bool {
	select {
	case <-done:
		return true
	case <-time.After(d):
	case <-h.ctx.Done():
	}
	return false
}

// keeperWho tells about the Keeper, for people who wait for it.
func (h *Holder) keeperWho() string {
	k, ok := h.options.Keep.(interface{ who(context.Context) string })
	if !ok {
		return "the keeper"
	}
	return k.who(h.ctx)
}

// unkeep makes the Keeper give up r. What r has claimed stays claimed until it has: the memory is not free before. The
// result is closed then; nil: nobody keeps it.
func (h *Holder) unkeep(m *held, r *residence) <-chan struct{} {
	if h.options.Keep == nil || r.memory == nil {
		return nil
	}
	h.mu.Lock()
	r.withKeeper = true
	h.mu.Unlock()
	done := make(chan struct{})
	h.background.Go(func() {
		defer close(done)
		for again := true; again; {
			again = h.tryUnkeep(m, r)
		}
		h.mu.Lock()
		defer h.mu.Unlock()
		r.withKeeper = false
		h.settle(r)
	})
	return done
}

// tryUnkeep is one attempt of unkeep. It reports whether another one makes sense: a keeper that does not answer has the
// memory.
func (h *Holder) tryUnkeep(m *held, r *residence) (again bool) {
	h.keeping.Lock()
	defer h.keeping.Unlock()
	r.unkept = true
	ctx, cancel := context.WithTimeout(h.ctx, keepTime)
	defer cancel()
	err := h.options.Keep.Forget(ctx, r.id)
	switch {
	case err == nil || h.ctx.Err() != nil:
	case errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded):
		return true
	case !r.keepFailed:
		h.log.Warn("the keeper goes on keeping the model's memory", "model", m.name, "error", err)
	}
	return false
}

// awaitUnkept waits for the Keeper, but not for long: one that is stopped is to hold up nothing but its memory.
func (h *Holder) awaitUnkept(m *held, forgotten <-chan struct{}) {
	if forgotten == nil || h.within(forgotten, waitingTime) || h.ctx.Err() != nil {
		return
	}
	who := h.keeperWho()
	h.mu.Lock()
	h.awaited = who
	h.mu.Unlock()
	h.log.Warn("device memory is not free before the keeper has given it up", "model", m.name, "keeper", who)
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
