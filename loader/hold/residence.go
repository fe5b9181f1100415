package hold

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/internal/watch"
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
			err = h.measure(r, p)
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
		err = h.measure(r, p)
	}
	if err != nil {
		return nil, nil, errors.Join(err, file.Close())
	}
	if m.files == nil || m.arch == "" {
		m.arch = file.Architecture()
		m.hf, m.hfError = plan.HFTensors(file)
	}
	m.files, r.file = files, file
	return p, r, nil
}

// measure notes how much device memory a load of r by p takes.
func (h *Holder) measure(r *residence, p *loader.Plan) (err error) {
	r.claimed = h.need(p.Plan)
	r.scratch, err = p.ScratchBytes()
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

// start begins to load m by p, and makes its manifest.
func (h *Holder) start(ctx context.Context, m *held, r *residence, p *loader.Plan) error {
	request := m.request
	if r.image != nil || m.loaded { // what a request wants to see of a load, it has seen
		request = loader.Request{Check: m.request.Check && r.image == nil, Prove: m.request.Prove}
	}
	if h.options.Scrub > 0 && request.Prove == loader.ProveAuto { // its kernel is there anyway
		request.Prove = loader.ProveOn
	}
	request.Share = true
	if h.share == ShareFD {
		r.memory = newSharedMemory(h.devices, &m.ranges)
		request.Allocate = r.memory.allocate
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
	r.model, r.manifest = model, man
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
	fill := err == nil && !dropping && r.file != nil && h.wantImage(m, r.file)
	h.notify()
	h.mu.Unlock()
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
		h.keep(m, r)
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

// release closes a residence's model, and notes what that could not free. What it did free, others may have.
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
	} else {
		for d, n := range r.claimed {
			h.claimed[d] -= n
		}
	}
	h.notify()
	return err
}

// wantImage reports whether m is to get an image, and begins to make it of file, which is closed in the end. h.mu is
// held.
func (h *Holder) wantImage(m *held, file *gguf.File) bool {
	if h.pool == nil || m.image != nil || m.imaging != nil {
		return false
	}
	ctx, cancel := context.WithCancel(h.ctx)
	m.imaging, m.noImage = make(chan struct{}), cancel
	files, done := slices.Clone(m.files), m.imaging
	h.background.Go(func() {
		im, reading := h.makeImage(ctx, m, file, files)
		cancel()
		if reading {
			h.log.Warn("the model's file stays open, as it may still be read", "model", m.name)
		} else {
			h.closeFile(m, file)
		}
		h.mu.Lock()
		m.image, m.imaging, m.noImage = im, nil, nil
		close(done)
		h.notify()
		h.mu.Unlock()
		h.tell()
	})
	return true
}

// makeImage copies the tensors of m to page-locked memory; nil: there will be no image. With reading, somebody still
// reads the file.
func (h *Holder) makeImage(ctx context.Context, m *held, file *gguf.File, files []FileIdentity) (_ *hostImage,
	reading bool) {
	select {
	case h.filling <- struct{}{}:
		defer func() { <-h.filling }()
	case <-ctx.Done():
		return nil, false
	}
	began := time.Now()
	slabs, err := h.hostRoom(ctx, m, loader.ImageBytes(m.plan))
	if err != nil {
		switch {
		case ctx.Err() != nil:
		case errors.Is(err, errPoolFull):
			h.log.Info("the model gets no page-locked memory", "model", m.name, "error", err)
		default:
			h.noRAM.Do(func() { h.log.Warn("no more page-locked memory can be had: models sleep in their files", "error", err) })
		}
		return nil, false
	}
	im, err := loader.NewImage(m.plan, slabs)
	if err == nil { // however long that takes; when it is cancelled, it has to end
		forever := new(watch.Calls).Limit(math.MaxInt64)
		err = watch.Call(ctx, forever, "copying the model's file", func() error { return im.Fill(ctx, file, m.plan) })
	}
	if watch.Lost(err) {
		for _, s := range slabs {
			h.pool.leave(int64(s.Len()))
		}
		return nil, true
	}
	if err == nil {
		err = unchanged(file, files)
	}
	if err != nil {
		h.pool.putSlabs(slabs)
		if ctx.Err() == nil {
			h.log.Warn("the model gets no page-locked memory", "model", m.name, "error", err)
		}
		return nil, false
	}
	h.log.Info("in page-locked memory, too", "model", m.name, "seconds", time.Since(began).Seconds())
	return &hostImage{Image: im, slabs: slabs}, false
}

// unchanged refuses a file that was written to since it was identified.
func unchanged(file *gguf.File, was []FileIdentity) error {
	for i, p := range file.Parts() {
		info, err := os.Stat(p.Path)
		if err != nil {
			return err
		}
		if info.Size() != was[i].Size || info.ModTime().UnixNano() != was[i].ModTime {
			return fmt.Errorf("hold: %s has changed: %w", p.Path, ErrOtherFile)
		}
	}
	return nil
}

// hostRoom takes n bytes of page-locked memory. Images that are not in use make room, of models that were used less
// recently than m.
func (h *Holder) hostRoom(ctx context.Context, m *held, n int64) (slabs []*amdhip.HostMemory, err error) {
	if !h.pool.fits(n) {
		return nil, fmt.Errorf("%w: %d bytes are needed, the budget is %d", errPoolFull, n, h.pool.budget)
	}
	for {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		slabs, err = h.pool.take(ctx, n)
		if !errors.Is(err, errPoolFull) {
			return slabs, err
		}
		v := h.idlestImage(m)
		if v == nil {
			return nil, err
		}
		h.dropImage(v)
		<-v.turn
	}
}

// idlestImage returns the model with an image that was used least recently, and takes its turn; nil: there is none that
// may go.
func (h *Holder) idlestImage(m *held) (v *held) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, x := range h.models {
		busy := x.now != nil && !x.now.finished && x.now.image != nil
		if x == m || x.image == nil || x.pinned || busy || x.order > m.order || v != nil && v.order < x.order {
			continue
		}
		select {
		case x.turn <- struct{}{}:
			if v != nil {
				<-v.turn
			}
			v = x
		default:
		}
	}
	return v
}

// dropImage gives back the page-locked memory of m. The caller has m's turn.
func (h *Holder) dropImage(m *held) {
	h.mu.Lock()
	im := m.image
	m.image = nil
	h.mu.Unlock()
	if im != nil {
		h.pool.put(im)
	}
}
