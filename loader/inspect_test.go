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

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels"
)

// ways are the ways in which bytes pass an inspector.
var ways = []struct {
	name string
	load loadFunc
	io   IO
}{
	{"auto", Load, IOAuto}, {"direct", Load, IODirect}, {"mmap", Load, IOMapped}, {"sync", LoadSync, IOAuto},
}

// TestHashes compares the hashes with those of the file's bytes.
func TestHashes(t *testing.T) {
	for _, path := range []string{sample, "../testdata/gguf/all-types.gguf", small} {
		m := openModel(t, path)
		want := make(map[string][sha256.Size]byte)
		for _, x := range m.Tensors() {
			want[x.Name] = sha256.Sum256(m.Data(&x))
		}
		for _, way := range ways {
			for _, d := range DTypes() {
				t.Run(fmt.Sprintf("%s/%s/%v", filepath.Base(path), way.name, d), func(t *testing.T) {
					dev, _ := openDevice(t, amdhip.SoftwareOptions{})
					o := tight
					o.DType, o.IO, o.Hash, o.Check = d, way.io, true, path != "../testdata/gguf/all-types.gguf"
					w, err := way.load(t.Context(), dev, m, o)
					if err != nil {
						t.Fatal(err)
					}
					defer mustClose(t, w)
					got := w.Hashes()
					if len(got) != len(want) {
						t.Errorf("%d hashes, want %d", len(got), len(want))
					}
					for i, h := range got {
						if h.Sum != want[h.Name] || h.Name != w.plan.Tensors[i].Name {
							t.Errorf("%s: %x, want %x", h.Name, h.Sum, want[h.Name])
						}
					}
					if err := w.Verify(t.Context()); err != nil {
						t.Error(err)
					}
				})
			}
		}
	}
}

// TestNoHashes: there are none unless they were asked for, and none of a load that is not over or has failed.
func TestNoHashes(t *testing.T) {
	m := openModel(t, sample)
	dev, sw := openDevice(t, amdhip.SoftwareOptions{})
	w, err := Load(t.Context(), dev, m, tight)
	if err != nil {
		t.Fatal(err)
	}
	if w.Hashes() != nil {
		t.Error("hashes, although nobody wants any")
	}
	mustClose(t, w)

	o := tight
	o.Hash = true
	sw.Inject(amdhip.Fault{Func: "hipMemcpyAsync", N: 3, Stall: true})
	if w, err = Start(t.Context(), dev, m, o); err != nil {
		t.Fatal(err)
	}
	if w.Hashes() != nil {
		t.Error("hashes of a load that is under way")
	}
	sw.ClearFaults()
	mustClose(t, w)
	if errors.Is(w.WaitAll(t.Context()), ErrClosed) && w.Hashes() != nil {
		t.Error("hashes of a load that has failed")
	}
}

// TestRuns wants large tensors to begin a run each, so that hashing them is shared among workers, and all chunks in runs.
func TestRuns(t *testing.T) {
	m := openModel(t, sample)
	o := tight
	o.Hash, o.DType = true, F32
	p, err := NewPlan(m, o)
	if err != nil {
		t.Fatal(err)
	}
	chunks := p.cut(minChunk, 4, true)
	starts := runs(chunks)
	for i := range p.Tensors {
		if x := &p.Tensors[i]; x.Bytes <= minChunk {
			continue
		}
		begins := slices.ContainsFunc(starts, func(n int) bool { return chunks[n].segs[0].tensor == i })
		if !begins {
			t.Errorf("no run begins with %s of %d bytes", p.Tensors[i].Name, p.Tensors[i].Bytes)
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
		name   string
		tensor string
		at     int64 // byte in the tensor
		bytes  []byte
		dtypes []DType // that find it
		want   string
	}{
		{"sound", plain, 0, nil, nil, ""},
		{"scale NaN", quantized, 144, half(nil, 0x7e01), DTypes(), "Q4_K block at byte 144 of its data, is NaN"},
		{"minimum infinite", quantized, 144 + 2, half(nil, 0xfc00), DTypes(), "Q4_K block at byte 144"},
		{"scale too large", quantized, 0, half(nil, 0x7bff), []DType{F16}, "infinite as F16"},
		{"NaN", plain, 8, single(float32(math.NaN())), DTypes(), "element 2 of tensor"},
		{"infinite", plain, 4, single(float32(math.Inf(-1))), DTypes(), "is -Inf"},
		{"too large", plain, 0, single(65520), []DType{F16}, "is 65520, which is infinite as F16"},
		{"large", plain, 0, single(65519), nil, ""},
		{"too large for BF16", plain, 0, single(math.MaxFloat32), []DType{F16, BF16}, "which is infinite as"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := openModel(t, spoil(t, tt.tensor, tt.at, tt.bytes))
			dev, sw := openDevice(t, amdhip.SoftwareOptions{})
			w, err := Load(t.Context(), dev, m, tight)
			if err != nil {
				t.Fatalf("unchecked: %v", err)
			}
			mustClose(t, w)
			before := measure(sw)
			for _, way := range ways {
				for _, d := range DTypes() {
					o := tight
					o.DType, o.IO = d, way.io
					o.Check = true
					w, err := way.load(t.Context(), dev, m, o)
					if !slices.Contains(tt.dtypes, d) {
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
					wantBack(t, sw, before)
				}
			}
		})
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
		for _, inspect := range []string{"none", "check", "hash"} {
			o := Options{Check: inspect == "check", Hash: inspect == "hash"}
			b.Run(fmt.Sprintf("type=%v/inspect=%s", from, inspect), func(b *testing.B) {
				p, err := NewPlan(m, o)
				if err != nil {
					b.Fatal(err)
				}
				ker, err := kernels.For(kernels.Auto)
				if err != nil {
					b.Fatal(err)
				}
				out := make([]byte, p.opts.Chunk)
				b.SetBytes(2 * elems)
				for b.Loop() {
					chunks := p.cut(len(out), 0, true)
					src, err := newSource(p, chunks)
					if err != nil {
						b.Fatal(err)
					}
					fill := filler{plan: p, ker: ker, inspect: newInspector(p, newSums(p))}
					read := newReader(src, &fill, "worker")
					for i := range chunks {
						fill.begin(out[:chunks[i].bytes], false)
						if err := read.read(b.Context(), chunks[i].segs); err != nil {
							b.Fatal(err)
						}
					}
					src.close()
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
