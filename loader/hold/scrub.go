package hold

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/gguf2gpu/gguf2gpu/loader"
)

// scrubShare is the share of the time in which a device's memory, or the host's, is looked at again. No kernel has more
// than the bandwidth of the memory, so that this is the share of it that is taken at most.
const scrubShare = 0.02

// scrubPause is how long nobody looks after somebody has looked for so long.
func scrubPause(looked time.Duration) time.Duration {
	return time.Duration(float64(looked) * (1/scrubShare - 1))
}

// Scrub is what was found when the memory of a model was looked at again, since the Holder has it. A block has 64 KiB.
type Scrub struct {
	Bytes       uint64 `json:"bytes"`          // that were looked at, of device memory and of page-locked memory
	Passes      int    `json:"passes"`         // over all of the model's device memory
	Damaged     int    `json:"damaged"`        // blocks of device memory that were damaged
	Rewritten   int    `json:"rewritten"`      // of these, blocks that were written again where they are
	Now         int    `json:"damaged_now"`    // blocks that are damaged still
	Rewoken     int    `json:"rewoken"`        // times that all of the model was loaded again
	HostDamaged int    `json:"host_damaged"`   // times that the copy in page-locked memory was damaged, and made again
	Last        string `json:"last,omitempty"` // the last damage, in words
}

// scrubbed is m.scrub, with the passes over the device that had the fewest. The Holder's lock is held.
func (m *held) scrubbed() *Scrub {
	s := m.scrub
	if m.now != nil {
		s.Now = m.now.damaged
	}
	if m.passes == nil {
		return &s
	}
	s.Passes = math.MaxInt
	for i := range m.plan.Groups {
		if len(m.plan.Groups[i].Tensors) == 0 {
			continue
		}
		for _, d := range m.plan.Groups[i].Devices {
			s.Passes = min(s.Passes, m.passes[d])
		}
	}
	return &s
}

// beginScrubbing looks again at all devices, and at page-locked memory, from now on, if the options say so.
func (h *Holder) beginScrubbing() error {
	if h.options.Scrub == 0 {
		return nil
	}
	var all []*loader.Scrubber
	for d := range h.devices {
		s, err := h.loader.NewScrubber(h.ctx, d)
		if err != nil {
			for _, s := range all {
				err = errors.Join(err, s.Close())
			}
			return fmt.Errorf("hold: memory cannot be looked at again: %w", err)
		}
		all = append(all, s)
		h.claimed[d] += s.DeviceBytes() // of the budget, for as long as the Holder is there
	}
	for d, s := range all {
		h.background.Go(func() {
			looking := &scrubbing{Holder: h, device: d, scrubber: s}
			h.eachInterval(looking.pass, h.look)
			looking.close()
		})
	}
	if h.pool != nil {
		h.background.Go(func() { h.eachInterval(h.scrubImages, nil) })
	}
	return nil
}

// close frees what it takes to look.
func (s *scrubbing) close() {
	if err := s.scrubber.Close(); err != nil {
		s.log.Error("freeing what it takes to look at memory again failed", "device", s.devices[s.device].Name(), "error", err)
	}
}

// eachInterval calls pass once in each interval, or as often as it gets to it, until it returns false or the Holder is
// closed. When now is closed, it calls pass at once, or once more.
func (h *Holder) eachInterval(pass func() bool, now <-chan struct{}) {
	for wait := h.options.Scrub; ; {
		select {
		case <-h.ctx.Done():
		case <-now:
			now = nil
		case <-time.After(max(wait, 0)):
		}
		if h.ctx.Err() != nil {
			return
		}
		began := time.Now()
		if !pass() {
			return
		}
		wait = h.options.Scrub - time.Since(began)
	}
}

// sleep waits. It is false when the Holder is closed.
func (h *Holder) sleep(d time.Duration) bool {
	select {
	case <-h.ctx.Done():
		return false
	case <-time.After(max(d, 0)):
		return h.ctx.Err() == nil
	}
}

// scrubbing is the looking at one device.
type scrubbing struct {
	*Holder
	device   int
	scrubber *loader.Scrubber
	watched  map[*residence]*watchedMemory
}

// watchedMemory is what one residence has on the device.
type watchedMemory struct {
	*loader.Scrub
	known map[string]bool // blocks that are damaged, as an earlier pass has said
}

// resident is a model that is in device memory.
type resident struct {
	m *held
	r *residence
}

// residents returns the models in device memory, by name.
func (h *Holder) residents() (all []resident) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, m := range h.models {
		if r := m.now; r != nil && r.finished && r.err == nil && !m.dropping {
			all = append(all, resident{m, r})
		}
	}
	slices.SortFunc(all, func(a, b resident) int { return strings.Compare(a.m.name, b.m.name) })
	return all
}

// pass looks once at all models that the device has. It is false when there is no use in going on.
func (s *scrubbing) pass() bool {
	all := s.residents()
	watched := make(map[*residence]*watchedMemory)
	for _, x := range all { // those that are gone are forgotten
		if w := s.watched[x.r]; w != nil {
			watched[x.r] = w
		}
	}
	s.watched = watched
	for _, x := range all {
		if !s.model(x.m, x.r) {
			return false
		}
	}
	return true
}

// model looks at one model. It is false when there is no use in going on.
func (s *scrubbing) model(m *held, r *residence) bool {
	w := s.watched[r]
	if w == nil {
		made, err := s.scrubber.Watch(r.model)
		if err != nil { // it is closed
			return true
		}
		w = &watchedMemory{made, make(map[string]bool)}
		s.watched[r] = w
	}
	for ended := false; !ended; {
		began := time.Now()
		n, damage, last, err := w.Next(s.ctx)
		looked := time.Since(began)
		switch {
		case s.ctx.Err() != nil:
			return false
		case errors.Is(err, loader.ErrClosed): // it was dropped, or sleeps
			return true
		case errors.Is(err, loader.ErrStalled):
			s.log.Error("the device hangs, its memory is not looked at any more", "device", s.devices[s.device].Name(), "error", err)
			return false
		case err != nil:
			s.log.Warn("device memory could not be looked at", "model", m.name, "error", err)
			return s.sleep(scrubPause(looked))
		}
		s.mu.Lock()
		m.scrub.Bytes += uint64(n)
		if r.unseen[s.device] {
			r.provedBytes += uint64(n)
		}
		s.mu.Unlock()
		for _, e := range damage {
			s.mend(m, r, w, e)
		}
		if ended = last; !s.sleep(scrubPause(looked)) {
			return false
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if m.passes == nil {
		m.passes = make([]int, len(s.devices))
	}
	m.passes[s.device]++
	s.seen(m, r, s.device)
	return true
}

// mend puts right what is damaged in device memory. The block is written again where it is, so that nobody who has the
// memory mapped needs to know. Where that does not help, the model is woken anew, if nobody is attached.
func (s *scrubbing) mend(m *held, r *residence, w *watchedMemory, e *loader.ProveError) {
	if s.takeTurn(s.ctx, m) != nil {
		return
	}
	defer func() { <-m.turn }()
	at := fmt.Sprintf("%s %d", e.Tensor, e.Offset)
	s.mu.Lock()
	gone := m.now != r || m.dropping
	isNew := !w.known[at]
	if !gone && isNew {
		w.known[at] = true
		m.scrub.Damaged++
		r.damaged++
		m.scrub.Last = e.Error()
	}
	s.mu.Unlock()
	if gone {
		return
	}
	if isNew {
		s.log.Error("device memory is damaged", "model", m.name, "error", e)
	}
	source, err := s.rewrite(m, w, e)
	if err == nil {
		delete(w.known, at)
		s.mu.Lock()
		m.scrub.Rewritten++
		r.damaged--
		s.mu.Unlock()
		s.log.Info("what was damaged is written again", "model", m.name, "tensor", e.Tensor, "offset", e.Offset)
		s.tell()
		return
	}
	if errors.Is(err, loader.ErrClosed) || s.ctx.Err() != nil {
		return
	}
	if source && s.rewake(m, r) {
		return
	}
	if isNew {
		s.log.Error("device memory stays damaged", "model", m.name, "tensor", e.Tensor, "offset", e.Offset, "error", err)
	}
	s.tell()
}

// rewrite writes a damaged block again: from the model's image, if that is whole, else from its file. source says that
// one of them can be read. The caller has m's turn.
func (s *scrubbing) rewrite(m *held, w *watchedMemory, e *loader.ProveError) (source bool, err error) {
	s.mu.Lock()
	im := m.image
	s.mu.Unlock()
	if im != nil {
		if err = w.Repair(s.ctx, e, im.Image, nil); err == nil {
			return true, nil
		}
		host, damaged := errors.AsType[*loader.ProveError](err)
		if damaged && host.Host {
			s.remakeImage(m, host)
		} else {
			return !errors.Is(err, loader.ErrBadOption), err
		}
	}
	file, err := s.options.open(s.ctx, m.path)
	if err != nil {
		return false, err
	}
	defer s.closeFile(m, file)
	if err := SameFile(m.files, file); err != nil {
		return false, err
	}
	return true, w.Repair(s.ctx, e, nil, file)
}

// rewake loads m again, as its device memory cannot be put right. It is false when that cannot be now. The caller has
// m's turn.
func (h *Holder) rewake(m *held, r *residence) bool {
	h.mu.Lock()
	if m.now != r || m.attached > 0 || m.dropping || m.imaging != nil {
		h.mu.Unlock()
		return false
	}
	m.now = nil
	h.promise(r)
	h.mu.Unlock()
	err := h.vacate(m, r)
	if err == nil {
		err = h.load(h.ctx, m)
	}
	if err != nil {
		h.log.Error("the model, which was damaged, could not be loaded again", "model", m.name, "error", err)
	} else {
		h.mu.Lock()
		m.scrub.Rewoken++
		h.mu.Unlock()
	}
	h.tell()
	return true
}

// remakeImage gives up m's image, which is damaged, and makes another one of its file. The caller has m's turn.
func (h *Holder) remakeImage(m *held, e *loader.ProveError) {
	h.mu.Lock()
	m.scrub.HostDamaged++
	m.scrub.Last = e.Error()
	h.mu.Unlock()
	h.log.Error("the model's copy in host memory is damaged, so it is read again", "model", m.name, "error", e)
	h.dropImage(m)
	h.refill(m)
	h.tell()
}

// scrubImages looks once at all images. It is false when the Holder is closed.
func (h *Holder) scrubImages() bool {
	h.mu.Lock()
	all := make([]*held, 0, len(h.models))
	for _, m := range h.models {
		all = append(all, m)
	}
	h.mu.Unlock()
	for _, m := range all {
		for at := int64(0); ; {
			began := time.Now()
			next := h.scrubImage(m, at)
			if !h.sleep(scrubPause(time.Since(began))) {
				return false
			}
			if at = next; at == 0 {
				break
			}
		}
	}
	return true
}

// scrubImage looks at a piece of m's image, from byte at on, and returns where to go on; 0: it is done for now. While
// somebody else has m's turn, or a load reads the image, nobody looks.
func (h *Holder) scrubImage(m *held, at int64) (next int64) {
	select {
	case m.turn <- struct{}{}:
		defer func() { <-m.turn }()
	default:
		return 0
	}
	h.mu.Lock()
	im, loading := m.image, false
	if r := m.now; r != nil {
		select {
		case <-r.ended:
		default:
			loading = true
		}
	}
	idle := im != nil && !loading && !m.dropping && !h.closed
	h.mu.Unlock()
	if !idle {
		return 0
	}
	next, n, err := im.Check(m.plan, at)
	h.mu.Lock()
	m.scrub.Bytes += uint64(n)
	h.mu.Unlock()
	if e, ok := errors.AsType[*loader.ProveError](err); ok {
		h.remakeImage(m, e)
		return 0
	}
	return next
}

// writeScrubMetrics writes what was found when memory was looked at again.
func writeScrubMetrics(b *bytes.Buffer, metric func(name, kind, help string), models []Model) {
	for _, x := range []struct {
		name, help string
		value      func(*Scrub) uint64
	}{
		{"gguf2gpu_scrubbed_bytes_total", "Bytes of the model that were looked at again.", func(s *Scrub) uint64 { return s.Bytes }},
		{
			"gguf2gpu_scrub_passes_total", "Times that all device memory of the model was looked at again.",
			func(s *Scrub) uint64 { return uint64(s.Passes) },
		},
		{
			"gguf2gpu_scrub_damage_total", "Blocks of 64 KiB of device memory that were found damaged.",
			func(s *Scrub) uint64 { return uint64(s.Damaged) },
		},
		{
			"gguf2gpu_scrub_rewritten_total", "Damaged blocks that were written again.",
			func(s *Scrub) uint64 { return uint64(s.Rewritten) },
		},
		{
			"gguf2gpu_scrub_rewoken_total", "Times that the model was loaded again as it was damaged.",
			func(s *Scrub) uint64 { return uint64(s.Rewoken) },
		},
		{
			"gguf2gpu_scrub_host_damage_total", "Times that the copy in page-locked memory was found damaged.",
			func(s *Scrub) uint64 { return uint64(s.HostDamaged) },
		},
	} {
		metric(x.name, "counter", x.help)
		for i := range models {
			fmt.Fprintf(b, "%s{model=\"%s\"} %d\n", x.name, escapeLabel(models[i].Name), x.value(models[i].Scrub))
		}
	}
}

// requestOfOthers is what applies of Options.Request to models that other processes add.
func (o *Options) requestOfOthers() loader.Request {
	return loader.Request{Check: o.Request.Check, Prove: o.Request.Prove}
}
