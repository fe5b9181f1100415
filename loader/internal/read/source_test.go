package read

import (
	"fmt"
	"os"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
	"github.com/gguf2gpu/gguf2gpu/loader/trace"
)

// specs are plans of whole tensors as they are, of converted ones, and of slices in one piece and in many.
var specs = map[string]plan.Spec{
	"raw":     {Policy: plan.Raw},
	"f16":     {Policy: plan.F16},
	"slice 0": {Policy: plan.Raw, Shard: plan.Shard{Rank: 0, World: 4, By: plan.ShardTensors}},
	"slice 3": {Policy: plan.F32, Shard: plan.Shard{Rank: 3, World: 4, By: plan.ShardTensors}},
}

// TestTransports wants the same bytes whatever brings them: each byte of the plan once, and no other.
func TestTransports(t *testing.T) {
	t.Parallel()
	small := written(t, 1<<20)
	for name, spec := range specs {
		for _, mode := range []Mode{Auto, Mapped, Direct} {
			for _, bytes := range []int{plan.MinChunk, 300_000, 16 << 20} {
				for _, workers := range []int{1, 4} {
					t.Run(fmt.Sprintf("%s/mode %d/chunks of %d/%d workers", name, mode, bytes, workers), func(t *testing.T) {
						t.Parallel()
						f := open(t, small)
						g := group(t, f, spec)
						chunks := g.Cut(plan.CutOptions{Bytes: bytes, Ramp: 3})
						src, err := Open(f, g, chunks, Options{Mode: mode})
						if err != nil {
							t.Fatal(err)
						}
						defer src.Close()
						readAll(t, src, chunks, newTaken(g), workers)
						s := src.Stats()
						if s.Mapped+s.Direct != int64(g.ReadBytes) || s.Remote != 0 || s.Fetched < s.Direct {
							t.Errorf("%+v of %d bytes", s, g.ReadBytes)
						}
						if mode == Mapped && s.Direct != 0 || mode == Direct && s.Mapped != 0 {
							t.Errorf("mode %d: %+v", mode, s)
						}
						checkConsumed(t, src)
					})
				}
			}
		}
	}
}

// checkConsumed wants every window to be done with, and no file to be open.
func checkConsumed(t *testing.T, src *Source) {
	t.Helper()
	for _, p := range src.parts {
		for w := range p.windows {
			if n := p.windows[w].left.Load(); n != 0 {
				t.Errorf("%d segments of window %d are still to be read", n, w)
			}
		}
		if p.left.Load() != 0 || p.plain.file != nil || p.direct.file != nil {
			t.Errorf("a file is still open, %d segments are left", p.left.Load())
		}
	}
}

// TestSample reads a model with all its types in every way.
func TestSample(t *testing.T) {
	t.Parallel()
	const path = "../../../testdata/tiny-llama.gguf"
	for _, mode := range []Mode{Auto, Mapped, Direct} {
		f := open(t, path)
		g := group(t, f, plan.Spec{})
		chunks := g.Cut(plan.CutOptions{Bytes: plan.MinChunk, Ordered: true})
		src, err := Open(f, g, chunks, Options{Mode: mode})
		if err != nil {
			t.Fatal(err)
		}
		readAll(t, src, chunks, newTaken(g), 3)
		src.Close()
	}
	f, _ := openServed(t, path)
	g := group(t, f, plan.Spec{})
	chunks := g.Cut(plan.CutOptions{Bytes: plan.MinChunk})
	src, err := Open(f, g, chunks, Options{Threads: 2, Connections: 3})
	if err != nil {
		t.Fatal(err)
	}
	readAll(t, src, chunks, newTaken(g), 3)
	src.Close()
}

// TestWindows: what brings a window is decided once, and windows that are brought in different ways fit together.
func TestWindows(t *testing.T) {
	t.Parallel()
	path := written(t, 2*windowBytes+3<<20)
	f := open(t, path)
	for name, spec := range specs {
		g := group(t, f, spec)
		chunks := g.Cut(plan.CutOptions{Bytes: 1 << 20})
		src, err := Open(f, g, chunks, Options{Mode: Auto})
		if err != nil {
			t.Fatal(err)
		}
		p := src.parts[0]
		if want := (len(p.bytes) + windowBytes - 1) / windowBytes; len(p.windows) != want || want < 3 {
			t.Fatalf("%d windows, want %d", len(p.windows), want)
		}
		decided := make([]uint32, len(p.windows))
		for w := range p.windows { // as if every second one were not in the page cache
			decided[w] = byMapping + uint32(w%2)*(byDirectRead-byMapping)
			p.windows[w].transport.Store(decided[w])
		}
		readAll(t, src, chunks, newTaken(g), 2)
		for w := range p.windows {
			if got := p.windows[w].transport.Load(); got != decided[w] {
				t.Errorf("%s: window %d changed from %d to %d", name, w, decided[w], got)
			}
		}
		s := src.Stats()
		if s.Mapped+s.Direct != int64(g.ReadBytes) || spec.Shard.World == 0 && (s.Mapped == 0 || s.Direct == 0) {
			t.Errorf("%s: %+v of %d bytes", name, s, g.ReadBytes)
		}
		checkConsumed(t, src)
		src.Close()
	}
}

// TestTransport: a mapping that is in memory is used, and a mode that is asked for is kept to.
func TestTransport(t *testing.T) {
	t.Parallel()
	f := open(t, written(t, 1<<20))
	g := group(t, f, plan.Spec{})
	chunks := g.Cut(plan.CutOptions{Bytes: 1 << 20})
	sum := byte(0)
	for _, b := range f.Parts()[0].Bytes() { // now it is in memory
		sum += b
	}
	t.Log("sum of all bytes", sum)
	for mode, want := range map[Mode]uint32{Auto: byMapping, Mapped: byMapping, Direct: byDirectRead} {
		src, err := Open(f, g, chunks, Options{Mode: mode})
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if got := src.transport(src.parts[0], 0); got != want {
				t.Errorf("mode %d: %d, want %d", mode, got, want)
			}
		}
		src.Close()
	}
}

// TestDirectFetches: direct reads fetch what lies between the pieces of a slice, and say so.
func TestDirectFetches(t *testing.T) {
	t.Parallel()
	f := open(t, written(t, 1<<20))
	g := group(t, f, specs["slice 0"])
	chunks := g.Cut(plan.CutOptions{Bytes: 1 << 20})
	var tr trace.Trace
	src, err := Open(f, g, chunks, Options{Mode: Direct, Trace: &tr})
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	readAll(t, src, chunks, newTaken(g), 1)
	if s := src.Stats(); s.Fetched <= s.Direct+100_000 || s.Fetched > int64(f.Size()) {
		t.Errorf("%+v of a file of %d bytes", s, f.Size())
	}
	var b countingWriter
	if _, err := tr.WriteTo(&b); err != nil || b < 200 {
		t.Errorf("a trace of %d bytes, %v", b, err)
	}
}

type countingWriter int

func (w *countingWriter) Write(b []byte) (int, error) {
	*w += countingWriter(len(b))
	return len(b), nil
}

// TestTensor compares what Tensor returns with what the file has, for whole tensors and slices, near and far.
func TestTensor(t *testing.T) {
	t.Parallel()
	path := written(t, 1<<20)
	near := open(t, path)
	far, server := openServed(t, path)
	for name, spec := range specs {
		for _, f := range []*gguf.File{near, far} {
			k := newTaken(group(t, f, spec))
			var buf []byte
			for i := range k.group.Tensors {
				x := &k.group.Tensors[i]
				const step = 34 * 1000 // whole blocks of Q8_0, and pieces of rows
				for off := int64(0); off < x.Size; off += step {
					n := int(min(step, x.Size-off))
					before := server.calls.Load()
					b, err := Tensor(t.Context(), f, &buf, x, off, n)
					if err != nil || len(b) != n {
						t.Fatalf("%s: %s from %d: %d bytes, %v", name, x.Name, off, len(b), err)
					}
					if made := server.calls.Load() - before; f == far && made != 1 {
						t.Errorf("%d requests for %d bytes", made, n)
					}
					k.put(i, off, b)
					LetGo(f, x, off, n) // the bytes come again when they are wanted
				}
			}
			checkTaken(t, k, f)
		}
	}
}

// TestClosed: a file that was closed is an error, and no fault.
func TestClosed(t *testing.T) {
	t.Parallel()
	f, err := gguf.Open(written(t, 1<<20))
	if err != nil {
		t.Fatal(err)
	}
	x := &group(t, f, plan.Spec{}).Tensors[0]
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	var buf []byte
	if _, err := Tensor(t.Context(), f, &buf, x, 0, 34); err == nil {
		t.Error("a closed file was read")
	}
}

func TestOpenDirect(t *testing.T) {
	t.Parallel()
	path := written(t, 1<<20)
	f := open(t, path)
	d, err := OpenDirect(f.Parts()[0])
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	b := AlignedBytes(8192)
	if n, err := d.ReadAt(b, 4096); n != len(b) || err != nil {
		t.Fatal(n, err)
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(b) != string(want[4096:4096+8192]) {
		t.Error("other bytes")
	}
}
