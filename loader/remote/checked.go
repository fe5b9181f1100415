package remote

import (
	"context"
	"errors"
	"io"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// checked is a source whose bytes are hashed, or kept in a cache, while they are read.
type checked struct {
	gguf.Source
	fails  *failure
	digest *digester // nil: none is checked
	keeper *keeper   // nil: nothing is kept
	always bool      // check also if a share of the model was read
}

var (
	_ gguf.CheckedSource = (*checked)(nil)
	_ gguf.ReadingSource = (*checked)(nil)
)

// newChecked returns s with a digester for the digest want, if that is not "".
func newChecked(s gguf.Source, want string, fails *failure) *checked {
	c := &checked{Source: s, fails: fails}
	if want != "" {
		c.digest = newDigester(s, want, fails)
	}
	return c
}

// Reading asks for short ranges, since a digest needs bytes in order.
func (c *checked) Reading() gguf.Reading {
	if c.digest == nil || c.digest.ended.Load() {
		return gguf.Reading{}
	}
	return gguf.Reading{MaxRange: checkedRange}
}

// Range returns a reader that shows what it reads to the digester and the keeper.
func (c *checked) Range(ctx context.Context, off, n int64) io.ReadCloser {
	r := &watched{ReadCloser: c.Source.Range(ctx, off, n), c: c, off: off, from: off, end: off + n}
	if d := c.digest; d != nil && !d.ended.Load() {
		r.d = d
		d.mu.Lock()
		d.reading[r] = struct{}{}
		d.mu.Unlock()
	}
	return r
}

// Check compares the digest, and completes what the cache keeps.
func (c *checked) Check(ctx context.Context, whole bool) error {
	if !whole && !c.always {
		return nil
	}
	if c.keeper != nil {
		if err := c.keeper.complete(ctx, c); err != nil {
			return err
		}
	}
	if c.digest != nil {
		if err := c.digest.check(ctx); err != nil {
			return err
		}
	}
	if c.keeper != nil {
		return c.keeper.commit()
	}
	return nil
}

// Identity tells the file from others. See [Identify].
func (c *checked) Identity() Identity {
	var id Identity
	if s, ok := c.Source.(gguf.IdentifiedSource); ok {
		id = s.Identity()
	}
	if c.digest != nil && c.digest.ended.Load() {
		id.Checked = c.digest.err == nil
	}
	return id
}

// Close closes the source.
func (c *checked) Close() error {
	if c.digest != nil {
		c.digest.close()
	}
	err := c.Source.Close()
	if c.keeper != nil {
		err = errors.Join(err, c.keeper.close())
	}
	return err
}

// watched is a reader of a range whose bytes others see, too.
type watched struct {
	io.ReadCloser
	c   *checked
	d   *digester // nil: nobody needs the bytes
	off int64     // of the next byte
	buf *[pieceBytes]byte
	n   int // bytes in buf: those before off

	from, end int64 // what the digester is still to get; from is under its lock
}

// Read reads, and shows what it has read to the others.
func (w *watched) Read(b []byte) (int, error) {
	if err := w.c.fails.get(); err != nil {
		return 0, err
	}
	n, err := w.ReadCloser.Read(b)
	if k := w.c.keeper; k != nil && n > 0 {
		k.write(w.off, b[:n])
	}
	for rest := b[:n]; w.d != nil && len(rest) > 0; {
		if w.buf == nil {
			w.buf = pieces.Get().(*[pieceBytes]byte)
		}
		k := copy(w.buf[w.n:], rest)
		w.n += k
		rest = rest[k:]
		w.off += int64(k)
		if w.n == pieceBytes {
			w.flush()
		}
	}
	if w.d == nil {
		w.off += int64(n)
	}
	return n, err
}

// flush hands over what has been collected.
func (w *watched) flush() {
	if w.n > 0 {
		buf, n := w.buf, w.n
		w.buf, w.n = nil, 0
		w.d.add(piece{w.off - int64(n), buf[:n]})
		w.d.mu.Lock()
		w.from = w.off
		w.d.mu.Unlock()
	}
}

// Close ends reading. What was not read of the range, the digester may read itself.
func (w *watched) Close() error {
	if w.d != nil {
		w.flush()
		w.d.mu.Lock()
		delete(w.d.reading, w)
		w.d.kick()
		w.d.mu.Unlock()
		w.d = nil
	}
	return w.ReadCloser.Close()
}
