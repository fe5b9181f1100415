package trace

import (
	"cmp"
	"container/heap"
	"slices"
	"strings"
)

// sortedTracks returns the numbers of tracks, sorted by name as a person would: "worker 2" before "worker 10".
func sortedTracks(tracks []string) []int {
	order := make([]int, len(tracks))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int { return compareNames(tracks[a], tracks[b]) })
	return order
}

// compareNames compares texts; runs of digits in them are compared as numbers.
func compareNames(a, b string) int {
	for a != "" && b != "" {
		m, n := digits(a), digits(b)
		if m > 0 && n > 0 {
			x, y := strings.TrimLeft(a[:m], "0"), strings.TrimLeft(b[:n], "0")
			if c := cmp.Or(cmp.Compare(len(x), len(y)), strings.Compare(x, y)); c != 0 {
				return c
			}
			a, b = a[m:], b[n:]
			continue
		}
		if c := cmp.Compare(a[0], b[0]); c != 0 {
			return c
		}
		a, b = a[1:], b[1:]
	}
	return cmp.Compare(len(a), len(b))
}

// digits is how many digits s begins with.
func digits(s string) int {
	n := 0
	for n < len(s) && '0' <= s[n] && s[n] <= '9' {
		n++
	}
	return n
}

// place returns the spans of a track in the order in which they begin, so that none overlaps another in part.
func place(spans []span) []span {
	byName := make(map[string][]*span)
	for i := range spans {
		s := &spans[i]
		byName[s.name] = append(byName[s.name], s)
	}
	for _, all := range byName {
		follow(all)
	}
	return nest(spans)
}

// follow places spans of the same name one behind the other. A span that ends after the next one begins was seen to end
// too late, and is moved back. From the last span to the first, so that one that was moved can move the one before it.
func follow(spans []*span) {
	slices.SortStableFunc(spans, func(a, b *span) int { return a.end.Compare(b.end) })
	for i := len(spans) - 2; i >= 0; i-- {
		s, next := spans[i], spans[i+1]
		if late := s.end.Sub(next.start); late > 0 {
			s.start, s.end = s.start.Add(-late), s.end.Add(-late)
		}
	}
}

// nest shortens spans of different names that overlap in part: the later one begins where the earlier one ends. Spans
// that are inside of others stay as they are.
func nest(spans []span) []span {
	queue := make(queue, len(spans))
	for i := range spans {
		queue[i] = queued{spans[i], i}
	}
	heap.Init(&queue)
	placed := spans[:0:0]
	var open []span // each inside of the one before it
	for len(queue) > 0 {
		s := queue[0].span
		for len(open) > 0 && !s.start.Before(open[len(open)-1].end) {
			open = open[:len(open)-1]
		}
		if k := len(open); k > 0 && s.end.After(open[k-1].end) {
			queue[0].start = open[k-1].end
			heap.Fix(&queue, 0)
			continue
		}
		open = append(open, s)
		placed = append(placed, s)
		heap.Pop(&queue)
	}
	return placed
}

// queue is a heap of spans: those that begin first come first, of these the longest, and then the one that was recorded
// first.
type queue []queued

type queued struct {
	span
	recorded int
}

func (q queue) Len() int      { return len(q) }
func (q queue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *queue) Push(x any)   { *q = append(*q, x.(queued)) }

func (q queue) Less(i, j int) bool {
	a, b := &q[i], &q[j]
	return cmp.Or(a.start.Compare(b.start), b.end.Compare(a.end), cmp.Compare(a.recorded, b.recorded)) < 0
}

// Pop removes the last span. Package heap has moved the first one there.
func (q *queue) Pop() any {
	last := len(*q) - 1
	x := (*q)[last]
	*q = (*q)[:last]
	return x
}
