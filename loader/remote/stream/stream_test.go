package stream

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/internal/fake"
)

// slow hides that a reader has other methods than Read.
type slow struct{ io.Reader }

// TestOpen: whatever a stream is like, its tensors come, once.
func TestOpen(t *testing.T) {
	t.Parallel()
	sample, err := os.ReadFile("../../../testdata/tiny-llama.gguf")
	if err != nil {
		t.Fatal(err)
	}
	large := fake.Model(3, 3<<20)
	for name, data := range map[string][]byte{"small": fake.Model(1, 320), "sample": sample, "large": large} {
		for how, r := range map[string]io.Reader{
			"at once": bytes.NewReader(data), "byte by byte": iotest.OneByteReader(bytes.NewReader(data)),
			"with its end": iotest.DataErrReader(bytes.NewReader(data)), "with more behind it": io.MultiReader(bytes.NewReader(data),
				strings.NewReader("more")),
		} {
			f, err := Open(t.Context(), slow{r}, "-")
			if err != nil {
				t.Errorf("%s, %s: %v", name, how, err)
				continue
			}
			if !f.Remote() || !f.Reading().Once || int64(f.Size()) > int64(len(data))+4 {
				t.Errorf("%s, %s: %s", name, how, f)
			}
			for i, x := range f.Tensors() {
				got, err := io.ReadAll(f.Range(t.Context(), &x, 0, x.Size))
				if err != nil || !bytes.Equal(got, data[x.Offset:x.Offset+x.Size]) {
					t.Errorf("%s, %s: tensor %d: %d bytes, %v", name, how, i, len(got), err)
				}
			}
			if name == "large" {
				x := &f.Tensors()[0]
				if _, err := f.Range(t.Context(), x, 2<<20, 1).Read(make([]byte, 1)); !errors.Is(err, ErrOnce) {
					t.Errorf("%s: bytes that have passed: %v", how, err)
				}
			}
			if err := f.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}

// TestSkips: what nobody wants may be left out.
func TestSkips(t *testing.T) {
	t.Parallel()
	data := fake.Model(3, 9<<20)
	f, err := Open(t.Context(), bytes.NewReader(data), "-")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	x := &f.Tensors()[0]
	for _, off := range []int64{3 << 20, 3<<20 + 10, 8 << 20} {
		got, err := io.ReadAll(f.Range(t.Context(), x, off, 10))
		if err != nil || !bytes.Equal(got, data[x.Offset+off:][:10]) {
			t.Errorf("at %d: %v, %v", off, got, err)
		}
	}
}

// TestBroken: a stream that ends early, fails or is something else is an error that says so.
func TestBroken(t *testing.T) {
	t.Parallel()
	data := fake.Model(3, 9<<20)
	broken := errors.New("broken")
	for what, tt := range map[string]struct {
		r  io.Reader
		is error
	}{
		"nothing": {strings.NewReader(""), gguf.ErrTruncated}, "a beginning": {bytes.NewReader(data[:20]), gguf.ErrTruncated},
		"a page": {strings.NewReader("<!doctype html><html></html>"), gguf.ErrNotGGUF}, "an error": {iotest.ErrReader(broken), broken},
		"an end in a short stream": {bytes.NewReader(fake.Model(1, 320)[:400]), gguf.ErrTruncated},
		"a part of a split":        {bytes.NewReader(fake.Split("m", 2, 320)["m-00001-of-00002.gguf"]), gguf.ErrSplit},
	} {
		if _, err := Open(t.Context(), slow{tt.r}, "-"); !errors.Is(err, tt.is) {
			t.Errorf("%s: %v, want %v", what, err, tt.is)
		}
	}
	for what, tt := range map[string]struct {
		rest io.Reader
		is   error
	}{"an end": {strings.NewReader(""), gguf.ErrTruncated}, "an error": {iotest.ErrReader(broken), broken}} {
		f, err := Open(t.Context(), slow{io.MultiReader(bytes.NewReader(data[:8<<20]), tt.rest)}, "-")
		if err != nil {
			t.Fatal(err)
		}
		x := &f.Tensors()[0]
		n, err := io.Copy(io.Discard, f.Range(t.Context(), x, 0, x.Size))
		if !errors.Is(err, tt.is) || n != 8<<20-x.Offset || !strings.HasPrefix(err.Error(), "-: ") {
			t.Errorf("%s: %v after %d bytes", what, err, n)
		}
		f.Close()
	}
}

// TestCancelled: a stream that does not go on holds nobody up, and what it brings later harms nobody.
func TestCancelled(t *testing.T) {
	t.Parallel()
	data := fake.Model(3, 9<<20)
	r, w := io.Pipe()
	defer w.Close()
	ctx, cancel := context.WithCancelCause(t.Context())
	go func() { // ends when the pipe is closed
		w.Write(data[:2<<20])
		cancel(io.ErrNoProgress)
		w.Write(data[2<<20:])
	}()
	f, err := Open(t.Context(), r, "-")
	if err != nil {
		t.Fatal(err)
	}
	x := &f.Tensors()[0]
	body := f.Range(ctx, x, 0, x.Size)
	if _, err := io.Copy(io.Discard, body); err != io.ErrNoProgress {
		t.Errorf("cancelled: %v", err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	if _, err := w.Write(data); err != io.ErrClosedPipe {
		t.Errorf("the stream is still open: %v", err)
	}
	if _, err := Open(ctx, bytes.NewReader(data), "-"); !errors.Is(err, io.ErrNoProgress) {
		t.Errorf("opening: %v", err)
	}
}

// counter is a Check that keeps what it is told.
type counter struct {
	bytes.Buffer
	err error
}

func (c *counter) Result() error { return c.err }

// TestChecked: who looks at a stream sees all of it, once and in order, whatever was read of it, and has the last word.
func TestChecked(t *testing.T) {
	t.Parallel()
	data := append(fake.Model(3, 3<<20), "more"...)
	wrong := errors.New("wrong")
	for _, share := range []int64{0, 1000, 3 << 20} {
		for _, want := range []error{nil, wrong} {
			c := &counter{err: want}
			f, err := OpenChecked(t.Context(), slow{bytes.NewReader(data)}, "-", c)
			if err != nil {
				t.Fatal(err)
			}
			x := &f.Tensors()[0]
			if _, err := io.ReadAll(f.Range(t.Context(), x, 0, share)); err != nil {
				t.Fatal(err)
			}
			if err := f.Check(t.Context(), false); !errors.Is(err, want) || !bytes.Equal(c.Bytes(), data) {
				t.Errorf("after %d bytes: %v, %d bytes were seen of %d", share, err, c.Len(), len(data))
			}
			if err := f.Close(); err != nil {
				t.Error(err)
			}
		}
	}
	c := &counter{}
	broken := errors.New("broken")
	model := fake.Model(3, 1<<20)
	r := io.MultiReader(bytes.NewReader(model[:len(model)-9]), iotest.ErrReader(broken))
	f, err := OpenChecked(t.Context(), r, "-", c)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Check(t.Context(), true); !errors.Is(err, broken) {
		t.Error(err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}
