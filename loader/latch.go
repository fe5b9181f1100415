package loader

import (
	"sync"
	"sync/atomic"
)

// latch counts, for every tensor, the chunks that have yet to pass a point, and wakes who waits for a tensor. Passing is an
// atomic decrement; only a waiter costs more.
type latch struct {
	left []atomic.Int32
	mu   sync.Mutex
	wait map[int]chan struct{}
}

// passed is the channel of tensors that nobody has to wait for.
var passed = func() chan struct{} { c := make(chan struct{}); close(c); return c }()

// newLatch returns a latch for n tensors that the chunks have yet to pass.
func newLatch(n int, chunks []chunk) *latch {
	l := &latch{left: make([]atomic.Int32, n), wait: make(map[int]chan struct{})}
	for i := range chunks {
		for j := range chunks[i].segs {
			l.left[chunks[i].segs[j].tensor].Add(1)
		}
	}
	return l
}

// pass counts c as passed for all its tensors.
func (l *latch) pass(c *chunk) {
	for i := range c.segs {
		t := c.segs[i].tensor
		if l.left[t].Add(-1) != 0 {
			continue
		}
		l.mu.Lock()
		if w := l.wait[t]; w != nil {
			close(w)
			delete(l.wait, t)
		}
		l.mu.Unlock()
	}
}

// done returns a channel that is closed once all chunks of tensor t have passed.
func (l *latch) done(t int) <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.left[t].Load() == 0 {
		return passed
	}
	w := l.wait[t]
	if w == nil {
		w = make(chan struct{})
		l.wait[t] = w
	}
	return w
}
