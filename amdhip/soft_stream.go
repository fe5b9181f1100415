package amdhip

import (
	"runtime/debug"
	"sync"
	"time"
)

// firstHandle is where the numbers of streams, events and the like start: no address of anything, and none that HIP gives a
// meaning (0 is the null stream, 1 and 2 are special ones).
const firstHandle = 0x5f00_0000_0000

type opKind uint8

const (
	opMarker opKind = iota // nothing but its marker
	opCopy
	opSet
	opWait
	opFree
	opLaunch
)

// softOp is an operation in the queue of a stream.
type softOp struct {
	kind     opKind
	at       time.Duration // when it was put there
	late     delayed
	dst, src operand     // src of opCopy only
	links    [2]*link    // that a copy goes over, nil: none
	value    byte        // of opSet
	marker   *marker     // completed when the operation has been executed; may be nil
	wait     *marker     // of opWait
	region   *region     // of opFree
	launch   *SoftLaunch // of opLaunch
}

// marker is a point in a stream: what an event records and what synchronization waits for.
type marker struct {
	done chan struct{} // closed when the stream has got there; after that the rest may be read
	time time.Duration // on the model's clock
	err  Status        // the failure of the stream up to there
}

func newMarker() *marker { return &marker{done: make(chan struct{})} }

// reached reports whether the stream has got there.
func (m *marker) reached() bool {
	select {
	case <-m.done:
		return true
	default:
		return false
	}
}

// result waits for the marker.
func (m *marker) result() Status {
	<-m.done
	return m.err
}

// softStream is a queue with a goroutine that executes it in order. The goroutine ends after streamDestroy, when the
// queue is empty, or when the Software is closed.
type softStream struct {
	sw    *Software
	dev   *softDevice
	ended chan struct{} // closed when the goroutine ends
	timer *time.Timer   // of the goroutine

	mu      sync.Mutex
	work    sync.Cond // signalled when an operation comes or the stream is to end
	queue   []softOp
	busy    bool // the goroutine has operations that are no longer in queue
	leaving bool // streamDestroy was called
	err     Status

	// end is when the last operation ended on the model's clock. Only the goroutine uses it. Operations start there even
	// if the goroutine got to them later, so what it oversleeps does not add up.
	end time.Duration
}

func (sw *Software) streamCreate(stream *uintptr, flags uint32) Status {
	if st := sw.call("hipStreamCreateWithFlags"); st != Success {
		return st
	}
	if stream == nil || flags > streamNonBlocking {
		return ErrInvalidValue
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	if sw.closed {
		return ErrDeinitialized
	}
	s := &softStream{sw: sw, dev: sw.device(), ended: make(chan struct{})}
	s.work.L = &s.mu
	*stream = sw.newHandle()
	sw.streams[*stream] = s
	s.dev.streams[s] = struct{}{}
	sw.stats.Streams++
	sw.ended.Go(s.run)
	return Success
}

// stream returns the stream of a handle. Destroyed ones and what was never a stream get HIP 6's answer. sw.mu is held.
func (sw *Software) stream(handle uintptr) (*softStream, Status) {
	switch s := sw.streams[handle]; {
	case sw.closed:
		return nil, ErrDeinitialized
	case handle == 0:
		return nil, ErrNotSupported
	case s == nil:
		return nil, ErrContextIsDestroyed
	default:
		return s, Success
	}
}

// streamDestroy waits for the stream's work.
func (sw *Software) streamDestroy(stream uintptr) Status {
	if st := sw.call("hipStreamDestroy"); st != Success {
		return st
	}
	sw.mu.Lock()
	s, st := sw.stream(stream)
	if st != Success {
		sw.mu.Unlock()
		return st
	}
	delete(sw.streams, stream)
	s.leave()
	sw.mu.Unlock()

	<-s.ended
	sw.mu.Lock()
	defer sw.mu.Unlock()
	delete(s.dev.streams, s)
	sw.stats.Streams--
	return Success
}

func (sw *Software) streamSynchronize(stream uintptr) Status {
	if st := sw.call("hipStreamSynchronize"); st != Success {
		return st
	}
	sw.mu.Lock()
	s, st := sw.stream(stream)
	sw.mu.Unlock()
	if st != Success {
		return st
	}
	return s.finish()
}

func (sw *Software) streamQuery(stream uintptr) Status {
	if st := sw.call("hipStreamQuery"); st != Success {
		return st
	}
	sw.mu.Lock()
	s, st := sw.stream(stream)
	sw.mu.Unlock()
	if st != Success {
		return st
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == Success && (s.busy || len(s.queue) > 0) {
		return ErrNotReady
	}
	return s.err
}

func (sw *Software) deviceSynchronize() Status {
	if st := sw.call("hipDeviceSynchronize"); st != Success {
		return st
	}
	sw.mu.Lock()
	d := sw.device()
	sw.mu.Unlock()
	return sw.drain(d)
}

// drain waits for what the streams of d have to do now and returns the first failure among them.
func (sw *Software) drain(d *softDevice) Status {
	sw.mu.Lock()
	streams := make([]*softStream, 0, len(d.streams))
	for s := range d.streams {
		streams = append(streams, s)
	}
	closed := sw.closed
	sw.mu.Unlock()
	if closed {
		return ErrDeinitialized
	}
	first := Success
	for _, s := range streams {
		if st := s.finish(); first == Success {
			first = st
		}
	}
	return first
}

// finish waits for what is in the queue now and returns the state of the stream after it.
func (s *softStream) finish() Status {
	m := newMarker()
	if s.enqueue(softOp{kind: opMarker, marker: m}) == Success {
		return m.result()
	}
	<-s.ended
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// enqueue adds op to the queue.
func (s *softStream) enqueue(op softOp) Status {
	op.at = s.sw.now()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.leaving {
		return ErrContextIsDestroyed
	}
	s.queue = append(s.queue, op)
	if len(s.queue) == 1 {
		s.work.Signal()
	}
	return Success
}

// leave makes the stream refuse new operations and its goroutine end after those that it has.
func (s *softStream) leave() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.leaving = true
	s.work.Signal()
}

// run is the goroutine of the stream.
func (s *softStream) run() {
	defer close(s.ended)
	// Host memory is the caller's, who may have unmapped it: that shall fail a copy, not the process.
	debug.SetPanicOnFault(true)
	s.timer = time.NewTimer(0)
	defer s.timer.Stop()

	var batch []softOp
	for {
		s.mu.Lock()
		s.busy = false
		for len(s.queue) == 0 && !s.leaving {
			s.work.Wait()
		}
		if len(s.queue) == 0 {
			s.mu.Unlock()
			return
		}
		clear(batch) // lets go of the markers and regions in it
		s.queue, batch = batch[:0], s.queue
		s.busy = true
		s.mu.Unlock()
		for i := range batch {
			s.step(&batch[i])
		}
	}
}

// step executes one operation, or skips it when the stream has failed or the Software is being closed.
func (s *softStream) step(op *softOp) {
	s.end = max(s.end, op.at)
	if s.err == Success {
		if st := s.execute(op); st != Success {
			s.mu.Lock()
			s.err = st
			s.mu.Unlock()
		}
	}
	if op.kind == opFree { // of a failed stream, too: nobody else can free it any more
		s.sw.mu.Lock()
		s.sw.remove(op.region)
		s.sw.mu.Unlock()
		s.sw.release(op.region.block)
	}
	if op.marker != nil {
		op.marker.time, op.marker.err = s.end, s.err
		close(op.marker.done)
	}
}

func (s *softStream) execute(op *softOp) Status {
	if op.late.stall != nil {
		select {
		case <-op.late.stall:
			s.end = max(s.end, s.sw.now())
		case <-s.sw.quit:
		}
	}
	switch {
	case s.stopped():
		return ErrDeinitialized
	case op.late.code != Success:
		return op.late.code
	case op.kind == opCopy:
		return s.copy(op)
	case op.kind == opSet:
		return s.set(op)
	case op.kind == opLaunch:
		return s.launch(op.launch)
	case op.kind == opWait:
		select {
		case <-op.wait.done:
			s.end = max(s.end, op.wait.time)
			return op.wait.err
		case <-s.sw.quit:
			return ErrDeinitialized
		}
	}
	return Success
}

// stopped reports whether the Software is being closed.
func (s *softStream) stopped() bool {
	select {
	case <-s.sw.quit:
		return true
	default:
		return false
	}
}

// sleepUntil returns at time t of the model's clock, up to a millisecond later, or when the Software is closed.
func (s *softStream) sleepUntil(t time.Duration) {
	d := t - s.sw.now()
	if d <= 0 {
		return
	}
	s.timer.Reset(d)
	select {
	case <-s.timer.C:
	case <-s.sw.quit:
	}
}

// wakeAt is sleepUntil, but more precise where Go's timers are coarse for a fast link.
func (s *softStream) wakeAt(t time.Duration) {
	if maxNap > 0 && !s.sw.otherClock.Load() {
		s.sleepUntil(t - maxNap)
		for before := s.sw.now(); before < t && !s.stopped(); {
			nap(t - before)
			after := s.sw.now()
			if after == before { // the clock is that of testing/synctest, which only timers move
				s.sw.otherClock.Store(true)
				break
			}
			before = after
		}
	}
	s.sleepUntil(t)
}
