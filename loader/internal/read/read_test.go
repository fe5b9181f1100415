package read

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// written is a model of random bytes: a large tensor, small ones, and such as slices are cut from.
func written(t *testing.T, large uint64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "made.gguf")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := gguf.NewWriter(f, gguf.WriterOptions{})
	all := []struct {
		name  string
		typ   gguf.Type
		shape []uint64
	}{
		{"token_embd.weight", gguf.Q8_0, []uint64{256, 103}},
		{"blk.0.attn_norm.weight", gguf.F32, []uint64{256}},
		{"blk.0.attn_output.weight", gguf.Q4_0, []uint64{1024, 256}},
		{"blk.0.ffn_up.weight", gguf.F32, []uint64{256, large / 1024}},
		{"blk.0.ffn_down.weight", gguf.Q8_0, []uint64{2048, 256}},
		{"blk.0.ffn_gate_exps.weight", gguf.F16, []uint64{64, 32, 8}},
		{"empty", gguf.I8, []uint64{0}},
		{"output_norm.weight", gguf.F32, []uint64{256}},
	}
	err = errors.Join(w.Set("general.architecture", "x"), w.Set("x.attention.head_count", uint32(8)))
	for _, x := range all {
		err = errors.Join(err, w.AddTensor(x.name, x.typ, x.shape...))
	}
	err = errors.Join(err, w.WriteHeader())
	rng := rand.New(rand.NewPCG(1, 2))
	for _, x := range all {
		elems := uint64(1)
		for _, n := range x.shape {
			elems *= n
		}
		n, _ := x.typ.Bytes(elems)
		data := make([]byte, n)
		for i := 0; i+8 <= len(data); i += 8 {
			binary.LittleEndian.PutUint64(data[i:], rng.Uint64())
		}
		err = errors.Join(err, w.WriteTensor(x.name, data))
	}
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return path
}

func open(t *testing.T, path string) *gguf.File {
	t.Helper()
	f, err := gguf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

// served is a file as a server has it. It counts requests, and lets them fail.
type served struct {
	data  []byte
	calls atomic.Int64
	fail  func(off int64, r io.Reader) io.Reader // nil: does not
}

func (s *served) Path() string { return "served.gguf" }
func (s *served) Size() int64  { return int64(len(s.data)) }
func (s *served) Close() error { return nil }

func (s *served) Range(_ context.Context, off, n int64) io.ReadCloser {
	s.calls.Add(1)
	var r io.Reader = bytes.NewReader(s.data[off : off+n])
	if s.fail != nil {
		r = s.fail(off, r)
	}
	return io.NopCloser(r)
}

// openServed opens the file at path as one that a server has.
func openServed(t *testing.T, path string) (*gguf.File, *served) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	s := &served{data: data}
	f, err := gguf.OpenSource(t.Context(), "served.gguf", func(context.Context, string) (gguf.Source, error) {
		return s, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return f, s
}

// group is the only group of a plan for f.
func group(t *testing.T, f *gguf.File, s plan.Spec) *plan.Group {
	t.Helper()
	p, err := plan.New(f, s, []uint64{1 << 40})
	if err != nil {
		t.Fatal(err)
	}
	return &p.Groups[0]
}

// taken is what the sinks of all workers got: the bytes of each tensor, as they are in the file, and how often each
// came.
type taken struct {
	group *plan.Group
	bytes [][]byte
	times [][]uint8
	looks bool // what Looks says
	fits  bool // whether rooms begin as far behind a page boundary as their bytes in the file

	mu  sync.Mutex
	err error // what was wrong
}

func newTaken(g *plan.Group) *taken {
	k := &taken{group: g}
	for i := range g.Tensors {
		k.bytes, k.times = append(k.bytes, make([]byte, g.Tensors[i].Size)), append(k.times, make([]uint8, g.Tensors[i].Size))
	}
	return k
}

func (k *taken) wrong(format string, args ...any) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.err = errors.Join(k.err, fmt.Errorf(format, args...))
}

// put takes bytes of a tensor from byte at on.
func (k *taken) put(tensor int, at int64, b []byte) {
	copy(k.bytes[tensor][at:], b)
	for i := range b {
		k.times[tensor][at+int64(i)]++
	}
}

// sink is one worker's. It fails with the error it has, in the call that is named.
type sink struct {
	*taken
	given  []given // rooms, since the last Flush
	failIn string
	fail   error
	calls  map[string]int
}

// given is the room of a segment.
type given struct {
	seg   *plan.Segment
	room  []byte
	parts int64 // bytes of seg that PutPart got
}

func newSink(k *taken) *sink { return &sink{taken: k, calls: make(map[string]int)} }

func (s *sink) result(call string) error {
	s.calls[call]++
	if call == s.failIn {
		return s.fail
	}
	return nil
}

func (s *sink) Put(seg *plan.Segment, src []byte) error {
	if len(src) != seg.SrcBytes {
		s.wrong("%d bytes for %+v", len(src), seg)
	}
	s.put(seg.Tensor, seg.Src, src)
	return s.result("Put")
}

func (s *sink) AsIs(seg *plan.Segment) bool {
	t := &s.group.Tensors[seg.Tensor]
	return t.Target == t.Type
}

func (s *sink) Room(seg *plan.Segment) ([]byte, error) {
	room := AlignedBytes(seg.DstBytes + directAlign)
	if t := &s.group.Tensors[seg.Tensor]; s.fits {
		at, _ := t.Span(seg.Src, int64(seg.SrcBytes))
		room = room[at%directAlign:]
	}
	room = room[:seg.DstBytes:seg.DstBytes]
	s.given = append(s.given, given{seg: seg, room: room})
	return room, s.result("Room")
}

// finish takes what was read into rooms.
func (s *sink) finish() {
	for _, g := range s.given {
		switch {
		case g.parts == 0 && s.AsIs(g.seg) && !s.looks:
			s.put(g.seg.Tensor, g.seg.Src, g.room)
		case g.parts != int64(g.seg.SrcBytes):
			s.wrong("%d bytes of %+v were put", g.parts, g.seg)
		}
	}
	s.given = s.given[:0]
}

func (s *sink) PutPart(seg *plan.Segment, at int64, dst, src []byte) error {
	block, out := s.group.Tensors[seg.Tensor].Block()
	i := slices.IndexFunc(s.given, func(g given) bool { return g.seg == seg })
	if i < 0 {
		s.wrong("a part of %+v, whose room was not asked for", seg)
		return s.result("PutPart")
	}
	if &src[0] == &dst[0] && (!s.AsIs(seg) || !s.looks) || len(src)%block != 0 || len(dst) != len(src)/block*out {
		s.wrong("%d bytes become %d of %+v", len(src), len(dst), seg)
	}
	if &dst[0] != &s.given[i].room[int(at-seg.Src)/block*out] {
		s.wrong("byte %d of %+v goes elsewhere", at, seg)
	}
	s.given[i].parts += int64(len(src))
	s.put(seg.Tensor, at, src)
	return s.result("PutPart")
}

func (s *sink) Looks() bool { return s.looks }

func (s *sink) Flush() error {
	s.finish()
	return s.result("Flush")
}

// readAll reads all chunks with some workers, each a run of chunks at a time, as a pipeline does.
func readAll(t *testing.T, src *Source, chunks []plan.Chunk, k *taken, workers int) {
	t.Helper()
	runs := make([]int, len(chunks)) // where each begins
	for i := range runs {
		runs[i] = i
	}
	if src.file.Remote() {
		runs = src.Requests(chunks)
	}
	var next atomic.Int64
	var all sync.WaitGroup
	errs := make([]error, workers)
	for w := range workers {
		all.Go(func() {
			s := newSink(k)
			r := src.Reader(s, fmt.Sprint("worker ", w))
			defer r.Close()
			for errs[w] == nil {
				i := int(next.Add(1)) - 1
				if i >= len(runs) {
					return
				}
				end := len(chunks)
				if i+1 < len(runs) {
					end = runs[i+1]
				}
				for c := runs[i]; c < end && errs[w] == nil; c++ {
					errs[w] = r.Read(t.Context(), chunks[c].Segs, chunks[c+1:end])
				}
			}
		})
	}
	all.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	checkTaken(t, k, src.file)
}

// checkTaken compares all bytes with those of the file, where the plan says that they are. Each must have come once.
func checkTaken(t *testing.T, k *taken, f *gguf.File) {
	t.Helper()
	if k.err != nil {
		t.Fatal(k.err)
	}
	for i := range k.group.Tensors {
		x := &k.group.Tensors[i]
		want := make([]byte, 0, x.Size)
		for off := int64(0); off < x.Size; {
			at, n := x.InFile(off)
			want = append(want, fileBytes(t, f, x.Part, at, n)...)
			off += n
		}
		if !bytes.Equal(k.bytes[i], want) {
			t.Fatalf("%s: other bytes than in the file", x.Name)
		}
		if n := slices.IndexFunc(k.times[i], func(n uint8) bool { return n != 1 }); n >= 0 {
			t.Fatalf("%s: byte %d came %d times", x.Name, n, k.times[i][n])
		}
	}
}

func fileBytes(t *testing.T, f *gguf.File, part int, at, n int64) []byte {
	t.Helper()
	p := f.Parts()[part]
	if s := p.Source(); s != nil {
		return s.(*served).data[at : at+n]
	}
	return p.Bytes()[at : at+n]
}
