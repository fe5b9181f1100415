package gguf

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
)

// memory is a Source in memory. It counts.
type memory struct {
	path   string
	data   []byte
	size   int64 // 0: that of data
	read   atomic.Int64
	open   atomic.Int32 // readers
	closed atomic.Int32
}

func (m *memory) Path() string { return m.path }

func (m *memory) Size() int64 {
	if m.size > 0 {
		return m.size
	}
	return int64(len(m.data))
}

func (m *memory) Range(ctx context.Context, off, n int64) io.ReadCloser {
	m.open.Add(1)
	if off < 0 || n <= 0 || off+n > m.Size() {
		return &memoryReader{m, ctx, iotestErr{fmt.Errorf("range of %d bytes at %d of %d", n, off, m.Size())}}
	}
	end := min(off+n, int64(len(m.data)))
	return &memoryReader{m, ctx, io.MultiReader(bytes.NewReader(m.data[min(off, end):end]), iotestErr{errGone})}
}

func (m *memory) Close() error { m.closed.Add(1); return nil }

var errGone = errors.New("gone")

type iotestErr struct{ err error }

func (e iotestErr) Read([]byte) (int, error) { return 0, e.err }

type memoryReader struct {
	m   *memory
	ctx context.Context
	r   io.Reader
}

func (r *memoryReader) Read(b []byte) (int, error) {
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	n, err := r.r.Read(b)
	r.m.read.Add(int64(n))
	return n, err
}

func (r *memoryReader) Close() error { r.m.open.Add(-1); return nil }

// headerOf reads the header of a Source, first bytes of it to begin with.
func headerOf(s *memory, first int64) (*Part, error) {
	p := &Part{Path: s.path, Size: s.Size(), source: s}
	if err := p.readHeader(context.Background(), first); err != nil {
		return p, err
	}
	_, err := newFile([]*Part{p})
	return p, err
}

// TestBeginnings: a header that is read piece by piece is judged as one that is there at once, down to the words. Only
// where things are beyond the limit of a header, what has not been read is not looked at.
func TestBeginnings(t *testing.T) {
	t.Parallel()
	files := hostileFiles()
	for _, name := range []string{"v2.gguf", "align8.gguf", "align64.gguf", "all-types.gguf"} {
		files = append(files, hostile{name: name, data: readFile(t, filepath.Join(goldenDir, name))})
	}
	for _, f := range files {
		want, wantErr := parseBytes(f.data)
		for _, first := range []int64{headerSize, 33, 100} {
			s := &memory{path: "x.gguf", data: f.data}
			got, err := headerOf(s, first)
			if fmt.Sprint(err) != fmt.Sprint(wantErr) {
				t.Errorf("%s, %d bytes at first: %v\nwant %v", f.name, first, err, wantErr)
			}
			if s.open.Load() != 0 {
				t.Errorf("%s: %d readers were not closed", f.name, s.open.Load())
			}
			if err == nil && (got.header != want.header || got.DataOffset != want.DataOffset ||
				len(got.tensors) != len(want.tensors)) {
				t.Errorf("%s, %d bytes at first: another header", f.name, first)
			}
		}
	}
}

// TestLyingSize: a file that claims to be huge, and has a header that claims to be, costs what was read and no more.
func TestLyingSize(t *testing.T) {
	many := raw{nkeys: uint64(1) << 50}
	for i := range 200 {
		many.keys = append(many.keys, key(fmt.Sprintf("%04d", i), KindUint8, uint8(0)))
	}
	tokens := raw{keys: [][]byte{key("k", KindArray, uint32(KindString), uint64(maxArray), make([]byte, 1<<10))}}
	numbers := raw{keys: [][]byte{key("k", KindArray, uint32(KindUint64), uint64(maxArray), make([]byte, 1<<10))}}
	for name, tt := range map[string]struct {
		data []byte
		want string
	}{
		"keys":    {many.bytes(), errGone.Error()},
		"tokens":  {tokens.bytes(), errGone.Error()},
		"numbers": {numbers.bytes(), "a header of more than"},
	} {
		s := &memory{path: "x.gguf", data: tt.data, size: 1 << 60}
		before := allocated()
		_, err := headerOf(s, 1<<10)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got %v, want an error with %q", name, err, tt.want)
		}
		if n := allocated() - before; n > 1<<20 {
			t.Errorf("%s: %d bytes allocated", name, n)
		}
	}
}

func TestOpenSource(t *testing.T) {
	t.Parallel()
	data := readFile(t, tinyLlama)
	s := &memory{path: "far://x", data: data}
	m, err := OpenSource(t.Context(), "x.gguf", func(_ context.Context, name string) (Source, error) {
		if name != "x.gguf" {
			t.Errorf("%s is opened", name)
		}
		return s, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	local := openFile(t, tinyLlama)
	if !m.Remote() || local.Remote() || m.Parts()[0].Info() != nil || m.Parts()[0].Bytes() != nil ||
		m.Parts()[0].Source() != s {
		t.Error("what is mapped and what is not is told wrongly")
	}
	if m.Size() != local.Size() || len(m.Tensors()) != len(local.Tensors()) || m.Architecture() != "llama" {
		t.Error("another model")
	}
	for i := range m.Tensors() {
		x := &m.Tensors()[i]
		if m.Data(x) != nil {
			t.Errorf("%s has data", x.Name)
		}
		r := m.Range(t.Context(), x, 1, x.Size-1)
		got := make([]byte, x.Size-1)
		if _, err := io.ReadFull(r, got); err != nil {
			t.Fatal(err)
		}
		r.Close()
		if !bytes.Equal(got, local.Data(&local.Tensors()[i])[1:]) {
			t.Errorf("%s differs", x.Name)
		}
	}
	mustPanic(t, func() { m.Range(t.Context(), &m.Tensors()[0], 1, m.Tensors()[0].Size) })
	for range 2 {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}
	if s.closed.Load() != 1 || s.open.Load() != 0 {
		t.Errorf("closed %d times, %d readers open", s.closed.Load(), s.open.Load())
	}
}

func mustPanic(t *testing.T, f func()) {
	t.Helper()
	defer func() {
		if recover() == nil {
			t.Error("no panic")
		}
	}()
	f()
}

// TestOpenSourceSplit opens a split model from any part, and closes what it opened when one is missing or wrong.
func TestOpenSourceSplit(t *testing.T) {
	t.Parallel()
	parts := threeParts()
	sources := map[string]*memory{}
	open := func(_ context.Context, name string) (Source, error) {
		s, ok := sources[name]
		if !ok {
			return nil, fmt.Errorf("far://%s: %w", name, fs.ErrNotExist)
		}
		return s, nil
	}
	fill := func(parts []*testPart) {
		clear(sources)
		for _, p := range parts {
			sources[p.name] = &memory{path: "far://" + p.name, data: p.bytes(t)}
		}
	}
	closed := func() (n int32) {
		for _, s := range sources {
			n += s.closed.Load()
		}
		return n
	}
	for i := range parts {
		fill(parts)
		m, err := OpenSource(t.Context(), parts[i].name, open)
		if err != nil {
			t.Fatal(err)
		}
		if len(m.Parts()) != 3 || len(m.Tensors()) != 4 || m.Parts()[1].Path != "far://"+parts[1].name {
			t.Errorf("%d parts, %d tensors, the second is %s", len(m.Parts()), len(m.Tensors()), m.Parts()[1].Path)
		}
		if m.Close(); closed() != 3 {
			t.Errorf("%d sources closed", closed())
		}
	}
	fill(parts[:2])
	_, err := OpenSource(t.Context(), parts[0].name, open)
	if !errors.Is(err, ErrSplit) || !errors.Is(err, fs.ErrNotExist) ||
		!strings.Contains(err.Error(), "far://"+parts[2].name) || closed() != 2 {
		t.Errorf("part 3 is missing: %v, %d sources closed", err, closed())
	}
	parts[2].keys[splitTensorsKey] = int32(9)
	fill(parts)
	if _, err := OpenSource(t.Context(), parts[1].name, open); !errors.Is(err, ErrSplit) || closed() != 3 {
		t.Errorf("wrong count: %v, %d sources closed", err, closed())
	}
}

func TestOpenSourceFails(t *testing.T) {
	t.Parallel()
	refused := errors.New("refused")
	_, err := OpenSource(t.Context(), "x.gguf", func(context.Context, string) (Source, error) { return nil, refused })
	if !errors.Is(err, refused) {
		t.Errorf("got %v", err)
	}
	s := &memory{path: "far://x", data: readFile(t, tinyLlama)[:100], size: 1 << 20}
	_, err = OpenSource(t.Context(), "x.gguf", func(context.Context, string) (Source, error) { return s, nil })
	if !errors.Is(err, errGone) || s.closed.Load() != 1 || s.open.Load() != 0 {
		t.Errorf("got %v, closed %d times, %d readers open", err, s.closed.Load(), s.open.Load())
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(refused)
	s = &memory{path: "far://x", data: readFile(t, tinyLlama)}
	_, err = OpenSource(ctx, "x.gguf", func(context.Context, string) (Source, error) { return s, nil })
	if !errors.Is(err, refused) || s.closed.Load() != 1 {
		t.Errorf("cancelled: %v, closed %d times", err, s.closed.Load())
	}
}
