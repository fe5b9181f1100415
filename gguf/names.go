package gguf

import "hash/maphash"

// names finds the records of a header by name. It is a hash table that holds nothing but their numbers, so it costs 4 bytes
// a slot where a map of strings costs 25: a hostile file can be all short names, and what is allocated for it is bounded.
// The hash is seeded at random, so that no file can choose names that collide.
type names struct {
	seed  maphash.Seed
	slots []uint32 // a number plus one; 0: free
	of    func(i int) string
}

// newNames returns a table for up to n records, of which record i is called of(i).
func newNames(n int, of func(i int) string) *names {
	size := 8
	for 3*size < 4*n { // at most three quarters full
		size *= 2
	}
	return &names{seed: maphash.MakeSeed(), slots: make([]uint32, size), of: of}
}

// slot is where the record of that name is, or would be.
func (x *names) slot(name string) *uint32 {
	mask := uint64(len(x.slots) - 1)
	for h := maphash.String(x.seed, name); ; h++ {
		s := &x.slots[h&mask]
		if *s == 0 || x.of(int(*s-1)) == name {
			return s
		}
	}
}

// add enters record i. It is false when there is one of the same name already.
func (x *names) add(i int) bool {
	s := x.slot(x.of(i))
	if *s != 0 {
		return false
	}
	*s = uint32(i + 1)
	return true
}

// find returns the number of the record of that name.
func (x *names) find(name string) (i int, ok bool) {
	s := *x.slot(name)
	return int(s) - 1, s != 0
}
