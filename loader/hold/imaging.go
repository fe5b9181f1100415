package hold

import (
	"context"
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
)

// wantImage reports whether m is to get an image, and begins to make it: of what its load has kept on the way, or else
// of file, which is closed in the end. h.mu is held.
func (h *Holder) wantImage(m *held, file *gguf.File, t *teeing) bool {
	if h.pool == nil || m.image != nil || m.imaging != nil || m.once && t == nil {
		return false
	}
	ctx, cancel := context.WithCancel(h.ctx)
	m.imaging, m.noImage = make(chan struct{}), cancel
	files, done := slices.Clone(m.files), m.imaging
	h.background.Go(func() {
		im, reading := h.makeImage(ctx, m, file, files, t)
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

// makeImage brings the tensors of m to page-locked memory; nil: there will be no image. With reading, somebody still
// reads the file.
func (h *Holder) makeImage(ctx context.Context, m *held, file *gguf.File, files []FileIdentity, t *teeing) (
	_ *hostImage, reading bool,
) {
	if t == nil { // reading the file is for one at a time
		select {
		case h.filling <- struct{}{}:
			defer func() { <-h.filling }()
		case <-ctx.Done():
			return nil, false
		}
	}
	began := time.Now()
	var im *loader.Image
	var slabs []*amdhip.HostMemory
	var err error
	if t != nil {
		<-t.made
		im, slabs, err = t.image, t.slabs, t.err
	} else {
		slabs, err = h.hostRoom(ctx, m, loader.ImageBytes(m.plan), nil)
	}
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
	if t != nil {
		err = im.Seal(ctx, m.plan)
	} else if im, err = loader.NewImage(m.plan, slabs); err == nil {
		// However long that takes; when it is cancelled, it has to end.
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
		if t != nil {
			im.GiveUp()
		}
		h.pool.putSlabs(slabs)
		if ctx.Err() == nil {
			h.log.Warn("the model gets no page-locked memory", "model", m.name, "error", err)
		}
		return nil, false
	}
	h.log.Info("in page-locked memory, too", "model", m.name, "seconds", time.Since(began).Seconds())
	return &hostImage{Image: im, slabs: slabs}, false
}

// teeing is page-locked memory that a load fills with what it reads.
type teeing struct {
	image *loader.Image
	end   context.CancelFunc // ends the making of slabs

	made  chan struct{} // closed when what follows is known
	slabs []*amdhip.HostMemory
	err   error // why there are none
}

// beginTee begins to make page-locked memory for m, which its load by p fills on its way, so that a model on a server
// is fetched once. Files are read again instead, from the page cache mostly: they are read so fast that one more copy
// of every byte would cost the load more time. Nil: there will be none. The caller has m's turn.
func (h *Holder) beginTee(m *held, r *residence, p *loader.Plan) *teeing {
	if h.pool == nil || r.file == nil || !r.file.Remote() {
		return nil
	}
	h.mu.Lock()
	h.touch(m) // those that were used before it make room
	there := m.image != nil || m.imaging != nil
	h.mu.Unlock()
	n := loader.ImageBytes(p.Plan)
	if there || !h.pool.fits(n) { // wantImage says so
		return nil
	}
	im, err := loader.AwaitImage(p.Plan, h.pool.pieces(n))
	if err != nil {
		h.log.Warn("the model gets no page-locked memory on its way", "model", m.name, "error", err)
		return nil
	}
	ctx, end := context.WithCancel(h.ctx)
	t := &teeing{image: im, end: end, made: make(chan struct{})}
	h.background.Go(func() {
		defer close(t.made)
		if t.slabs, t.err = h.hostRoom(ctx, m, n, im); t.err != nil {
			im.GiveUp() // the load does not wait for it
		}
	})
	return t
}

// dropTee gives back what beginTee has begun, if it has.
func (h *Holder) dropTee(t *teeing) {
	if t == nil {
		return
	}
	t.end()
	t.image.GiveUp() // from now on nobody writes to it
	h.background.Go(func() {
		<-t.made
		h.pool.putSlabs(t.slabs)
	})
}

// unchanged refuses a file that was written to since it was identified.
func unchanged(file *gguf.File, was []FileIdentity) error {
	for i, p := range file.Parts() {
		if was[i].Source != nil || was[i].Once { // each read has found that out, or nothing can
			continue
		}
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

// hostRoom takes n bytes of page-locked memory, for an Image that waits for it if one does. Images that are not in use
// make room, of models that were used less recently than m.
func (h *Holder) hostRoom(ctx context.Context, m *held, n int64, to *loader.Image) (slabs []*amdhip.HostMemory,
	err error,
) {
	if !h.pool.fits(n) {
		return nil, fmt.Errorf("%w: %d bytes are needed, the budget is %d", errPoolFull, n, h.pool.budget)
	}
	for {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		slabs, err = h.pool.take(ctx, n, to)
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
		last := x.once && x.now == nil // this is all that there is of it
		if x.base() == m.base() || x.image == nil || x.pinned || last || busy || x.order > m.order ||
			v != nil && v.order < x.order {
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
