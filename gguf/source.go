package gguf

import (
	"context"
	"errors"
	"fmt"
	"io"
)

// Source is a file that is read by ranges instead of being mapped, such as one on a server. Its methods must be safe for
// concurrent use.
type Source interface {
	// Path names the file in errors and reports: an address without secrets.
	Path() string
	// Size of the file in bytes. It does not change.
	Size() int64
	// Range returns a reader of the n bytes from offset off on, which lie in the file. Before the last of them it does not
	// return io.EOF. The reader ends with ctx, is for one goroutine, and must be closed.
	Range(ctx context.Context, off, n int64) io.ReadCloser
	// Close is called once, when no reader is in use any more.
	Close() error
}

const (
	// firstRead is how much of a Source is read at first: more than the header of a model without a vocabulary.
	firstRead = 1 << 20
	// growRead is how many times as much is read when that was not enough. Headers of up to 16 MiB take three reads.
	growRead = 4
)

// OpenSource opens a model whose files are not on a disk. open is called with name, the file's name without a directory, and then,
// if that is part of a split model, with the names of the other parts. Where a part does not exist, its error should match
// [io/fs.ErrNotExist]. Only headers are read, each from the start in pieces of 1 MiB and then four times as much as before;
// what is allocated is bounded by a small multiple of the bytes that have been read. Tensor data is not there: [Model.Data] is
// nil, and [Model.Range] reads it. The caller must Close the model, which closes the sources. Errors: *[FormatError], and those
// of open and of the sources.
func OpenSource(ctx context.Context, name string, open func(ctx context.Context, name string) (Source, error)) (*Model, error) {
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

// readHeader reads as much of the source as its header takes: first bytes, at least headerSize, to begin with.
func (p *Part) readHeader(ctx context.Context, first int64) error {
	limit := min(p.Size, maxBytes)
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
				"a header of more than %d bytes, limit %d", max(n, int64(short.need)-1), maxBytes)}
		}
	}
}

// readFull fills b with the source's bytes from off on.
func (p *Part) readFull(ctx context.Context, b []byte, off int64) error {
	r := p.source.Range(ctx, off, int64(len(b)))
	_, err := io.ReadFull(r, b)
	return errors.Join(err, r.Close())
}

// Source returns what the part is read from; nil if it is mapped.
func (p *Part) Source() Source { return p.source }

// Remote reports whether the model is read from a [Source], so that its tensors' bytes are not mapped.
func (m *Model) Remote() bool { return m.parts[0].source != nil }

// Range returns a reader of n bytes of a tensor of this model from off on, off being 0 at the tensor's first byte. It is for
// models that are [Model.Remote]; see [Source]. It panics if the tensor does not have these bytes.
func (m *Model) Range(ctx context.Context, t *Tensor, off, n int64) io.ReadCloser {
	if off < 0 || n < 0 || n > t.Size-off {
		panic(fmt.Sprintf("gguf: bytes %d to %d of tensor %q, which has %d", off, off+n, t.Name, t.Size))
	}
	return m.parts[t.Part].source.Range(ctx, t.Offset+off, n)
}
