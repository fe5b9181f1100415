package gguf

import (
	"bytes"
	"encoding/binary"
	"errors"
	"unicode/utf8"
)

// What the format, or ggml's reader, allows.
const (
	headerSize = 24 // magic, version, number of tensors, number of keys
	minRecord  = 13 // of a key and its value: length, kind, one byte
	minInfo    = 24 // of a tensor: length, number of dimensions, type, offset

	maxKey   = 1<<16 - 1 // the GGUF specification
	maxName  = 63        // GGML_MAX_NAME less the final NUL
	maxDims  = 4         // GGML_MAX_DIMS
	maxText  = 1 << 30   // ggml's reader; real ones are chat templates of some 10 kB
	maxArray = 1 << 30   // ggml's reader; real ones are vocabularies of up to some 300,000 entries
	maxBytes = 1 << 30   // of a header, which is copied to memory; real ones are up to some 20 MB
	maxDepth = 16        // of arrays in arrays, so that no file exhausts the stack; none is known to nest at all
)

var (
	errDuplicateKey    = errors.New("key is given twice")
	errDuplicateTensor = errors.New("tensor name is given twice")
)

// header is where things lie in a file's header: the result of checking its syntax.
type header struct {
	version uint32
	end     int      // of the header
	keys    []uint32 // where each metadata record starts, and where the last ends
	infos   []uint32 // where each tensor's record starts, and where the last ends: the end of the header
}

// scan checks the syntax of a header from its start to its end: every length, count, kind, name and truth value. data is a
// file of size bytes or the beginning of one; if it ends before the header does, the error wraps a *beginningError. With keep
// it notes where records are, 4 bytes for each; data must then be the whole header, of no more than maxBytes. It holds nothing
// for the elements of arrays.
func scan(path string, data []byte, size int64, keep bool) (header, error) {
	c := cursor{data: data, size: uint64(size), path: path}
	var h header
	h.version = c.preamble()
	c.field = "tensor count"
	tensors := c.count("tensors", minInfo, 1<<63-1)
	c.field = "key count"
	keys := c.count("keys", minRecord, 1<<63-1)
	h.keys = c.records(keys, keep, c.record)
	h.infos = c.records(tensors, keep, c.info)
	h.end = c.pos
	if c.err != nil {
		return header{}, c.err
	}
	return h, nil
}

// records walks n records, of which count has made sure that there is room for them, and with keep returns where each starts
// and the last ends.
func (c *cursor) records(n uint64, keep bool, walk func()) (pos []uint32) {
	if keep && c.err == nil {
		pos = make([]uint32, 1, n+1)
		pos[0] = uint32(c.pos)
	}
	for ; n > 0 && c.err == nil; n-- {
		walk()
		if keep {
			pos = append(pos, uint32(c.pos))
		}
	}
	return pos
}

// preamble reads magic and version.
func (c *cursor) preamble() uint32 {
	if err := identify(c.data, c.size); err != nil {
		c.failf(0, "%w", err)
		return 0
	}
	c.bytes(4) // the magic
	c.field = "version"
	v := c.u32()
	switch {
	case c.err != nil:
	case v != 0 && v&0xffff == 0: // ggml's own test: a small number whose bytes are swapped
		c.failf(4, "%w", ErrBigEndian)
	case v < 2 || v > 3:
		c.failf(4, "%w: GGUF version %d; versions 2 and 3 are supported", ErrUnsupported, v)
	}
	return v
}

// record walks one key and its value.
func (c *cursor) record() {
	c.key, c.field = nil, "key"
	at := c.pos
	key := c.str(maxKey)
	switch {
	case c.err != nil:
		return
	case len(key) == 0:
		c.failf(at, "key is empty")
	case !utf8.Valid(key):
		c.failf(at, "key is not UTF-8: %q", shorten(string(key)))
	case bytes.IndexByte(key, 0) >= 0:
		c.failf(at, "key contains a NUL byte: %q", shorten(string(key)))
	}
	c.key = key
	at = c.pos
	switch k := Kind(c.u32()); {
	case k == Array:
		c.array(1)
	case k == String:
		c.str(maxText)
	case k < numKinds:
		c.scalars(k, 1)
	default:
		c.failf(at, "unknown value type %d", uint32(k))
	}
}

// scalars walks n values of a fixed size.
func (c *cursor) scalars(k Kind, n uint64) {
	at := c.pos
	b := c.bytes(n * kindSizes[k]) // n is at most maxArray, so the product cannot overflow
	if k != Bool {
		return
	}
	for i, v := range b {
		if v > 1 {
			c.failf(at+i, "a bool is %d, not 0 or 1", v)
			return
		}
	}
}

// array walks an array: the kind of its elements, their number, the elements.
func (c *cursor) array(depth int) {
	at := c.pos
	k := Kind(c.u32())
	switch {
	case c.err != nil:
	case k >= numKinds:
		c.failf(at, "unknown type %d of array elements", uint32(k))
	case depth > maxDepth:
		c.failf(at, "arrays nest more than %d deep", maxDepth)
	case k == String:
		c.strings(c.count("strings", 8, maxArray))
	case k == Array:
		for n := c.count("arrays", 12, maxArray); n > 0 && c.err == nil; n-- {
			c.array(depth + 1)
		}
	default:
		c.scalars(k, c.count("elements", kindSizes[k], maxArray))
	}
}

// strings walks n strings. Vocabularies are nearly all of a header, so this loop is what opening a model costs; it leaves
// whatever is wrong to str.
func (c *cursor) strings(n uint64) {
	data, pos := c.data, c.pos
	for ; n > 0; n-- {
		if len(data)-pos < 8 {
			break
		}
		size := binary.LittleEndian.Uint64(data[pos:])
		if size > maxText || size > uint64(len(data)-pos-8) {
			break
		}
		pos += 8 + int(size)
	}
	c.pos = pos
	if n > 0 {
		c.str(maxText)
	}
}

// info walks the record of one tensor.
func (c *cursor) info() {
	c.key, c.tensor, c.field = nil, nil, "tensor name"
	at := c.pos
	name := c.str(maxName)
	switch {
	case c.err != nil:
		return
	case len(name) == 0:
		c.failf(at, "tensor name is empty")
	case !utf8.Valid(name):
		c.failf(at, "tensor name is not UTF-8: %q", name)
	case bytes.IndexByte(name, 0) >= 0:
		c.failf(at, "tensor name contains a NUL byte: %q", name)
	}
	c.tensor, c.field = name, "dims"
	at = c.pos
	n := c.u32()
	if c.err == nil && (n == 0 || n > maxDims) {
		c.failf(at, "%d dimensions; 1 to %d are allowed", n, maxDims)
	}
	c.bytes(8 * uint64(n))
	c.field = "type"
	c.u32()
	c.field = "offset"
	c.u64()
}
