package main

import (
	"cmp"
	"slices"
	"testing"
)

// choice is a value of a dimension, both as indices.
type choice struct{ dimension, value int }

// pair is two choices. The one of the lower dimension is first.
type pair [2]choice

func newPair(d, v, e, w int) pair {
	if d > e {
		d, v, e, w = e, w, d, v
	}
	return pair{{d, v}, {e, w}}
}

// cover returns combinations in which every pair of values occurs that can occur in one that fits, and the pairs that
// cannot. fits must not become true again when more of a combination is chosen.
func cover(fits func(combination) bool) (rows []combination, impossible []pair) {
	var missing []pair // in order, so that the result is always the same
	open := make(map[pair]bool)
	for e := range dimensions {
		for d := range e {
			for v := range dimensions[d].values {
				for w := range dimensions[e].values {
					p := newPair(d, v, e, w)
					missing, open[p] = append(missing, p), true
				}
			}
		}
	}
	for _, p := range missing {
		if !open[p] {
			continue
		}
		row := complete(with(p), fits, mostOpen(open))
		if row == nil {
			impossible = append(impossible, p)
			delete(open, p)
			continue
		}
		for e := range row {
			for d := range e {
				delete(open, newPair(d, row[d], e, row[e]))
			}
		}
		rows = append(rows, row)
	}
	return rows, impossible
}

// with returns a combination with these choices. All else is open.
func with(p pair) combination {
	c := slices.Repeat(combination{open}, len(dimensions))
	for _, x := range p {
		c[x.dimension] = x.value
	}
	return c
}

// mostOpen orders values by how many pairs that nobody has yet they make with what is chosen.
func mostOpen(open map[pair]bool) func(c combination, d int) []int {
	return func(c combination, d int) []int {
		gain := make([]int, len(dimensions[d].values))
		order := make([]int, len(gain))
		for v := range gain {
			order[v] = v
			for e, w := range c {
				if w >= 0 && e != d && open[newPair(d, v, e, w)] {
					gain[v]++
				}
			}
		}
		slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(gain[b], gain[a]) })
		return order
	}
}

// complete chooses what is open in c so that it fits, and returns nil if that is not possible. order says in which
// order the values of a dimension are tried; where it returns nil that is the order of the table.
func complete(c combination, fits func(combination) bool, order func(c combination, d int) []int) combination {
	if !fits(c) {
		return nil
	}
	d := slices.Index(c, open)
	if d < 0 {
		return c
	}
	values := order(c, d)
	for i := range dimensions[d].values {
		if values != nil {
			i = values[i]
		}
		next := slices.Clone(c)
		next[d] = i
		if row := complete(next, fits, order); row != nil {
			return row
		}
	}
	return nil
}

// TestCover checks the combinations that cover chooses against the table: all of them are accepted, every pair is in
// one of them or was said to be impossible, and what is impossible is so because of the refusals alone.
func TestCover(t *testing.T) {
	t.Parallel()
	accepts := func(c combination) bool { return len(c.refused()) == 0 }
	rows, impossible := cover(accepts)
	have := make(map[pair]int)
	for _, row := range rows {
		if slices.Contains(row, open) || !accepts(row) {
			t.Errorf("%v is not accepted", row)
		}
		for e := range row {
			for d := range e {
				have[pair{{d, row[d]}, {e, row[e]}}]++
			}
		}
	}
	for _, p := range impossible {
		if have[p] > 0 {
			t.Errorf("%v is there, and was said to be impossible", with(p))
		}
		have[p]++
	}
	for e := range dimensions {
		for d := range e {
			for v := range dimensions[d].values {
				for w := range dimensions[e].values {
					if have[pair{{d, v}, {e, w}}] == 0 {
						t.Errorf("%v is missing", with(pair{{d, v}, {e, w}}))
					}
				}
			}
		}
	}
	again, _ := cover(accepts)
	if !slices.EqualFunc(rows, again, slices.Equal) {
		t.Error("the second time there are other combinations")
	}
	t.Logf("%d combinations", len(rows))
	if none, all := cover(func(combination) bool { return false }); len(none) > 0 || len(all) != len(have) {
		t.Errorf("nothing fits, and yet there are %d combinations; %d pairs are impossible, want %d", len(none), len(all), len(have))
	}
}
