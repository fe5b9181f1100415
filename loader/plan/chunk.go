package plan

import "fmt"

// MinChunk is the least size of a chunk in bytes: far above that of a block, and of what is worth a copy of its own.
const MinChunk = 64 << 10

// Segment is a run of whole blocks of one tensor inside a chunk.
type Segment struct {
	Tensor   int   // in Group.Tensors
	Src      int64 // first byte, in the tensor's bytes in the file
	SrcBytes int
	Dst      int // first byte, in the chunk
	DstBytes int
}

// Chunk is what travels in one copy. Usually that is a run of device memory: whole blocks of one tensor, or of several
// neighbours with the padding between them. A chunk that is expanded on the device holds blocks as they are in the
// file, each segment at a multiple of Align.
type Chunk struct {
	Arena     int
	Offset    uint64 // in the arena; not used when expanded
	Bytes     int    // that travel
	Delivered int    // bytes of tensors that are in device memory when the chunk has arrived, without padding
	Expand    bool
	Segs      []Segment // in file order, at least one
}

// CutOptions says how Group.Cut divides a group.
type CutOptions struct {
	Bytes int // the largest chunk, on the device as well as in the file; at least MinChunk
	// Ramp is how many of the first chunks are smaller, the very first the smallest. With as many as there are workers,
	// the link gets something to do early, and the workers do not all finish at the same moment. 0: none is smaller.
	Ramp   int
	Expand []bool // by tensor: the device converts it; nil: none
	Skip   []bool // by tensor: leave it out, and leave its memory alone; nil: none
	// Ordered begins a chunk at every tensor that needs several, so that one worker can read such a tensor in order.
	Ordered bool
}

// Cut divides the group into chunks. It panics if o.Bytes is below MinChunk, since a block may not fit then.
func (g *Group) Cut(o CutOptions) []Chunk {
	if o.Bytes < MinChunk {
		panic(fmt.Sprintf("plan: chunks of %d bytes; the least is %d", o.Bytes, MinChunk))
	}
	most := min(g.DeviceBytes/uint64(o.Bytes), 1<<20) // a guess; a plan that somebody else made may claim anything
	c := cutter{g: g, o: o, segs: make([]Segment, 0, len(g.Tensors)+int(most)+1)}
	c.begin(Chunk{})
	for i := range g.Tensors {
		switch {
		case o.Skip == nil || !o.Skip[i]:
			c.add(i)
		case g.Tensors[i].Bytes > 0: // a chunk across it would be written over it
			c.begin(Chunk{})
		}
	}
	c.begin(Chunk{})
	return c.chunks
}

// cutter fills one chunk after the other.
type cutter struct {
	g        *Group
	o        CutOptions
	chunks   []Chunk
	segs     []Segment // of all chunks, one behind the other
	cur      Chunk
	first    int // where the current chunk's segments begin in segs
	srcBytes int // of the current chunk
	limit    int // of its bytes
}

// begin ends the current chunk, if there is something in it, and goes on with next.
func (c *cutter) begin(next Chunk) {
	if len(c.segs) > c.first {
		c.cur.Segs = c.segs[c.first:len(c.segs):len(c.segs)]
		c.chunks = append(c.chunks, c.cur)
	}
	c.cur, c.first, c.srcBytes, c.limit = next, len(c.segs), 0, c.o.Bytes
	if n := len(c.chunks); n < c.o.Ramp {
		c.limit = min(c.o.Bytes, max(MinChunk, c.o.Bytes/c.o.Ramp*(n+1)))
	}
}

// add appends the blocks of tensor i.
func (c *cutter) add(i int) {
	t := &c.g.Tensors[i]
	src, out := t.Block()
	blocks := t.Size / int64(src)
	if blocks == 0 {
		return
	}
	dst, step := out, int64(1)
	expand := c.o.Expand != nil && c.o.Expand[i]
	if expand { // blocks travel as they are; what a kernel writes begins aligned
		dst, step = src, int64(max(1, Align/t.Type.BlockElems()))
	}
	for b := int64(0); b < blocks; {
		at := t.DeviceOffset + uint64(b)*uint64(out)
		pos, room := 0, int64(0)
		alone := c.o.Ordered && b == 0 && blocks*int64(dst) > int64(c.o.Bytes)
		if len(c.segs) > c.first && c.cur.Expand == expand && (expand || c.cur.Arena == t.Arena) && !alone {
			if pos = int(at - c.cur.Offset); expand {
				pos = int(alignUp(uint64(c.cur.Bytes), Align))
			}
			fits := min(int64(c.limit-pos)/int64(dst), int64(c.limit-c.srcBytes)/int64(src))
			room = wholeSteps(fits, step, blocks-b)
		}
		if room <= 0 {
			c.begin(Chunk{Arena: t.Arena, Offset: at, Expand: expand})
			pos, room = 0, wholeSteps(int64(c.limit/max(dst, src)), step, blocks-b)
		}
		s := Segment{Tensor: i, Src: b * int64(src), SrcBytes: int(room) * src, Dst: pos, DstBytes: int(room) * dst}
		c.segs = append(c.segs, s)
		c.srcBytes += s.SrcBytes
		c.cur.Bytes = s.Dst + s.DstBytes
		c.cur.Delivered += int(room) * out
		b += room
	}
}

// wholeSteps returns how many of the blocks that are left to take, where there is room for so many: all if they fit,
// else as many whole steps as fit.
func wholeSteps(room, step, left int64) int64 {
	if left <= room {
		return left
	}
	return room - room%step
}

// TensorOffset is where in its tensor's device bytes a segment begins.
func (g *Group) TensorOffset(s *Segment) uint64 {
	t := &g.Tensors[s.Tensor]
	src, dst := t.Block()
	return uint64(s.Src) / uint64(src) * uint64(dst)
}
