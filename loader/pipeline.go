package loader

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/internal/watch"
	"github.com/gguf2gpu/gguf2gpu/loader/internal/read"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// pipeline loads one group: the devices that get the same bytes.
//
// Each worker acquires a free staging buffer, then takes the next chunk in file order, fills the one with the other,
// and submits the copy to one of the streams. The pool sees the copy's end, frees the buffer and calls staged.Done. On
// a device that shares the host's memory there are no buffers and no copies: see transport.
type pipeline struct {
	loader  *Loader
	model   *Model
	part    *part
	plan    *Plan
	file    *gguf.File // nil: the plan is loaded from an Image
	request Request
	sizes   sizes
	expand  []bool // by tensor: the devices convert it; nil: none
	proof   *proof // nil: nothing is proved
	round   *round // of proof, of this attempt; nil without one

	unexpand bool        // the device has failed to convert
	kernels  []kernelSet // that they convert with, by device of the group
	skip     []bool      // by tensor: it has arrived in an earlier attempt; nil: none has
	kept     int         // how many of these the devices converted
	began    time.Time
	label    string // what its tracks in a trace begin with
	team     *team

	stage     *stage // nil: nothing is staged
	transport transport
	chunks    []plan.Chunk
	src       *read.Source
	workers   []*worker
	runs      []int // the chunks at which runs begin, if each run is for one worker: with Hash, and of remote models
	gate      gate  // for workers
	opened    bool  // the gate has been opened before

	ctx    context.Context
	cancel context.CancelCauseFunc // the first call's error is the load's

	failed      atomic.Bool   // a copy, or what came with it, has failed
	next        atomic.Int64  // chunk, or run, to be taken
	arrived     atomic.Int64  // chunks
	uploaded    atomic.Uint64 // bytes, to each device
	delivered   atomic.Int64  // bytes of tensors that have arrived
	flying      atomic.Int64  // copies enqueued and not yet ended
	unpinned    atomic.Int64  // copies from memory that is not pinned
	last        chan struct{} // closed when the last chunk has arrived
	groupReport groupReport   // of the attempts so far
}

// groupReport is what one pipeline adds to the report.
type groupReport struct {
	devices                                        []int
	read                                           read.Stats
	image                                          uint64 // bytes that came from an Image
	upload                                         uint64 // to each device
	scratch                                        uint64 // of each device
	expanded, streams, threads, connections, chunk int
	pinned, unpinned                               int64
	pin, pinTotal, transfer, prove                 time.Duration
	provedTensors                                  int
	provedBytes                                    uint64 // of all devices
}

// open makes what the pipeline works with.
func (p *pipeline) open(ctx context.Context) error {
	group := p.part.group
	p.last = make(chan struct{})
	chunkBytes := p.sizes.chunk
	if dev := p.part.on[0].device; dev.Integrated() && p.expand == nil && len(p.part.on) == 1 && !p.model.share {
		p.transport = &shared{p: p}
	} else if len(group.Tensors) > 0 {
		started := time.Now()
		s, err := p.loader.takeStage(ctx, p.team.limit, p.part.devices(), p.sizes, p.request.Trace != nil)
		if err != nil {
			return err
		}
		p.stage = s
		if p.plan.image == nil {
			p.transport = &staged{p: p, stage: s}
		} else if p.transport, err = newImaged(ctx, p.team.limit, p, s, p.plan.image); err != nil {
			p.transport = nil
			return err
		}
		chunkBytes = s.chunkBytes(p.sizes)
		p.groupReport.pin += time.Since(started)
	} else {
		p.transport = &shared{p: p} // there is nothing to transport
	}
	cut := chunkBytes
	if p.stage != nil && p.readsInPlace(chunkBytes) {
		cut -= pageBytes // so that a chunk can begin anywhere in the first page of its buffer
	}
	p.chunks = group.Cut(plan.CutOptions{
		Bytes: cut, Ramp: p.sizes.threads, Expand: p.expand, Skip: p.skip, Ordered: p.request.hashInOrder(),
	})
	if p.proof != nil {
		var err error
		p.round, err = p.proof.begin(ctx, p.team.limit, p.chunks)
		if errors.Is(err, ErrInsufficientMemory) && p.request.Prove == ProveAuto {
			p.unprove(err)
		} else if err != nil {
			return err
		}
	}
	p.part.ready.expect(p.chunks)
	p.part.issued.expect(p.chunks)
	if p.plan.image == nil {
		src, err := read.Open(p.file, group, p.chunks, read.Options{
			Mode: read.Mode(p.loader.config.IO), Threads: p.sizes.converters, Connections: p.sizes.readers,
			Trace: p.request.Trace, ReadAt: p.loader.config.readAt, Fallback: p.team.fellBack,
		})
		if err != nil {
			return fmt.Errorf("loader: %w", err)
		}
		p.src = src
	}
	switch {
	case p.request.hashInOrder():
		p.runs = hashRuns(p.chunks)
	case p.plan.remote():
		p.runs = p.src.Requests(p.chunks)
	}
	workers := min(p.sizes.threads, len(p.chunks))
	switch {
	case p.team.turns:
		workers = p.sizes.connections
	case p.plan.remote():
		workers = min(p.sizes.connections, len(p.runs))
	}
	for i := range workers {
		p.workers = append(p.workers, newWorker(p, i))
	}
	p.model.setStreams(p.part, p.transport.streams)
	r := &p.groupReport
	r.devices = group.Devices
	r.streams, r.threads, r.chunk = len(p.transport.streams(0)), min(p.sizes.threads, workers), chunkBytes
	if p.plan.remote() {
		r.connections = workers
	}
	r.expanded = count(p.expand) + p.kept
	if p.stage != nil {
		r.scratch = p.stage.scratchBytes()
	}
	return nil
}

// readsInPlace reports whether most bytes may be read straight into staging memory, so that chunks are worth shifting.
func (p *pipeline) readsInPlace(chunk int) bool {
	return p.plan.image == nil && p.loader.config.IO != IOMapped && !p.file.Remote() && chunk >= largeChunk &&
		!mostlyConverted(p.part.group, p.expand)
}

// largeChunk is the size of a chunk that is not missed when a page of it stays free.
const largeChunk = 1 << 20

// close gives back what open made. Nothing of this load may be on its way, unless it is stuck.
func (p *pipeline) close(limit *watch.Limit, stuck bool) error {
	if p.src != nil {
		p.groupReport.read = add(p.groupReport.read, p.src.Stats())
	}
	if p.src != nil && !stuck { // else a worker may be reading
		p.src.Close()
	}
	if p.plan.image != nil {
		p.groupReport.image = p.part.group.ReadBytes
	}
	var err error
	if p.transport != nil {
		err = p.transport.close(limit, stuck)
	}
	if p.stage != nil {
		if p.stage.pool != nil {
			stats := p.stage.pool.Stats()
			p.groupReport.pinned, p.groupReport.pinTotal = stats.PinnedBytes, stats.TotalPin
		}
		err = errors.Join(err, p.loader.giveBack(limit, p.stage, p.failed.Load(), stuck))
	}
	if !stuck { // else a worker that a call holds up may look at them much later
		p.src, p.stage, p.transport, p.workers, p.runs = nil, nil, nil, nil, nil
	}
	return err
}

func add(a, b read.Stats) read.Stats {
	return read.Stats{
		Mapped: a.Mapped + b.Mapped, Direct: a.Direct + b.Direct, Plain: a.Plain + b.Plain, Remote: a.Remote + b.Remote,
		Fetched: a.Fetched + b.Fetched,
	}
}

// run drives the load of the group to its end, good or bad. It is the one goroutine that ends it.
func (p *pipeline) run(ctx context.Context) {
	stuck, err := p.transfer(ctx)
	for err != nil && !stuck && p.failed.Load() && ctx.Err() == nil && p.doesWithout(err) {
		if err = p.startOver(ctx); err == nil {
			stuck, err = p.transfer(ctx)
		}
	}
	if err == nil && p.proof != nil {
		start := time.Now()
		stuck, err = p.groupReport.proving(ctx, p.team.limit, p.model, p.proof)
		if p.request.Trace != nil {
			p.request.Trace.Add(p.label+"proof", "compare", start, time.Now(), "", sumSize*p.round.slots)
		}
	}
	p.groupReport.upload, p.groupReport.unpinned = p.uploaded.Load(), p.unpinned.Load()
	if !p.model.noStreams(p.part, p.team.limit) { // nobody may be using the streams when they are closed
		stuck = true
	}
	err = errors.Join(err, p.proof.close(p.team.limit, err != nil, stuck), p.close(p.team.limit, stuck))
	p.team.ended(p, err, stuck)
}

// doesWithout decides what another attempt does without, after a device has failed at something that it need not do: to
// convert, or to compute fingerprints. False: there is nothing of the kind.
func (p *pipeline) doesWithout(err error) bool {
	c := &p.loader.config
	_, unsummed := errors.AsType[*unsummed](err)
	switch {
	case unsummed && p.proof != nil && p.request.Prove == ProveAuto:
		c.Logger.Warn("the device failed to compute fingerprints, the load is not proved", "error", err)
		p.unprove(err)
	case p.expand != nil && c.Dequant == DequantAuto:
		c.Logger.Warn("the device failed to convert, the CPU does it", "error", err)
		p.unexpand = true
	default:
		return false
	}
	return true
}

// unprove gives up proving what the group gets. What an attempt has enqueued has ended.
func (p *pipeline) unprove(why error) {
	if err := p.proof.close(p.team.limit, true, false); err != nil {
		p.loader.config.Logger.Warn("freeing memory of fingerprints failed", "error", err)
	}
	p.proof, p.round = nil, nil
	p.model.unprove(why)
}

// startOver prepares for another attempt. Tensors that have been reported as ready stay as they are: somebody may be
// using them.
func (p *pipeline) startOver(ctx context.Context) error {
	if !p.model.noStreams(p.part, p.team.limit) {
		return fmt.Errorf("%w: another stream is being made to wait for those of the load", ErrStalled)
	}
	if err := p.close(p.team.limit, false); err != nil {
		return err
	}
	group := p.part.group
	p.skip = make([]bool, len(group.Tensors))
	var have int64
	for i := range p.skip {
		if p.skip[i] = p.part.ready.has(i); p.skip[i] {
			have += int64(group.Tensors[i].Bytes)
			if p.unexpand && p.expand != nil && p.expand[i] {
				p.kept++
			}
		}
	}
	p.proof.keep(p.skip)
	if p.unexpand {
		p.expand, p.kernels = nil, nil
	}
	expand := make([][]bool, len(p.plan.Groups))
	expand[p.part.index] = p.expand
	all, err := p.plan.sizes(p.loader.config, expand)
	if err != nil {
		return err
	}
	p.sizes = all[p.part.index]
	p.failed.Store(false)
	p.next.Store(0)
	p.arrived.Store(0)
	p.delivered.Store(have)
	p.groupReport.pin = 0
	return p.open(ctx)
}

// transfer is one attempt to get everything to the devices. With stuck it has ended while a device or a worker goes on.
func (p *pipeline) transfer(ctx context.Context) (stuck bool, err error) {
	p.ctx, p.cancel = context.WithCancelCause(ctx)
	start := time.Now()
	p.gate.open()
	if !p.opened && p.team.turns {
		p.opened = true
		p.team.opened.Done()
	}
	for _, wk := range p.workers {
		if p.team.turns {
			go p.team.roam(wk)
			continue
		}
		p.gate.enter(wk)
		go func() {
			wk.run()
			p.gate.leave(wk)
			p.team.help(wk)
		}()
	}
	watch := make(chan struct{})
	go p.watch(watch, p.src)

	if len(p.chunks) == 0 {
		close(p.last)
	}
	select {
	case <-p.last:
	case <-p.ctx.Done():
	}
	p.groupReport.transfer += time.Since(start)
	close(watch)
	err = context.Cause(p.ctx) // before the regular end is marked by cancelling, too
	select {
	case <-p.last:
		err = nil // a cancellation that came after the last chunk changes nothing
	default:
	}
	p.cancel(nil)
	if errors.Is(err, ErrStalled) || p.loader.calls.Hanging() { // it has had its time
		p.team.limit.Spend()
	}
	return !p.settle(p.gate.close()), err
}

// settle waits until no worker, no copy and no sum is under way. It is false when that does not come about in time:
// then a device may still use the staging buffers and the model's memory.
func (p *pipeline) settle(idle <-chan struct{}) bool {
	limit := p.team.limit
	if _, ended := limit.Free("waiting for workers", func() error { <-idle; return nil }); !ended {
		return false
	}
	return atRest(limit, p.transport.idle) && atRest(limit, p.proof.idle)
}

// arrive counts a chunk that is on the devices. Calls do not overlap.
func (p *pipeline) arrive(c *plan.Chunk) {
	p.uploaded.Add(uint64(c.Bytes))
	delivered := p.delivered.Add(int64(c.Delivered))
	p.team.progress(p, delivered)
	p.part.ready.pass(c)
	if p.arrived.Add(1) == int64(len(p.chunks)) {
		close(p.last)
	}
}

// name is that of the first tensor in c.
func (p *pipeline) name(c *plan.Chunk) string { return p.part.group.Tensors[c.Segs[0].Tensor].Name }

// what a worker does to c, in a trace.
func (p *pipeline) stageName(c *plan.Chunk) string {
	if t := &p.part.group.Tensors[c.Segs[0].Tensor]; t.Target == t.Type || c.Expand {
		return "stage"
	}
	return "dequantize"
}

// chunkError says that the copy of c, or what came with it on its stream, failed.
func (p *pipeline) chunkError(c *plan.Chunk, err error) error {
	p.failed.Store(true)
	op := "copy"
	if c.Expand {
		op = "expand"
	}
	return &TensorError{
		Tensor: p.name(c), Op: opOf(op, err), Offset: int64(p.part.group.TensorOffset(&c.Segs[0])), Bytes: c.Bytes, Err: err,
	}
}

// watch gives up on a load that makes no progress, and warns before that. It ends when stop is closed.
func (p *pipeline) watch(stop <-chan struct{}, src *read.Source) {
	stall := p.loader.config.Stall
	tick := time.NewTicker(min(max(stall/12, time.Millisecond), watch.Moment/2))
	defer tick.Stop()
	var seen int64
	since, warned := time.Now(), false
	for {
		select {
		case <-stop:
			return
		case now := <-tick.C:
			n := p.arrived.Load() + p.next.Load()
			if src != nil {
				n += src.Stats().Remote
			}
			if n != seen || p.awaitsTurn() {
				seen, since, warned = n, now, false
				continue
			}
			still := now.Sub(since)
			if still >= stall {
				p.cancel(fmt.Errorf("%w for %v: %s", ErrStalled, still.Round(time.Millisecond), p.waitsFor()))
				return
			}
			if still >= stall/3 && !warned {
				p.loader.config.Logger.Warn("the load makes no progress", "for", still.Round(time.Millisecond), "waiting", p.waitsFor())
				warned = true
			}
		}
	}
}

// waitsFor says what a load that stands still is waiting for, and why that may be.
func (p *pipeline) waitsFor() string {
	if i := p.gate.filling(); i >= 0 {
		return fmt.Sprintf("file read of tensor %q: a slow or lost disk, network file system or server", p.name(&p.chunks[i]))
	}
	if n := p.flying.Load(); n > 0 {
		return fmt.Sprintf("%d copies in flight, the first for tensor %q: the device or its driver hangs (see the kernel's log)",
			n, p.firstMissing())
	}
	return "pinning host memory: the driver hangs or the host is out of memory"
}

// firstMissing is the name of the first tensor that is not on the devices yet.
func (p *pipeline) firstMissing() string {
	for i := range p.part.group.Tensors {
		if !p.part.ready.has(i) {
			return p.part.group.Tensors[i].Name
		}
	}
	return ""
}
