package measure

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/internal/read"
)

const (
	readBytes = 4 << 20 // of one read
	readLimit = 4 << 30 // bytes that are read at most: enough for any disk, and no wait for large models
)

// Read measures how fast the first 4 GiB of the model's files can be read by threads readers in file order. If direct
// is set, they are read from the disk, past the page cache, if that works. Otherwise they are read the way any program
// does it, from the page cache as far as they are in it. Parts that are not mapped are read by ranges of their source,
// whatever direct says. It returns bytes per second.
func Read(ctx context.Context, m *gguf.File, threads int, direct bool) (float64, error) {
	if err := checkThreads(threads); err != nil {
		return 0, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	pieces := piecesOf(ctx, m, direct)
	var next, bytes atomic.Int64
	var readers sync.WaitGroup
	start := time.Now()
	for range min(threads, len(pieces)) {
		readers.Go(func() {
			buf := read.AlignedBytes(readBytes)
			for ctx.Err() == nil {
				i := int(next.Add(1)) - 1
				if i >= len(pieces) {
					return
				}
				n, err := pieces[i].read(buf)
				if err != nil {
					cancel(err)
				}
				bytes.Add(int64(n))
			}
		})
	}
	readers.Wait()
	took := max(time.Since(start), 1)
	if err := context.Cause(ctx); err != nil {
		for _, p := range pieces { // those that nobody has read
			p.input.close()
		}
		return 0, err
	}
	return float64(bytes.Load()) / took.Seconds(), nil
}

// piece is what one read brings.
type piece struct {
	input *input
	off   int64
}

// piecesOf divides the beginning of the model's files.
func piecesOf(ctx context.Context, m *gguf.File, direct bool) (all []piece) {
	for _, p := range m.Parts() {
		in := &input{open: func() (file, error) { return openPart(ctx, p, direct) }}
		for off := int64(0); off < p.Size && len(all) < readLimit/readBytes; off += readBytes {
			all = append(all, piece{in, off})
			in.left++
		}
	}
	return all
}

// file is what can be read at any place, by many at a time.
type file interface {
	io.ReaderAt
	io.Closer
}

// openPart opens a part.
func openPart(ctx context.Context, p *gguf.Part, direct bool) (file, error) {
	if p.Source() != nil {
		return ranges{ctx, p.Source()}, nil
	}
	f, err := openDisk(p, direct)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p.Path, err)
	}
	return f, nil
}

// disk reads a file directly as long as that works, and then in the ordinary way.
type disk struct {
	direct *os.File // nil: it is not read directly
	plain  *os.File
	failed atomic.Bool // direct reads
}

func openDisk(p *gguf.Part, direct bool) (*disk, error) {
	plain, err := p.Open(0)
	if err != nil {
		return nil, err
	}
	d := &disk{plain: plain}
	if direct {
		if f, err := read.OpenDirect(p); err == nil {
			d.direct = f
		}
	}
	return d, nil
}

// ReadAt reads as the file's ReadAt does.
func (d *disk) ReadAt(b []byte, off int64) (int, error) {
	if d.direct != nil && !d.failed.Load() {
		n, err := d.direct.ReadAt(b, off)
		if err == nil || errors.Is(err, io.EOF) {
			return n, err
		}
		d.failed.Store(true)
	}
	return d.plain.ReadAt(b, off)
}

// Close closes the file.
func (d *disk) Close() error {
	if d.direct != nil {
		_ = d.direct.Close() // it was only read
	}
	return d.plain.Close()
}

// input is a part that is open from its first piece to its last: a model may have hundreds.
type input struct {
	open func() (file, error)

	mu   sync.Mutex
	file file
	left int // pieces that nobody has read
}

// read reads a piece, or what there is of it.
func (p piece) read(buf []byte) (int, error) {
	f, err := p.input.get()
	if err != nil {
		return 0, err
	}
	defer p.input.done()
	n, err := f.ReadAt(buf, p.off)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return n, err
}

func (in *input) get() (file, error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.file == nil {
		f, err := in.open()
		if err != nil {
			return nil, err
		}
		in.file = f
	}
	return in.file, nil
}

// done says that a piece has been read.
func (in *input) done() {
	in.mu.Lock()
	in.left--
	last := in.left == 0
	in.mu.Unlock()
	if last {
		in.close()
	}
}

func (in *input) close() {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.file != nil {
		_ = in.file.Close() // it was only read
		in.file = nil
	}
}

// ranges reads a source as a file is read.
type ranges struct {
	ctx    context.Context
	source gguf.Source
}

// ReadAt fills b with one range, or with what there is of it.
func (r ranges) ReadAt(b []byte, off int64) (int, error) {
	b = b[:min(int64(len(b)), r.source.Size()-off)]
	body := r.source.Range(r.ctx, off, int64(len(b)))
	defer body.Close()
	return io.ReadFull(body, b)
}

// Close leaves the source open, which is the model's.
func (ranges) Close() error { return nil }
