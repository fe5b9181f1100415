package loader

import (
	"encoding/binary"
	"sync"
	"sync/atomic"

	"lukechampine.com/blake3/guts"
)

// treeGroup is how many bytes are hashed in one go: as many chunks of BLAKE3 as the widest vectors take at a time. Each
// group is a subtree of BLAKE3's tree, which does not depend on the rest.
const treeGroup = guts.MaxSIMD * guts.ChunkSize

// treeHash computes the BLAKE3 of a tensor whose bytes come in any order, and from any number of workers at the same
// time. Every byte must come once. Bytes that are not a whole group are kept until the rest of the group has come.
type treeHash struct {
	size int64
	sum  *[32]byte // gets the hash

	left atomic.Int64 // bytes that are not hashed yet

	mu     sync.Mutex
	groups [][8]uint32           // the values of groups that are hashed; made for the first bytes
	parts  map[int64]*groupParts // by group
}

// groupParts is a group of which some bytes have come.
type groupParts struct {
	bytes [treeGroup]byte
	have  int
}

var groupBuffers = sync.Pool{New: func() any { return new(groupParts) }}

// newTreeHash returns a hash of size bytes, at least one.
func newTreeHash(size int64, sum *[32]byte) *treeHash {
	h := &treeHash{size: size, sum: sum}
	h.left.Store(size)
	return h
}

// add takes b, the bytes from offset off on. It may be called by several goroutines.
func (h *treeHash) add(off int64, b []byte) {
	groups := h.begin()
	for len(b) > 0 {
		g := off / treeGroup
		start := g * treeGroup
		size := int(min(treeGroup, h.size-start))
		n := min(len(b), int(start+int64(size)-off))
		if n == treeGroup {
			h.hash(groups, g, (*[treeGroup]byte)(b), n)
		} else if p := h.collect(g, int(off-start), b[:n], size); p != nil {
			h.hash(groups, g, &p.bytes, size)
			p.have = 0
			groupBuffers.Put(p)
		}
		off, b = off+int64(n), b[n:]
	}
}

// begin returns the place for the values of groups.
func (h *treeHash) begin() [][8]uint32 {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.groups == nil {
		h.groups = make([][8]uint32, (h.size-1)/treeGroup+1)
	}
	return h.groups
}

// collect keeps b, which begins at byte at of group g. When all size bytes of the group are there, it returns them.
func (h *treeHash) collect(g int64, at int, b []byte, size int) *groupParts {
	h.mu.Lock()
	defer h.mu.Unlock()
	p := h.parts[g]
	if p == nil {
		p = groupBuffers.Get().(*groupParts)
		if h.parts == nil {
			h.parts = make(map[int64]*groupParts)
		}
		h.parts[g] = p
	}
	p.have += copy(p.bytes[at:], b)
	if p.have < size {
		return nil
	}
	delete(h.parts, g)
	return p
}

// hash hashes group g, and after the last group the tensor.
func (h *treeHash) hash(groups [][8]uint32, g int64, b *[treeGroup]byte, size int) {
	node := guts.CompressBuffer(b, size, &guts.IV, uint64(g)*guts.MaxSIMD, 0)
	if len(groups) == 1 {
		h.finish(node)
		return
	}
	groups[g] = guts.ChainingValue(node)
	if h.left.Add(int64(-size)) == 0 {
		h.finish(rootOf(groups))
	}
}

// rootOf joins the values of two or more groups to the root of their tree: neighbours in pairs, until one pair is left.
// A last one without a neighbour goes up as it is.
func rootOf(values [][8]uint32) guts.Node {
	for len(values) > 2 {
		n := 0
		for i := 0; i < len(values); i += 2 {
			if values[n] = values[i]; i+1 < len(values) {
				values[n] = guts.ChainingValue(guts.ParentNode(values[i], values[i+1], &guts.IV, 0))
			}
			n++
		}
		values = values[:n]
	}
	return guts.ParentNode(values[0], values[1], &guts.IV, 0)
}

// finish writes the hash, and lets go what it was made of.
func (h *treeHash) finish(root guts.Node) {
	root.Flags |= guts.FlagRoot
	for i, w := range guts.CompressNode(root) {
		if 4*i < len(h.sum) {
			binary.LittleEndian.PutUint32(h.sum[4*i:], w)
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.groups = nil
}
