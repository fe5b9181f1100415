package loader

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"lukechampine.com/blake3"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels"
	"github.com/gguf2gpu/gguf2gpu/loader/internal/read"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// ways are the ways in which bytes pass an inspector.
var ways = []struct {
	name string
	load loadFunc
	io   IO
}{
	{"auto", load, IOAuto}, {"direct", load, IODirect}, {"mmap", load, IOMapped}, {"sync", loadSync, IOAuto},
}

// sumFuncs are the hashes of bytes that are in one place.
var sumFuncs = map[HashAlgorithm]func([]byte) [HashSize]byte{SHA256: sha256.Sum256, BLAKE3: blake3.Sum256}

// TestHashes compares the hashes with those of the file's bytes.
func TestHashes(t *testing.T) {
	t.Parallel()
	for _, path := range []string{sample, allTypes, small} {
		m := openModel(t, path)
		want := make(map[HashAlgorithm]map[string][HashSize]byte)
		for with, sum := range sumFuncs {
			want[with] = make(map[string][HashSize]byte)
			for _, x := range m.Tensors() {
				want[with][x.Name] = sum(m.Data(&x))
			}
		}
		for _, way := range ways {
			for i, d := range plan.Policies() {
				with := HashAlgorithm((i + len(way.name)) % len(sumFuncs))
				t.Run(fmt.Sprintf("%s/%s/%v/%v", filepath.Base(path), way.name, d, with), func(t *testing.T) {
					t.Parallel()
					want := want[with]
					dev, _ := openDevice(t, soft.Options{})
					o := tight
					o.Policy, o.IO, o.Hash, o.HashWith, o.Check = d, way.io, true, with, path != allTypes
					w, err := way.load(t.Context(), m, o, dev)
					if err != nil {
						t.Fatal(err)
					}
					defer mustClose(t, w)
					got := w.Hashes()
					if len(got) != len(want) {
						t.Errorf("%d hashes, want %d", len(got), len(want))
					}
					for i, h := range got {
						if h.Sum != want[h.Name] || h.Name != w.Plan().Tensors()[i].Name {
							t.Errorf("%s: %x, want %x", h.Name, h.Sum, want[h.Name])
						}
					}
					if err := verify(t.Context(), w, m); err != nil {
						t.Error(err)
					}
				})
			}
		}
	}
}

// TestNoHashes: there are none unless they were asked for, and none of a load that is not over or has failed.
func TestNoHashes(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := openModel(t, sample)
		dev, sw := openDevice(t, soft.Options{})
		w, err := load(t.Context(), m, tight, dev)
		if err != nil {
			t.Fatal(err)
		}
		if w.Hashes() != nil {
			t.Error("hashes, although nobody wants any")
		}
		mustClose(t, w)

		o := tight
		o.Hash = true
		sw.Inject(soft.Fault{Func: "hipMemcpyAsync", N: 3, Stall: true})
		w = start(t.Context(), t, m, o, dev)
		if w.Hashes() != nil {
			t.Error("hashes of a load that is under way")
		}
		sw.ClearFaults()
		mustClose(t, w)
		if err := w.WaitAll(t.Context()); !errors.Is(err, ErrClosed) || w.Hashes() != nil {
			t.Errorf("hashes of a load that was closed, %v", err)
		}

		sw.Inject(soft.Fault{Func: "hipMemcpyAsync", N: 20, Code: amdhip.ErrUnknown})
		w = start(t.Context(), t, m, o, dev)
		if err := w.WaitAll(t.Context()); !errors.Is(err, amdhip.ErrUnknown) || w.Hashes() != nil {
			t.Errorf("hashes of a load that failed, %v", err)
		}
		mustClose(t, w)
	})
}

// TestRuns wants large tensors to begin a run each, so that hashing them is shared among workers, and all chunks in
// runs.
func TestRuns(t *testing.T) {
	t.Parallel()
	g := &planned(t, openModel(t, sample), options{Policy: plan.F32}).Groups[0]
	chunks := g.Cut(plan.CutOptions{Bytes: minChunk, Ramp: 4, Ordered: true})
	starts := hashRuns(chunks)
	for i := range g.Tensors {
		if x := &g.Tensors[i]; x.Bytes <= minChunk {
			continue
		}
		begins := slices.ContainsFunc(starts, func(n int) bool { return chunks[n].Segs[0].Tensor == i })
		if !begins {
			t.Errorf("no run begins with %s of %d bytes", g.Tensors[i].Name, g.Tensors[i].Bytes)
		}
	}
	if len(starts) == 0 || starts[0] != 0 {
		t.Errorf("runs begin at %v", starts)
	}
}

// spoil returns the path of a copy of the sample with b at byte at of a tensor.
func spoil(t *testing.T, name string, at int64, b []byte) string {
	t.Helper()
	data, err := os.ReadFile(sample)
	if err != nil {
		t.Fatal(err)
	}
	x, ok := openModel(t, sample).Tensor(name)
	if !ok {
		t.Fatalf("the sample has no tensor %q", name)
	}
	copy(data[x.Offset+at:x.Offset+x.Size], b)
	path := filepath.Join(t.TempDir(), "spoiled.gguf")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestCheck spoils one value of a model in several ways and loads it in all of them.
func TestCheck(t *testing.T) {
	t.Parallel()
	half := binary.LittleEndian.AppendUint16
	single := func(x float32) []byte { return binary.LittleEndian.AppendUint32(nil, math.Float32bits(x)) }
	m := openModel(t, sample)
	quantized, plain := "", "" // tensors of some chunks' length, if there are
	for _, x := range m.Tensors() {
		if x.Type == gguf.Q4_K && x.Size > 2*144 {
			quantized = x.Name
		}
		if x.Type == gguf.F32 {
			plain = x.Name
		}
	}
	for _, tt := range []struct {
		name     string
		tensor   string
		at       int64 // byte in the tensor
		bytes    []byte
		policies []plan.Policy // that find it
		want     string
	}{
		{"sound", plain, 0, nil, nil, ""},
		{"scale NaN", quantized, 144, half(nil, 0x7e01), plan.Policies(), "Q4_K block at byte 144 of its data, is NaN"},
		{"minimum infinite", quantized, 144 + 2, half(nil, 0xfc00), plan.Policies(), "Q4_K block at byte 144"},
		{"scale too large", quantized, 0, half(nil, 0x7bff), []plan.Policy{plan.F16}, "infinite as F16"},
		{"NaN", plain, 8, single(float32(math.NaN())), plan.Policies(), "element 2 of tensor"},
		{"infinite", plain, 4, single(float32(math.Inf(-1))), plan.Policies(), "is -Inf"},
		{"too large", plain, 0, single(65520), []plan.Policy{plan.F16}, "is 65520, which is infinite as F16"},
		{"large", plain, 0, single(65519), nil, ""},
		{"too large for BF16", plain, 0, single(math.MaxFloat32), []plan.Policy{plan.F16, plan.BF16}, "which is infinite as"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			m := openModel(t, spoil(t, tt.tensor, tt.at, tt.bytes))
			dev, sw := openDevice(t, soft.Options{})
			w, err := load(t.Context(), m, tight, dev)
			if err != nil {
				t.Fatalf("unchecked: %v", err)
			}
			mustClose(t, w)
			for _, way := range ways {
				for _, d := range plan.Policies() {
					o := tight
					o.Policy, o.IO = d, way.io
					o.Check = true
					w, err := way.load(t.Context(), m, o, dev)
					if !slices.Contains(tt.policies, d) {
						if err != nil {
							t.Fatalf("%s as %v: %v", way.name, d, err)
						}
						mustClose(t, w)
						continue
					}
					e, ok := errors.AsType[*ValueError](err)
					x, named := errors.AsType[*TensorError](err)
					if !ok || !named || w != nil || e.Tensor != tt.tensor || x.Op != "check" || !strings.Contains(err.Error(), tt.want) {
						t.Errorf("%s as %v: %v, want a ValueError with %q", way.name, d, err, tt.want)
					}
					wantBack(t, sw, resources{})
				}
			}
		})
	}
}

// TestCheckValues puts one NaN into the third block of a run that begins with the fifth block of its tensor.
func TestCheckValues(t *testing.T) {
	t.Parallel()
	src := make([]byte, 8*gguf.Q4_0.BlockBytes())
	p := &plan.Tensor{Tensor: &gguf.Tensor{Name: "x", Type: gguf.Q4_0}, Target: gguf.F16}
	if err := checkValues(p, 4*18, src); err != nil {
		t.Errorf("zeroes: %v", err)
	}
	binary.LittleEndian.PutUint16(src[2*18:], 0x7e00)
	err := checkValues(p, 4*18, src)
	e, ok := errors.AsType[*ValueError](err)
	if !ok || e.Tensor != "x" || e.Element != 6*32 || e.Offset != 6*18 || !math.IsNaN(e.Value) {
		t.Errorf("%v, want NaN as element %d at byte %d", err, 6*32, 6*18)
	}
	if x, ok := errors.AsType[*TensorError](err); !ok || x.Op != "check" || x.Offset != 6*18 || x.Bytes != 18 {
		t.Errorf("%v, want the block at byte %d", err, 6*18)
	}
}

// BenchmarkInspect is what a worker does: it reads a cached file, converts it, and looks at it. Bytes are the output's.
func BenchmarkInspect(b *testing.B) {
	const elems = 16 << 20
	for _, from := range []gguf.Type{gguf.F16, gguf.F32, gguf.Q4_0, gguf.Q8_0, gguf.Q4_K, gguf.Q6_K} {
		n, _ := from.Bytes(elems)
		data := make([]byte, n) // zeroes: fewer surprises than any other bytes, and no quicker
		path := filepath.Join(b.TempDir(), from.String())
		writeTensor(b, path, from, elems, data)
		m := openModel(b, path)
		for _, inspect := range []string{"none", "check", "sha256", "blake3"} {
			r := Request{Check: inspect == "check", Hash: inspect == "sha256" || inspect == "blake3"}
			if inspect == "blake3" {
				r.HashWith = BLAKE3
			}
			b.Run(fmt.Sprintf("type=%v/inspect=%s", from, inspect), func(b *testing.B) {
				ker, err := kernels.For(kernels.Auto)
				if err != nil {
					b.Fatal(err)
				}
				g := &planned(b, m, options{}).Groups[0]
				out := make([]byte, defaultChunk)
				b.SetBytes(2 * elems)
				for b.Loop() {
					chunks := g.Cut(plan.CutOptions{Bytes: len(out), Ordered: r.hashInOrder()})
					src, err := read.Open(m, g, chunks, read.Options{})
					if err != nil {
						b.Fatal(err)
					}
					fill := filler{group: g, kernels: ker, inspect: newInspector(g, r, newHashes(g, r))}
					reader := src.Reader(&fill, "worker")
					for i := range chunks {
						fill.begin(out[:chunks[i].Bytes], false, nil)
						if err := reader.Read(b.Context(), chunks[i].Segs, nil); err != nil {
							b.Fatal(err)
						}
					}
					reader.Close()
					src.Close()
				}
			})
		}
	}
}

// writeTensor writes a model of one tensor.
func writeTensor(tb testing.TB, path string, typ gguf.Type, elems uint64, data []byte) {
	tb.Helper()
	f, err := os.Create(path)
	if err != nil {
		tb.Fatal(err)
	}
	defer f.Close()
	w := gguf.NewWriter(f, gguf.WriterOptions{})
	if err := w.AddTensor("x", typ, elems); err != nil {
		tb.Fatal(err)
	}
	if err := errors.Join(w.WriteHeader(), w.WriteTensor("x", data), w.Close()); err != nil {
		tb.Fatal(err)
	}
}
