package pinned

import (
	"errors"
	"fmt"
	"slices"
	"time"
)

const (
	// pollInterval is how long the reaper sleeps between two looks at copies in flight, at first. The pool holds a
	// millisecond and more of a fast link's work, so this delay makes nobody wait. While nothing ends, each sleep is
	// twice the last, up to maxPollInterval: on a slow link waking up for nothing would take a fair part of a core.
	pollInterval    = 40 * time.Microsecond
	maxPollInterval = 8 * pollInterval

	// After patience looks in a row at which nothing has ended, a third of a second, the device is likely to hang. Then
	// each sleep may be as long as hungPollInterval, so that a process that lives on does not spend a core on it.
	patience         = 1000
	hungPollInterval = 10 * time.Millisecond
)

// reaper waits for copies in flight and sets their buffers free. It polls: a goroutine that waits inside the runtime
// for an event keeps a core busy with some versions of HIP, and could not be called back.
type reaper struct {
	pool   *Pool
	flying []*Buffer
	coarse bool // pause does not move Go's clock, which is that of testing/synctest: sleep by it
}

// reap is the goroutine of the reaper. It ends with Abandon, and with Close after the last copy.
func (p *Pool) reap() {
	defer close(p.reaped)
	r := reaper{pool: p}
	wait, looks := pollInterval, 0
	for r.collect() {
		before := len(r.flying)
		if r.look(); len(r.flying) < before {
			wait, looks = pollInterval, 0
			continue
		}
		r.sleep(wait)
		limit := maxPollInterval
		if looks++; looks > patience {
			limit = hungPollInterval
		}
		wait = min(2*wait, limit)
	}
}

// collect takes over the buffers that were handed in. While none is in flight it waits for one. It returns false when
// the reaper is to end.
func (r *reaper) collect() bool {
	p := r.pool
	for len(r.flying) == 0 {
		select {
		case b := <-p.handed:
			r.flying = append(r.flying, b)
		case <-p.closing:
			if p.stop() {
				return false
			}
			r.flying = append(r.flying, <-p.handed) // it was handed in just before
		}
	}
	for {
		select {
		case b := <-p.handed:
			r.flying = append(r.flying, b)
			continue
		case <-p.abandoned:
			return false
		default:
		}
		return true
	}
}

// stop lets no more buffers be handed in and returns true, unless one is waiting to be taken over.
func (p *Pool) stop() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.handed) > 0 && !p.givenUp {
		return false
	}
	p.stopped = true
	return true
}

// look frees those buffers whose copies have ended and keeps the others, in order.
func (r *reaper) look() {
	left := r.flying[:0]
	for _, b := range r.flying {
		if b.ended(left) {
			r.pool.finish(b)
		} else {
			left = append(left, b)
		}
	}
	clear(r.flying[len(left):])
	r.flying = left
}

// finish sets the buffer free, or counts it as lost, and tells its Completion.
func (p *Pool) finish(b *Buffer) {
	p.mu.Lock()
	p.flying--
	p.mu.Unlock()
	if b.unsure {
		b.state.Store(lost)
		p.lose()
	} else {
		b.state.Store(released)
		p.putBack(b.slot)
	}
	if b.to != nil {
		b.to.Done(b.tag, b.took, b.err)
	}
}

// ended reports whether all copies of b have ended, one way or the other. Copies on one stream end in order, so a
// stream is not asked when one of the buffers that were handed in before b, and are still in flight, waits for it.
func (b *Buffer) ended(before []*Buffer) bool {
	all := true
	for i := range b.slot.sides {
		s := &b.slot.sides[i]
		if s.stream == nil {
			continue
		}
		waits := slices.ContainsFunc(before, func(l *Buffer) bool { return l.slot.sides[i].stream == s.stream })
		if waits || !b.look(s) {
			all = false
		}
	}
	return all
}

// look asks whether the copies of side s have ended, and remembers how. An event that cannot be asked counts as ended,
// since asking again would not help. The device may still be at work then. If it only reads the buffer, that harms
// nobody but the copy that is reported as failed; if it writes, the buffer must not get another owner.
func (b *Buffer) look(s *side) bool {
	done, err := s.event.Query()
	if !done && err == nil {
		return false
	}
	if err != nil {
		b.unsure = b.unsure || b.written
	} else if s.begin != nil && s.begun {
		var took time.Duration
		took, err = s.event.Elapsed(s.begin)
		b.took = max(b.took, took)
	}
	if err != nil && len(b.slot.sides) > 1 {
		err = fmt.Errorf("device %d: %w", s.event.Device().Index(), err)
	}
	b.err = errors.Join(b.err, err)
	s.stream = nil
	return true
}

// sleep sleeps for about d.
func (r *reaper) sleep(d time.Duration) {
	if !r.coarse {
		r.coarse = !pause(d)
		return
	}
	select {
	case <-time.After(d):
	case <-r.pool.abandoned:
	}
}
