package loader

import (
	"errors"
	"math/rand/v2"
	"regexp"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
)

const sample = "../testdata/tiny-llama.gguf"

func openModel(t testing.TB, path string) *gguf.Model {
	t.Helper()
	m, err := gguf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

func TestParse(t *testing.T) {
	for _, d := range DTypes() {
		if got, err := ParseDType(strings.ToUpper(d.String())); err != nil || got != d {
			t.Errorf("ParseDType(%q) = %v, %v", strings.ToUpper(d.String()), got, err)
		}
	}
	if _, err := ParseDType("f12"); err == nil || !strings.Contains(err.Error(), "raw, f32, f16 or bf16") {
		t.Errorf("ParseDType of a wrong name: %v, want what is allowed", err)
	}
	r, err := ParseRule("a=b=bf16")
	if err != nil || r.Name.String() != "a=b" || r.DType != BF16 {
		t.Errorf("ParseRule = %v, %v; the last '=' divides", r, err)
	}
	for _, bad := range []string{"", "f16", "=f16", "x=", "x=q4_k", "(=f16"} {
		if _, err := ParseRule(bad); err == nil {
			t.Errorf("ParseRule(%q): no error", bad)
		}
	}
	for _, name := range []string{"auto", "mmap", "direct"} {
		if o, err := ParseIO(name); err != nil || o.String() != name {
			t.Errorf("ParseIO(%q) = %v, %v", name, o, err)
		}
	}
}

func TestOptions(t *testing.T) {
	for _, bad := range []Options{{Streams: -1}, {Threads: -1}, {Threads: 1 << 20}, {Chunk: 1}, {Staging: 1}, {Staging: 1 << 20, Chunk: 2 << 20}, {Stall: -1}} {
		if _, err := bad.withDefaults(); !errors.Is(err, ErrBadOption) {
			t.Errorf("%+v: %v, want ErrBadOption", bad, err)
		}
	}
	for _, o := range []Options{{}, {Threads: 100}, {Chunk: 1 << 28}, {Staging: 64 << 10}, {Staging: 100_000}, {Staging: 1 << 20}} {
		got, err := o.withDefaults()
		if err != nil || got.Threads == 0 || got.Streams == 0 || got.Chunk > int(got.Staging) || o.Staging != 0 && got.Staging != o.Staging {
			t.Errorf("%+v becomes %+v, %v", o, got, err)
		}
	}
}

// TestLargeLoads wants larger chunks for large loads that convert, and for nothing else.
func TestLargeLoads(t *testing.T) {
	m := openModel(t, sparse(t, 3, 1<<30)) // 6 GiB of F16
	for _, test := range []struct {
		o     Options
		chunk int
	}{
		{Options{DType: BF16}, 2 * defaultChunk},
		{Options{DType: F16}, defaultChunk}, // nothing to convert
		{Options{DType: Raw}, defaultChunk},
		{Options{DType: BF16, Tensors: regexp.MustCompile(`blk\.0`)}, defaultChunk},
		{Options{DType: BF16, Chunk: 1 << 20}, 1 << 20},
		{Options{DType: BF16, Staging: 64 << 20}, defaultChunk},
	} {
		p, err := NewPlan(m, test.o)
		if err != nil {
			t.Fatal(err)
		}
		p.grow(test.o)
		if p.opts.Chunk != test.chunk || p.opts.Staging < 2*int64(test.chunk) || p.opts.Staging > maxDefaultStaging {
			t.Errorf("%+v: chunks of %d bytes, %d staging; want chunks of %d", test.o, p.opts.Chunk, p.opts.Staging, test.chunk)
		}
	}
	p, err := NewPlan(m, Options{DType: BF16})
	if err != nil {
		t.Fatal(err)
	}
	for i := range p.Tensors {
		p.Tensors[i].expand = true
	}
	if p.grow(Options{DType: BF16}); p.opts.Chunk != defaultChunk {
		t.Errorf("the device converts: chunks of %d bytes, want %d", p.opts.Chunk, defaultChunk)
	}
}

func TestDTypeRules(t *testing.T) {
	m := openModel(t, sample)
	rules := []Rule{
		{regexp.MustCompile(`norm`), F32},
		{regexp.MustCompile(`^blk\.0\.`), Raw},
		{regexp.MustCompile(`attn`), BF16},
	}
	p, err := NewPlan(m, Options{Rules: rules})
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range p.Tensors {
		want := gguf.F16
		switch {
		case strings.Contains(x.Name, "norm"):
			want = gguf.F32
		case strings.HasPrefix(x.Name, "blk.0."):
			want = x.Type
		case strings.Contains(x.Name, "attn"):
			want = gguf.BF16
		}
		if x.Target != want {
			t.Errorf("%s (%v) becomes %v, want %v", x.Name, x.Type, x.Target, want)
		}
	}
	if F16.Target(gguf.I32) != gguf.I32 {
		t.Error("integers must stay as they are")
	}
}

func TestSelection(t *testing.T) {
	m := openModel(t, sample)
	p, err := NewPlan(m, Options{Tensors: regexp.MustCompile(`^blk\.2\.`)})
	if err != nil {
		t.Fatal(err)
	}
	if len(p.Tensors) == 0 || len(p.Tensors) == len(m.Tensors()) {
		t.Errorf("%d of %d tensors are selected", len(p.Tensors), len(m.Tensors()))
	}
	if _, err := NewPlan(m, Options{Tensors: regexp.MustCompile(`nothing`)}); err == nil {
		t.Error("a selection without tensors: no error")
	}
}

// TestLayout wants tensors aligned, inside their arena and apart from each other.
func TestLayout(t *testing.T) {
	m := openModel(t, sample)
	for _, d := range DTypes() {
		p, err := NewPlan(m, Options{DType: d})
		if err != nil {
			t.Fatal(err)
		}
		var end uint64
		arena := 0
		for _, x := range p.Tensors {
			if x.arena != arena {
				arena, end = x.arena, 0
			}
			if x.offset%deviceAlign != 0 || x.offset < end || x.offset+x.Bytes > p.arenas[x.arena] {
				t.Errorf("%v: %s at %d, %d bytes, in an arena of %d; the one before ends at %d", d, x.Name, x.offset, x.Bytes,
					p.arenas[x.arena], end)
			}
			end = x.offset + x.Bytes
		}
	}
}

// madeUp is a plan for made-up tensors, so that sizes no test file has can be tried.
func madeUp(rnd *rand.Rand, n int) *Plan {
	p := &Plan{}
	types := gguf.Types()
	var at int64
	for range n {
		typ := types[rnd.IntN(len(types))]
		elems := uint64(typ.BlockElems()) * (1 + rnd.Uint64N(1<<rnd.IntN(18)))
		t := &gguf.Tensor{Type: typ, Shape: []uint64{elems}, Offset: at}
		size, _ := typ.Bytes(elems)
		t.Size = int64(size)
		at += t.Size
		target := DTypes()[rnd.IntN(4)].Target(typ)
		bytes, _ := target.Bytes(elems)
		expand := target != typ && rnd.IntN(2) == 0
		p.Tensors = append(p.Tensors, PlannedTensor{Tensor: t, Target: target, Bytes: bytes, expand: expand})
	}
	p.layOut()
	return p
}

// TestCut wants every byte of every tensor in exactly one chunk, in order, in whole blocks, within the limit; what is to be
// expanded apart from the rest, and aligned on both sides.
func TestCut(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		p := madeUp(rnd, 1+rnd.IntN(60))
		size := 64<<10 + rnd.IntN(1<<20)
		src, dst := make([]int64, len(p.Tensors)), make([]uint64, len(p.Tensors))
		at := 0
		expand := rnd.IntN(4) > 0
		for i, c := range p.cut(size, rnd.IntN(20), expand) {
			read, end := 0, 0
			for _, s := range c.segs {
				x := p.Tensors[s.tensor]
				if s.tensor < at || s.tensor > at+1 {
					t.Fatalf("tensor %d follows tensor %d", s.tensor, at)
				}
				at = s.tensor
				blocks := int64(s.srcBytes / x.Type.BlockBytes())
				elems := uint64(blocks) * uint64(x.Type.BlockElems())
				want, _ := x.Target.Bytes(elems)
				if c.expand {
					want = uint64(s.srcBytes)
				}
				place := x.offset + p.tensorOffset(&s)
				switch {
				case s.srcBytes%x.Type.BlockBytes() != 0 || uint64(s.dstBytes) != want || blocks == 0:
					t.Fatalf("chunk %d, %v to %v: %d bytes become %d", i, x.Type, x.Target, s.srcBytes, s.dstBytes)
				case s.src != src[at] || p.tensorOffset(&s) != dst[at] || !c.expand && c.arena != x.arena:
					t.Fatalf("chunk %d, tensor %d: bytes %d to %d, want %d to %d", i, at, s.src, p.tensorOffset(&s), src[at], dst[at])
				case c.expand != (expand && x.expand):
					t.Fatalf("chunk %d, tensor %d: expanded %v", i, at, c.expand)
				case c.expand && (s.dst%deviceAlign != 0 || place%deviceAlign != 0):
					t.Fatalf("chunk %d: a kernel reads at %d and writes at %d", i, s.dst, place)
				case !c.expand && c.off+uint64(s.dst) != place:
					t.Fatalf("chunk %d, tensor %d: goes to %d, want %d", i, at, c.off+uint64(s.dst), place)
				case s.dst < end:
					t.Fatalf("chunk %d: segments overlap", i)
				}
				src[at] += int64(s.srcBytes)
				out, _ := x.Target.Bytes(elems)
				dst[at] += out
				read, end = read+s.srcBytes, s.dst+s.dstBytes
			}
			if end != c.bytes || c.bytes > size || read > size {
				t.Fatalf("chunk %d: %d bytes, segments end at %d, %d are read; the limit is %d", i, c.bytes, end, read, size)
			}
		}
		for i, x := range p.Tensors {
			if src[i] != x.Size || dst[i] != x.Bytes {
				t.Fatalf("tensor %d: %d of %d bytes become %d of %d", i, src[i], x.Size, dst[i], x.Bytes)
			}
		}
	}
}

func TestArenas(t *testing.T) {
	p := &Plan{}
	for _, n := range []uint64{3 << 30, 2 << 30, 5 << 30, 1, 1} {
		p.Tensors = append(p.Tensors, PlannedTensor{Tensor: &gguf.Tensor{Type: gguf.I8, Shape: []uint64{n}, Size: int64(n)}, Target: gguf.I8, Bytes: n})
	}
	if !p.layOut() {
		t.Fatal("does not fit")
	}
	want := []uint64{3 << 30, 2 << 30, 5 << 30, 2 * deviceAlign}
	if len(p.arenas) != len(want) {
		t.Fatalf("arenas %v, want %v", p.arenas, want)
	}
	for i := range want {
		if p.arenas[i] != want[i] {
			t.Errorf("arenas %v, want %v", p.arenas, want)
		}
	}
	for _, c := range p.cut(1<<20, 0, true) {
		if c.off+uint64(c.bytes) > p.arenas[c.arena] {
			t.Fatalf("a chunk of %d bytes at %d leaves arena %d", c.bytes, c.off, c.arena)
		}
	}
	huge := uint64(1) << 62
	p.Tensors[0].Bytes, p.Tensors[1].Bytes, p.Tensors[2].Bytes, p.DeviceBytes, p.arenas = huge, huge, huge, 0, nil
	if p.layOut() {
		t.Error("a sum of 3 * 2^62 bytes: no refusal")
	}
}

func TestInsufficientMemory(t *testing.T) {
	m := openModel(t, sample)
	raw, err := NewPlan(m, Options{DType: Raw})
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		memory  uint64
		fitting string
	}{
		{raw.DeviceBytes + 4096, "it would fit as raw"},
		{64 << 10, "no dtype fits"},
	} {
		rt, err := amdhip.OpenSoftware(amdhip.SoftwareOptions{Memory: test.memory})
		if err != nil {
			t.Fatal(err)
		}
		dev, err := rt.Device(0)
		if err != nil {
			t.Fatal(err)
		}
		for name, load := range map[string]loadFunc{"Load": Load, "LoadSync": LoadSync} {
			_, err := load(t.Context(), dev, m, Options{DType: F32})
			e, ok := errors.AsType[*InsufficientMemoryError](err)
			if !ok || !errors.Is(err, ErrInsufficientMemory) || !strings.Contains(err.Error(), test.fitting) || e.Needed <= e.Free {
				t.Errorf("%s into %d bytes: %v, want %q", name, test.memory, err, test.fitting)
			}
		}
		if n := rt.Software().Calls()["hipMalloc"]; n != 0 {
			t.Errorf("%d allocations before the check", n)
		}
		if err := rt.Close(); err != nil {
			t.Error(err)
		}
	}
}
