package loader

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels"
	"github.com/gguf2gpu/gguf2gpu/kernels/gpu"
	"github.com/gguf2gpu/gguf2gpu/pinned"
)

// Load puts the tensors of m on dev and returns when all of them have arrived. On an error, or when ctx ends before that,
// nothing is left on the device. Errors: what withDefaults refuses, *InsufficientMemoryError, *TensorError, *amdhip.Error,
// *gguf.FormatError for a file that changes while it is read, ErrStalled, and the cause of ctx's end.
func Load(ctx context.Context, dev *amdhip.Device, m *gguf.Model, o Options) (*Model, error) {
	w, err := Start(ctx, dev, m, o)
	if err != nil {
		return nil, err
	}
	<-w.finished // not ctx: what is in flight must be over first
	if w.err != nil {
		return nil, errors.Join(w.err, w.Close())
	}
	return w, nil
}

// Start begins to put the tensors of m on dev and returns once device memory is allocated; tensors then arrive in the order
// of the file. See [Model.Wait] and [Model.WaitStream]. The load ends early when ctx does. m must stay open until the load
// has ended.
func Start(ctx context.Context, dev *amdhip.Device, m *gguf.Model, o Options) (*Model, error) {
	began := time.Now()
	w, conv, err := prepare(ctx, dev, m, o)
	if err != nil {
		return nil, err
	}
	p := newPipeline(w, conv, began)
	if err := p.open(); err != nil {
		return nil, errors.Join(err, p.close(), w.free())
	}
	ctx, w.cancel = context.WithCancelCause(ctx)
	go p.run(ctx)
	return w, nil
}

// pipeline is a load that is running.
//
// Each worker takes a free staging buffer, then the next chunk in file order, fills the one with the other, and enqueues the
// copy on one of the streams. The pool's reaper sees the copy's end, frees the buffer and calls staged.Done. On a device
// that shares the host's memory there are no buffers and no copies: see way.
type pipeline struct {
	model   *Model
	copies  []*Model // of the same plan, on other devices, which get the same bytes
	opts    Options
	ker     *kernels.Kernels
	sets    []*gpu.Set // what the device of the model, and those of copies, convert with; nil: they do not
	began   time.Time
	label   string // what its tracks in a trace begin with
	team    *team  // nil: it is alone
	way     way
	src     *source
	workers []*worker
	runs    []int // the chunks at which runs begin, if each is for one worker: with Options.Hash, and of remote models
	gate    gate  // for workers

	ctx    context.Context
	cancel context.CancelCauseFunc // the first call's error is the load's

	expandFailed atomic.Bool // something failed on the device while it was to convert

	next     atomic.Int64  // chunk, or run, to be taken
	arrived  atomic.Int64  // chunks
	bytes    atomic.Int64  // uploaded
	total    int64         // to be uploaded
	flying   atomic.Int64  // copies enqueued and not yet ended
	unpinned atomic.Int64  // copies from memory that is not pinned
	last     chan struct{} // closed when the last chunk has arrived
}

func newPipeline(w *Model, conv converters, began time.Time) *pipeline {
	p := &pipeline{model: w, opts: w.plan.opts, ker: conv.cpu, began: began}
	if conv.gpu != nil {
		p.sets = []*gpu.Set{conv.gpu}
	}
	return p
}

// models are the model and its copies.
func (p *pipeline) models() []*Model { return append([]*Model{p.model}, p.copies...) }

// open makes what the pipeline works with.
func (p *pipeline) open() error {
	w := p.model
	if w.dev.Integrated() && p.sets == nil && p.copies == nil && !p.opts.exported {
		p.way = &shared{p: p}
	} else {
		s, err := newStaged(p)
		if err != nil {
			return err
		}
		p.way = s
	}
	w.chunks = w.plan.cut(p.way.chunkBytes(), p.opts.Threads, true)
	for _, w := range p.models() {
		w.ready.set(len(w.plan.Tensors), p.model.chunks)
		w.issued.set(len(w.plan.Tensors), p.model.chunks)
	}
	p.last, p.total = make(chan struct{}), 0
	for i := range w.chunks {
		p.total += int64(w.chunks[i].bytes)
	}
	src, err := newSource(w.plan, w.chunks)
	if err != nil {
		return err
	}
	p.src = src
	remote := w.plan.model.Remote()
	switch {
	case p.opts.Hash:
		p.runs = runs(w.chunks)
	case remote:
		p.runs = src.requests(w.chunks)
	}
	workers := min(p.opts.Threads, max(1, len(w.chunks)))
	if remote {
		workers = min(p.opts.Connections, max(1, len(p.runs)))
	}
	for i := range workers {
		p.workers = append(p.workers, newWorker(p, i))
	}
	for i, w := range p.models() {
		w.mu.Lock()
		w.streams = p.way.streams(i)
		r := &w.report
		r.Streams, r.ChunkBytes, r.Threads = len(w.streams), p.way.chunkBytes(), min(p.opts.Threads, len(p.workers))
		if remote {
			r.Connections = workers
		}
		r.Expanded, r.ScratchBytes = w.plan.expanded(), p.way.scratchBytes()
		w.mu.Unlock()
	}
	return nil
}

// close gives back what open made, and the device's kernels. Nothing may be on its way.
func (p *pipeline) close() error {
	var errs []error
	if p.src != nil {
		p.src.close()
	}
	if p.way != nil {
		errs = append(errs, p.way.close())
	}
	for _, set := range p.sets {
		errs = append(errs, set.Close())
	}
	p.src, p.way, p.workers, p.runs, p.sets = nil, nil, nil, nil, nil
	return errors.Join(errs...)
}

// run drives the load to its end, good or bad. It is the one goroutine that ends it.
func (p *pipeline) run(ctx context.Context) {
	transfer, stuck, err := p.transfer(ctx)
	if err != nil && !stuck && p.expandFailed.Load() && p.opts.Dequant == DequantAuto && ctx.Err() == nil {
		p.opts.Logger.Warn("the device failed to convert, the CPU does it", "error", err)
		if err = p.startOver(); err == nil {
			transfer, stuck, err = p.transfer(ctx)
		}
	}
	var sum Report
	sum.UploadBytes, sum.UnpinnedCopies, sum.Transfer = uint64(p.bytes.Load()), p.unpinned.Load(), transfer
	if p.way != nil {
		stats := p.way.stats()
		sum.PinnedBytes, sum.Pin, sum.PinTotal = stats.PinnedBytes, stats.FirstPin, stats.TotalPin
	}
	if p.src != nil {
		sum.MappedBytes, sum.DirectBytes = uint64(p.src.mapped.Load()), uint64(p.src.direct.Load())
		sum.FetchedBytes, sum.RemoteBytes = uint64(p.src.fetched.Load()), uint64(p.src.remote.Load())
	}
	for _, w := range p.models() { // nobody may be using the streams when they are closed
		w.mu.Lock()
	}
	if stuck {
		p.way.abandon()
	} else {
		err = errors.Join(err, p.close())
	}
	for _, w := range p.models() {
		w.stuck.Store(stuck)
		w.streams, w.err = nil, err
		w.mu.Unlock()
	}
	if p.team != nil {
		err = p.team.outcome(p, err)
	}
	for _, w := range p.models() {
		w.end(&sum, err, p.began)
	}
}

// end marks the load as ended. After an error it frees the memory, if the device is at rest.
func (w *Model) end(sum *Report, err error, began time.Time) {
	w.mu.Lock()
	r := &w.report
	r.UploadBytes, r.UnpinnedCopies, r.Transfer = sum.UploadBytes, sum.UnpinnedCopies, sum.Transfer
	r.PinnedBytes, r.Pin, r.PinTotal = sum.PinnedBytes, sum.Pin, sum.PinTotal
	r.MappedBytes, r.DirectBytes, r.FetchedBytes, r.RemoteBytes = sum.MappedBytes, sum.DirectBytes, sum.FetchedBytes, sum.RemoteBytes
	r.Total = time.Since(began)
	w.err = err
	if err != nil && !w.stuck.Load() && !w.plan.opts.exported { // a Holder frees when nobody has it mapped any more
		w.err = errors.Join(err, w.free())
	}
	w.mu.Unlock()
	w.cancel(nil)
	close(w.finished)
}

// startOver prepares for another attempt, in which the CPU converts. Tensors that have arrived are written again, with the same
// bytes.
func (p *pipeline) startOver() error {
	if err := p.close(); err != nil {
		return err
	}
	plan := p.model.plan
	for i := range plan.Tensors {
		plan.Tensors[i].expand = false
	}
	p.next.Store(0)
	p.arrived.Store(0)
	p.bytes.Store(0)
	p.flying.Store(0)
	return p.open()
}

// transfer is one attempt to get everything to the device. With stuck it has ended while the device or a worker goes on.
func (p *pipeline) transfer(ctx context.Context) (took time.Duration, stuck bool, err error) {
	p.ctx, p.cancel = context.WithCancelCause(ctx)
	start := time.Now()
	p.gate.open()
	for _, wk := range p.workers {
		p.gate.enter(wk)
		go func() {
			wk.run()
			p.gate.leave(wk)
			if p.team != nil {
				p.team.help(wk)
			}
		}()
	}
	watch := make(chan struct{})
	go p.watch(watch, p.src)

	if len(p.model.chunks) == 0 {
		close(p.last)
	}
	select {
	case <-p.last:
	case <-p.ctx.Done():
	}
	took = time.Since(start)
	close(watch)
	err = context.Cause(p.ctx) // before the regular end is marked by cancelling, too
	select {
	case <-p.last:
		err = nil // a cancellation that came after the last chunk changes nothing
	default:
	}
	p.cancel(nil)
	return took, !p.settle(p.gate.close()), err
}

// settle waits until no worker and no copy is under way. It is false when that does not come about within Options.Stall:
// then the device may still use the staging buffers and the model's memory.
func (p *pipeline) settle(idle <-chan struct{}) bool {
	deadline := time.Now().Add(p.opts.Stall)
	select {
	case <-idle:
	case <-time.After(p.opts.Stall):
		return false
	}
	return p.way.idle(deadline)
}

// arrive counts a chunk that is on the device. Calls do not overlap.
func (p *pipeline) arrive(c *chunk) {
	p.model.ready.pass(c)
	for _, w := range p.copies {
		w.ready.pass(c)
	}
	sum := p.bytes.Add(int64(c.bytes))
	if p.opts.Progress != nil {
		p.opts.Progress(sum, p.total)
	}
	if p.arrived.Add(1) == int64(len(p.model.chunks)) {
		close(p.last)
	}
}

// name is that of the first tensor in c.
func (p *pipeline) name(c *chunk) string { return p.model.plan.Tensors[c.segs[0].tensor].Name }

// stage is what a worker does to c.
func (p *pipeline) stage(c *chunk) string {
	if t := &p.model.plan.Tensors[c.segs[0].tensor]; t.Target == t.Type || c.expand {
		return "stage"
	}
	return "dequantize"
}

// chunkError says that the copy of c, or what came with it on its stream, failed.
func (p *pipeline) chunkError(c *chunk, err error) error {
	if p.sets != nil {
		p.expandFailed.Store(true)
	}
	op := "copy"
	if c.expand {
		op = "expand"
	}
	return &TensorError{Tensor: p.name(c), Op: op, Offset: int64(p.model.plan.tensorOffset(&c.segs[0])), Bytes: c.bytes, Err: err}
}

// watch gives up on a load that makes no progress, and warns before that. It ends when stop is closed.
func (p *pipeline) watch(stop <-chan struct{}, src *source) {
	tick := time.NewTicker(max(p.opts.Stall/12, time.Millisecond))
	defer tick.Stop()
	var seen int64
	since, warned := time.Now(), false
	for {
		select {
		case <-stop:
			return
		case now := <-tick.C:
			if n := p.arrived.Load() + p.next.Load() + src.remote.Load(); n != seen {
				seen, since, warned = n, now, false
				continue
			}
			still := now.Sub(since)
			if still >= p.opts.Stall {
				p.cancel(fmt.Errorf("%w for %v: %s", ErrStalled, still.Round(time.Millisecond), p.waitsFor()))
				return
			}
			if still >= p.opts.Stall/3 && !warned {
				p.opts.Logger.Warn("the load makes no progress", "for", still.Round(time.Millisecond), "waiting", p.waitsFor())
				warned = true
			}
		}
	}
}

// waitsFor says what a load that stands still is waiting for, and why that may be.
func (p *pipeline) waitsFor() string {
	if i := p.gate.filling(); i >= 0 {
		return fmt.Sprintf("file read of tensor %q: a slow or lost disk, network file system or server", p.name(&p.model.chunks[i]))
	}
	if n := p.flying.Load(); n > 0 {
		return fmt.Sprintf("%d copies in flight, the first for tensor %q: the device or its driver hangs (see the kernel's log)",
			n, p.firstMissing())
	}
	return "pinning host memory: the driver hangs or the host is out of memory"
}

// firstMissing is the name of the first tensor that is not on the device yet.
func (p *pipeline) firstMissing() string {
	for i := range p.model.ready.left {
		if p.model.ready.left[i].Load() > 0 {
			return p.model.plan.Tensors[i].Name
		}
	}
	return ""
}

// worker fills staging buffers.
type worker struct {
	p       *pipeline
	track   string
	read    *reader
	fill    filler
	buf     *pinned.Buffer // when the way is staged: the one being filled
	filling atomic.Int64   // chunk that is being read, -1: none
	after   int            // of a run: the chunk that is next
	end     int            // of a run
}

func newWorker(p *pipeline, i int) *worker {
	wk := &worker{p: p, track: fmt.Sprintf("%sworker %d", p.label, i)}
	wk.fill = filler{plan: p.model.plan, ker: p.ker, around: p.way.uncached()}
	wk.fill.inspect = newInspector(p.model.plan, p.model.sums)
	wk.read = newReader(p.src, &wk.fill, fmt.Sprintf("%sreader %d", p.label, i))
	wk.filling.Store(-1)
	return wk
}

// run works until there is no chunk left or the load's context ends.
func (wk *worker) run() {
	p := wk.p
	defer wk.read.close()
	for {
		t0 := wk.now()
		if err := p.way.take(wk); err != nil {
			p.cancel(err) // without effect when it is the context's own cause
			return
		}
		i := wk.take()
		if i >= len(p.model.chunks) {
			p.way.untake(wk)
			return
		}
		c := &p.model.chunks[i]
		t1 := wk.now()
		wk.filling.Store(int64(i))
		wk.fill.begin(p.way.room(wk, c), c.expand)
		err := wk.read.read(p.ctx, c.segs)
		wk.filling.Store(-1)
		if err != nil {
			p.way.untake(wk)
			p.cancel(err)
			return
		}
		t2 := wk.now()
		if err := p.way.deliver(wk, i, c); err != nil {
			p.cancel(p.chunkError(c, err))
			return
		}
		if p.opts.Trace != nil {
			p.opts.Trace.add(wk.track, "wait", t0, t1, p.name(c), c.bytes)
			p.opts.Trace.add(wk.track, p.stage(c), t1, t2, p.name(c), c.bytes)
			p.opts.Trace.add(wk.track, "issue", t2, time.Now(), p.name(c), c.bytes)
		}
	}
}

// now is the time when a trace wants it.
func (wk *worker) now() (t time.Time) {
	if wk.p.opts.Trace != nil {
		t = time.Now()
	}
	return t
}

// filler turns the file's bytes of a chunk's segments into what the device gets.
type filler struct {
	plan    *Plan
	ker     *kernels.Kernels
	inspect *inspector
	around  bool // write around the caches
	expand  bool // the device converts: blocks are copied as they are
	buf     []byte
	end     int // of what has been filled
	short   shortRuns
}

// begin starts a new chunk that buf is to hold.
func (f *filler) begin(buf []byte, expand bool) {
	f.buf, f.end, f.expand = buf, 0, expand
	f.short.bytes = f.short.bytes[:0]
}

// place returns where a segment goes, and clears the padding before it. Segments are to be placed in order.
func (f *filler) place(s *segment) []byte {
	clear(f.buf[f.end:s.dst])
	f.end = s.dst + s.dstBytes
	return f.buf[s.dst:f.end]
}

// pieceBytes is how much is copied, converted or looked at in one go: little enough to be in the cache still when the next thing
// is done with it. Besides, copies of 1 MiB and more write around the caches, and the device then has to fetch from memory what
// it could have had from a cache.
const pieceBytes = 256 << 10

// from puts a segment in its place, src being its bytes in the file.
func (f *filler) from(s *segment, src []byte) error {
	t := &f.plan.Tensors[s.tensor]
	in := t.Type.BlockBytes()
	out := s.dstBytes / (s.srcBytes / in) // of a block, too
	most := pieceBytes / max(in, out)
	if t.comb != nil && t.Target != t.Type && !f.expand && len(src) <= most*in/2 {
		return f.collect(s, src, most*in)
	}
	if err := f.flush(); err != nil {
		return err
	}
	return f.pieces(s, s.src, f.place(s), src)
}

// pieces turns src, which begins at byte at of the tensor of s, into dst.
func (f *filler) pieces(s *segment, at int64, dst, src []byte) error {
	in := f.plan.Tensors[s.tensor].Type.BlockBytes()
	out := s.dstBytes / (s.srcBytes / in) // of a block, too
	most := pieceBytes / max(in, out)
	for len(src) > 0 {
		n := min(len(src)/in, most)
		if err := f.piece(s.tensor, at, dst[:n*out], src[:n*in]); err != nil {
			return err
		}
		dst, src, at = dst[n*out:], src[n*in:], at+int64(n*in)
	}
	return nil
}

// piece turns src, which begins at byte at of a tensor, into dst.
func (f *filler) piece(tensor int, at int64, dst, src []byte) error {
	t := &f.plan.Tensors[tensor]
	if t.Target == t.Type || f.expand {
		kernels.Copy(dst, src)
		return f.inspect.see(tensor, at, dst)
	}
	if err := f.inspect.see(tensor, at, src); err != nil {
		return err
	}
	dequantize := f.ker.Dequantize
	if f.around {
		dequantize = f.ker.DequantizeNT
	}
	if err := dequantize(dst, t.Target, src, t.Type); err != nil {
		return &TensorError{Tensor: t.Name, Op: "dequantize", Offset: at, Bytes: len(src), Err: err}
	}
	return nil
}
