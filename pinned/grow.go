package pinned

import (
	"errors"
	"fmt"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
)

// firstShare is the part of the buffers, one in so many, that New makes by hipHostMalloc before it returns.
const firstShare = 4

// first makes the first buffers: all of them at once where memory can be registered, else a part of them by
// hipHostMalloc, else fewer, else smaller ones, else plain memory.
func (p *Pool) first() error {
	asked := p.size
	regErr := p.add(p.want, registeredSlab)
	if !errors.Is(regErr, errCannotPin) {
		return regErr
	}
	n := (p.want + firstShare - 1) / firstShare
	pinErr := p.add(n, pinnedSlab)
	for err := pinErr; err != nil; {
		if !errors.Is(err, errCannotPin) {
			return err
		}
		switch {
		case n > 1:
			n /= 2
		case p.size/2 >= MinBufferBytes:
			p.size /= 2
		default:
			p.size = asked
			if err := p.add(p.want, plainSlab); err != nil {
				return fmt.Errorf("pinned: no staging memory: %w", errors.Join(regErr, pinErr, err))
			}
			p.log.Warn("host memory cannot be pinned, copies will be slow: raise the locked-memory limit (ulimit -l)",
				"error", errors.Join(regErr, pinErr))
			return nil
		}
		err = p.add(n, pinnedSlab)
	}
	if p.size != asked {
		p.log.Warn("host memory can be pinned in small pieces only, copies will be slower: "+
			"raise the locked-memory limit (ulimit -l)", "buffer_bytes", p.size, "error", pinErr)
	}
	return nil
}

// grow makes the buffers after the first. It ends when all are made, when no more can be made, or when the pool closes.
func (p *Pool) grow() {
	defer close(p.grown)
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.growing = false
		p.checkExhausted()
	}()
	p.mu.Lock()
	have := len(p.all)
	p.mu.Unlock()
	for n := have; have < p.want; {
		select {
		case <-p.closing:
			return
		default:
		}
		n = min(n, p.want-have)
		err := p.add(n, pinnedSlab)
		if err == nil {
			have += n
			continue
		}
		if n /= 2; n == 0 || !errors.Is(err, errCannotPin) {
			p.log.Warn("fewer staging buffers than asked for: memory cannot be pinned",
				"buffers", have, "wanted", p.want, "error", err)
			return
		}
	}
}

// add makes n more buffers, with one slab for all of them, and sets them free. If it fails, it makes none.
func (p *Pool) add(n int, alloc func(dev *amdhip.Device, n int) (*slab, error)) error {
	start := time.Now()
	sl, err := alloc(p.devs[0], n*p.size)
	if err != nil {
		return err
	}
	bytes := sl.mem.Bytes()
	slots := make([]*slot, n)
	for i := range slots {
		off := i * p.size
		slots[i] = &slot{mem: sl.mem, off: off, bytes: bytes[off : off+p.size : off+p.size], sides: make([]side, len(p.devs))}
		if err := slots[i].makeEvents(p.devs, p.timing); err != nil {
			errs := []error{err}
			for _, s := range slots[:i+1] {
				errs = append(errs, s.closeEvents())
			}
			return errors.Join(append(errs, sl.close())...)
		}
	}
	p.mu.Lock()
	p.slabs = append(p.slabs, sl)
	p.left += int64(sl.mem.Len())
	p.all = append(p.all, slots...)
	p.stats.TotalPin += time.Since(start)
	p.mu.Unlock()
	for _, s := range slots {
		p.putBack(s)
	}
	return nil
}

// makeEvents makes the slot's events for each of the devices.
func (s *slot) makeEvents(devs []*amdhip.Device, timing bool) (err error) {
	o := amdhip.EventOptions{Timing: timing}
	for i, dev := range devs {
		sd := &s.sides[i]
		if timing {
			if sd.begin, err = dev.NewEvent(o); err != nil {
				return err
			}
		}
		if sd.event, err = dev.NewEvent(o); err != nil {
			return err
		}
	}
	return nil
}

// closeEvents frees the events that were made.
func (s *slot) closeEvents() error {
	var errs []error
	for _, sd := range s.sides {
		for _, ev := range []*amdhip.Event{sd.begin, sd.event} {
			if ev != nil {
				errs = append(errs, ev.Close())
			}
		}
	}
	return errors.Join(errs...)
}
