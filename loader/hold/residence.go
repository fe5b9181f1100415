package hold

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"time"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// load brings m to device memory: from its image where there is one, else from its file. Others make room for it. It
// returns once the memory is allocated. The caller has m's turn.
func (h *Holder) load(ctx context.Context, m *held) (err error) {
	h.mu.Lock()
	m.coming = true
	h.mu.Unlock()
	defer func() {
		h.mu.Lock()
		m.coming, m.claims = false, nil
		h.notify()
		h.mu.Unlock()
	}()
	p, r, err := h.source(ctx, m)
	if err != nil {
		return err
	}
	if err = h.room(ctx, m, r, p); err == nil {
		if err = h.start(ctx, m, r, p); err != nil {
			h.unclaim(m, r)
		}
	}
	if err != nil && r.file != nil {
		err = errors.Join(err, r.file.Close())
	}
	if err != nil {
		return err
	}
	h.mu.Lock()
	m.now = r
	h.touch(m)
	h.mu.Unlock()
	go h.watch(m, r)
	return nil
}

// source decides where m is loaded from.
func (h *Holder) source(ctx context.Context, m *held) (*loader.Plan, *residence, error) {
	r := &residence{id: newID(), began: time.Now(), ended: make(chan struct{})}
	r.arrivals.changed = make(chan struct{})
	h.mu.Lock()
	r.image = m.image
	h.mu.Unlock()
	if r.image != nil {
		p, err := h.loader.PlanImage(m.plan, r.image.Image)
		if err == nil {
			err = h.measure(m, r, p)
		}
		if err == nil {
			return p, r, nil
		}
		h.log.Warn("the model cannot be woken from host memory, so it is loaded from its file", "model", m.name, "error", err)
		r.image = nil
	}
	file, err := h.options.open(ctx, m.path)
	if err != nil {
		return nil, nil, err
	}
	if h.options.opened != nil {
		h.options.opened()
	}
	files, err := identify(file, h.options.nameOf(m))
	if err == nil && m.files != nil {
		err = SameFile(m.files, file)
	}
	var p *loader.Plan
	if err == nil {
		p, err = h.loader.Plan(file, m.spec)
	}
	if err == nil {
		err = h.measure(m, r, p)
	}
	if err != nil {
		return nil, nil, errors.Join(err, file.Close())
	}
	if m.files == nil || m.arch == "" {
		m.arch = file.Architecture()
		m.hf, m.hfError = plan.HFTensors(file)
	}
	m.files, r.file = files, file
	h.mu.Lock()
	m.once = files[0].Once
	h.mu.Unlock()
	return p, r, nil
}

// measure notes how much device memory a load of r by p takes.
func (h *Holder) measure(m *held, r *residence, p *loader.Plan) (err error) {
	r.claimed = h.need(p.Plan)
	r.scratch, err = p.ScratchBytes(h.requestOf(m, r).Prove)
	return err
}

// newID is what tells one residence from all others.
func newID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // it never fails
	return hex.EncodeToString(b[:])
}

// need is how much device memory p takes on each device.
func (h *Holder) need(p *plan.Plan) []uint64 {
	need := make([]uint64, len(h.devices))
	for i := range p.Groups {
		for _, n := range p.Groups[i].Arenas {
			for _, d := range p.Groups[i].Devices {
				need[d] += sharedSize(n)
			}
		}
	}
	return need
}

// requestOf is what is wanted of a load of m.
func (h *Holder) requestOf(m *held, r *residence) loader.Request {
	q := m.request
	if r.image != nil || m.loaded { // what a request wants to see of a load, it has seen
		q = loader.Request{Check: m.request.Check && r.image == nil, Prove: m.request.Prove}
	}
	if h.options.Scrub > 0 && q.Prove == loader.ProveAuto { // its kernel is there anyway
		q.Prove = loader.ProveOn
	}
	q.Share = true
	return q
}

// start begins to load m by p, and makes its manifest.
func (h *Holder) start(ctx context.Context, m *held, r *residence, p *loader.Plan) (err error) {
	request := h.requestOf(m, r)
	if h.share == ShareFD {
		r.memory = newSharedMemory(h.devices, &m.ranges)
		request.Allocate = r.memory.allocate
	}
	t := h.beginTee(m, r, p)
	defer func() {
		if err != nil {
			h.dropTee(t)
		}
	}()
	if t != nil {
		request.Keep = t.image
	}
	model, err := h.loader.Start(context.WithoutCancel(ctx), p, request) // the model outlives whoever asked for it
	if err != nil {
		return err
	}
	made := make(chan *manifest, 1)
	err = model.Guard(context.WithoutCancel(ctx), "exporting device memory", func() error {
		man, err := describe(m, r, model)
		made <- man
		return err
	})
	var man *manifest
	if err == nil {
		man = <-made
		err = man.fits()
	}
	if err != nil {
		return errors.Join(err, model.Close())
	}
	r.model, r.manifest, r.tee = model, man, t
	h.mu.Lock()
	defer h.mu.Unlock()
	m.plan = p.Plan
	return nil
}

// watch follows a load to its end, and lets go of the file.
func (h *Holder) watch(m *held, r *residence) {
	defer close(r.ended)
	for i, t := range r.model.Plan().Tensors() {
		if r.model.Wait(context.Background(), t.Name) != nil {
			break // WaitAll says why
		}
		r.arrivals.set(arrival{tensors: i + 1})
	}
	err := r.model.WaitAll(context.Background())
	report := r.model.Report()
	h.mu.Lock()
	r.finished, r.err = true, err
	h.endScratch(r)
	again := m.loaded
	if err == nil {
		h.count(m, r, &report)
	}
	free := err != nil && m.attached == 0
	dropping := m.dropping || h.closed
	fill := err == nil && !dropping && r.file != nil && h.wantImage(m, r.file, r.tee)
	h.notify()
	h.mu.Unlock()
	if !fill {
		h.dropTee(r.tee)
	}
	if e, ok := errors.AsType[*loader.ProveError](err); ok && e.Host && r.image != nil {
		h.log.Warn("the model's copy in host memory is damaged and given up, its file is used the next time", "model", m.name)
		h.dropImage(m) // nobody else loads the model before r has ended
	}
	r.arrivals.set(arrival{tensors: r.arrivals.tensors(), ended: true, err: err})
	switch {
	case err == nil && again:
		h.log.Info("woken", "model", m.name, "bytes", report.DeviceBytes, "seconds", time.Since(r.began).Seconds(),
			"allocating", report.Alloc.Seconds(), "copying", report.Transfer.Seconds())
	case err == nil:
		h.log.Info("loaded", "model", m.name, "bytes", report.DeviceBytes, "seconds", report.Total.Seconds())
	case !dropping:
		h.log.Error("the load failed", "model", m.name, "error", err)
	}
	if err == nil {
		h.keepSoon(m, r)
	}
	switch {
	case fill: // it closes the file
	case errors.Is(err, loader.ErrStalled):
		h.log.Warn("the model's file stays open, as it may still be read", "model", m.name)
	case r.file != nil:
		h.closeFile(m, r.file)
	}
	if free {
		h.free(m, r)
	}
	h.tell()
}

func (h *Holder) closeFile(m *held, file *gguf.File) {
	if err := file.Close(); err != nil {
		h.log.Warn("closing the model's file failed", "model", m.name, "error", err)
	}
}

// count notes a load that has ended well. h.mu is held.
func (h *Holder) count(m *held, r *residence, report *loader.Report) {
	r.proved, r.provedBytes = report.Proved, report.ProvedBytes
	if m.loaded {
		m.wakes++
		m.wakeTime = time.Since(r.began)
		h.wakes++
		h.wakeTime += m.wakeTime
	}
	if r.file != nil {
		m.report = *report
	}
	m.loaded = true
}

// free gives back the memory of a load that failed.
func (h *Holder) free(m *held, r *residence) {
	if err := h.release(m, r); err != nil {
		h.log.Error("freeing memory failed", "model", m.name, "error", err)
	}
}

// release closes a residence's model, and notes what that could not free. What it did free, others may have, once no
// Keeper has it.
func (h *Holder) release(m *held, r *residence) error {
	err := r.model.Close()
	h.mu.Lock()
	defer h.mu.Unlock()
	if r.freed {
		return err
	}
	r.freed = true
	if e, ok := errors.AsType[*loader.LeftError](err); ok {
		r.left = e.DeviceBytes
		h.log.Error("device memory stays taken until this process ends", "model", m.name, "bytes", r.left)
	}
	h.settle(r)
	return err
}

// settle gives back what r has claimed, and fulfils what was promised of it, once its memory is free. h.mu is held.
func (h *Holder) settle(r *residence) {
	if !r.freed || r.withKeeper {
		return
	}
	for d, n := range r.claimed {
		if r.left == 0 && !r.settled {
			h.claimed[d] -= n
		}
		if r.promised {
			h.freeing[d] -= n
		}
	}
	r.settled, r.promised = true, false
	h.notify()
}
