package gguf

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"runtime"
	"testing"
)

// allocated returns the bytes that the process has allocated so far. Tests that compare two of these numbers are not
// parallel, so that no other test allocates in between.
func allocated() uint64 {
	var s runtime.MemStats
	runtime.ReadMemStats(&s) // exact, unlike package metrics
	return s.TotalAlloc
}

// tryFile reads a file that may be anything. It must not panic; what it allocates is bounded by the file's size; what
// is refused is refused with a FormatError, and what is accepted is sound.
func tryFile(data []byte) error {
	limit := 1<<20 + 4*uint64(len(data)) // what SECURITY.md promises
	before := allocated()
	p, err := parseBytes(data)
	if n := allocated() - before; n > limit {
		return fmt.Errorf("%d bytes allocated for a file of %d", n, len(data))
	}
	if err == nil {
		return walk(p)
	}
	if _, ok := errors.AsType[*FormatError](err); !ok || err.Error() == "" {
		return fmt.Errorf("the error is no FormatError: %w", err)
	}
	return nil
}

func FuzzOpen(f *testing.F) {
	for _, h := range hostileFiles() {
		f.Add(h.data)
	}
	for _, name := range []string{"v2.gguf", "align8.gguf", "align64.gguf", "tiny-llama-00002-of-00003.header"} {
		f.Add(readFile(f, filepath.Join(goldenDir, name)))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := tryFile(data); err != nil {
			t.Error(err)
		}
	})
}

// interesting are byte values near the limits of what lengths, kinds and counts can be.
var interesting = []byte{0, 1, 2, 7, 8, 9, 0x7f, 0x80, 0xff}

// TestEveryByte changes every byte of a sound file's header, one at a time.
func TestEveryByte(t *testing.T) {
	for _, name := range []string{"v2.gguf", "align64.gguf"} {
		data := readFile(t, filepath.Join(goldenDir, name))
		p, err := parseBytes(data)
		if err != nil {
			t.Fatal(err)
		}
		for i := range p.DataOffset {
			was := data[i]
			for _, v := range append([]byte{was ^ 1, was ^ 0x80, was + 1}, interesting...) {
				data[i] = v
				if err := tryFile(data); err != nil {
					t.Fatalf("%s, byte %d changed to %#x: %v", name, i, v, err)
				}
			}
			data[i] = was
		}
	}
}

// TestMutations changes sound files at random, the same way in every run.
func TestMutations(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for name, rounds := range map[string]int{"v2.gguf": 4000, "align64.gguf": 4000, "all-types.gguf": 300} {
		whole := readFile(t, filepath.Join(goldenDir, name))
		p, err := parseBytes(whole)
		if err != nil {
			t.Fatal(err)
		}
		for round := range rounds {
			data := append([]byte(nil), whole...)
			for range 1 + rng.IntN(4) {
				data[rng.IntN(int(p.DataOffset))] = interesting[rng.IntN(len(interesting))]
			}
			if rng.IntN(4) == 0 {
				data = data[:rng.IntN(len(data))]
			}
			if err := tryFile(data); err != nil {
				t.Fatalf("%s, round %d: %v", name, round, err)
			}
		}
	}
}

// TestAllocationIsBounded feeds the records that cost most memory for their size.
func TestAllocationIsBounded(t *testing.T) {
	const n = 300_000
	short := func(i int) string {
		return string([]byte{byte(i/126/126%126) + 1, byte(i/126%126) + 1, byte(i%126) + 1})
	}
	r := raw{}
	for i := range n {
		r.keys = append(r.keys, key(short(i), KindUint8, uint8(0)))
	}
	// The most tensors for the fewest bytes: no alignment to speak of, one byte each.
	s := raw{keys: [][]byte{key(alignmentKey, KindUint32, uint32(1))}, data: n}
	for i := range n {
		s.infos = append(s.infos, info(short(i), I8, uint64(i), 1))
	}
	// The same without data: types of unknown size, and no dimensions.
	unsized := raw{}
	for i := range n {
		unsized.infos = append(unsized.infos, info(short(i), 99999, 0))
	}
	tokens := raw{keys: [][]byte{key("k", KindArray, uint32(KindString), uint64(n), make([]byte, 8*n))}}
	for name, data := range map[string][]byte{
		"keys": r.bytes(), "tensors": s.bytes(), "strings": tokens.bytes(),
		"tensors without data": unsized.bytes(),
	} {
		if _, err := parseBytes(data); err != nil {
			t.Fatalf("%s: %v", name, err) // or nothing is measured
		}
		if err := tryFile(data); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}
