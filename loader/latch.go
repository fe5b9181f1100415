package loader

import (
	"sync"
	"sync/atomic"

	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// latch counts, for every tensor of a group, the chunks that have yet to pass a point, and wakes who waits for a
// tensor. Passing is an atomic decrement; only a waiter costs more.
type latch struct {
	left []atomic.Int32
	mu   sync.Mutex
	wait map[int]chan struct{}
}

// passed is the channel of tensors that nobody has to wait for.
var passed = func() chan struct{} { c := make(chan struct{}); close(c); return c }()

// newLatch returns a latch for n tensors, each of which has one pass to go.
func newLatch(n int) *latch {
	l := &latch{left: make([]atomic.Int32, n), wait: make(map[int]chan struct{})}
	for i := range l.left {
		l.left[i].Store(1)
	}
	return l
}

// expect makes the chunks those that have yet to pass. Tensors that are in none of them have passed; those who wait for
// others go on waiting.
func (l *latch) expect(chunks []plan.Chunk) {
	count := make([]int32, len(l.left))
	for i := range chunks {
		for j := range chunks[i].Segs {
			count[chunks[i].Segs[j].Tensor]++
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, n := range count {
		if l.left[i].Store(n); n == 0 {
			l.wake(i)
		}
	}
}

// pass counts c as passed for all its tensors.
func (l *latch) pass(c *plan.Chunk) {
	for i := range c.Segs {
		l.passTensor(c.Segs[i].Tensor)
	}
}

// passTensor counts one chunk, or whatever else there is one of, as passed for tensor t.
func (l *latch) passTensor(t int) {
	if l.left[t].Add(-1) != 0 {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.wake(t)
}

// wake lets those go on who wait for tensor t. l.mu is held.
func (l *latch) wake(t int) {
	if w := l.wait[t]; w != nil {
		close(w)
		delete(l.wait, t)
	}
}

// has reports whether all chunks of tensor t have passed.
func (l *latch) has(t int) bool { return l.left[t].Load() <= 0 }

// done returns a channel that is closed once all chunks of tensor t have passed.
func (l *latch) done(t int) <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.has(t) {
		return passed
	}
	w := l.wait[t]
	if w == nil {
		w = make(chan struct{})
		l.wait[t] = w
	}
	return w
}
