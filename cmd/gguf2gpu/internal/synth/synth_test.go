package synth

import (
	"bytes"
	"context"
	"errors"
	"io"
	"maps"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

func tinyModel(types Types) *Model {
	return &Model{Tiny, types, 3}
}

// TestPresets compares the shapes with the models that they imitate: the numbers of weights, and of tensors of each
// type in their published Q4_K_M files.
func TestPresets(t *testing.T) {
	t.Parallel()
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
			t.Parallel()
			var p Preset
			if err := p.UnmarshalText([]byte(tt.preset)); err != nil {
				t.Fatal(err)
			}
			var weights uint64
			types := map[gguf.Type]int{}
			for _, tensor := range (&Model{Preset: p, Types: Q4KM}).Tensors() {
				elems := tensor.Shape[0]
				for _, n := range tensor.Shape[1:] {
					elems *= n
				}
				weights += elems
				types[tensor.Type]++
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

func TestPresetsFitEveryBlock(t *testing.T) {
	t.Parallel()
	for _, p := range Presets() {
		for _, tensor := range (&Model{Preset: p, Types: Q4KM}).Tensors() {
			if tensor.Shape[0]%256 != 0 {
				t.Errorf("%v: rows of %s have %d elements, want a multiple of 256", p, tensor.Name, tensor.Shape[0])
			}
		}
	}
}

// TestEveryType writes a model of each type and reads it with the package's own reader.
func TestEveryType(t *testing.T) {
	t.Parallel()
	all := []Types{Q4KM}
	for _, typ := range gguf.Types() {
		var types Types
		err := types.UnmarshalText([]byte(typ.String()))
		if (err != nil) != typ.Integer() {
			t.Errorf("types by the name of %v: %v", typ, err)
		}
		if err == nil {
			all = append(all, types)
		}
	}
	for _, types := range all {
		t.Run(types.name, func(t *testing.T) {
			t.Parallel()
			model := tinyModel(types)
			path := filepath.Join(t.TempDir(), "m.gguf")
			f, err := os.Create(path)
			if err != nil {
				t.Fatal(err)
			}
			size, err := model.Write(t.Context(), f, nil)
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
			for i, want := range model.Tensors() {
				got := m.Tensors()[i]
				if got.Name != want.Name || got.Type != want.Type || got.Size != want.Bytes() {
					t.Errorf("tensor %d is %s, %v, %d bytes; want %s, %v, %d bytes", i, got.Name, got.Type, got.Size,
						want.Name, want.Type, want.Bytes())
				}
			}
		})
	}
}

// TestDeterministic writes a model with several numbers of cores: the bytes must be the same.
func TestDeterministic(t *testing.T) {
	t.Parallel()
	write := func(cores int) []byte {
		var b bytes.Buffer
		if _, err := tinyModel(Q4KM).write(t.Context(), &b, cores, nil); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	if one, many := write(1), write(7); !bytes.Equal(one, many) {
		t.Error("1 and 7 cores give different files")
	}
}

// TestLongTensor reads a tensor of several chunks back and compares it with one that is filled at once.
func TestLongTensor(t *testing.T) {
	t.Parallel()
	tensors := []Tensor{
		{Name: "a", Type: gguf.Q6_K, Shape: []uint64{256, 50_000}}, // 10.5 MB
		{Name: "b", Type: gguf.F32, Shape: []uint64{256}, norm: true},
	}
	var got []byte
	err := generate(t.Context(), tensors, 5, 2, func(r io.Reader) (err error) {
		got, err = io.ReadAll(r)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	var want []byte
	for i, tensor := range tensors {
		b := make([]byte, tensor.Bytes())
		tensor.weights(tensorSeed(5, i)).fill(b, 0)
		want = append(want, b...)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("read %d bytes that differ from the %d that were to be made", len(got), len(want))
	}
}

// TestStops ends the writing of a model early, by an error of the disk and by canceling the context. Under synctest a
// goroutine that stays blocked is a failure.
func TestStops(t *testing.T) {
	t.Parallel()
	full := errors.New("disk is full")
	t.Run("disk full", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			model := &Model{Llama1B, Q4KM, 1}
			_, err := model.Write(t.Context(), &limitedWriter{left: 20_000_000, err: full}, nil)
			if !errors.Is(err, full) {
				t.Errorf("got %v, want %v", err, full)
			}
		})
	})
	t.Run("canceled", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			model := &Model{Llama1B, Q4KM, 1}
			_, err := model.Write(ctx, io.Discard, func(done, _ int64) {
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
	t.Parallel()
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

// TestZeroModel refuses a model that says nothing.
func TestZeroModel(t *testing.T) {
	t.Parallel()
	for _, m := range []Model{{}, {Preset: Tiny}, {Types: Q4KM}} {
		if n, err := m.Write(t.Context(), io.Discard, nil); err == nil {
			t.Errorf("%+v: wrote %d bytes, want an error", m, n)
		}
	}
}

// TestFill fills whole blocks that depend on the seed.
func TestFill(t *testing.T) {
	t.Parallel()
	var a, b, c [18 * 7]byte
	Fill(a[:], gguf.Q4_0, 1)
	Fill(b[:], gguf.Q4_0, 1)
	Fill(c[:], gguf.Q4_0, 2)
	if a != b || a == c {
		t.Error("the same seed must give the same bytes, and another seed others")
	}
}

// TestProgress reports only sums that grow, up to the bytes of all tensors.
func TestProgress(t *testing.T) {
	t.Parallel()
	model := &Model{Small, Q4KM, 1}
	var last, want int64
	for _, tensor := range model.Tensors() {
		want += tensor.Bytes()
	}
	_, err := model.Write(t.Context(), io.Discard, func(done, total int64) {
		if done < last || total != want {
			t.Errorf("%d of %d bytes after %d; want more, of %d", done, total, last, want)
		}
		last = done
	})
	if err != nil || last != want {
		t.Errorf("%v, %d bytes at last; want %d", err, last, want)
	}
}
