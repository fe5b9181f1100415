package hold

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/gguf2gpu/gguf2gpu/internal/watch"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// Sleep takes a model out of device memory. It copies nothing: what it is woken from is in page-locked memory, or else
// in its file. A model that is on its way in, in whatever direction, is waited for. The error matches ErrAttached while
// processes use the model and ErrPinned when it is pinned, or is a *loader.LeftError when a device hangs. Putting a
// model to sleep that sleeps is no error.
func (h *Holder) Sleep(ctx context.Context, name string) error {
	if err := h.unused(name); err != nil {
		return err
	}
	return h.each(name, func(name string) error {
		m, err := h.await(ctx, name)
		if err != nil {
			return err
		}
		return h.putToSleep(ctx, m, false)
	})
}

// putToSleep is Sleep, and with evict the making of room. Then a model that is in use by now, or pinned, stays.
func (h *Holder) putToSleep(ctx context.Context, m *held, evict bool) error {
	if err := h.takeTurn(ctx, m); err != nil {
		return err
	}
	defer func() { <-m.turn }()
	var r *residence
	for {
		h.mu.Lock()
		r = m.now
		var wait <-chan struct{}
		switch {
		case r == nil:
			h.mu.Unlock()
			return nil
		case m.attached > 0 || m.pinned || m.dropping || m.mustStay():
			err := h.staysAwake(m)
			h.mu.Unlock()
			if evict {
				return nil
			}
			return err
		case !r.finished:
			wait = r.ended
		case m.imaging != nil:
			wait = m.imaging
		default:
			m.now = nil // nobody attaches to it any more
			h.promise(r)
		}
		h.mu.Unlock()
		if wait == nil {
			break
		}
		select {
		case <-wait:
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-h.ctx.Done():
			return loader.ErrClosed
		}
	}
	began := time.Now()
	err := h.vacate(m, r)
	h.mu.Lock()
	if evict {
		h.evictions++
	}
	state := m.state()
	h.mu.Unlock()
	h.log.Info("put to sleep", "model", m.name, "state", state, "to make room", evict, "seconds", time.Since(began).Seconds())
	h.tell()
	return err
}

// vacate gives back the device memory of r, which is promised already: m has it no more. The caller has m's turn.
func (h *Holder) vacate(m *held, r *residence) error {
	<-r.ended
	forgotten := h.unkeep(m, r)
	err := h.release(m, r)
	h.mu.Lock()
	h.left += r.left
	h.mu.Unlock()
	h.awaitUnkept(m, forgotten)
	return err
}

// staysAwake says why a model cannot be put to sleep. h.mu is held.
func (h *Holder) staysAwake(m *held) error {
	switch {
	case m.dropping:
		return fmt.Errorf("hold: %q: %w", m.name, ErrUnknownModel)
	case m.attached > 0:
		return fmt.Errorf("hold: %q: %w, %d of them", m.name, ErrAttached, m.attached)
	}
	if m.mustStay() {
		return fmt.Errorf("hold: %q: %w: it came as a stream, and could not be loaded again; with --ram it can sleep in host memory",
			m.name, ErrPinned)
	}
	return fmt.Errorf("hold: %q: %w: unpin it first", m.name, ErrPinned)
}

// mustStay reports whether device memory is the only place where m is. h.mu is held.
func (m *held) mustStay() bool { return m.once && m.image == nil && m.imaging == nil }

// promise notes that the memory of r will soon be free; see settle. h.mu is held.
func (h *Holder) promise(r *residence) {
	if r.promised || r.settled {
		return
	}
	r.promised = true
	for d, n := range r.claimed {
		h.freeing[d] += n
	}
	h.notify()
}

// takeTurn waits until nobody else changes the tier of m.
func (h *Holder) takeTurn(ctx context.Context, m *held) error {
	select {
	case m.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-h.ctx.Done():
		return loader.ErrClosed
	}
}

// Wake brings a model back to device memory and returns when it is there. Models that nobody uses and nobody has pinned
// make room, the least recently used first. When that would not be enough, none does, and the error matches
// loader.ErrInsufficientMemory and has the numbers. A model that is proved, and whose copy in host memory is damaged,
// is loaded from its file.
func (h *Holder) Wake(ctx context.Context, name string) error {
	return h.each(name, func(name string) error { return h.wakeOne(ctx, name) })
}

// wakeOne is Wake for one model or part.
func (h *Holder) wakeOne(ctx context.Context, name string) error {
	m, err := h.await(ctx, name)
	if err != nil {
		return err
	}
	for range 2 { // once more where the copy in host memory turned out to be damaged: then the file is loaded
		var r *residence
		if r, err = h.wake(ctx, m); err != nil {
			return err
		}
		err = h.wait(ctx, r)
		if e, ok := errors.AsType[*loader.ProveError](err); !ok || !e.Host {
			break
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if errors.Is(err, loader.ErrClosed) && m.dropping && !h.closed {
		return fmt.Errorf("hold: %q: %w: it was dropped while it was loaded", m.name, ErrUnknownModel)
	}
	return err
}

// wake is Wake, but returns once the model's memory is allocated.
func (h *Holder) wake(ctx context.Context, m *held) (*residence, error) {
	if err := h.takeTurn(ctx, m); err != nil {
		return nil, err
	}
	defer func() { <-m.turn }()
	h.mu.Lock()
	r := m.now
	gone, again := m.dropping || h.models[m.name] != m, m.loaded
	retry := r != nil && r.err != nil && again && m.attached == 0 && r.finished
	var failed error
	if r != nil {
		failed = r.err
	}
	h.mu.Unlock()
	switch {
	case gone:
		return nil, fmt.Errorf("hold: %q: %w", m.name, ErrUnknownModel)
	case retry:
		<-r.ended
		if err := h.release(m, r); err != nil { // it is released already, unless a device hangs
			return nil, err
		}
	case failed != nil:
		return nil, fmt.Errorf("hold: %q could not be loaded: %w", m.name, failed)
	case r != nil:
		h.mu.Lock()
		h.touch(m)
		h.mu.Unlock()
		return r, nil
	}
	if err := h.load(ctx, m); err != nil {
		return nil, err
	}
	h.tell()
	h.mu.Lock()
	defer h.mu.Unlock()
	return m.now, nil
}

// touch notes that m is used. h.mu is held.
func (h *Holder) touch(m *held) {
	h.uses++
	m.used, m.order = time.Now(), h.uses
}

// Pin keeps a model in its tier: it makes no room for others, and Sleep refuses it.
func (h *Holder) Pin(name string) error {
	return h.each(name, func(name string) error { return h.setPinned(name, true) })
}

// Unpin undoes Pin.
func (h *Holder) Unpin(name string) error {
	return h.each(name, func(name string) error { return h.setPinned(name, false) })
}

func (h *Holder) setPinned(name string, pinned bool) error {
	m, err := h.find(name)
	if err != nil {
		return err
	}
	h.mu.Lock()
	m.pinned = pinned
	h.notify()
	h.mu.Unlock()
	h.tell()
	return nil
}

// notify wakes those who wait for room. h.mu is held.
func (h *Holder) notify() {
	close(h.changed)
	h.changed = make(chan struct{})
}

// unclaim gives back what room has claimed for r.
func (h *Holder) unclaim(m *held, r *residence) {
	h.mu.Lock()
	defer h.mu.Unlock()
	m.claims = nil
	for d, n := range r.claimed {
		h.claimed[d] -= n
		h.scratch[d] -= r.scratch[d]
	}
	h.notify()
}

// endScratch notes that the load of r takes no device memory beside the model's any more. What the Loader has made for
// it is idle now, and counts as such. h.mu is held.
func (h *Holder) endScratch(r *residence) {
	for d, n := range r.scratch {
		h.scratch[d] -= n
	}
	r.scratch = nil
}

// room claims what r takes of each device for m, which is loaded by p. It puts models to sleep as far as that is
// necessary, but none if it is no use.
func (h *Holder) room(ctx context.Context, m *held, r *residence, p *loader.Plan) error {
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		h.mu.Lock()
		idle := h.loader.ScratchBytes() // under the lock: what a load gives up is idle before it is no longer claimed
		if h.closed {
			h.mu.Unlock()
			return loader.ErrClosed
		}
		var err error
		lack := h.overBudget(r, idle)
		if lack == nil {
			for d := range h.devices {
				h.claimed[d] += r.claimed[d]
				h.scratch[d] += r.scratch[d]
			}
			m.claims = r
			h.mu.Unlock()
			if err = h.fits(ctx, p, r, idle); err == nil {
				return nil
			}
			h.unclaim(m, r)
			if !errors.Is(err, loader.ErrInsufficientMemory) {
				return err
			}
			h.mu.Lock()
			lack = lacking(err, len(h.devices))
		}
		if slices.ContainsFunc(idle, func(n uint64) bool { return n > 0 }) {
			h.mu.Unlock()
			if err := h.loader.Trim(); err != nil {
				return err
			}
			if slices.Equal(idle, h.loader.ScratchBytes()) { // a load that failed is giving it back
				time.Sleep(time.Millisecond)
			}
			continue
		}
		if !h.canFree(m, lack) {
			if err == nil {
				err = h.budgetError(m, r, lack)
			}
			h.mu.Unlock()
			return err
		}
		victim, changed := h.idlest(m, lack), h.changed
		h.mu.Unlock()
		if victim == nil { // one is on its way
			select {
			case <-changed:
			case <-ctx.Done():
			case <-h.ctx.Done():
				return loader.ErrClosed
			}
			continue
		}
		if err := h.putToSleep(ctx, victim, true); err != nil {
			if _, left := errors.AsType[*loader.LeftError](err); !left {
				return err
			}
		}
	}
}

// fits compares what r takes, and what p itself says that it needs, with what is free on the devices. idle is what the
// Loader has for blocks that devices convert, and can use for this load.
func (h *Holder) fits(ctx context.Context, p *loader.Plan, r *residence, idle []uint64) error {
	if err := p.Fits(); err != nil {
		return err
	}
	var errs []error
	limit := h.calls.Limit(h.stall())
	for d, dev := range h.devices {
		free, err := watch.Do(ctx, limit, "asking for free device memory", func() (uint64, error) {
			free, _, err := dev.MemInfo()
			return free, err
		}, func(uint64) {})
		if need := r.claimed[d] + r.scratch[d] - min(r.scratch[d], idle[d]); err == nil && free < need {
			err = &plan.MemoryError{Device: d, Name: dev.Name(), Policy: p.Spec.Policy, Needed: need, Free: free}
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// overBudget returns how many bytes are too many on each device when r is added; nil: it fits. h.mu is held.
func (h *Holder) overBudget(r *residence, idle []uint64) (lack []uint64) {
	if h.options.VRAM == 0 {
		return nil
	}
	for d, n := range r.claimed {
		if n+r.scratch[d] == 0 { // nothing goes there
			continue
		}
		if sum := h.claimed[d] + h.scratch[d] + idle[d] + n + r.scratch[d]; sum > h.options.VRAM {
			if lack == nil {
				lack = make([]uint64, len(h.devices))
			}
			lack[d] = sum - h.options.VRAM
		}
	}
	return lack
}

// lacking returns how many bytes are missing on each device, by an error of Plan.Fits.
func lacking(err error, devices int) []uint64 {
	lack := make([]uint64, devices)
	var walk func(err error)
	walk = func(err error) {
		switch e := err.(type) { //nolint:errorlint // it unwraps by hand
		case *plan.MemoryError:
			if e.Device < devices {
				lack[e.Device] = e.Needed - e.Free
			}
		case interface{ Unwrap() []error }:
			for _, err := range e.Unwrap() {
				walk(err)
			}
		case interface{ Unwrap() error }:
			walk(e.Unwrap())
		}
	}
	walk(err)
	return lack
}

// mayGo reports whether m could make room for other, now or when it has come to device memory. Parts of one model make
// no room for each other: they are of use together only. h.mu is held.
func (m *held) mayGo(other *held) bool {
	there := m.now != nil && m.now.err == nil || m.claims != nil
	return m.base() != other.base() && there && m.attached == 0 && !m.pinned && !m.dropping && !m.mustStay()
}

// takes is how many bytes of device d m has, or is about to have. h.mu is held.
func (m *held) takes(d int) uint64 {
	switch {
	case m.now != nil:
		return m.now.claimed[d]
	case m.claims != nil:
		return m.claims.claimed[d]
	}
	return 0
}

// canFree reports whether so many bytes would be free on each device if all that may go went. h.mu is held.
func (h *Holder) canFree(m *held, lack []uint64) bool {
	for d, n := range lack {
		sum := h.freeing[d] + h.scratch[d]
		for _, x := range h.models {
			if x.mayGo(m) {
				sum += x.takes(d)
			}
		}
		if sum < n {
			return false
		}
	}
	return true
}

// idlest returns the model that goes next: the least recently used of those that have something of what is lacking.
// Nil: such a model is still being loaded, or freed. h.mu is held.
func (h *Holder) idlest(m *held, lack []uint64) (v *held) {
	for _, x := range h.models {
		if !x.mayGo(m) || x.now == nil || !x.now.finished || v != nil && v.order < x.order {
			continue
		}
		helps := false
		for d, n := range lack {
			helps = helps || n > h.freeing[d]+h.scratch[d] && x.now.claimed[d] > 0
		}
		if helps {
			v = x
		}
	}
	return v
}

// budgetError says what m needs for r, and what there is. h.mu is held.
func (h *Holder) budgetError(m *held, r *residence, lack []uint64) error {
	var errs []error
	for d, n := range lack {
		if n == 0 {
			continue
		}
		var stay []string
		for _, x := range h.models {
			if x != m && x.takes(d) > 0 && !x.mayGo(m) {
				why := "in use"
				switch {
				case x.attached > 0:
				case x.pinned:
					why = "pinned"
				case x.base() == m.base():
					why = "of the same model"
				case x.mustStay():
					why = "from a stream"
				}
				stay = append(stay, fmt.Sprintf("%q with %s (%s)", x.name, humanize.IBytes(x.takes(d)), why))
			}
		}
		slices.Sort(stay)
		who := "no model is in the way"
		if len(stay) > 0 {
			who = "what stays is " + strings.Join(stay, ", ")
		}
		need, beside := r.claimed[d], ""
		if n := r.scratch[d]; n > 0 {
			beside = fmt.Sprintf(" and %s for blocks that the device converts or sums of what is proved, which --dequant cpu and --prove=off spare,",
				humanize.IBytes(n))
		}
		errs = append(errs, fmt.Errorf("hold: %q needs %s (%d bytes)%s on device %d (%s), the budget is %s (%d bytes); %s: %w", m.name,
			humanize.IBytes(need), need, beside, h.devices[d].Index(), h.devices[d].Name(), humanize.IBytes(h.options.VRAM),
			h.options.VRAM, who, loader.ErrInsufficientMemory))
	}
	return errors.Join(errs...)
}
