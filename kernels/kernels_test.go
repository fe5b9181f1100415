package kernels

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"unsafe"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// aligned returns n bytes that start offset bytes after a multiple of 64.
func aligned(n, offset int) []byte {
	b := make([]byte, n+offset+63)
	start := -int(uintptr(unsafe.Pointer(&b[0]))) & 63
	return b[start+offset:][:n:n]
}

// randomBlocks returns n blocks of random bytes: every scale is possible, infinities and NaNs too.
func randomBlocks(seed uint64, from gguf.Type, n int) []byte {
	r := rand.New(rand.NewPCG(seed, uint64(from)))
	b := make([]byte, n*from.BlockBytes())
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

// forEachPair runs f as a subtest for each pair of types that can be converted.
func forEachPair(t *testing.T, f func(t *testing.T, to, from gguf.Type)) {
	t.Helper()
	for _, from := range gguf.Types() {
		for _, to := range outputs {
			t.Run(fmt.Sprintf("%v-%v", from, to), func(t *testing.T) { f(t, to, from) })
		}
	}
}

// modes are the two ways to store.
var modes = map[string]func(k *Kernels, dst []byte, to gguf.Type, src []byte, from gguf.Type) error{
	"cached": (*Kernels).Dequantize,
	"NT":     (*Kernels).DequantizeNT,
}

// TestTiersAgree compares every tier with the generic code on random blocks: 1 to 70 blocks, and enough plain elements
// that every length of a ragged tail occurs.
func TestTiersAgree(t *testing.T) {
	t.Parallel()
	const maxBlocks = 70
	forEachTier(t, func(t *testing.T, k *Kernels) {
		forEachPair(t, func(t *testing.T, to, from gguf.Type) {
			lengths := maxBlocks
			if from.BlockElems() == 1 {
				lengths = 300
			}
			src := randomBlocks(1, from, lengths)
			perBlock := from.BlockElems() * to.BlockBytes()
			want := make([]byte, lengths*perBlock)
			out, _ := outputOf(to)
			generic(want, out, src, from)
			canonical(want, to)
			for mode, run := range modes {
				got := aligned(len(want), 0)
				for n := 1; n <= lengths; n++ {
					clear(got)
					if err := run(k, got[:n*perBlock], to, src[:n*from.BlockBytes()], from); err != nil {
						t.Fatal(err)
					}
					canonical(got, to)
					if i := firstDifference(got[:n*perBlock], want); i >= 0 {
						t.Fatalf("%s, %d blocks: byte %d, element %d of block %d: got % x, want % x", mode, n, i,
							i%perBlock/to.BlockBytes(), i/perBlock, element(got, i, to), element(want, i, to))
					}
				}
			}
		})
	})
}

// element returns the bytes of the element that byte i is part of.
func element(b []byte, i int, typ gguf.Type) []byte {
	size := typ.BlockBytes()
	return b[i/size*size:][:size]
}

// firstDifference returns the index of the first byte of a that b does not have there, -1 if a is a prefix of b.
func firstDifference(a, b []byte) int {
	if bytes.HasPrefix(b, a) {
		return -1
	}
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

// TestLongCall decodes more than fits one assembly call.
func TestLongCall(t *testing.T) {
	t.Parallel()
	forEachTier(t, func(t *testing.T, k *Kernels) {
		for _, from := range []gguf.Type{gguf.Q4_0, gguf.Q6_K, gguf.F32} {
			src := randomBlocks(2, from, 2*maxCall/from.BlockBytes()+3)
			got := canonical(dequantize(t, k, gguf.BF16, src, from), gguf.BF16)
			want := make([]byte, len(got))
			generic(want, outBF16, src, from)
			canonical(want, gguf.BF16)
			if i := firstDifference(got, want); i >= 0 {
				t.Errorf("%v: byte %d of %d differs", from, i, len(got))
			}
		}
	})
}

// TestMisalignment decodes from every source and to every destination offset within a cache line, and looks at the
// bytes on both sides of the destination.
func TestMisalignment(t *testing.T) {
	t.Parallel()
	const guard = 64
	forEachTier(t, func(t *testing.T, k *Kernels) {
		forEachPair(t, func(t *testing.T, to, from gguf.Type) {
			blocks := 3
			if from.BlockElems() == 1 {
				blocks = 131 // two steps of any kernel and a tail
			}
			want := dequantize(t, k, to, randomBlocks(3, from, blocks), from)
			canonical(want, to)
			offsets := func(srcOff, dstOff int) {
				src := aligned(blocks*from.BlockBytes(), srcOff)
				copy(src, randomBlocks(3, from, blocks))
				for mode, run := range modes {
					buf := aligned(guard+len(want)+guard, dstOff)
					for i := range buf {
						buf[i] = 0xa5
					}
					dst := buf[guard : guard+len(want)]
					if err := run(k, dst, to, src, from); err != nil {
						t.Fatal(err)
					}
					canonical(dst, to)
					if i := firstDifference(dst, want); i >= 0 {
						t.Fatalf("%s, source offset %d, destination offset %d: byte %d differs", mode, srcOff, dstOff, i)
					}
					for i, b := range buf {
						if b != 0xa5 && (i < guard || i >= guard+len(want)) {
							t.Fatalf("%s, source offset %d, destination offset %d: wrote outside, at byte %d of %d",
								mode, srcOff, dstOff, i-guard, len(want))
						}
					}
				}
			}
			for off := range 64 {
				offsets(off, 0)
				offsets(0, off)
				offsets(off, 63-off)
			}
		})
	})
}

func TestFillNT(t *testing.T) {
	t.Parallel()
	forEachTier(t, func(t *testing.T, k *Kernels) {
		for _, n := range []int{0, 1, 63, 255, 256, 257, 4096, 2*maxCall + 1000} {
			for _, offset := range []int{0, 1, 32} {
				buf := aligned(n+1, offset)
				k.FillNT(buf[:n], 0x5a)
				if i := firstDifference(buf[:n], bytes.Repeat([]byte{0x5a}, n)); i >= 0 {
					t.Errorf("%d bytes at offset %d: byte %d is %#x", n, offset, i, buf[i])
				}
				if buf[n] != 0 {
					t.Errorf("%d bytes at offset %d: wrote behind the end", n, offset)
				}
			}
		}
	})
}

func TestErrors(t *testing.T) {
	t.Parallel()
	k, err := For(Generic)
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 4096)
	for _, c := range []struct {
		name     string
		dst      []byte
		to       gguf.Type
		src      []byte
		from     gguf.Type
		want     error
		wantText string
	}{
		{"output type", buf[:18], gguf.Q4_0, buf[1024:1042], gguf.Q4_0, ErrUnsupported, "Q4_0 to Q4_0"},
		{"output integer", buf[:32], gguf.I8, buf[1024:1042], gguf.Q4_0, ErrUnsupported, "Q4_0 to I8"},
		{"retired type", buf[:128], gguf.F32, buf[1024:1042], gguf.Type(4), ErrUnsupported, "Q4_2"},
		{"unknown type", buf[:128], gguf.F32, buf[1024:1042], gguf.Type(250), ErrUnsupported, "type 250"},
		{"half a block", buf[:128], gguf.F32, buf[1024:1041], gguf.Q4_0, ErrLength, "17 bytes"},
		{"short destination", buf[:127], gguf.F32, buf[1024:1042], gguf.Q4_0, ErrLength, "127 bytes"},
		{"long destination", buf[:256], gguf.F32, buf[1024:1042], gguf.Q4_0, ErrLength, "decode to 128"},
		{"no destination", nil, gguf.F32, buf[1024:1042], gguf.Q4_0, ErrLength, "0 bytes"},
		{"in place", buf[:128], gguf.F32, buf[:18], gguf.Q4_0, ErrOverlap, "overlap"},
		{"source starts in destination", buf[:128], gguf.F32, buf[127:145], gguf.Q4_0, ErrOverlap, "overlap"},
		{"destination starts in source", buf[17:145], gguf.F32, buf[:18], gguf.Q4_0, ErrOverlap, "overlap"},
	} {
		t.Run(c.name, func(t *testing.T) {
			for mode, run := range modes {
				err := run(k, c.dst, c.to, c.src, c.from)
				if !errors.Is(err, c.want) || !strings.Contains(fmt.Sprint(err), c.wantText) {
					t.Errorf("%s: got error %v, want one that matches %q and contains %q", mode, err, c.want, c.wantText)
				}
			}
		})
	}
	if !bytes.Equal(buf, make([]byte, len(buf))) {
		t.Error("a refused call wrote")
	}
	for name, neighbours := range map[string][2][]byte{
		"source first":      {buf[18:146], buf[:18]},
		"destination first": {buf[:128], buf[128:146]},
		"empty":             {nil, nil},
	} {
		if err := k.Dequantize(neighbours[0], gguf.F32, neighbours[1], gguf.Q4_0); err != nil {
			t.Errorf("%s: got error %v for neighbours, want none", name, err)
		}
	}
}

func TestFor(t *testing.T) {
	supported := Supported()
	best := supported[len(supported)-1]
	for _, c := range []struct {
		env     string
		isa     ISA
		want    ISA
		wantErr string
	}{
		{"", Auto, best, ""},
		{"auto", Auto, best, ""},
		{"generic", Auto, Generic, ""},
		{"GENERIC", Auto, Generic, ""},
		{best.String(), Auto, best, ""},
		{"sse9", Auto, 0, envISA},
		{"generic", best, best, ""}, // the API comes before the environment
		{"sse9", Generic, Generic, ""},
		{"", ISA(77), 0, "ISA(77)"},
	} {
		t.Run(fmt.Sprintf("%s=%s,For(%v)", envISA, c.env, c.isa), func(t *testing.T) {
			t.Setenv(envISA, c.env)
			k, err := For(c.isa)
			switch {
			case c.wantErr != "":
				if err == nil || !strings.Contains(err.Error(), c.wantErr) {
					t.Errorf("got error %v, want one that contains %q", err, c.wantErr)
				}
			case err != nil:
				t.Error(err)
			case k.ISA() != c.want:
				t.Errorf("got %v, want %v", k.ISA(), c.want)
			}
		})
	}
}

func TestTier(t *testing.T) {
	t.Parallel()
	forEachTier(t, func(t *testing.T, k *Kernels) {
		for _, c := range []struct{ to, from gguf.Type }{{gguf.Q4_0, gguf.Q4_0}, {gguf.F32, gguf.Type(4)}} {
			if got := k.Tier(c.to, c.from); got != Auto {
				t.Errorf("%v to %v: got %v, want %v", c.from, c.to, got, Auto)
			}
		}
		forEachPair(t, func(t *testing.T, to, from gguf.Type) {
			if got := k.Tier(to, from); got < Generic || got > k.ISA() {
				t.Errorf("got %v, want one from %v to %v", got, Generic, k.ISA())
			}
		})
	})
}

func TestISAText(t *testing.T) {
	t.Parallel()
	for isa := range numISAs {
		text, err := isa.MarshalText()
		if err != nil || string(text) != isa.String() {
			t.Errorf("%v: text %q, %v", isa, text, err)
		}
		for _, name := range []string{string(text), strings.ToUpper(string(text))} {
			got := ISA(77)
			if err := got.UnmarshalText([]byte(name)); got != isa || err != nil {
				t.Errorf("%s: got %v, %v", name, got, err)
			}
		}
	}
	for _, name := range []string{"", "sse9", "avx2 "} {
		got := AVX2
		err := got.UnmarshalText([]byte(name))
		if err == nil || !strings.Contains(err.Error(), "auto, generic, avx2, avx512") || got != AVX2 {
			t.Errorf("%q: got %v, %v, want the names that there are", name, got, err)
		}
	}
	if text, err := ISA(77).MarshalText(); !errors.Is(err, ErrUnsupported) {
		t.Errorf("ISA(77): got %q, %v", text, err)
	}
}
