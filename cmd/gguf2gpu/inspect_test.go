package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// modelFile describes a GGUF file for tests, of which anything may be odd.
type modelFile struct {
	keys    map[string]any // a string, or what binary.Append takes: the encoded value with its kind
	tensors []modelTensor
}

type modelTensor struct {
	name string
	kind gguf.Type
	dims []uint64
}

// write writes the file and returns its path. There are 4 KiB of data, and all tensors begin at the first byte.
func (m modelFile) write(t *testing.T, name string) string {
	t.Helper()
	text := func(s string) []byte { return append(binary.LittleEndian.AppendUint64(nil, uint64(len(s))), s...) }
	b := []byte("GGUF")
	add := func(values ...any) {
		for _, v := range values {
			var err error
			if s, ok := v.(string); ok {
				v = text(s)
			}
			if b, err = binary.Append(b, binary.LittleEndian, v); err != nil {
				t.Fatal(err)
			}
		}
	}
	add(uint32(3), uint64(len(m.tensors)), uint64(len(m.keys)))
	for _, key := range slices.Sorted(maps.Keys(m.keys)) {
		add(key)
		if s, ok := m.keys[key].(string); ok {
			add(uint32(gguf.KindString), s)
		} else {
			add(m.keys[key])
		}
	}
	for _, x := range m.tensors {
		add(x.name, uint32(len(x.dims)), x.dims, uint32(x.kind), uint64(0))
	}
	add(make([]byte, -len(b)&31), make([]byte, 4096))
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// array encodes an array for modelFile.
func array(kind gguf.ValueKind, n int, elements []byte) []byte {
	b := binary.LittleEndian.AppendUint32(nil, uint32(gguf.KindArray))
	b = binary.LittleEndian.AppendUint32(b, uint32(kind))
	return append(binary.LittleEndian.AppendUint64(b, uint64(n)), elements...)
}

// number encodes a uint32 for modelFile.
func number(n uint32) []byte {
	return binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, uint32(gguf.KindUint32)), n)
}

// runCommand runs a command that must do well, and returns what it prints on stdout.
func runCommand(t *testing.T, args ...string) string {
	t.Helper()
	var stdout, stderr bytes.Buffer
	if code := Main(t.Context(), args, nil, &stdout, &stderr); code != exitOK {
		t.Fatalf("%q: exit code %d\n%s", args, code, &stderr)
	}
	return stdout.String()
}

// control has characters that no command may print.
const control = "\x1b]0;x\x07\x7f\u009b\u202e\u2028\u2066"

// isHarmless fails if s has a character that drives a terminal.
func isHarmless(t *testing.T, s string) {
	t.Helper()
	bad := func(r rune) bool { return r != '\n' && r != '\t' && !strconv.IsPrint(r) }
	if i := strings.IndexFunc(s, bad); i >= 0 || !utf8.ValidString(s) {
		t.Errorf("raw control characters in %q", s[max(i-60, 0):])
	}
}

// TestInspectControlCharacters has them everywhere in a file, and in its name.
func TestInspectControlCharacters(t *testing.T) {
	t.Parallel()
	element := append(binary.LittleEndian.AppendUint64(nil, uint64(len(control))), control...)
	path := modelFile{
		keys: map[string]any{
			"general.architecture": control, "text": control, "list" + control: array(gguf.KindString, 1, element),
			"long": array(gguf.KindString, 20, bytes.Repeat(element, 20)),
		},
		tensors: []modelTensor{{"t" + control, gguf.F32, []uint64{32}}},
	}.write(t, "m"+control+".gguf")
	for _, flag := range []string{"--full", "--full=false"} {
		isHarmless(t, runCommand(t, "inspect", path, flag))
		out := runCommand(t, "inspect", path, flag, "--json")
		isHarmless(t, out)
		var got struct {
			Model    string
			Metadata struct {
				Text string
				Long any
			}
		}
		if err := json.Unmarshal([]byte(out), &got); err != nil || got.Model != path || got.Metadata.Text != control {
			t.Errorf("%v: %+v", err, got)
		}
	}
	for _, args := range [][]string{
		{"load", path, "--device", "soft"},
		{"load", path, "--device", "soft", "--plan"},
		{"verify", path + control},
		{"load", path, "--tensors", "none" + control},
		{"inspect", path, "--colour" + control},
		{"inspect" + control},
		{"load", path, "--dtype", control},
		{"load", path, "--device", "soft", "--readback", "/nowhere" + control + "/x"},
	} {
		var stdout, stderr bytes.Buffer
		Main(t.Context(), args, nil, &stdout, &stderr)
		isHarmless(t, stdout.String())
		isHarmless(t, stderr.String())
	}
}

// TestInspectSummary wants the lines that say what a model is.
func TestInspectSummary(t *testing.T) {
	t.Parallel()
	path := modelFile{
		keys: map[string]any{
			"general.architecture": "moe", "general.file_type": number(1024 + 15), "moe.block_count": number(48),
			"moe.attention.head_count": number(32), "moe.context_length": number(262144), "moe.expert_count": number(128),
			"moe.attention.head_count_kv": array(gguf.KindUint32, 3, []byte{0, 0, 0, 0, 4, 0, 0, 0, 2, 0, 0, 0}),
			"moe.expert_used_count":       number(8), "tokenizer.ggml.tokens": array(gguf.KindUint8, 300, make([]byte, 300)),
			"template": strings.Repeat("x", 100),
		},
		tensors: []modelTensor{
			{"a", gguf.Q8_0, []uint64{0, 5}},
			{"b", 31, []uint64{0}},
			{"c", 38, []uint64{32}},
			{"d", 99999, nil},
			{"e", gguf.Q4_0, []uint64{32}},
		},
	}.write(t, "m.gguf")
	out := runCommand(t, "inspect", path)
	for _, want := range []string{
		"quantization    Q4_K_M (guessed), 4.50 bits per weight\n",
		"shape           48 layers, 32 heads, 4 of keys and values, context 262144, vocabulary 300, 128 experts, 8 of them used at a time\n",
		"bytes on a device, by dtype, without 2 tensors of unknown size\n",
		"  Q4_0_4_4    1 tensors  0 bytes (0 B)    not a type of ggml; from: ggml, which has retired it\n",
		"  type 99999  1 tensors  size not known   not a type of ggml; from: unknown\n",
		"[0, 0, 0, 0, 0, …] (300 uint8s)\n", `"` + strings.Repeat("x", maxText) + "\"… (100 bytes)\n",
		"  e  Q4_0        32      part 0 at ", "  d  type 99999  scalar  part 0 at ", "  a  Q8_0        0 x 5 ",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("no line %q in\n%s", want, out)
		}
	}
	type total struct {
		Tensors, Unsized int
		Origin           string
	}
	var got struct {
		Quantization    string
		Bits            float64 `json:"bits_per_weight"`
		Hyperparameters shape
		Types           map[string]total
		Tensors         []struct {
			Name  string
			Bytes int64
		}
	}
	if err := json.Unmarshal([]byte(runCommand(t, "inspect", path, "--json", "--tensors", "[cde]")), &got); err != nil {
		t.Fatal(err)
	}
	if got.Quantization != "Q4_K_M (guessed)" || got.Bits != 4.5 || got.Hyperparameters.KVHeads != 4 || len(got.Tensors) != 3 {
		t.Errorf("%+v", got)
	}
	want := total{Tensors: 1, Unsized: 1, Origin: "unknown"}
	if diff := cmp.Diff(want, got.Types["type 99999"]); diff != "" {
		t.Errorf("types differ (-want +got):\n%s", diff)
	}
}

// TestInspectFails truncates the file while it is printed: --json ends with the error, in the same object.
func TestInspectFails(t *testing.T) {
	t.Parallel()
	if runtime.GOOS == "windows" {
		t.Skip("Windows does not let a mapped file be truncated")
	}
	path := modelFile{keys: map[string]any{"k": strings.Repeat("x", 1<<20)}}.write(t, "m.gguf")
	out := &truncating{path: path}
	var stderr bytes.Buffer
	if code := Main(t.Context(), []string{"inspect", path, "--json"}, nil, out, &stderr); code != exitBadModel {
		t.Errorf("exit code %d, want %d", code, exitBadModel)
	}
	var got failure
	if err := json.Unmarshal(out.Bytes(), &got); err != nil || got.Code != exitBadModel || !strings.Contains(got.Error, "truncated") {
		t.Errorf("%v: %+v in %.200q", err, got, out.String())
	}
	if !strings.Contains(stderr.String(), "truncated") {
		t.Errorf("stderr is %q", &stderr)
	}
}

// truncating truncates a file at the first write.
type truncating struct {
	bytes.Buffer
	path string
}

func (w *truncating) Write(b []byte) (int, error) {
	if w.Len() == 0 {
		if err := os.Truncate(w.path, 0); err != nil {
			return 0, err
		}
	}
	return w.Buffer.Write(b)
}
