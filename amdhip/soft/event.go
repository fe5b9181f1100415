package soft

import (
	"math/bits"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
)

// Flags of hipEventCreateWithFlags that HIP 6 knows.
const (
	eventFences = 0xE0000000
	eventKnown  = hip.EventBlockingSync | hip.EventDisableTiming | hip.EventInterprocess | eventFences
)

// event belongs to the device that was current when it was made. It is guarded by Software.mu.
type event struct {
	dev    *device
	timing bool
	last   *marker // what it recorded last, nil: nothing

	captured *captured // what it recorded last if that was while its stream recorded, else nil
}

func (sw *Software) eventCreate(out *uintptr, flags uint32) hip.Status {
	if st := sw.call("hipEventCreateWithFlags"); st != hip.Success {
		return st
	}
	if out == nil || flags&^eventKnown != 0 || bits.OnesCount32(flags&eventFences) > 1 ||
		flags&hip.EventInterprocess != 0 && flags&hip.EventDisableTiming == 0 {
		return hip.ErrInvalidValue
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	if sw.closed {
		return hip.ErrDeinitialized
	}
	*out = sw.newHandle()
	sw.events[*out] = &event{dev: sw.device(), timing: flags&hip.EventDisableTiming == 0}
	sw.stats.Events++
	return hip.Success
}

// event returns the event of a handle. sw.mu is held.
func (sw *Software) event(handle uintptr) (*event, hip.Status) {
	if sw.closed {
		return nil, hip.ErrDeinitialized
	}
	e := sw.events[handle]
	if e == nil {
		return nil, hip.ErrInvalidHandle
	}
	return e, hip.Success
}

// recorded returns what the event stands for now.
func (sw *Software) recorded(event uintptr) (*marker, hip.Status) {
	sw.mu.Lock()
	defer sw.mu.Unlock()
	e, st := sw.event(event)
	if st != hip.Success {
		return nil, st
	}
	if e.captured != nil {
		return nil, hip.ErrCapturedEvent
	}
	return e.last, hip.Success
}

// eventDestroy does not wait: what was recorded goes on, and so do streams that wait for it.
func (sw *Software) eventDestroy(event uintptr) hip.Status {
	if st := sw.call("hipEventDestroy"); st != hip.Success {
		return st
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	_, st := sw.event(event)
	switch {
	case st == hip.ErrInvalidHandle && event != 0:
		return hip.ErrContextIsDestroyed
	case st != hip.Success:
		return st
	}
	delete(sw.events, event)
	sw.stats.Events--
	return hip.Success
}

func (sw *Software) eventRecord(event, stream uintptr) hip.Status {
	late, st := sw.enter("hipEventRecord")
	if st != hip.Success {
		return st
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	e, st := sw.event(event)
	if st != hip.Success {
		return st
	}
	s, st := sw.stream(stream)
	if st != hip.Success {
		return st
	}
	if s.dev != e.dev {
		return hip.ErrInvalidHandle
	}
	if s.capture != nil {
		return s.capture.record(s, e)
	}
	m := newMarker()
	if st := s.enqueue(operation{kind: opMarker, late: late, marker: m}); st != hip.Success {
		return st
	}
	e.last, e.captured = m, nil
	return hip.Success
}

// streamWaitEvent lets the stream wait for what the event stands for now. Recording the event again later does not
// change that.
func (sw *Software) streamWaitEvent(stream, event uintptr, flags uint32) hip.Status {
	late, st := sw.enter("hipStreamWaitEvent")
	if st != hip.Success {
		return st
	}
	if flags != 0 {
		return hip.ErrInvalidValue
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	s, st := sw.stream(stream)
	if st != hip.Success {
		return st
	}
	e, st := sw.event(event)
	if st != hip.Success {
		return st
	}
	if s.capture != nil || e.captured != nil {
		return s.joinCapture(e)
	}
	op := operation{kind: opWait, late: late, wait: e.last}
	if e.last == nil {
		op.kind = opMarker // nothing to wait for; what was injected happens all the same
	}
	return s.enqueue(op)
}

func (sw *Software) eventQuery(event uintptr) hip.Status {
	if st := sw.call("hipEventQuery"); st != hip.Success {
		return st
	}
	m, st := sw.recorded(event)
	switch {
	case m == nil:
		return st
	case !m.reached():
		return hip.ErrNotReady
	}
	return m.err
}

func (sw *Software) eventSynchronize(event uintptr) hip.Status {
	if st := sw.call("hipEventSynchronize"); st != hip.Success {
		return st
	}
	m, st := sw.recorded(event)
	if m == nil {
		return st
	}
	return m.result()
}

// eventElapsedTime answers with times of the model's clock, which leave out delays of the goroutines.
func (sw *Software) eventElapsedTime(ms *float32, start, stop uintptr) hip.Status {
	if st := sw.call("hipEventElapsedTime"); st != hip.Success {
		return st
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	a, st := sw.event(start)
	if st != hip.Success {
		return st
	}
	b, st := sw.event(stop)
	if st != hip.Success {
		return st
	}
	switch {
	case ms == nil:
		return hip.ErrInvalidValue
	case !a.timing || !b.timing || a.last == nil || b.last == nil || a.dev != b.dev:
		return hip.ErrInvalidHandle
	case !a.last.reached() || !b.last.reached():
		return hip.ErrNotReady
	}
	for _, m := range []*marker{a.last, b.last} {
		if m.err != hip.Success {
			return m.err
		}
	}
	*ms = float32(float64(b.last.time-a.last.time) / float64(time.Millisecond))
	return hip.Success
}
