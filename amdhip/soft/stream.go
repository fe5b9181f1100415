package soft

import (
	"runtime/debug"
	"sync"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
)

// firstHandle is the number before the first handle of a stream, event and so on. It is not the address of anything,
// and no number that has a meaning in HIP: 0 is the null stream, 1 and 2 are special streams.
const firstHandle = 0x5f00_0000_0000

type opKind uint8

const (
	opMarker opKind = iota // nothing but its marker
	opCopy
	opSet
	opWait
	opFree
	opLaunch
	opGraph
)

// operation is an operation in the queue of a stream.
type operation struct {
	kind     opKind
	at       time.Duration // when it was put there
	late     delayed
	dst, src operand     // src of opCopy only
	links    [2]*link    // that a copy goes over, nil: none
	value    byte        // of opSet
	marker   *marker     // completed when the operation has been executed; may be nil
	wait     *marker     // of opWait, and of opGraph, where it may be nil
	region   *region     // of opFree
	launch   *launched   // of opLaunch
	graph    []operation // of opGraph

	toDev, fromDev *device // that work on dst and src
}

// marker is a point in a stream: what an event records and what synchronization waits for.
type marker struct {
	done chan struct{} // closed when the stream has got there; after that the rest may be read
	time time.Duration // on the model's clock
	err  hip.Status    // the failure of the stream up to there
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
func (m *marker) result() hip.Status {
	<-m.done
	return m.err
}

// stream is a queue and the goroutine that executes it in order. The goroutine ends after streamDestroy, once the queue
// is empty, or when the Software is closed.
type stream struct {
	sw    *Software
	dev   *device
	ended chan struct{} // closed when the goroutine ends
	timer *time.Timer   // of the goroutine

	mu      sync.Mutex
	work    sync.Cond // signalled when an operation comes or the stream is to end
	queue   []operation
	busy    bool // the goroutine has operations that are no longer in queue
	leaving bool // streamDestroy was called
	err     hip.Status

	// end is when the last operation ended, on the model's clock. Only the goroutine uses it. An operation starts at
	// that time even if the goroutine gets to it later, so that delays of the goroutine do not add up.
	end time.Duration

	// capture is the recording that the stream takes part in, nil if it executes its work. recorded counts what it has
	// recorded; after says how many operations of other streams come before what it records next. All three are guarded
	// by Software.mu.
	capture  *capture
	recorded int
	after    map[*stream]int
}

func (sw *Software) streamCreate(out *uintptr, flags uint32) hip.Status {
	if st := sw.call("hipStreamCreateWithFlags"); st != hip.Success {
		return st
	}
	if out == nil || flags > hip.StreamNonBlocking {
		return hip.ErrInvalidValue
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	if sw.closed {
		return hip.ErrDeinitialized
	}
	s := &stream{sw: sw, dev: sw.device(), ended: make(chan struct{})}
	s.work.L = &s.mu
	*out = sw.newHandle()
	sw.streams[*out] = s
	s.dev.streams[s] = struct{}{}
	sw.stats.Streams++
	sw.ended.Go(s.run)
	return hip.Success
}

// stream returns the stream of a handle. A handle that was destroyed or never was a stream gets the answer of HIP 6.
// sw.mu is held.
func (sw *Software) stream(handle uintptr) (*stream, hip.Status) {
	switch s := sw.streams[handle]; {
	case sw.closed:
		return nil, hip.ErrDeinitialized
	case handle == 0:
		return nil, hip.ErrNotSupported
	case s == nil:
		return nil, hip.ErrContextIsDestroyed
	default:
		return s, hip.Success
	}
}

// idleStream is stream for calls that ask about work that was queued: they are refused while the stream records.
func (sw *Software) idleStream(handle uintptr) (*stream, hip.Status) {
	sw.mu.Lock()
	defer sw.mu.Unlock()
	s, st := sw.stream(handle)
	if st == hip.Success {
		st = s.refuseCapture()
	}
	return s, st
}

// streamDestroy waits for the stream's work.
func (sw *Software) streamDestroy(stream uintptr) hip.Status {
	if st := sw.call("hipStreamDestroy"); st != hip.Success {
		return st
	}
	sw.mu.Lock()
	s, st := sw.stream(stream)
	if st != hip.Success {
		sw.mu.Unlock()
		return st
	}
	delete(sw.streams, stream)
	s.spoilCapture()
	s.leave()
	sw.mu.Unlock()

	if sw.opts.Waits != WaitsForNothing {
		<-s.ended
	}
	sw.settle(nil)
	sw.mu.Lock()
	defer sw.mu.Unlock()
	delete(s.dev.streams, s)
	sw.stats.Streams--
	return hip.Success
}

func (sw *Software) streamSynchronize(stream uintptr) hip.Status {
	if st := sw.call("hipStreamSynchronize"); st != hip.Success {
		return st
	}
	s, st := sw.idleStream(stream)
	if st != hip.Success {
		return st
	}
	return s.finish()
}

func (sw *Software) streamQuery(stream uintptr) hip.Status {
	if st := sw.call("hipStreamQuery"); st != hip.Success {
		return st
	}
	s, st := sw.idleStream(stream)
	if st != hip.Success {
		return st
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == hip.Success && (s.busy || len(s.queue) > 0) {
		return hip.ErrNotReady
	}
	return s.err
}

func (sw *Software) deviceSynchronize() hip.Status {
	if st := sw.call("hipDeviceSynchronize"); st != hip.Success {
		return st
	}
	sw.mu.Lock()
	d, st := sw.device(), sw.refuseCaptures()
	sw.mu.Unlock()
	if st != hip.Success {
		return st
	}
	return sw.drain(d)
}

// drain waits for everything that is queued on the streams of d now, and returns the first failure among them.
func (sw *Software) drain(d *device) hip.Status {
	sw.mu.Lock()
	streams := make([]*stream, 0, len(d.streams))
	for s := range d.streams {
		streams = append(streams, s)
	}
	closed := sw.closed
	sw.mu.Unlock()
	if closed {
		return hip.ErrDeinitialized
	}
	first := hip.Success
	for _, s := range streams {
		if st := s.finish(); first == hip.Success {
			first = st
		}
	}
	return first
}

// settle waits for what a call that frees something waits for; its own device is d, nil if that does not matter. How
// the work ended does not matter to who frees.
func (sw *Software) settle(d *device) {
	switch {
	case sw.opts.Waits == WaitsForAll:
		for _, d := range sw.devices {
			_ = sw.drain(d)
		}
	case sw.opts.Waits == WaitsForDevice && d != nil:
		_ = sw.drain(d)
	}
}

// finish waits for everything that is queued now and returns the state of the stream after it.
func (s *stream) finish() hip.Status {
	m := newMarker()
	if s.enqueue(operation{kind: opMarker, marker: m}) == hip.Success {
		return m.result()
	}
	<-s.ended
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// enqueue adds op to the queue.
func (s *stream) enqueue(op operation) hip.Status {
	op.at = s.sw.now()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.leaving {
		return hip.ErrContextIsDestroyed
	}
	s.queue = append(s.queue, op)
	if len(s.queue) == 1 {
		s.work.Signal()
	}
	return hip.Success
}

// leave makes the stream refuse new operations. Its goroutine ends after those that are queued.
func (s *stream) leave() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.leaving = true
	s.work.Signal()
}

// run is the goroutine of the stream.
func (s *stream) run() {
	defer close(s.ended)
	// Host memory belongs to the caller, who may have unmapped it: that must fail a copy, not the process.
	debug.SetPanicOnFault(true)
	s.timer = time.NewTimer(0)
	defer s.timer.Stop()

	var batch []operation
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
func (s *stream) step(op *operation) {
	s.end = max(s.end, op.at)
	if s.err == hip.Success {
		if st := s.execute(op); st != hip.Success {
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

func (s *stream) execute(op *operation) hip.Status {
	if op.late.stall != nil {
		select {
		case <-op.late.stall:
			s.end = max(s.end, s.sw.now())
		case <-s.sw.quit:
		}
	}
	switch {
	case s.stopped():
		return hip.ErrDeinitialized
	case op.late.code != hip.Success:
		return op.late.code
	case op.kind == opCopy:
		return s.count(s.copy(op))
	case op.kind == opSet:
		return s.count(s.set(op))
	case op.kind == opLaunch:
		return s.launch(op.launch)
	case op.kind == opWait:
		return s.waitFor(op.wait)
	case op.kind == opGraph:
		return s.replay(op)
	}
	return hip.Success
}

// count counts an operation whose memory was gone.
func (s *stream) count(st hip.Status) hip.Status {
	if st == hip.ErrIllegalAddress {
		s.sw.stray.Add(1)
	}
	return st
}

// waitFor executes opWait.
func (s *stream) waitFor(m *marker) hip.Status {
	select {
	case <-m.done:
		s.end = max(s.end, m.time)
		return m.err
	case <-s.sw.quit:
		return hip.ErrDeinitialized
	}
}

// stopped reports whether the Software is being closed.
func (s *stream) stopped() bool {
	select {
	case <-s.sw.quit:
		return true
	default:
		return false
	}
}

// sleepUntil returns at time t of the model's clock, up to a millisecond later, or when the Software is closed.
func (s *stream) sleepUntil(t time.Duration) {
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
func (s *stream) wakeAt(t time.Duration) {
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
