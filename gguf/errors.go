package gguf

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Errors that a caller may want to tell apart, with errors.Is. Whatever is wrong with a file comes as a *[FormatError],
// which may wrap one of them.
var (
	// ErrTruncated: the file ends before something that it announces, or it shrank while it was mapped.
	ErrTruncated = errors.New("file is truncated")
	// ErrNotGGUF: the file is something else; the message says what, where that can be seen.
	ErrNotGGUF = errors.New("not a GGUF file")
	// ErrBigEndian: a GGUF file in big-endian byte order.
	ErrBigEndian = errors.New("big-endian GGUF file; only little-endian ones are supported")
	// ErrUnsupported: a GGUF version or a tensor type that this package does not know, or no longer.
	ErrUnsupported = errors.New("unsupported")
	// ErrSplit: the parts of a split model do not belong together, or one is missing.
	ErrSplit = errors.New("inconsistent split")
)

// FormatError says where a file breaks which rule of the format.
type FormatError struct {
	Path   string // the file, one part of a split model
	Offset int64  // where in that file, in bytes; negative when the error has no place
	Tensor string // the tensor concerned, or ""
	Field  string // the metadata key or the part of a record that is wrong, or ""
	Err    error  // the rule that is broken
}

// Error returns for example: model.gguf: offset 0x1a40, tensor "blk.0.attn_q.weight", dims: 7 dimensions, limit 4.
func (e *FormatError) Error() string {
	var where []string
	if e.Offset >= 0 {
		where = append(where, fmt.Sprintf("offset %#x", e.Offset))
	}
	if e.Tensor != "" {
		where = append(where, "tensor "+strconv.Quote(shorten(e.Tensor)))
	}
	if e.Field != "" {
		where = append(where, printable(shorten(e.Field)))
	}
	if len(where) == 0 {
		return fmt.Sprintf("%s: %v", e.Path, e.Err)
	}
	return fmt.Sprintf("%s: %s: %v", e.Path, strings.Join(where, ", "), e.Err)
}

// Unwrap returns the rule that is broken.
func (e *FormatError) Unwrap() error { return e.Err }

// shorten keeps a message readable when a hostile file has a name of many kilobytes.
func shorten(s string) string {
	const limit = 100
	if len(s) <= limit {
		return s
	}
	return s[:limit] + "…"
}

// printable quotes what could drive a terminal; ordinary keys stay as they are.
func printable(s string) string {
	if q := strconv.Quote(s); q[1:len(q)-1] != s {
		return q
	}
	return s
}
