package amdhip

import (
	"math/bits"
	"time"
)

// Flags of hipEventCreateWithFlags that HIP 6 knows beyond those of api.go.
const (
	eventInterprocess = 4 // only together with eventDisableTiming
	eventFences       = 0xE0000000
	eventKnown        = eventBlockingSync | eventDisableTiming | eventInterprocess | eventFences
)

// softEvent belongs to the device that was current when it was made. It is guarded by Software.mu.
type softEvent struct {
	dev    *softDevice
	timing bool
	last   *marker // what it recorded last, nil: nothing
}

func (sw *Software) eventCreate(event *uintptr, flags uint32) Status {
	if st := sw.call("hipEventCreateWithFlags"); st != Success {
		return st
	}
	if event == nil || flags&^eventKnown != 0 || bits.OnesCount32(flags&eventFences) > 1 ||
		flags&eventInterprocess != 0 && flags&eventDisableTiming == 0 {
		return ErrInvalidValue
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	if sw.closed {
		return ErrDeinitialized
	}
	*event = sw.newHandle()
	sw.events[*event] = &softEvent{dev: sw.device(), timing: flags&eventDisableTiming == 0}
	sw.stats.Events++
	return Success
}

// event returns the event of a handle. sw.mu is held.
func (sw *Software) event(handle uintptr) (*softEvent, Status) {
	if sw.closed {
		return nil, ErrDeinitialized
	}
	e := sw.events[handle]
	if e == nil {
		return nil, ErrInvalidHandle
	}
	return e, Success
}

// recorded returns what the event stands for now.
func (sw *Software) recorded(event uintptr) (*marker, Status) {
	sw.mu.Lock()
	defer sw.mu.Unlock()
	e, st := sw.event(event)
	if st != Success {
		return nil, st
	}
	return e.last, Success
}

// eventDestroy does not wait: what was recorded goes on, and so do streams that wait for it.
func (sw *Software) eventDestroy(event uintptr) Status {
	if st := sw.call("hipEventDestroy"); st != Success {
		return st
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	_, st := sw.event(event)
	switch {
	case st == ErrInvalidHandle && event != 0:
		return ErrContextIsDestroyed
	case st != Success:
		return st
	}
	delete(sw.events, event)
	sw.stats.Events--
	return Success
}

func (sw *Software) eventRecord(event, stream uintptr) Status {
	late, st := sw.enter("hipEventRecord")
	if st != Success {
		return st
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	e, st := sw.event(event)
	if st != Success {
		return st
	}
	s, st := sw.stream(stream)
	if st != Success {
		return st
	}
	if s.dev != e.dev {
		return ErrInvalidHandle
	}
	m := newMarker()
	if st := s.enqueue(softOp{kind: opMarker, late: late, marker: m}); st != Success {
		return st
	}
	e.last = m
	return Success
}

// streamWaitEvent lets the stream wait for what the event stands for now; recording it again later changes nothing.
func (sw *Software) streamWaitEvent(stream, event uintptr, flags uint32) Status {
	late, st := sw.enter("hipStreamWaitEvent")
	if st != Success {
		return st
	}
	if flags != 0 {
		return ErrInvalidValue
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	s, st := sw.stream(stream)
	if st != Success {
		return st
	}
	e, st := sw.event(event)
	if st != Success {
		return st
	}
	op := softOp{kind: opWait, late: late, wait: e.last}
	if e.last == nil {
		op.kind = opMarker // nothing to wait for; what was injected happens all the same
	}
	return s.enqueue(op)
}

func (sw *Software) eventQuery(event uintptr) Status {
	if st := sw.call("hipEventQuery"); st != Success {
		return st
	}
	m, st := sw.recorded(event)
	switch {
	case m == nil:
		return st
	case !m.reached():
		return ErrNotReady
	}
	return m.err
}

func (sw *Software) eventSynchronize(event uintptr) Status {
	if st := sw.call("hipEventSynchronize"); st != Success {
		return st
	}
	m, st := sw.recorded(event)
	if m == nil {
		return st
	}
	return m.result()
}

// eventElapsedTime answers with the model's times, so without what the goroutines overslept.
func (sw *Software) eventElapsedTime(ms *float32, start, stop uintptr) Status {
	if st := sw.call("hipEventElapsedTime"); st != Success {
		return st
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	a, st := sw.event(start)
	if st != Success {
		return st
	}
	b, st := sw.event(stop)
	if st != Success {
		return st
	}
	switch {
	case ms == nil:
		return ErrInvalidValue
	case !a.timing || !b.timing || a.last == nil || b.last == nil || a.dev != b.dev:
		return ErrInvalidHandle
	case !a.last.reached() || !b.last.reached():
		return ErrNotReady
	}
	for _, m := range []*marker{a.last, b.last} {
		if m.err != Success {
			return m.err
		}
	}
	*ms = float32(float64(b.last.time-a.last.time) / float64(time.Millisecond))
	return Success
}
