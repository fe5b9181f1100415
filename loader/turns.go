package loader

import "cmp"

// The groups of a load take turns where ranges of a file that are read at the same time have to be close, as they do
// where its digest is checked, or where a file comes once: all workers read what comes next in the file, for whichever
// group that is. Otherwise each group would be read from its own place in the file on, and most bytes would come too
// early for the digest.

// spot is where a run begins in the files of a model.
type spot struct {
	part int
	at   int64
}

func (a spot) compare(b spot) int {
	return cmp.Or(cmp.Compare(a.part, b.part), cmp.Compare(a.at, b.at))
}

// spotOf is where the run that begins with a chunk begins.
func (p *pipeline) spotOf(chunk int) spot {
	s := &p.chunks[chunk].Segs[0]
	t := &p.part.group.Tensors[s.Tensor]
	at, _ := t.Span(s.Src, int64(s.SrcBytes))
	return spot{t.Part, at}
}

// upcoming is where the next run begins that nobody has taken. ok is false when there is none, or nobody is let in.
func (p *pipeline) upcoming() (at spot, ok bool) {
	p.gate.mu.Lock()
	defer p.gate.mu.Unlock()
	i := int(p.next.Load())
	if !p.gate.isOpen || p.ctx.Err() != nil || i >= len(p.runs) {
		return at, false
	}
	return p.spotOf(p.runs[i]), true
}

// turn is the pipeline whose next run comes first in the file; nil: nothing is left.
func (t *team) turn() (first *pipeline) {
	var least spot
	for _, p := range t.pipes {
		if at, ok := p.upcoming(); ok && (first == nil || at.compare(least) < 0) {
			first, least = p, at
		}
	}
	return first
}

// hasTurn reports whether a worker of p may begin another run.
func (p *pipeline) hasTurn() bool { return !p.team.turns || p.team.turn() == p }

// awaitsTurn reports whether nothing happens to p because others have their turn.
func (p *pipeline) awaitsTurn() bool {
	if !p.team.turns || p.flying.Load() > 0 {
		return false
	}
	p.gate.mu.Lock()
	defer p.gate.mu.Unlock()
	return len(p.gate.inside) == 0
}

// share gives each pipeline its part of the workers: no more in all than there are runs, or ranges that may be read at
// the same time. Any of them works for all.
func (t *team) share() {
	left := 0
	for _, p := range t.pipes {
		left += len(p.runs)
	}
	left = min(left, t.pipes[0].sizes.readers)
	for _, p := range t.pipes {
		n := min(len(p.workers), left)
		p.workers, p.groupReport.connections = p.workers[:n], n
		left -= n
	}
}

// roam lets a worker work for whichever pipeline has its turn, until nothing is left.
func (t *team) roam(wk *worker) {
	t.opened.Wait()
	for t.ctx.Err() == nil {
		p := t.turn()
		if p == nil {
			return
		}
		p.gate.lend(wk, p)
	}
}
