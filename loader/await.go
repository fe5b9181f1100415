package loader

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/kernels"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// onItsWay is what an Image has that a load fills.
type onItsWay struct {
	sizes []int64
	ready []chan struct{} // by slab, closed when it is there
	put   atomic.Int64    // bytes; those that are read again count again
	short atomic.Bool     // bytes were left out, since the load was to end before their slab was there
	gone  chan struct{}   // closed by GiveUp
	once  sync.Once

	// copying is held for reading while bytes are copied to a slab, and for writing by GiveUp.
	copying sync.RWMutex
}

// ErrGivenUp is matched by the error of Image.Seal when the Image was given up, or the load was ended.
var ErrGivenUp = errors.New("the image was given up")

// AwaitImage returns an Image for the tensors of p that is filled by a load with Request.Keep, from the bytes that the
// load reads, so that these are read once. Its slabs may be made while the load runs, which waits for each until Supply
// brings it: making page-locked memory takes its time. sizes are those of the slabs, and must be ImageBytes(p) together
// at least, else the error matches ErrBadOption. After a load that has ended well Seal ends the filling; else, and when
// slabs cannot be had, GiveUp must be called before the slabs are used for anything else.
//
// It is for models that are read more slowly than memory is copied, from servers mostly: each byte is copied once more.
func AwaitImage(p *plan.Plan, sizes []int64) (*Image, error) {
	im, err := newImage(p, sizes)
	if err != nil {
		return nil, err
	}
	im.slabs = make([]*amdhip.HostMemory, len(sizes))
	im.way = &onItsWay{sizes: slices.Clone(sizes), gone: make(chan struct{})}
	for range sizes {
		im.way.ready = append(im.way.ready, make(chan struct{}))
	}
	return im, nil
}

// Supply brings one of the slabs: the first of its size that is missing. It is for one goroutine. The error matches
// ErrBadOption when none of that size is.
func (im *Image) Supply(slab *amdhip.HostMemory) error {
	for i, n := range im.way.sizes {
		if im.slabs[i] == nil && n == int64(slab.Len()) {
			im.slabs[i] = slab
			close(im.way.ready[i])
			return nil
		}
	}
	return fmt.Errorf("%w: a slab of %d bytes, where none of that size is missing", ErrBadOption, slab.Len())
}

// GiveUp makes a load that fills the Image go on without. Once it has returned, nobody writes to the slabs any more.
func (im *Image) GiveUp() {
	im.way.once.Do(func() {
		im.way.copying.Lock()
		defer im.way.copying.Unlock()
		close(im.way.gone)
	})
}

// isGone reports whether GiveUp was called.
func (w *onItsWay) isGone() bool {
	select {
	case <-w.gone:
		return true
	default:
		return false
	}
}

// keep puts bytes of the file into the Image, from byte at of a tensor on, unless the load ends. A nil Image keeps
// nothing.
func (im *Image) keep(t *plan.Tensor, at int64, b []byte, ends <-chan struct{}) {
	if im == nil || len(b) == 0 {
		return
	}
	w := im.way
	im.each(im.places[t.Name].off+at, int64(len(b)), func(slab, from, done, n int) {
		select {
		case <-w.ready[slab]: // whatever else is true
		default:
			select {
			case <-w.ready[slab]:
			case <-w.gone:
				return
			case <-ends:
				w.short.Store(true) // the chunk may arrive all the same, and never be read again
				return
			}
		}
		w.copying.RLock()
		defer w.copying.RUnlock()
		if !w.isGone() {
			kernels.Copy(im.slabs[slab].Bytes()[from:from+n], b[done:done+n])
			w.put.Add(int64(n))
		}
	})
}

// Seal ends the filling of an Image by a load of p, which must have ended well: it sums up what is there, and PlanImage
// takes the Image then. Else the error matches ErrGivenUp, or is the cause of ctx's end.
func (im *Image) Seal(ctx context.Context, p *plan.Plan) error {
	if err := im.suits(p); err != nil {
		return err
	}
	var size int64
	for _, t := range p.Tensors() {
		size += t.Size
	}
	if im.way.isGone() || im.way.short.Load() || im.way.put.Load() < size {
		return fmt.Errorf("loader: %d of %d bytes are in the image: %w", im.way.put.Load(), size, ErrGivenUp)
	}
	end := int64(0)
	for _, t := range p.Tensors() {
		at := im.places[t.Name]
		im.clear(end, at.off)
		prints := make(fingerprints, kernels.Fingerprints(t.Size))
		for i := range prints {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			prints[i] = im.sumOf(t, i)
		}
		im.prints[t.Name], end = prints, at.off+t.Size
	}
	im.clear(end, im.bytes)
	im.filled.Store(true)
	return nil
}
