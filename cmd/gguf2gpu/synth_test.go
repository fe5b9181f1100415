package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

func tinyModel(types synthTypes) *synthModel {
	return &synthModel{shape: presets[0], types: types, seed: 3}
}

func ignoreProgress(int64, int64) {}

// TestSynthPresets compares the shapes with the models that they imitate: the numbers of weights, and of tensors of each
// type in their published Q4_K_M files.
func TestSynthPresets(t *testing.T) {
	tests := []struct {
		preset  string
		weights uint64
		types   map[gguf.Type]int
	}{
		{"llama-1b", 1_100_048_384, map[gguf.Type]int{gguf.F32: 45, gguf.Q4_K: 135, gguf.Q6_K: 21}},
		{"llama-7b", 6_738_415_616, map[gguf.Type]int{gguf.F32: 65, gguf.Q4_K: 193, gguf.Q6_K: 33}},
		{"llama-70b", 68_976_648_192, map[gguf.Type]int{gguf.F32: 161, gguf.Q4_K: 441, gguf.Q5_K: 40, gguf.Q6_K: 81}},
	}
	for _, tt := range tests {
		t.Run(tt.preset, func(t *testing.T) {
			s, err := parsePreset(tt.preset)
			if err != nil {
				t.Fatal(err)
			}
			var weights uint64
			types := map[gguf.Type]int{}
			for _, tensor := range (&synthModel{shape: s, types: mixQ4KM}).tensors() {
				elems := tensor.shape[0]
				for _, n := range tensor.shape[1:] {
					elems *= n
				}
				weights += elems
				types[tensor.typ]++
			}
			if weights != tt.weights {
				t.Errorf("%d weights, want %d", weights, tt.weights)
			}
			if diff := cmp.Diff(tt.types, types); diff != "" {
				t.Errorf("tensors of each type differ (-want +got):\n%s", diff)
			}
		})
	}
}

func TestSynthPresetsFitEveryBlock(t *testing.T) {
	for _, s := range presets {
		for _, tensor := range (&synthModel{shape: s, types: mixQ4KM}).tensors() {
			if tensor.shape[0]%256 != 0 {
				t.Errorf("%v: rows of %s have %d elements, want a multiple of 256", s, tensor.name, tensor.shape[0])
			}
		}
	}
}

// TestSynthEveryType writes a model of each type and reads it with the package's own reader.
func TestSynthEveryType(t *testing.T) {
	all := []synthTypes{mixQ4KM}
	for _, typ := range gguf.Types() {
		types, err := parseSynthTypes(typ.String())
		if (err != nil) != typ.Integer() {
			t.Errorf("parseSynthTypes(%v): %v", typ, err)
		}
		if err == nil {
			all = append(all, types)
		}
	}
	for _, types := range all {
		t.Run(types.name, func(t *testing.T) {
			model := tinyModel(types)
			path := filepath.Join(t.TempDir(), "m.gguf")
			f, err := os.Create(path)
			if err != nil {
				t.Fatal(err)
			}
			size, err := model.write(t.Context(), f, ignoreProgress)
			if err := errors.Join(err, f.Close()); err != nil {
				t.Fatal(err)
			}
			m, err := gguf.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer m.Close()
			if int64(m.Size()) != size {
				t.Errorf("the file has %d bytes, write said %d", m.Size(), size)
			}
			last := m.Tensors()[len(m.Tensors())-1]
			if want := (last.Offset + last.Size + 31) &^ 31; size != want {
				t.Errorf("the file has %d bytes, want %d: to the end of the last tensor, padded", size, want)
			}
			for i, want := range model.tensors() {
				got := m.Tensors()[i]
				if got.Name != want.name || got.Type != want.typ || got.Size != want.bytes() {
					t.Errorf("tensor %d is %s, %v, %d bytes; want %s, %v, %d bytes", i, got.Name, got.Type, got.Size,
						want.name, want.typ, want.bytes())
				}
			}
		})
	}
}

// TestSynthDeterministic: neither the number of cores nor the run changes the bytes.
func TestSynthDeterministic(t *testing.T) {
	write := func(cores int) []byte {
		defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(cores))
		var b bytes.Buffer
		if _, err := tinyModel(mixQ4KM).write(t.Context(), &b, ignoreProgress); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	if one, many := write(1), write(7); !bytes.Equal(one, many) {
		t.Error("1 and 7 cores give different files")
	}
}

// TestSynthLongTensor reads a tensor of several chunks back and compares it with one that is filled at once.
func TestSynthLongTensor(t *testing.T) {
	tensors := []synthTensor{
		{name: "a", typ: gguf.Q6_K, shape: []uint64{256, 50_000}}, // 10.5 MB
		{name: "b", typ: gguf.F32, shape: []uint64{256}, norm: true},
	}
	var got []byte
	err := synthesize(t.Context(), tensors, 5, func(r io.Reader) (err error) {
		got, err = io.ReadAll(r)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	var want []byte
	for i, tensor := range tensors {
		b := make([]byte, tensor.bytes())
		tensor.weights(mix(5+uint64(i+1)*golden)).fill(b, 0)
		want = append(want, b...)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("read %d bytes that differ from the %d that were to be made", len(got), len(want))
	}
}

// TestSynthStops ends a synthesis early, by an error of the disk and by a signal. Under synctest a goroutine that stays
// blocked is a failure.
func TestSynthStops(t *testing.T) {
	full := errors.New("disk is full")
	t.Run("disk full", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			model := &synthModel{shape: presets[1], types: mixQ4KM, seed: 1}
			_, err := model.write(t.Context(), &limitedWriter{left: 20_000_000, err: full}, ignoreProgress)
			if !errors.Is(err, full) {
				t.Errorf("got %v, want %v", err, full)
			}
		})
	})
	t.Run("canceled", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			model := &synthModel{shape: presets[1], types: mixQ4KM, seed: 1}
			_, err := model.write(ctx, io.Discard, func(done, _ int64) {
				if done > 50e6 {
					cancel()
				}
			})
			if !errors.Is(err, context.Canceled) {
				t.Errorf("got %v, want it canceled", err)
			}
		})
	})
}

// limitedWriter fails when it is full.
type limitedWriter struct {
	left int
	err  error
}

func (w *limitedWriter) Write(p []byte) (int, error) {
	if w.left -= len(p); w.left < 0 {
		return 0, w.err
	}
	return len(p), nil
}

func TestVocabulary(t *testing.T) {
	const n = 32000
	tokens, scores, types := vocabulary(n)
	if len(tokens) != n || len(scores) != n || len(types) != n {
		t.Fatalf("%d tokens, %d scores, %d types; want %d of each", len(tokens), len(scores), len(types), n)
	}
	seen := map[string]bool{}
	counts := map[int32]int{}
	for i, token := range tokens {
		if seen[token] || token == "" {
			t.Fatalf("token %d, %q, is empty or there twice", i, token)
		}
		seen[token] = true
		counts[types[i]]++
	}
	want := map[int32]int{tokenUnknown: 1, tokenControl: 2, tokenByte: 256, tokenNormal: n - 259}
	if !maps.Equal(counts, want) {
		t.Errorf("tokens of each type: %v, want %v", counts, want)
	}
}
