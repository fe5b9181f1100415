package gguf

import (
	"fmt"
	"math"
	"path/filepath"
	"strings"
	"testing"
)

// TestValueText: values print as a person would write them, and nothing in them drives a terminal.
func TestValueText(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("ä", 30) // 60 bytes
	var b strings.Builder
	w := NewWriter(&b, WriterOptions{})
	values := []struct {
		value any
		want  string
	}{
		{uint8(7), "7"},
		{int64(-7), "-7"},
		{float32(0.1), "0.1"},
		{math.Inf(1), "+Inf"},
		{true, "true"},
		{"a \"b\"\x1b[31m\n", `"a \"b\"\x1b[31m\n"`},
		{strings.Repeat("x", 300), `"` + strings.Repeat("x", 300) + `"`},
		{[]uint8{}, "[]"},
		{[]int16{-1, 2, 3, 4, 5}, "[-1, 2, 3, 4, 5]"},
		{[]int16{-1, 2, 3, 4, 5, 6}, "[-1, 2, 3, 4, 5, …] (6 int16s)"},
		{[]float32{0.1, 1e30}, "[0.1, 1e+30]"},
		{[]bool{true, false}, "[true, false]"},
		{[]uint64{math.MaxUint64}, "[18446744073709551615]"},
		{[]string{"<s>", "\x07", "c", "d", "e", "f"}, `["<s>", "\a", "c", "d", "e", …] (6 strings)`},
		{[]string{long}, `["` + long[:40] + `"… (60 bytes)]`},
		{[]string{"x" + long}, `["x` + long[:38] + `"… (61 bytes)]`}, // not in the midst of a letter
		{[]any{[]uint8{1}, []any{[]string{"x"}}, []bool{}}, `[[1], [["x"]], []]`},
	}
	for i, v := range values {
		w.Set(fmt.Sprintf("k%d", i), v.value)
	}
	w.WriteHeader()
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	p, err := parseBytes([]byte(b.String()))
	if err != nil {
		t.Fatal(err)
	}
	for i, v := range values {
		got, _ := p.Metadata().Get(fmt.Sprintf("k%d", i))
		for _, verb := range []string{"%v", "%s", "%+v", "%#v"} {
			if text := fmt.Sprintf(verb, got); text != v.want {
				t.Errorf("%v with %s prints %s, want %s", v.value, verb, text, v.want)
			}
		}
	}
	if text := fmt.Sprint(Value{}); text != "none" {
		t.Errorf("the zero Value prints %s", text)
	}
}

// TestMetadataText: metadata prints a line for each key. Its raw header does not show with any verb.
func TestMetadataText(t *testing.T) {
	t.Parallel()
	p, err := parseBytes(raw{keys: [][]byte{
		key("general.architecture", KindString, "llama"), key("llama.block_count", KindUint32, uint32(4)),
		key("a\x1b[2J", KindBool, true), key("template", KindString, strings.Repeat("x", 201)),
	}}.bytes())
	if err != nil {
		t.Fatal(err)
	}
	want := "general.architecture = \"llama\"\nllama.block_count = 4\n\"a\\x1b[2J\" = true\n" +
		"template = \"" + strings.Repeat("x", 200) + "\"… (201 bytes)\n"
	md := p.Metadata()
	for _, got := range []string{
		fmt.Sprint(md), fmt.Sprint(*md), fmt.Sprintf("%+v", md), fmt.Sprintf("%#v", md),
		md.String(),
	} {
		if got != want {
			t.Errorf("metadata prints\n%s\nwant\n%s", got, want)
		}
	}
	if got := fmt.Sprint(Metadata{}); got != "" {
		t.Errorf("the zero Metadata prints %q", got)
	}
}

// TestFileText: a file and its parts print as one line without their contents.
func TestFileText(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	writeParts(t, dir, threeParts())
	f := openFile(t, filepath.Join(dir, "m-00002-of-00003.gguf"))
	got := fmt.Sprintf("%v\n%+v", f, f.Parts()[1])
	want := fmt.Sprintf("%s (3 parts, 4 tensors, %d bytes)\n%s (GGUF version 3, 1 tensors, %d bytes)",
		filepath.Join(dir, "m-00001-of-00003.gguf"), f.Size(), filepath.Join(dir, "m-00002-of-00003.gguf"), f.Parts()[1].Size)
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// TestPathsInErrors: a path that could drive a terminal is quoted.
func TestPathsInErrors(t *testing.T) {
	t.Parallel()
	for path, want := range map[string]string{
		"a b.gguf": "a b.gguf: x", `C:\m.gguf`: `C:\m.gguf: x`, "вес.gguf": "вес.gguf: x", "e\x1b[31m": `"e\x1b[31m": x`,
		"e\u202e": `"e\u202e": x`, "e\xff": `"e\xff": x`, "": ": x",
	} {
		if got := (&FormatError{Path: path, Offset: -1, Err: fmt.Errorf("x")}).Error(); got != want {
			t.Errorf("the path %q gives %q, want %q", path, got, want)
		}
	}
}
