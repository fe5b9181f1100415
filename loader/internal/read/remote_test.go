package read

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/iotest"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// TestRanges reads from a server in every way, with as many requests as were planned.
func TestRanges(t *testing.T) {
	t.Parallel()
	path := written(t, 2<<20)
	for name, spec := range specs {
		for _, bytes := range []int{plan.MinChunk, 300_000, 16 << 20} {
			for _, looks := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/chunks of %d/looks %v", name, bytes, looks), func(t *testing.T) {
					t.Parallel()
					f, server := openServed(t, path)
					g := group(t, f, spec)
					chunks := g.Cut(plan.CutOptions{Bytes: bytes})
					src, err := Open(f, g, chunks, Options{Threads: 2, Connections: 4})
					if err != nil {
						t.Fatal(err)
					}
					defer src.Close()
					before := server.calls.Load()
					k := newTaken(g)
					k.looks = looks
					readAll(t, src, chunks, k, 3)
					if s := src.Stats(); s.Remote != int64(g.ReadBytes) || s.Mapped+s.Direct+s.Fetched != 0 {
						t.Errorf("%+v of %d bytes", s, g.ReadBytes)
					}
					runs := int64(len(src.Requests(chunks)))
					if made := server.calls.Load() - before; made < runs || spec.Shard.World == 0 && made != runs {
						t.Errorf("%d requests for %d runs", made, runs)
					}
				})
			}
		}
	}
}

// TestRequests: runs of chunks are as long as one request may be, and shorter towards the end.
func TestRequests(t *testing.T) {
	t.Parallel()
	f, _ := openServed(t, written(t, 24<<20))
	g := group(t, f, plan.Spec{Policy: plan.Raw})
	chunks := g.Cut(plan.CutOptions{Bytes: 256 << 10})
	src, err := Open(f, g, chunks, Options{Threads: 1, Connections: 2})
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	starts := src.Requests(chunks)
	if starts[0] != 0 || !slices.IsSorted(starts) || starts[len(starts)-1] >= len(chunks) {
		t.Fatalf("runs begin at %v of %d", starts, len(chunks))
	}
	var lengths []int64
	for i, start := range starts {
		end := len(chunks)
		if i+1 < len(starts) {
			end = starts[i+1]
		}
		_, lo, _ := src.extent(&chunks[start].Segs[0])
		last := &chunks[end-1]
		_, _, hi := src.extent(&last.Segs[len(last.Segs)-1])
		lengths = append(lengths, hi-lo)
	}
	if most := slices.Max(lengths); most > maxRange || most < maxRange/2 {
		t.Errorf("the longest request is for %d bytes", most)
	}
	if k := len(lengths); lengths[k-1] > 2*minRange || lengths[k-2] > maxRange/2 {
		t.Errorf("requests for %v bytes", lengths)
	}
}

// TestBrokenRanges: a server that breaks off is an error with tensor and range.
func TestBrokenRanges(t *testing.T) {
	t.Parallel()
	reset := errors.New("connection reset")
	for _, x := range []struct {
		name string
		fail func(off int64, r io.Reader) io.Reader
		want error
	}{
		{"at once", func(int64, io.Reader) io.Reader { return iotest.ErrReader(reset) }, reset},
		{"in the midst", func(_ int64, r io.Reader) io.Reader {
			return io.MultiReader(io.LimitReader(r, 1000), iotest.ErrReader(reset))
		}, reset},
		{"too short", func(_ int64, r io.Reader) io.Reader { return io.LimitReader(r, 1000) }, io.ErrUnexpectedEOF},
		{"byte by byte", func(_ int64, r io.Reader) io.Reader { return iotest.OneByteReader(r) }, nil},
	} {
		f, server := openServed(t, written(t, 64<<10))
		server.fail = x.fail
		g := group(t, f, plan.Spec{Policy: plan.Raw})
		chunks := g.Cut(plan.CutOptions{Bytes: plan.MinChunk})
		src, err := Open(f, g, chunks, Options{}) // as if one thread were given
		if err != nil {
			t.Fatal(err)
		}
		err = first(t, src, chunks, newSink(newTaken(g)))
		e, ok := errors.AsType[*Error](err)
		if !errors.Is(err, x.want) || x.want != nil && (!ok || e.Tensor != "token_embd.weight" || e.Offset != 0) {
			t.Errorf("%s: %v, want %v", x.name, err, x.want)
		}
		var buf []byte
		_, err = Tensor(t.Context(), f, &buf, &g.Tensors[0], 0, int(g.Tensors[0].Size))
		if !errors.Is(err, x.want) {
			t.Errorf("%s: one tensor: %v, want %v", x.name, err, x.want)
		}
		src.Close()
	}
}

// TestAnyOrder: a reader that is given other chunks than those that were said to follow makes new requests.
func TestAnyOrder(t *testing.T) {
	t.Parallel()
	f, _ := openServed(t, written(t, 1<<20))
	for name, spec := range specs {
		g := group(t, f, spec)
		chunks := g.Cut(plan.CutOptions{Bytes: plan.MinChunk})
		src, err := Open(f, g, chunks, Options{})
		if err != nil {
			t.Fatal(err)
		}
		k := newTaken(g)
		r := src.Reader(newSink(k), "worker 0")
		for _, i := range rand.New(rand.NewPCG(5, 6)).Perm(len(chunks)) {
			if err := r.Read(t.Context(), chunks[i].Segs, chunks[i+1:]); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
		r.Close()
		checkTaken(t, k, f)
		src.Close()
	}
}

// TestMixed: a part that cannot be mapped is read by ranges, though the model's first part is mapped.
func TestMixed(t *testing.T) {
	t.Parallel()
	path := written(t, 1<<20)
	f := open(t, path)
	_, server := openServed(t, path)
	for name, spec := range specs {
		g := group(t, f, spec)
		chunks := g.Cut(plan.CutOptions{Bytes: plan.MinChunk})
		src, err := Open(f, g, chunks, Options{})
		if err != nil {
			t.Fatal(err)
		}
		src.parts[0].remote = server
		readAll(t, src, chunks, newTaken(g), 2)
		if s := src.Stats(); s.Remote != int64(g.ReadBytes) {
			t.Errorf("%s: %+v", name, s)
		}
		src.Close()
	}
}

// TestInherit: the memory of another reader is used again, and made anew where it is too small.
func TestInherit(t *testing.T) {
	t.Parallel()
	path := written(t, 1<<20)
	near := open(t, path)
	far, _ := openServed(t, path)
	old := new(Reader)
	for _, f := range []*gguf.File{near, far, near} {
		g := group(t, f, plan.Spec{Policy: plan.F16})
		chunks := g.Cut(plan.CutOptions{Bytes: plan.MinChunk})
		src, err := Open(f, g, chunks, Options{Mode: Direct, Threads: 1, Connections: 1})
		if err != nil {
			t.Fatal(err)
		}
		k := newTaken(g)
		r := src.Reader(newSink(k), "worker 0")
		r.Inherit(old)
		for i := range chunks {
			if err := r.Read(t.Context(), chunks[i].Segs, chunks[i+1:]); err != nil {
				t.Fatal(err)
			}
		}
		r.Close()
		checkTaken(t, k, f)
		old = r
		src.Close()
	}
}
