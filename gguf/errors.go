package gguf

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"

	"github.com/gguf2gpu/gguf2gpu/internal/term"
)

// Errors that a caller may want to tell apart with [errors.Is]. What is wrong with a file's content is reported as a
// *[FormatError], which may wrap one of them.
var (
	// ErrTruncated: the file ends before something that it announces, or it shrank while it was mapped.
	ErrTruncated = errors.New("file is truncated")
	// ErrNotGGUF: the file is something else. The message says what, if that can be seen.
	ErrNotGGUF = errors.New("not a GGUF file")
	// ErrBigEndian: a GGUF file in big-endian byte order.
	ErrBigEndian = errors.New("big-endian GGUF file; only little-endian ones are supported")
	// ErrUnsupported: a version of GGUF, a tensor type or an operation that this package does not support.
	ErrUnsupported = errors.New("unsupported")
	// ErrSplit: the parts of a split file do not belong together, or one is missing.
	ErrSplit = errors.New("inconsistent split")
	// ErrReplaced: another file has taken the place of the one that was opened.
	ErrReplaced = errors.New("the file was replaced since it was opened; open it again")
)

// FormatError says where a file breaks which rule of the format.
type FormatError struct {
	Path   string // of the file; of one part of a split file
	Offset int64  // in that file, in bytes; negative if the error has no place
	Tensor string // the tensor concerned, or ""
	Field  string // the metadata key or the part of a record that is wrong, or ""
	Err    error  // the rule that is broken
}

// Error returns for example: model.gguf: offset 0x1a40, tensor "blk.0.attn_q.weight", dims: 9 dimensions; 0 to 8 are
// allowed. Names and paths are quoted if they hold control characters.
func (e *FormatError) Error() string {
	var where []string
	if e.Offset >= 0 {
		where = append(where, fmt.Sprintf("offset %#x", e.Offset))
	}
	if e.Tensor != "" {
		where = append(where, "tensor "+strconv.Quote(shorten(e.Tensor)))
	}
	if e.Field != "" {
		where = append(where, term.Safe(shorten(e.Field)))
	}
	if len(where) == 0 {
		return fmt.Sprintf("%s: %v", term.Safe(e.Path), e.Err)
	}
	return fmt.Sprintf("%s: %s: %v", term.Safe(e.Path), strings.Join(where, ", "), e.Err)
}

// Unwrap returns the rule that is broken.
func (e *FormatError) Unwrap() error { return e.Err }

// detach copies the names that an error has, so that it can be read after the mapping has gone that they may lie in.
func detach(err error) error {
	if e, ok := errors.AsType[*FormatError](err); ok {
		e.Tensor, e.Field = strings.Clone(e.Tensor), strings.Clone(e.Field)
	}
	return err
}

// shorten cuts a name, so that a message stays readable when a hostile file has one of many kilobytes.
func shorten(s string) string {
	return term.Shorten(s, 100)
}

// hints say what to do about errors of the operating system that come when a file is opened.
var hints = []struct {
	errno syscall.Errno
	hint  string
}{
	{syscall.EMFILE, "this process has reached its limit of open files: raise that (ulimit -n)"},
	{syscall.ENFILE, "the system has reached its limit of open files"},
	{syscall.EPERM, "it is no matter of the file's mode: the sandbox, the container or the file system forbids it"},
}

// explain adds a hint to an error of opening a file. It stays an *[os.PathError], and matches what it matched before.
func explain(err error) error {
	e, ok := errors.AsType[*os.PathError](err)
	if !ok {
		return err
	}
	for _, h := range hints {
		if errors.Is(e.Err, h.errno) {
			return &os.PathError{Op: e.Op, Path: e.Path, Err: fmt.Errorf("%w (%s)", e.Err, h.hint)}
		}
	}
	return err
}
