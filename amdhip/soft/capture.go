package soft

import (
	"maps"
	"slices"

	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
)

// capture is a recording: what its streams are given is kept instead of done. The operations are kept in the order of
// the calls. All waits between the streams allow that order, so a graph is executed as one list. It is guarded by
// Software.mu.
type capture struct {
	sw      *Software
	origin  *stream // on which it began, and has to end
	mode    hip.CaptureMode
	thread  uint64 // that began it
	streams []*stream
	ops     []operation
	invalid bool // a call that cannot be recorded was made
	ended   bool
}

// captured is what an event stands for that was recorded during a capture.
type captured struct {
	in    *capture
	after map[*stream]int // how many operations of each stream come before
}

// graph is what a capture leaves.
type graph struct{ ops []operation }

// graphExec is a graph that can be launched.
type graphExec struct {
	ops  []operation
	last *marker // of the last launch, nil: there was none
}

// join makes the stream take part.
func (c *capture) join(s *stream) {
	s.capture, s.recorded, s.after = c, 0, make(map[*stream]int)
	c.streams = append(c.streams, s)
}

// end takes all streams out.
func (c *capture) end() {
	c.ended = true
	for _, s := range c.streams {
		s.capture, s.after = nil, nil
	}
	c.sw.captures = slices.DeleteFunc(c.sw.captures, func(other *capture) bool { return other == c })
}

// record makes the event stand for what the stream has recorded so far.
func (c *capture) record(s *stream, e *event) hip.Status {
	if c.invalid {
		return hip.ErrStreamCaptureInvalidated
	}
	after := maps.Clone(s.after)
	after[s] = s.recorded
	e.last, e.captured = nil, &captured{in: c, after: after}
	return hip.Success
}

// put gives an operation to the stream, to be done or to be recorded. sw.mu is held.
func (s *stream) put(op operation) hip.Status {
	c := s.capture
	if c == nil {
		return s.enqueue(op)
	}
	if c.invalid {
		return hip.ErrStreamCaptureInvalidated
	}
	s.recorded++
	c.ops = append(c.ops, op)
	return hip.Success
}

// joinCapture is hipStreamWaitEvent where the stream records, or the event was recorded while its stream did. sw.mu is
// held.
func (s *stream) joinCapture(e *event) hip.Status {
	c, from := s.capture, e.captured
	switch {
	case c != nil && c.invalid:
		return hip.ErrStreamCaptureInvalidated
	case from == nil && e.last == nil: // never recorded, so there is nothing to wait for
		return hip.Success
	case from == nil: // work that is not part of the graph
		c.invalid = true
		return hip.ErrStreamCaptureIsolation
	case from.in.ended:
		s.spoilCapture()
		return hip.ErrCapturedEvent
	case c == nil:
		from.in.join(s)
	case c != from.in:
		c.invalid = true
		return hip.ErrStreamCaptureMerge
	}
	for other, n := range from.after {
		s.after[other] = max(s.after[other], n)
	}
	return hip.Success
}

// spoilCapture makes the capture of the stream invalid, if there is one. sw.mu is held.
func (s *stream) spoilCapture() {
	if s.capture != nil {
		s.capture.invalid = true
	}
}

// refuseCapture answers calls that cannot be recorded while the stream records. sw.mu is held.
func (s *stream) refuseCapture() hip.Status {
	if s.capture == nil {
		return hip.Success
	}
	s.capture.invalid = true
	return hip.ErrStreamCaptureUnsupported
}

// refuseCaptures answers calls that may wait for the device, or change what is there, while a stream records in a mode
// that forbids them. sw.mu is held.
func (sw *Software) refuseCaptures() hip.Status {
	for _, c := range sw.captures {
		if c.mode == hip.CaptureGlobal || c.mode == hip.CaptureThreadLocal && c.thread == threadID() {
			c.invalid = true
			return hip.ErrStreamCaptureUnsupported
		}
	}
	return hip.Success
}

func (sw *Software) streamBeginCapture(handle uintptr, mode hip.CaptureMode) hip.Status {
	if st := sw.call("hipStreamBeginCapture"); st != hip.Success {
		return st
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	s, st := sw.stream(handle)
	switch {
	case st != hip.Success:
		return st
	case mode < hip.CaptureGlobal || mode > hip.CaptureRelaxed:
		return hip.ErrInvalidValue
	case s.capture != nil:
		return hip.ErrIllegalState
	}
	c := &capture{sw: sw, origin: s, mode: mode, thread: threadID()}
	c.join(s)
	sw.captures = append(sw.captures, c)
	return hip.Success
}

func (sw *Software) streamEndCapture(handle uintptr, out *uintptr) hip.Status {
	if st := sw.call("hipStreamEndCapture"); st != hip.Success {
		return st
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	s, st := sw.stream(handle)
	switch {
	case st != hip.Success:
		return st
	case out == nil:
		return hip.ErrInvalidValue
	case s.capture == nil:
		return hip.ErrIllegalState
	}
	c := s.capture
	switch {
	case c.mode != hip.CaptureRelaxed && c.thread != threadID():
		return hip.ErrStreamCaptureWrongThread
	case c.origin != s:
		c.invalid = true
		return hip.ErrStreamCaptureUnmatched
	}
	unjoined := slices.ContainsFunc(c.streams, func(other *stream) bool {
		return other != s && s.after[other] < other.recorded
	})
	c.end()
	*out = 0
	switch {
	case c.invalid:
		return hip.ErrStreamCaptureInvalidated
	case unjoined:
		return hip.ErrStreamCaptureUnjoined
	}
	*out = sw.newHandle()
	sw.graphs[*out] = &graph{ops: c.ops}
	sw.stats.Graphs++
	return hip.Success
}

func (sw *Software) graphDestroy(handle uintptr) hip.Status {
	return destroy(sw, "hipGraphDestroy", sw.graphs, handle, &sw.stats.Graphs)
}

// destroy removes a handle from its table, of which count is the size.
func destroy[T any](sw *Software, call string, table map[uintptr]*T, handle uintptr, count *int) hip.Status {
	if st := sw.call(call); st != hip.Success {
		return st
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	if table[handle] == nil {
		return hip.ErrInvalidValue
	}
	delete(table, handle)
	*count--
	return hip.Success
}

func (sw *Software) graphInstantiate(
	out *uintptr, handle uintptr, errorNode *uintptr, log *byte, n uintptr,
) hip.Status {
	if st := sw.call("hipGraphInstantiate"); st != hip.Success {
		return st
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	g := sw.graphs[handle]
	switch {
	case sw.closed:
		return hip.ErrDeinitialized
	case out == nil || g == nil:
		return hip.ErrInvalidValue
	}
	if errorNode != nil {
		*errorNode = 0
	}
	if log != nil && n > 0 {
		*log = 0
	}
	*out = sw.newHandle()
	sw.execs[*out] = &graphExec{ops: g.ops}
	sw.stats.GraphExecs++
	return hip.Success
}

// graphExecDestroy does not wait: launches that are queued are executed all the same.
func (sw *Software) graphExecDestroy(handle uintptr) hip.Status {
	return destroy(sw, "hipGraphExecDestroy", sw.execs, handle, &sw.stats.GraphExecs)
}

// graphLaunch puts the graph on the stream. A graph never runs twice at a time: a launch waits for the one before it.
func (sw *Software) graphLaunch(exec, handle uintptr) hip.Status {
	late, st := sw.enter("hipGraphLaunch")
	if st != hip.Success {
		return st
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	s, st := sw.stream(handle)
	if st != hip.Success {
		return st
	}
	e := sw.execs[exec]
	if e == nil {
		return hip.ErrInvalidValue
	}
	if st := s.refuseCapture(); st != hip.Success {
		return st
	}
	op := operation{kind: opGraph, late: late, graph: e.ops, wait: e.last, marker: newMarker()}
	st = s.enqueue(op)
	if st == hip.Success {
		e.last = op.marker
	}
	return st
}

// replay executes opGraph.
func (s *stream) replay(op *operation) hip.Status {
	if op.wait != nil {
		if st := s.waitFor(op.wait); st != hip.Success {
			return st
		}
	}
	for i := range op.graph {
		if st := s.execute(&op.graph[i]); st != hip.Success {
			return st
		}
	}
	return hip.Success
}
