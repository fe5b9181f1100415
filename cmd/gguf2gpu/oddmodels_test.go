package main

import (
	"bytes"
	"encoding/binary"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// oddTensor is a tensor as other programs write them.
type oddTensor struct {
	name  string
	typ   gguf.Type
	shape []uint64
	bytes int
}

// oddTensors are those of a model without layers: names of up to 1,024 bytes, as diffusion models have them, no
// dimension at all, zeros among them, five as in video models, and eight.
func oddTensors() []oddTensor {
	return []oddTensor{
		{"scalar", gguf.F32, nil, 4},
		{"nothing", gguf.F32, []uint64{8, 0, 2}, 0},
		{"empty", gguf.F16, []uint64{0}, 0},
		{"model.diffusion_model." + strings.Repeat("n", 68), gguf.F16, []uint64{64, 3}, 2 * 64 * 3},
		{strings.Repeat("ä", 512), gguf.Q8_0, []uint64{32, 2}, 2 * 34},
		{"video", gguf.BF16, []uint64{4, 2, 2, 3, 5}, 2 * 240},
		{"eight", gguf.F32, []uint64{2, 1, 3, 1, 2, 1, 1, 2}, 4 * 24},
	}
}

// writeOdd writes a model with those tensors and metadata. The data of tensor i begins with the number i.
func writeOdd(t *testing.T, path string, keys map[string]any, tensors []oddTensor) (data map[string][]byte) {
	t.Helper()
	f, err := os.Create(path)
	must(t, err)
	defer f.Close()
	w := gguf.NewWriter(f, gguf.WriterOptions{})
	must(t, w.Set("general.architecture", "odd"))
	for key, v := range keys {
		must(t, w.Set(key, v))
	}
	for _, x := range tensors {
		must(t, w.AddTensor(x.name, x.typ, x.shape...))
	}
	must(t, w.WriteHeader())
	data = make(map[string][]byte)
	for i, x := range tensors {
		b := make([]byte, x.bytes)
		for k := range b { // no infinity, no NaN in any of the types
			b[k] = byte(i + k%7)
		}
		must(t, w.WriteTensor(x.name, b))
		data[x.name] = b
	}
	must(t, w.Close())
	return data
}

// TestOddModels loads, verifies, hashes, proves, plans and exports what other programs write, in every way.
func TestOddModels(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "odd.gguf")
	tensors := oddTensors()
	// What merging leaves: a count of 0 beside the other keys of a split.
	data := writeOdd(t, path, map[string]any{
		"split.count": uint16(0), "split.no": uint16(0), "split.tensors.count": int32(len(tensors)),
	}, tensors)
	for _, args := range [][]string{
		{"load", "--verify"},
		{"load", "--verify", "--dtype", "raw"},
		{"load", "--verify", "--dtype", "f32", "--check"},
		{"load", "--verify", "--sync"},
		{"load", "--verify", "--prove"},
		{"load", "--verify", "--io", "direct"},
		{"load", "--verify", "--device", "soft:3"},
		{"load", "--verify", "--device", "soft:2", "--split", "none"},
		{"load", "--verify", "--dequant", "gpu"},
		{"load", "--shard", "layer", "--rank", "1", "--world", "3", "--verify"},
		{"load", "--plan"},
		{"load", "--plan", "--device", "soft:3"},
		{"load", "--plan", "--shard", "layer", "--world", "2"},
		{"load", "--hash", filepath.Join(dir, "sums")},
		{"load", "--expect", filepath.Join(dir, "sums")},
		{"load", "--hash", "blake3:" + filepath.Join(dir, "b3")},
		{"verify"},
		{"inspect", "--full"},
		{"inspect", "--json"},
	} {
		if runtime.GOOS != "linux" && slices.Contains(args, "direct") {
			continue // there are no direct reads here
		}
		args = append(args, path)
		if args[0] != "inspect" {
			args = append(args, "--progress", "none")
			if !slices.Contains(args, "--device") {
				args = append(args, "--device", "soft")
			}
		}
		out := runCommand(t, args...)
		if slices.Contains(args, "--verify") && !slices.Contains(args, "--shard") && !strings.Contains(out, "verified: 7 of 7 tensors") {
			t.Errorf("%q says\n%s", args, out)
		}
	}
	for dtype, want := range map[string][]string{
		"raw": {"F32", "F32", "F16", "F16", "U8", "BF16", "F32"}, "f32": slices.Repeat([]string{"F32"}, 7),
	} {
		to := filepath.Join(dir, dtype+".safetensors")
		runCommand(t, "load", path, "--device", "soft", "--progress", "none", "--dtype", dtype, "--readback", to)
		f, err := readSafetensors(to)
		must(t, err)
		for i, x := range tensors {
			e, ok := f.tensors[x.name]
			shape := slices.Clone(x.shape)
			slices.Reverse(shape) // safetensors has the slowest dimension first
			if want[i] == "U8" {  // blocks of a type that safetensors does not have
				shape = []uint64{uint64(x.bytes)}
			}
			if !ok || e.DType != want[i] || !slices.Equal(e.Shape, shape) {
				t.Errorf("%s: %.30s is %+v, %t, want %s %v", dtype, x.name, e, ok, want[i], shape)
				continue
			}
			if dtype == "raw" && !bytes.Equal(f.bytes(e), data[x.name]) {
				t.Errorf("%.30s has other bytes", x.name)
			}
		}
		if dtype == "f32" {
			e := f.tensors["video"]
			got := math.Float32frombits(binary.LittleEndian.Uint32(f.bytes(e)))
			bits := uint32(binary.LittleEndian.Uint16(data["video"])) << 16
			if e.Offsets[1]-e.Offsets[0] != 4*240 || got != math.Float32frombits(bits) {
				t.Errorf("video begins with %g, want %g", got, math.Float32frombits(bits))
			}
		}
	}
}

// TestTypesOfForks: a model with types that ggml does not have is inspected, and loaded as it is where sizes are known.
// Else the error names the type and where it comes from.
func TestTypesOfForks(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "fork.gguf")
	data := writeOdd(t, path, nil, []oddTensor{
		{"norm", gguf.F32, []uint64{8}, 32},
		{"bitnet", 36, []uint64{128, 2}, 128*2/4 + 32},
		{"ik", 144, []uint64{256, 2}, 2 * (4 + 136)},
		{"retired", 31, []uint64{32, 4}, 4 * 18},
	})
	to := filepath.Join(dir, "fork.safetensors")
	for _, args := range [][]string{
		{"--verify"}, {"--sync", "--verify"}, {"--device", "soft:2", "--verify"}, {"--prove"}, {"--readback", to},
	} {
		args = append([]string{"load", path, "--device", "soft", "--dtype", "raw", "--progress", "none"}, args...)
		out := runCommand(t, args...)
		if slices.Contains(args, "--verify") && !strings.Contains(out, "verified: 4 of 4 tensors") {
			t.Errorf("%q says\n%s", args, out)
		}
	}
	f, err := readSafetensors(to)
	must(t, err)
	for name, want := range data {
		if e, ok := f.tensors[name]; !ok || !bytes.Equal(f.bytes(e), want) {
			t.Errorf("%s was not exported as it is in the file: %+v", name, e)
		}
	}
	text := runCommand(t, "inspect", path)
	for _, want := range []string{"I2_S", "BitNet", "IQ4_KS", "ik_llama.cpp", "Q4_0_4_4", "retired"} {
		if !strings.Contains(text, want) {
			t.Errorf("inspect does not say %q:\n%s", want, text)
		}
	}
	refused := func(want string, args ...string) {
		t.Helper()
		var stdout, stderr bytes.Buffer
		args = append([]string{"load", path, "--device", "soft", "--progress", "none"}, args...)
		code := Main(t.Context(), args, nil, &stdout, &stderr)
		if code != exitBadModel || !strings.Contains(stderr.String(), want) {
			t.Errorf("%q: exit code %d, want %d and %q\n%s", args, code, exitBadModel, want, &stderr)
		}
	}
	refused(`tensor "bitnet"`)
	refused("IQ4_KS", "--dtype", "f32", "--tensors", "ik|norm")
	refused("Q4_0_4_4", "--dtype", "bf16", "--tensors", "retired")
	runCommand(t, "load", path, "--device", "soft", "--progress", "none", "--dtype-for", "ik|bitnet|retired=raw", "--verify")
	// Of an unknown type nothing can be loaded, but the rest can.
	path = modelFile{
		keys:    map[string]any{"general.architecture": "x"},
		tensors: []modelTensor{{"a", 43, []uint64{8}}, {"b", gguf.F32, []uint64{8}}},
	}.write(t, "unknown.gguf")
	refused("type 43", "--dtype", "raw")
	runCommand(t, "load", path, "--device", "soft", "--progress", "none", "--dtype", "raw", "--tensors", "b")
}
