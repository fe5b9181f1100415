package gguf

import (
	"encoding/binary"
	"fmt"
)

// cursor reads little-endian values from a file's beginning. It keeps the first error; after that, every read returns
// zero and does not advance. So a record can be read to its end before the error is looked at.
type cursor struct {
	data []byte // the file, or its beginning
	size uint64 // of the whole file, in bytes
	pos  int
	err  *FormatError

	// What is being read, for the error. Names are slices of data, so that nothing is copied for errors that do not
	// come.
	path, field string
	key, tensor []byte
}

// failf records an error at offset at, unless there is one already.
func (c *cursor) failf(at int, format string, args ...any) {
	if c.err != nil {
		return
	}
	field := c.field
	if c.key != nil {
		field = string(c.key)
	}
	c.err = &FormatError{
		Path: c.path, Offset: int64(at), Tensor: string(c.tensor), Field: field, Err: fmt.Errorf(format, args...),
	}
}

// left returns how many bytes of the file follow, whether data holds them or not.
func (c *cursor) left() uint64 { return c.size - uint64(c.pos) }

// beginningError says that data, the beginning of a file, ends too early, though the file itself may not.
type beginningError struct{ need uint64 } // bytes from the start of the file, or more

func (e *beginningError) Error() string {
	return fmt.Sprintf("%d bytes of the file are needed", e.need)
}

// bytes reads the next n bytes. It returns nil if the data ends before them.
func (c *cursor) bytes(n uint64) []byte {
	if c.err != nil {
		return nil
	}
	if n > c.left() {
		c.failf(c.pos, "%w: %d bytes wanted, %d left", ErrTruncated, n, c.left())
		return nil
	}
	if end := uint64(c.pos) + n; end > uint64(len(c.data)) {
		c.failf(c.pos, "%w", &beginningError{end})
		return nil
	}
	b := c.data[c.pos : c.pos+int(n)]
	c.pos += int(n)
	return b
}

func (c *cursor) u32() uint32 {
	if b := c.bytes(4); b != nil {
		return binary.LittleEndian.Uint32(b)
	}
	return 0
}

func (c *cursor) u64() uint64 {
	if b := c.bytes(8); b != nil {
		return binary.LittleEndian.Uint64(b)
	}
	return 0
}

// count reads the number of records that follow, each of at least size bytes. If the rest of the file has no room for
// them, or if there are more than limit, that is an error, and count returns 0. So nothing is ever sized by an
// unchecked count.
func (c *cursor) count(what string, size, limit uint64) uint64 {
	at := c.pos
	n := c.u64()
	switch {
	case c.err != nil:
		return 0
	case n > limit:
		c.failf(at, "%d %s, limit %d", n, what, limit)
	case n > c.left()/size:
		c.failf(at, "%w: %d %s of at least %d bytes in the %d bytes left", ErrTruncated, n, what, size, c.left())
	default:
		return n
	}
	return 0
}

// str reads a string: its length, then its bytes.
func (c *cursor) str(limit uint64) []byte {
	return c.bytes(c.count("bytes of text", 1, limit))
}
