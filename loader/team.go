package loader

import (
	"context"
	"errors"
	"slices"
	"sync"

	"github.com/gguf2gpu/gguf2gpu/internal/watch"
	"github.com/gguf2gpu/gguf2gpu/loader/internal/read"
)

// team is the pipelines of one load, one for each group of devices. They share their workers and end together.
type team struct {
	model  *Model
	loader *Loader
	pipes  []*pipeline
	ctx    context.Context // of all; its end ends them
	cancel context.CancelCauseFunc
	limit  *watch.Limit // of what the load calls besides the workers
	prover *prover

	turns  bool           // the pipelines take turns; see turns.go
	opened sync.WaitGroup // then: the gates that have not been opened yet

	told sync.Once // that a file is not read in the usual way

	mu       sync.Mutex
	left     int   // pipelines that have not ended
	err      error // the first error of any
	done     []int64
	reported int64 // the greatest sum that Progress was told
}

// start lets the pipelines run. They have been opened.
func (t *team) start() {
	t.left, t.done = len(t.pipes), make([]int64, len(t.pipes))
	if t.turns {
		t.opened.Add(len(t.pipes))
		t.share()
	}
	for _, p := range t.pipes {
		go p.run(t.ctx)
	}
}

// progress tells how many bytes of tensors p has delivered. After an attempt that is made again that may be fewer than
// before; what Progress is told never falls.
func (t *team) progress(p *pipeline, delivered int64) {
	report := p.request.Progress
	if report == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.done[p.part.index] = delivered
	var sum int64
	for _, n := range t.done {
		sum += n
	}
	if sum > t.reported {
		t.reported = sum
		report(sum, int64(t.model.plan.TensorBytes()))
	}
}

// fellBack logs, once in a load, that a file is not read in the usual way.
func (t *team) fellBack(f read.Fallback) {
	t.told.Do(func() {
		t.loader.config.Logger.Warn("the usual way of reading does not work on this file",
			"file", f.Path, "instead", f.Instead, "error", f.Err)
	})
}

// help lets a worker that has nothing to do any more work for the other pipelines.
func (t *team) help(wk *worker) {
	home := slices.Index(t.pipes, wk.p)
	for i := range t.pipes[1:] {
		p := t.pipes[(home+1+i)%len(t.pipes)]
		p.gate.lend(wk, p)
	}
}

// ended is told how p has ended. The first error ends the others; the last pipeline ends the load.
func (t *team) ended(p *pipeline, err error, stuck bool) {
	if stuck {
		t.model.hangs(p.part)
		if p.plan.image != nil {
			p.plan.image.stuck.Store(true)
		}
	}
	t.mu.Lock()
	if err != nil && t.err == nil {
		t.err = err
		if t.ctx.Err() == nil { // else it was ended from outside, and no device is to blame
			t.err = onDevice(p.part.on[0].device, len(t.pipes) > 1, err)
			t.cancel(t.err)
		}
	}
	t.left--
	last := t.left == 0
	t.mu.Unlock()
	if !last {
		return
	}
	if t.err == nil {
		t.err = t.model.check(t.ctx, p.file)
	}
	t.model.end(t)
}

// close gives back what the pipelines of a load that did not start have.
func (t *team) close() error {
	var errs []error
	for _, p := range t.pipes {
		errs = append(errs, p.proof.close(t.limit, true, false), p.close(t.limit, false))
	}
	return errors.Join(errs...)
}

// gate lets workers in while a transfer runs, and knows who is in.
type gate struct {
	mu      sync.Mutex
	isOpen  bool
	inside  map[*worker]bool
	workers sync.WaitGroup
}

func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.isOpen, g.inside = true, make(map[*worker]bool)
}

// enter counts wk as being inside. The gate must be open.
func (g *gate) enter(wk *worker) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.inside[wk] = true
	g.workers.Add(1)
}

func (g *gate) leave(wk *worker) {
	g.mu.Lock()
	delete(g.inside, wk)
	g.mu.Unlock()
	g.workers.Done()
}

// lend lets a worker of another pipeline work for p, whose gate it is, until there is nothing to do. If the gate is
// closed, there is nothing.
func (g *gate) lend(from *worker, p *pipeline) {
	g.mu.Lock()
	if !g.isOpen {
		g.mu.Unlock()
		return
	}
	wk := newWorker(p, 0) // p has what it needs while the gate is open
	wk.track = from.track
	if wk.read != nil {
		wk.read.Track = from.read.Track
		wk.read.Inherit(from.read)
	}
	g.inside[wk] = true
	g.workers.Add(1)
	g.mu.Unlock()
	wk.run()
	if wk.read != nil {
		from.read.Inherit(wk.read)
	}
	g.leave(wk)
}

// close lets nobody in any more. The result is closed when nobody is inside.
func (g *gate) close() <-chan struct{} {
	g.mu.Lock()
	g.isOpen = false
	g.mu.Unlock()
	empty := make(chan struct{})
	go func() { g.workers.Wait(); close(empty) }()
	return empty
}

// filling is the number of a chunk that somebody inside is reading; -1 if nobody is.
func (g *gate) filling() int64 {
	g.mu.Lock()
	defer g.mu.Unlock()
	for wk := range g.inside {
		if i := wk.filling.Load(); i >= 0 {
			return i
		}
	}
	return -1
}
