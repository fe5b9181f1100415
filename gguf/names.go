package gguf

import "hash/maphash"

// names finds records by their name. It is a hash table with open addressing that stores record numbers only: a slot
// takes 4 bytes, where a Go map of strings takes 25. A hostile file can consist of short names, and memory use has to
// stay a small multiple of the file's size. The hash is seeded at random, so that no file can choose names that
// collide.
type names struct {
	seed  maphash.Seed
	slots []uint32           // record number plus one; 0 is a free slot
	of    func(i int) string // the name of record i
}

// newNames returns an empty table for up to n records. of returns the name of record i.
func newNames(n int, of func(i int) string) *names {
	size := n + n/3 + 8 // at most three quarters full
	return &names{seed: maphash.MakeSeed(), slots: make([]uint32, size), of: of}
}

// slot returns the slot of the record with the given name, or the free slot where it would go.
func (x *names) slot(name string) *uint32 {
	size := uint64(len(x.slots))
	for i := maphash.String(x.seed, name) % size; ; i = (i + 1) % size {
		s := &x.slots[i]
		if *s == 0 || x.of(int(*s-1)) == name {
			return s
		}
	}
}

// add enters record i. It returns false if a record with the same name is there already.
func (x *names) add(i int) bool {
	s := x.slot(x.of(i))
	if *s != 0 {
		return false
	}
	*s = uint32(i + 1)
	return true
}

// find returns the number of the record with the given name. ok is false if there is none.
func (x *names) find(name string) (i int, ok bool) {
	s := *x.slot(name)
	return int(s) - 1, s != 0
}
