// Package stream opens a model that comes through a pipe, a socket or standard input: once, and in order.
//
//	file, err := stream.Open(ctx, os.Stdin, "-")
//	defer file.Close()
//	model, err := loader.Load(ctx, file, spec, dev)
//
// The model can be loaded once, onto one device or several. There is no second pass: it cannot be verified against the
// stream, and parts of a split cannot be found. A few MiB are read ahead, and the header stays in memory.
package stream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"sync"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// ErrOnce is matched by the error of reading bytes that have passed.
var ErrOnce = errors.New("a stream can be read only once, and in order")

const (
	// bufferBytes and buffers are how much is read ahead.
	bufferBytes = 1 << 20
	buffers     = 4
	// unknownSize stands for the size of a stream until its header is known. Sums with it do not overflow.
	unknownSize = math.MaxInt64 / 4
)

// Open reads the header of the model that comes from r, which belongs to the file from then on and must not be read by
// others. name is what errors call it. If r is an [io.Closer], closing the file closes it. A Read that is under way
// then may go on until r returns. Errors are *[gguf.FormatError], those of r, and the cause of ctx's end.
func Open(ctx context.Context, r io.Reader, name string) (*gguf.File, error) {
	return OpenChecked(ctx, r, name, nil)
}

// Check is told every byte of a stream, in order and once, and says in the end whether they are what they should be.
type Check interface {
	io.Writer // whose errors do not count
	Result() error
}

// OpenChecked is Open for a stream that c looks at; nil: nobody does. [gguf.File.Check] reads it to its end.
func OpenChecked(ctx context.Context, r io.Reader, name string, c Check) (*gguf.File, error) {
	s := &source{
		check: c, name: name, r: r, size: unknownSize, full: make(chan []byte, buffers), free: make(chan []byte, buffers),
		stop: make(chan struct{}),
	}
	for range buffers {
		s.free <- make([]byte, bufferBytes)
	}
	go s.pump()
	open := func(context.Context, string) (gguf.Source, error) { return s, nil }
	f, err := gguf.OpenSource(ctx, name, open)
	if err != nil && !s.settle(nil) {
		return nil, errors.Join(err, s.end())
	}
	// The size of a stream follows from its header, or from its end. The header is parsed again with it.
	if err == nil {
		s.settle(f)
	}
	if f, err = gguf.OpenSource(ctx, name, open); err != nil {
		return nil, errors.Join(err, s.end())
	}
	s.mu.Lock()
	s.opened = true
	s.mu.Unlock()
	return f, nil
}

// settle sets the size: that of the stream if its end has come already, or else what the tensors of f need. It is false
// if neither is known.
func (s *source) settle(f *gguf.File) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.ended:
		s.size = s.at
	case f == nil:
		return false
	default:
		s.size = 0
		for _, p := range f.Parts() {
			s.size = max(s.size, p.DataOffset)
		}
		for _, t := range f.Tensors() {
			if t.Sized() {
				s.size = max(s.size, t.Offset+t.Size)
			}
		}
	}
	return true
}

// source is a stream as a [gguf.Source].
type source struct {
	name string
	r    io.Reader
	full chan []byte // what the pump has read; closed at the end
	free chan []byte // for the pump
	stop chan struct{}
	last error // why the pump ended; once full is closed

	check Check // nil: nobody looks at it

	mu     sync.Mutex
	size   int64
	opened bool   // the header is known: nothing more is kept
	ended  bool   // all bytes have been read
	head   []byte // the beginning, as far as it was read before that
	at     int64  // the next byte of the stream, behind head
	have   []byte // that was read and not used, from at on
	buf    []byte // that have is in
	once   sync.Once
}

var (
	_ gguf.ReadingSource = (*source)(nil)
	_ gguf.CheckedSource = (*source)(nil)
)

// pump reads ahead into memory of its own, so that nobody has to wait for a Read that does not return. It ends with the
// stream or with stop.
func (s *source) pump() {
	defer close(s.full)
	for {
		var b []byte
		select {
		case b = <-s.free:
		case <-s.stop:
			s.last = errClosed
			return
		}
		n, err := io.ReadAtLeast(s.r, b[:bufferBytes], 1)
		if n > 0 {
			s.full <- b[:n] // there is room for all
		}
		if err != nil {
			s.last = err
			return
		}
	}
}

var errClosed = errors.New("stream: closed")

// Path returns the name.
func (s *source) Path() string { return s.name }

// Size returns the size that follows from the header.
func (s *source) Size() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.size
}

// Reading says that there is one pass.
func (s *source) Reading() gguf.Reading { return gguf.Reading{Once: true} }

// Range returns a reader of n bytes from off on. Bytes before off that were not read are lost.
func (s *source) Range(ctx context.Context, off, n int64) io.ReadCloser {
	return &reader{ctx: ctx, s: s, off: off, end: off + n}
}

// Check reads what is left of the stream, if somebody looks at it, and returns what that one says.
func (s *source) Check(ctx context.Context, _ bool) error {
	if s.check == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for !s.ended {
		s.at += int64(len(s.have))
		s.have = nil
		if err := s.next(ctx); err != nil && !s.ended {
			return err
		}
	}
	return s.check.Result()
}

// Close ends the stream.
func (s *source) Close() error {
	s.mu.Lock()
	opened := s.opened
	s.mu.Unlock()
	if !opened { // Open closes the file that it opened first
		return nil
	}
	return s.end()
}

// end ends the pump, and closes what is behind the stream.
func (s *source) end() (err error) {
	s.once.Do(func() {
		close(s.stop)
		if c, ok := s.r.(io.Closer); ok {
			err = c.Close()
		}
	})
	return err
}

// read reads up to len(b) bytes at off. s.mu is held.
func (s *source) read(ctx context.Context, b []byte, off int64) (int, error) {
	if off < int64(len(s.head)) {
		return copy(b, s.head[off:]), nil
	}
	if off < s.at {
		return 0, fmt.Errorf("%s: byte %d has passed: %w", s.name, off, ErrOnce)
	}
	for {
		if err := s.next(ctx); err != nil {
			return 0, err
		}
		skip := min(off-s.at, int64(len(s.have)))
		if !s.opened { // the header is read without gaps, and again later
			s.head = append(s.head, s.have[:skip]...)
		}
		s.have = s.have[skip:]
		s.at += skip
		if off > s.at || len(s.have) == 0 {
			continue
		}
		n := copy(b, s.have)
		if !s.opened {
			s.head = append(s.head, b[:n]...)
		}
		s.have = s.have[n:]
		s.at += int64(n)
		return n, nil
	}
}

// next waits until there are bytes. s.mu is held.
func (s *source) next(ctx context.Context) error {
	for len(s.have) == 0 {
		if s.buf != nil {
			s.free <- s.buf // there is room for all
			s.buf = nil
		}
		select {
		case b, ok := <-s.full:
			if s.ended = !ok && errors.Is(s.last, io.EOF); s.ended {
				return &gguf.FormatError{Path: s.name, Offset: s.at, Err: fmt.Errorf("%w: the stream has ended", gguf.ErrTruncated)}
			}
			if !ok {
				return fmt.Errorf("%s: %w", s.name, s.last)
			}
			s.have, s.buf = b, b
			if s.check != nil {
				_, _ = s.check.Write(b) // its result will tell
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// reader reads a range of a source.
type reader struct {
	ctx      context.Context
	s        *source
	off, end int64
}

// Read reads what has come, at least a byte.
func (r *reader) Read(b []byte) (int, error) {
	switch {
	case r.ctx.Err() != nil:
		return 0, context.Cause(r.ctx)
	case r.off == r.end:
		return 0, io.EOF
	}
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	n, err := r.s.read(r.ctx, b[:min(int64(len(b)), r.end-r.off)], r.off)
	r.off += int64(n)
	return n, err
}

// Close does nothing: the stream belongs to the source.
func (r *reader) Close() error { return nil }
