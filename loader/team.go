package loader

import (
	"context"
	"fmt"
	"slices"
	"sync"
)

// team is several pipelines, to a device each, that share their workers and end together.
type team struct {
	pipes  []*pipeline
	ctx    context.Context // of all; its end ends them
	cancel context.CancelCauseFunc
	left   sync.WaitGroup // pipelines whose transfers have not ended

	mu   sync.Mutex
	err  error // the first error of any
	done []int64
	sum  int64 // of done
}

// start lets the pipelines run. They have been opened.
func (t *team) start(ctx context.Context, cancel context.CancelCauseFunc) {
	t.ctx, t.cancel = ctx, cancel
	t.left.Add(len(t.pipes))
	var total int64
	for _, p := range t.pipes {
		total += p.total
	}
	t.done = make([]int64, len(t.pipes))
	for i, p := range t.pipes {
		p.opts.Progress = t.progress(i, total, p.opts.Progress)
		go p.run(ctx)
	}
}

// progress passes on to f what has arrived on all devices; the result is for pipeline i.
func (t *team) progress(i int, total int64, f func(done, total int64)) func(done, total int64) {
	if f == nil {
		return nil
	}
	return func(done, _ int64) {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.sum += done - t.done[i]
		t.done[i] = done
		f(t.sum, total)
	}
}

// help lets a worker that has nothing to do any more work for the others of the team.
func (t *team) help(wk *worker) {
	home := slices.Index(t.pipes, wk.p)
	for i := range t.pipes[1:] {
		p := t.pipes[(home+1+i)%len(t.pipes)]
		p.gate.lend(wk, p)
	}
}

// outcome is told how p has ended, and returns how all have once they have ended. The first error ends the others.
func (t *team) outcome(p *pipeline, err error) error {
	t.mu.Lock()
	if err != nil && t.err == nil {
		if t.err = err; t.ctx.Err() == nil { // else it was ended
			t.err = p.deviceError(err)
			t.cancel(t.err)
		}
	}
	t.mu.Unlock()
	t.left.Done()
	t.left.Wait()
	return t.err
}

// deviceError adds the device that err is of, unless there is one only, or several that err may be of.
func (p *pipeline) deviceError(err error) error {
	if len(p.team.pipes) == 1 {
		return err
	}
	return fmt.Errorf("device %d: %w", p.model.dev.Index(), err)
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

// lend lets a worker of another pipeline work for p, whose gate it is, until there is nothing to do. If the gate is closed, there is
// nothing.
func (g *gate) lend(from *worker, p *pipeline) {
	g.mu.Lock()
	if !g.isOpen {
		g.mu.Unlock()
		return
	}
	wk := newWorker(p, 0) // p has what it needs while the gate is open
	wk.track, wk.read.track, wk.read.scratch = from.track, from.read.track, from.read.scratch
	g.inside[wk] = true
	g.workers.Add(1)
	g.mu.Unlock()
	wk.run()
	from.read.scratch = wk.read.scratch
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
