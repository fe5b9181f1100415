package gguf

import (
	"bytes"
	"encoding/binary"
	"errors"
	"unicode/utf8"
)

// Limits of what is read. Each is what the format or a program that writes such files allows.
const (
	headerSize = 24 // magic, version, number of tensors, number of keys
	minRecord  = 13 // of a key and its value: length, kind, one byte
	minInfo    = 24 // of a tensor: length, number of dimensions, type, offset

	maxKey   = 1<<16 - 1 // the GGUF specification
	maxName  = 1024      // ggml takes 63; image and video models have names of some 90 to 160
	maxDims  = 8         // ggml takes 4; video models have 5
	maxText  = 1 << 30   // ggml's reader; real ones are chat templates of some 10 kB
	maxArray = 1 << 30   // ggml's reader; real ones are vocabularies of up to some 300,000 entries
	maxBytes = 1 << 30   // of a header, which is copied to memory; real ones are up to some 20 MB
	maxDepth = 16        // of arrays in arrays, so that no file exhausts the stack; none is known to nest at all
)

var (
	errDuplicateKey    = errors.New("key is given twice")
	errDuplicateTensor = errors.New("tensor name is given twice")
)

// header is the result of scan: where things lie in a file's header.
type header struct {
	version    uint32
	keys       []uint32 // where each metadata record starts, and where the last one ends
	tensorInfo int      // where the first tensor record starts
	infos      int      // number of tensor records
	dims       int      // number of dimensions of all of them together
	end        int      // of the header
}

// scan checks the syntax of a header from start to end: every length, count, kind, name and bool. data is a file of
// size bytes, or the beginning of one. If data ends before the header does, the error wraps a *beginningError.
//
// With keep, scan records where the metadata records are, at 4 bytes each; data must then be the whole header and have
// at most maxBytes. It keeps nothing for the elements of arrays.
func scan(path string, data []byte, size int64, keep bool) (header, error) {
	c := cursor{data: data, size: uint64(size), path: path}
	var h header
	h.version = c.preamble()
	c.field = "tensor count"
	tensors := c.count("tensors", minInfo, 1<<63-1)
	c.field = "key count"
	keys := c.count("keys", minRecord, 1<<63-1)
	if keep && c.err == nil {
		h.keys = make([]uint32, 1, keys+1) // count has checked that the file has room for so many keys
		h.keys[0] = uint32(c.pos)
	}
	for ; keys > 0 && c.err == nil; keys-- {
		c.record()
		if keep {
			h.keys = append(h.keys, uint32(c.pos))
		}
	}
	h.tensorInfo = c.pos
	for ; tensors > 0 && c.err == nil; tensors-- {
		h.dims += c.info()
		h.infos++
	}
	h.end = c.pos
	if c.err != nil {
		return header{}, c.err
	}
	return h, nil
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
	case v != 0 && v&0xffff == 0: // a small number in the other byte order; ggml tests for it in the same way
		c.failf(4, "%w", ErrBigEndian)
	case v < 2 || v > 3:
		c.failf(4, "%w: GGUF version %d; versions 2 and 3 are supported", ErrUnsupported, v)
	}
	return v
}

// record walks over one key and its value.
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
	switch k := ValueKind(c.u32()); {
	case k == KindArray:
		c.array(1)
	case k == KindString:
		c.str(maxText)
	case k < numKinds:
		c.scalars(k, 1)
	default:
		c.failf(at, "unknown value type %d", uint32(k))
	}
}

// scalars walks over n values of a fixed size.
func (c *cursor) scalars(k ValueKind, n uint64) {
	at := c.pos
	b := c.bytes(n * kindSizes[k]) // n is at most maxArray, so the product cannot overflow
	if k != KindBool {
		return
	}
	for i, v := range b {
		if v > 1 {
			c.failf(at+i, "a bool is %d, not 0 or 1", v)
			return
		}
	}
}

// array walks over an array: the kind of its elements, their number, the elements.
func (c *cursor) array(depth int) {
	at := c.pos
	k := ValueKind(c.u32())
	switch {
	case c.err != nil:
	case k >= numKinds:
		c.failf(at, "unknown type %d of array elements", uint32(k))
	case depth > maxDepth:
		c.failf(at, "arrays nest more than %d deep", maxDepth)
	case k == KindString:
		c.strings(c.count("strings", 8, maxArray))
	case k == KindArray:
		for n := c.count("arrays", 12, maxArray); n > 0 && c.err == nil; n-- {
			c.array(depth + 1)
		}
	default:
		c.scalars(k, c.count("elements", kindSizes[k], maxArray))
	}
}

// strings walks over n strings. Nearly all of a header is vocabulary, so this loop decides how long it takes to open a
// file. It stops at the first string that is wrong, and leaves that to str, which makes the error.
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

// info walks over the record of one tensor, and returns the number of its dimensions.
func (c *cursor) info() (dims int) {
	c.key, c.tensor, c.field = nil, nil, "tensor name"
	at := c.pos
	name := c.str(maxName)
	switch {
	case c.err != nil:
		return 0
	case len(name) == 0:
		c.failf(at, "tensor name is empty")
	case !utf8.Valid(name):
		c.failf(at, "tensor name is not UTF-8: %q", shorten(string(name)))
	case bytes.IndexByte(name, 0) >= 0:
		c.failf(at, "tensor name contains a NUL byte: %q", shorten(string(name)))
	}
	c.tensor, c.field = name, "dims"
	at = c.pos
	n := c.u32()
	if n > maxDims {
		c.failf(at, "%d dimensions; 0 to %d are allowed", n, maxDims)
	}
	c.bytes(8 * uint64(n))
	c.field = "type"
	c.u32()
	c.field = "offset"
	c.u64()
	return int(n)
}
