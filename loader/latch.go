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

// set makes it a latch for n tensors that the chunks have yet to pass. Those who wait go on waiting.
func (l *latch) set(n int, chunks []chunk) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.left == nil {
		l.left, l.wait = make([]atomic.Int32, n), make(map[int]chan struct{})
	}
	for i := range l.left {
		l.left[i].Store(0)
	}
	for i := range chunks {
		for j := range chunks[i].segs {
			l.left[chunks[i].segs[j].tensor].Add(1)
		}
	}
}

// pass counts c as passed for all its tensors.
func (l *latch) pass(c *chunk) {
	for i := range c.segs {
		l.passTensor(c.segs[i].tensor)
	}
}

// passTensor counts a chunk as passed for tensor t.
func (l *latch) passTensor(t int) {
	if l.left[t].Add(-1) != 0 {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if w := l.wait[t]; w != nil {
		close(w)
		delete(l.wait, t)
	}
}

// expect makes it a latch for n tensors, each of which passTensor is to be called for once.
func (l *latch) expect(n int) {
	l.left, l.wait = make([]atomic.Int32, n), make(map[int]chan struct{})
	for i := range l.left {
		l.left[i].Store(1)
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
