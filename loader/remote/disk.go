package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// disk is a file on a disk that is read as if it were on a server: by ranges, so that its digest can be checked on the
// way.
type disk struct {
	path string
	file *os.File
	id   Identity
}

var _ gguf.Source = (*disk)(nil)

// newDisk opens a regular file. id is what is known of it; size and address are filled in.
func newDisk(path string, id Identity) (*disk, error) {
	info, err := os.Stat(path) // before it is opened, as merely opening a device can do something to it
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, &fs.PathError{Op: "open", Path: path, Err: errors.New("not a regular file")}
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	id.Size = info.Size()
	if id.URL == "" {
		id.URL = path
	}
	return &disk{path, f, id}, nil
}

// OpenFile opens the model in a regular file that is open, and reads it by ranges from its beginning. name is what
// errors and Options.Expect call it. The file belongs to the result from then on, also after an error. The parts of a
// split cannot be found.
func (c *Client) OpenFile(ctx context.Context, f *os.File, name string) (*gguf.File, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	d := &disk{name, f, Identity{URL: name, Size: info.Size()}}
	expected, err := c.expected(name)
	if err == nil {
		err = expected.sized(name, d.Size())
	}
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	var s gguf.Source = d
	if expected.Digest != "" {
		checked := newChecked(d, expected.Digest, new(failure))
		checked.always = true
		s = checked
	}
	return gguf.OpenSource(ctx, name, func(context.Context, string) (gguf.Source, error) { return s, nil })
}

// openDisk opens the model at path by ranges. wrap makes a source of each file.
func openDisk(
	ctx context.Context, path string, wrap func(d *disk, name string) (gguf.Source, error),
) (*gguf.File, error) {
	dir := filepath.Dir(path)
	return gguf.OpenSource(ctx, filepath.Base(path), func(_ context.Context, name string) (gguf.Source, error) {
		d, err := newDisk(filepath.Join(dir, name), Identity{})
		if err != nil {
			return nil, err
		}
		s, err := wrap(d, name)
		if err != nil {
			return nil, errors.Join(err, d.Close())
		}
		return s, nil
	})
}

// Path returns the path that was opened.
func (d *disk) Path() string { return d.path }

// Size returns the size that the file had when it was opened.
func (d *disk) Size() int64 { return d.id.Size }

// Identity returns what is known of the file.
func (d *disk) Identity() Identity { return d.id }

// Range returns a reader of n bytes from off on.
func (d *disk) Range(ctx context.Context, off, n int64) io.ReadCloser {
	return &diskReader{ctx, d, io.NewSectionReader(d.file, off, n), off + n, off}
}

// Close closes the file.
func (d *disk) Close() error { return d.file.Close() }

// diskReader reads a range of a disk file.
type diskReader struct {
	ctx     context.Context
	d       *disk
	section *io.SectionReader
	end, at int64
}

// Read reads up to len(b) bytes. If the file has shrunk, the error matches [gguf.ErrTruncated].
func (r *diskReader) Read(b []byte) (int, error) {
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	n, err := r.section.Read(b)
	r.at += int64(n)
	if err == io.EOF && r.at < r.end {
		err = &gguf.FormatError{Path: r.d.path, Offset: r.at, Err: fmt.Errorf(
			"%w: it has become shorter since it was opened", gguf.ErrTruncated)}
	}
	return n, err
}

// Close does nothing: the file belongs to the source.
func (r *diskReader) Close() error { return nil }
