package gguf

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
)

// Source is a file that is read in ranges instead of being mapped, such as a file on a server. Its methods must be safe
// for concurrent use.
type Source interface {
	// Path names the file in errors and reports. It must not contain secrets.
	Path() string
	// Size returns the size of the file in bytes. It does not change.
	Size() int64
	// Range returns a reader of the n bytes from offset off on. They lie in the file. The reader must not return io.EOF
	// before the last of them. It is for one goroutine, ends when ctx does, and must be closed.
	Range(ctx context.Context, off, n int64) io.ReadCloser
	// Close is called once, when no reader is in use any more.
	Close() error
}

const (
	// firstRead is how many bytes of a Source are read at first: more than the header of a file without a vocabulary.
	firstRead = 1 << 20
	// growRead is the factor by which the next read is larger if that was not enough. A header of 16 MiB takes three
	// reads.
	growRead = 4
	// maxSource is the largest header of a Source, in bytes, unless it is a file of this system. Real ones are up to some
	// 20 MB, and a server can send bytes without end.
	maxSource = 64 << 20
)

// OpenSource opens a file that is not on a disk. It calls open with name, the file's name without a directory. If that
// is part of a split file, it calls open with the names of the other parts, too. For a part that does not exist, the
// error of open should match [io/fs.ErrNotExist].
//
// OpenSource reads headers only, each from the start, 1 MiB at first and four times as much with each further read. It
// allocates a small multiple of the bytes it has read at most. Tensor data is not mapped: [File.Data] returns nil, and
// [File.Range] reads it. A header of more than 64 MiB is refused. The caller must Close the file, which closes the
// sources. Errors are *[FormatError] or those of open and of the sources.
func OpenSource(
	ctx context.Context, name string, open func(ctx context.Context, name string) (Source, error),
) (*File, error) {
	openPart := func(name string) (*Part, error) {
		s, err := open(ctx, name)
		if err != nil {
			return nil, err
		}
		p := &Part{Path: s.Path(), Size: s.Size(), name: name, source: s}
		if err := p.readHeader(ctx, firstRead); err != nil {
			return nil, errors.Join(err, p.close())
		}
		return p, nil
	}
	return openAll(name, openPart, openPart)
}

// readHeader reads as much of the source as its header takes. It begins with first bytes, which are headerSize or more.
func (p *Part) readHeader(ctx context.Context, first int64) error {
	most := int64(maxSource)
	if p.descriptor != nil { // a file of this system
		most = maxBytes
	}
	limit := min(p.Size, most)
	var data []byte
	for n := min(limit, first); ; n = min(limit, growRead*n) {
		more := make([]byte, n)
		have := copy(more, data)
		data = more
		if have < len(data) {
			if err := p.readFull(ctx, data[have:], int64(have)); err != nil {
				return err
			}
		}
		err := p.parseBeginning(data)
		short, ok := errors.AsType[*beginningError](err)
		if !ok {
			return err
		}
		if short.need > uint64(limit) || n == limit {
			return &FormatError{Path: p.Path, Offset: n, Err: fmt.Errorf(
				"a header of more than %d bytes, limit %d", max(n, int64(short.need)-1), most)}
		}
	}
}

// readFull fills b with the source's bytes from off on.
func (p *Part) readFull(ctx context.Context, b []byte, off int64) error {
	r := p.source.Range(ctx, off, int64(len(b)))
	_, err := io.ReadFull(r, b)
	return errors.Join(err, r.Close())
}

// Source returns what the part is read from, or nil if it is mapped.
func (p *Part) Source() Source { return p.source }

// Remote reports whether the file is read from a [Source] instead of being mapped. That is so for what [OpenSource]
// opened, and for files on disks whose file system does not support mapping.
func (f *File) Remote() bool { return f.parts[0].source != nil }

// Range returns a reader of n bytes of a tensor, off bytes behind the tensor's first one. It is for files that are
// [File.Remote]; see [Source]. It panics if the tensor does not have these bytes, or if its size is not known.
func (f *File) Range(ctx context.Context, t *Tensor, off, n int64) io.ReadCloser {
	if off < 0 || n < 0 || n > t.Size-off {
		panic(fmt.Sprintf("gguf: bytes %d to %d of tensor %q, which has %d", off, off+n, t.Name, t.Size))
	}
	return f.parts[t.Part].source.Range(ctx, t.Offset+off, n)
}

// fileSource is a file on a disk that cannot be mapped.
type fileSource struct {
	path string
	file *os.File
	size int64
}

// Path returns the path that was opened.
func (s *fileSource) Path() string { return s.path }

// Size returns the size that the file had when it was opened.
func (s *fileSource) Size() int64 { return s.size }

// Range returns a reader of n bytes from off on.
func (s *fileSource) Range(ctx context.Context, off, n int64) io.ReadCloser {
	return &fileReader{ctx: ctx, s: s, off: off, end: off + n}
}

// Close closes the file.
func (s *fileSource) Close() error { return s.file.Close() }

// fileReader reads a range of a fileSource.
type fileReader struct {
	ctx      context.Context
	s        *fileSource
	off, end int64
}

// Read reads up to len(b) bytes. If the file has shrunk, the error matches ErrTruncated.
func (r *fileReader) Read(b []byte) (int, error) {
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	b = b[:min(int64(len(b)), r.end-r.off)]
	if r.off == r.end {
		return 0, io.EOF
	}
	n, err := r.s.file.ReadAt(b, r.off)
	r.off += int64(n)
	switch {
	case n == len(b):
		return n, nil
	case errors.Is(err, io.EOF):
		return n, &FormatError{Path: r.s.path, Offset: r.off, Err: fmt.Errorf(
			"%w: it has become shorter since it was opened", ErrTruncated)}
	}
	return n, err
}

// Close does nothing: the file belongs to the source.
func (r *fileReader) Close() error { return nil }
