package hold

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/dustin/go-humanize"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/internal/watch"
	"github.com/gguf2gpu/gguf2gpu/loader"
)

const (
	// slabBytes is the size of most pieces of page-locked memory. Pieces of one size serve one model after the other,
	// and a piece is quick to make: runtimes take 0.06 to 0.4 s for a GiB.
	slabBytes = 256 << 20
	// slabAlign is what the size of the last piece of a model is a multiple of.
	slabAlign = 2 << 20
	// hostReserve is how much memory of the host, or of the control group, stays free: page-locked memory cannot be
	// swapped out, and taking all of it would end processes.
	hostReserve = 512 << 20
)

// errPoolFull is matched when the budget for page-locked memory does not allow more.
var errPoolFull = errors.New("the budget for page-locked memory is used up")

// noLimit stands for no limit of locked memory.
const noLimit = math.MaxUint64

// locked is what the kernel counts as locked memory of this process, in bytes, and how much that may be.
type locked struct {
	used, limit uint64
	known       bool
}

// hostPool is the page-locked memory that models sleep in. Pieces that are free serve the next model.
type hostPool struct {
	make   func(n int) (*amdhip.HostMemory, error)
	budget int64
	slab   int64
	root   string // of the file system that the kernel's limits are read from

	limit func() *watch.Limit // how long calls may take that make memory
	rest  func() *watch.Limit // and those that free it

	// counted is set when the kernel has counted a piece as locked memory. Whether it does that is up to the driver; where
	// it does not, the limit of locked memory, often a few MiB, says nothing.
	counted atomic.Bool

	mu   sync.Mutex // never held during a call of the runtime
	used int64      // bytes of all pieces, free or not
	free []*amdhip.HostMemory
	left int64 // bytes of pieces that a device may use for ever
}

// hostImage is a model's bytes in page-locked memory.
type hostImage struct {
	*loader.Image
	slabs []*amdhip.HostMemory
}

// bytes is the size of the memory.
func (im *hostImage) bytes() (n int64) {
	for _, s := range im.slabs {
		n += int64(s.Len())
	}
	return n
}

// pieces is how large the pieces for n bytes are.
func (p *hostPool) pieces(n int64) (sizes []int64) {
	for ; n > 0; n -= p.slab {
		sizes = append(sizes, min(p.slab, (n+slabAlign-1)&^(slabAlign-1)))
	}
	return sizes
}

// fits reports whether n bytes could ever be had.
func (p *hostPool) fits(n int64) bool {
	var sum int64
	for _, s := range p.pieces(n) {
		sum += s
	}
	return sum <= p.budget
}

// take returns pieces that have at least n bytes together. The error matches errPoolFull when the budget does not allow
// it; others say why the memory cannot be had, or are the cause of ctx's end. As soon as a piece is there, it is
// supplied to an Image that waits for it, which is given up on an error; nil: none waits.
func (p *hostPool) take(ctx context.Context, n int64, to *loader.Image) (taken []*amdhip.HostMemory, err error) {
	taken, missing, surplus, err := p.claim(n)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			if to != nil {
				to.GiveUp()
			}
			p.putSlabs(taken)
			p.unclaim(missing)
			taken = nil
		}
	}()
	if to != nil {
		for _, m := range taken {
			if err := to.Supply(m); err != nil {
				return taken, err
			}
		}
	}
	limit := p.limit()
	for _, m := range surplus {
		if err := p.discard(limit, m); err != nil {
			return taken, err
		}
	}
	for len(missing) > 0 {
		if err := p.allowed(missing); err != nil {
			return taken, err
		}
		size, before := missing[0], lockedMemory(p.root)
		made, err := watch.Do(ctx, limit, "page-locking memory for models that sleep", func() (*amdhip.HostMemory, error) {
			return p.make(int(size))
		}, func(m *amdhip.HostMemory) { _ = m.Close() })
		if err != nil {
			return taken, fmt.Errorf("%w (the limit of locked memory is %s: ulimit -l)", err, before)
		}
		if lockedMemory(p.root).used >= before.used+uint64(size)/2 {
			p.counted.Store(true)
		}
		taken, missing = append(taken, made), missing[1:]
		if to != nil {
			if err := to.Supply(made); err != nil {
				return taken, err
			}
		}
	}
	slices.SortStableFunc(taken, func(a, b *amdhip.HostMemory) int { return b.Len() - a.Len() })
	return taken, nil
}

// allowed refuses to make pieces of these sizes when the host, a control group or the limit of locked memory would not
// let all of them be.
func (p *hostPool) allowed(sizes []int64) error {
	var need uint64
	for _, n := range sizes {
		need += uint64(n)
	}
	if left, ok := hostLeft(p.root); ok && left < need+hostReserve {
		return fmt.Errorf("%s more are needed, the host, or the control group of this process, has %s left, and %s of it stay free",
			humanize.IBytes(need), humanize.IBytes(left), humanize.IBytes(hostReserve))
	}
	if l := lockedMemory(p.root); p.counted.Load() && l.known && l.limit-min(l.limit, l.used) < need {
		return fmt.Errorf("%s more are needed, %s are locked, and the limit of locked memory is %s: raise it with ulimit -l, "+
			"LimitMEMLOCK of systemd or --ulimit memlock=-1 of a container", humanize.IBytes(need), humanize.IBytes(l.used), l)
	}
	return nil
}

// String is the limit.
func (l locked) String() string {
	switch {
	case !l.known:
		return "not known"
	case l.limit == noLimit:
		return "infinite"
	}
	return humanize.IBytes(l.limit)
}

// claim takes pieces for n bytes as far as there are any. missing is what pieces are to be made, which count as used
// from now on, and surplus those that are to be freed first, of sizes that nobody wants now.
func (p *hostPool) claim(n int64) (taken []*amdhip.HostMemory, missing []int64, surplus []*amdhip.HostMemory,
	err error,
) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var more int64
	for _, size := range p.pieces(n) {
		i := slices.IndexFunc(p.free, func(m *amdhip.HostMemory) bool { return int64(m.Len()) == size })
		if i < 0 {
			missing, more = append(missing, size), more+size
			continue
		}
		taken = append(taken, p.free[i])
		p.free = slices.Delete(p.free, i, i+1)
	}
	for p.used+more > p.budget && len(p.free) > 0 {
		last := p.free[len(p.free)-1]
		p.free = p.free[:len(p.free)-1]
		p.used -= int64(last.Len())
		surplus = append(surplus, last)
	}
	if p.used+more > p.budget {
		err = fmt.Errorf("%w: %s (%d bytes) more are needed, %s of %s are in use", errPoolFull, humanize.IBytes(uint64(more)), more,
			humanize.IBytes(uint64(p.used)), humanize.IBytes(uint64(p.budget)))
		for _, m := range surplus {
			p.used += int64(m.Len())
		}
		p.free = append(append(p.free, surplus...), taken...)
		return nil, nil, nil, err
	}
	p.used += more
	return taken, missing, surplus, nil
}

// unclaim gives up pieces that were claimed and not made.
func (p *hostPool) unclaim(missing []int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, size := range missing {
		p.used -= size
	}
}

// discard frees a piece that is not counted as used any more.
func (p *hostPool) discard(limit *watch.Limit, m *amdhip.HostMemory) error {
	err, ended := limit.Free("freeing page-locked memory", m.Close)
	if !ended {
		p.leave(int64(m.Len()))
		return &loader.LeftError{HostBytes: uint64(m.Len())}
	}
	return err
}

// leave counts memory that is never freed.
func (p *hostPool) leave(n int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.left += n
}

// put takes the memory of an image back, unless a device may still be reading it.
func (p *hostPool) put(im *hostImage) {
	if im.Stuck() {
		p.leave(im.bytes())
		return
	}
	p.putSlabs(im.slabs)
}

// putSlabs is put for memory that no image was made of.
func (p *hostPool) putSlabs(slabs []*amdhip.HostMemory) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.free = append(p.free, slabs...)
}

// bytes is how much memory there is.
func (p *hostPool) bytes() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.used
}

// close frees what is free. The error is, or has in it, a *loader.LeftError if a device may still use some of the
// memory.
func (p *hostPool) close() error {
	p.mu.Lock()
	free := p.free
	p.free = nil
	for _, m := range free {
		p.used -= int64(m.Len())
	}
	p.mu.Unlock()
	limit := p.rest()
	var errs []error
	for _, m := range free {
		if err := p.discard(limit, m); !errors.Is(err, loader.ErrStalled) { // else it counts as left
			errs = append(errs, err)
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.left > 0 {
		errs = append(errs, &loader.LeftError{HostBytes: uint64(p.left)})
	}
	return errors.Join(errs...)
}
