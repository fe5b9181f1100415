package gguf

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// rewrite copies a part through the Writer.
func rewrite(t testing.TB, m *File, part int) []byte {
	t.Helper()
	p := m.Parts()[part]
	var b bytes.Buffer
	w := NewWriter(&b, WriterOptions{Version: p.Version, Alignment: p.Alignment})
	for k, v := range p.Metadata().All() {
		w.Set(k, v)
	}
	for _, tensor := range m.Tensors() {
		if tensor.Part == part {
			w.AddTensor(tensor.Name, tensor.Type, tensor.Shape...)
		}
	}
	w.WriteHeader()
	for i, tensor := range m.Tensors() {
		switch {
		case tensor.Part != part:
		case i%2 == 0:
			w.WriteTensor(tensor.Name, m.Data(&tensor))
		default:
			w.CopyTensor(tensor.Name, bytes.NewReader(m.Data(&tensor)))
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestRewriteGolden: a file of ggml's, read and written again, is the same to the byte.
func TestRewriteGolden(t *testing.T) {
	t.Parallel()
	paths := []string{tinyLlama, filepath.Join(rebuildSplit(t), splitFile(2))}
	for _, name := range []string{"all-types.gguf", "align8.gguf", "align64.gguf", "align4096.gguf", "v2.gguf"} {
		paths = append(paths, filepath.Join(goldenDir, name))
	}
	for _, path := range paths {
		m := openFile(t, path)
		for i, p := range m.Parts() {
			if got, want := hash(rewrite(t, m, i)), hash(p.Bytes()); got != want {
				t.Errorf("%s: rewritten file has sha256 %s, want %s", p.Path, got, want)
			}
		}
	}
}

// everyKind has a value of each kind, and an array of each.
var everyKind = []struct {
	key   string
	value any
	texts []string // as arrayTexts and bitsText give them
}{
	{"u8", uint8(255), []string{"255"}},
	{"i8", int8(-128), []string{"-128"}},
	{"u16", uint16(65535), []string{"65535"}},
	{"i16", int16(-32768), []string{"-32768"}},
	{"u32", uint32(1 << 31), []string{"2147483648"}},
	{"i32", int32(-1), []string{"-1"}},
	{"u64", uint64(math.MaxUint64), []string{"18446744073709551615"}},
	{"i64", int64(math.MinInt64), []string{"-9223372036854775808"}},
	{"f32", float32(1.5), []string{"0x3fc00000"}},
	{"f64", math.Inf(-1), []string{"0xfff0000000000000"}},
	{"true", true, []string{"true"}},
	{"false", false, []string{"false"}},
	{"text", "größer\n", []string{"größer\n"}},
	{"no text", "", []string{""}},
	{"u8s", []uint8{0, 255}, []string{"0", "255"}},
	{"i8s", []int8{-1, 127}, []string{"-1", "127"}},
	{"u16s", []uint16{1}, []string{"1"}},
	{"i16s", []int16{-2, 2}, []string{"-2", "2"}},
	{"u32s", []uint32{1 << 31}, []string{"2147483648"}},
	{"i32s", []int32{-3}, []string{"-3"}},
	{"u64s", []uint64{1 << 63}, []string{"9223372036854775808"}},
	{"i64s", []int64{-4}, []string{"-4"}},
	{"f32s", []float32{0, -1}, []string{"0x00000000", "0xbf800000"}},
	{"f64s", []float64{1}, []string{"0x3ff0000000000000"}},
	{"bools", []bool{true, false}, []string{"true", "false"}},
	{"texts", []string{"", "a", "bc"}, []string{"", "a", "bc"}},
	{"empty", []string{}, []string{}},
}

func TestRoundTrip(t *testing.T) {
	t.Parallel()
	for _, version := range []uint32{2, 3} {
		for _, alignment := range []uint32{1, 8, 32, 64, 4096} {
			t.Run(fmt.Sprintf("v%d/align=%d", version, alignment), func(t *testing.T) {
				testRoundTrip(t, WriterOptions{Version: version, Alignment: alignment})
			})
		}
	}
}

func testRoundTrip(t *testing.T, o WriterOptions) {
	var b bytes.Buffer
	w := NewWriter(&b, o)
	for _, k := range everyKind {
		w.Set(k.key, k.value)
	}
	w.Set("nested", []any{[]uint8{1, 2}, []any{[]string{"x"}}, []float64{}})
	data := make(map[string][]byte)
	for i, typ := range Types() {
		shape := []uint64{uint64(typ.BlockElems()), 3, 1, 2}[:1+i%4]
		w.AddTensor(typ.String(), typ, shape...)
		n, _ := typ.Bytes((&Tensor{Shape: shape}).Elems())
		data[typ.String()] = bytes.Repeat([]byte{byte(i + 1)}, int(n))
	}
	w.WriteHeader()
	for _, typ := range Types() {
		w.WriteTensor(typ.String(), data[typ.String()])
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}

	m := openFile(t, writeFile(t, filepath.Join(t.TempDir(), "m.gguf"), b.Bytes()))
	p, md := m.Parts()[0], m.Metadata()
	if p.Version != o.Version || p.Alignment != o.Alignment {
		t.Errorf("version %d, alignment %d; want %d, %d", p.Version, p.Alignment, o.Version, o.Alignment)
	}
	for _, k := range everyKind {
		v, _ := md.Get(k.key)
		got := []string{bitsText(v)}
		if v.Kind() == KindArray {
			got = arrayTexts(v)
		}
		if diff := cmp.Diff(k.texts, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", k.key, diff)
		}
	}
	nested, _ := md.Get("nested")
	var got []string
	for _, a := range nested.Arrays() {
		got = append(got, a.String(), fmt.Sprint(arrayTexts(a)))
		for _, b := range a.Arrays() {
			got = append(got, b.String(), fmt.Sprint(arrayTexts(b)))
		}
	}
	want := []string{"[1, 2]", "[1 2]", `[["x"]]`, "[]", `["x"]`, "[x]", "[]", "[]"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("nested (-want +got):\n%s", diff)
	}
	if len(m.Tensors()) != len(Types()) {
		t.Errorf("%d tensors, want %d", len(m.Tensors()), len(Types()))
	}
	for i := range m.Tensors() {
		tensor := &m.Tensors()[i]
		if tensor.Type.String() != tensor.Name || !bytes.Equal(m.Data(tensor), data[tensor.Name]) {
			t.Errorf("tensor %q of type %v: other data than written", tensor.Name, tensor.Type)
		}
	}
	if !bytes.Equal(rewrite(t, m, 0), b.Bytes()) {
		t.Error("the file, read and written again, differs")
	}
}

// brokenPipe fails after n bytes.
type brokenPipe struct{ n int }

func (b *brokenPipe) Write(p []byte) (int, error) {
	if len(p) > b.n {
		return 0, io.ErrClosedPipe
	}
	b.n -= len(p)
	return len(p), nil
}

func TestWriterRefuses(t *testing.T) {
	t.Parallel()
	header := func(w *Writer) {
		w.AddTensor("a", F32, 2)
		w.AddTensor("b", F32, 2)
		w.WriteHeader()
	}
	eight := make([]byte, 8)
	tests := []struct {
		name string
		opts WriterOptions
		use  func(w *Writer)
		want string
	}{
		{name: "version 1", opts: WriterOptions{Version: 1}, use: func(w *Writer) {}, want: "version 1"},
		{name: "alignment 3", opts: WriterOptions{Alignment: 3}, use: func(w *Writer) {}, want: "alignment 3"},
		{name: "int", use: func(w *Writer) { w.Set("k", 1) }, want: `key "k": a value of type int`},
		{name: "nil", use: func(w *Writer) { w.Set("k", nil) }, want: "type <nil>"},
		{name: "empty Value", use: func(w *Writer) { w.Set("k", Value{}) }, want: "empty"},
		{name: "scalar in []any", use: func(w *Writer) { w.Set("k", []any{uint8(1)}) }, want: "type uint8"},
		{name: "empty key", use: func(w *Writer) { w.Set("", true) }, want: "key"},
		{name: "long key", use: func(w *Writer) { w.Set(strings.Repeat("k", 65536), true) }, want: "65536 bytes"},
		{name: "key not UTF-8", use: func(w *Writer) { w.Set("\xff", true) }, want: "UTF-8"},
		{name: "key with NUL", use: func(w *Writer) { w.Set("\x00", true) }, want: "NUL"},
		{name: "key twice", use: func(w *Writer) { w.Set("k", true); w.Set("k", true) }, want: "twice"},
		{name: "other alignment", use: func(w *Writer) { w.Set(alignmentKey, uint32(64)) }, want: "alignment"},
		{name: "alignment as uint64", use: func(w *Writer) { w.Set(alignmentKey, uint64(32)) }, want: "alignment"},
		{
			name: "key after the header",
			use:  func(w *Writer) { w.WriteHeader(); w.Set("k", true) }, want: "after the header",
		},
		{
			name: "tensor name of 1025 bytes",
			use:  func(w *Writer) { w.AddTensor(strings.Repeat("n", 1025), F32, 1) }, want: "1025 bytes",
		},
		{
			name: "tensor twice",
			use:  func(w *Writer) { w.AddTensor("a", F32, 1); w.AddTensor("a", F32, 1) }, want: "twice",
		},
		{
			name: "9 dimensions",
			use:  func(w *Writer) { w.AddTensor("a", F32, 1, 1, 1, 1, 1, 1, 1, 1, 1) }, want: `tensor "a": 9 dimensions`,
		},
		{name: "broken rows", use: func(w *Writer) { w.AddTensor("a", Q4_K, 100) }, want: "whole blocks"},
		{name: "retired type", use: func(w *Writer) { w.AddTensor("a", 4, 32) }, want: "type 4 is Q4_2"},
		{name: "unknown type", use: func(w *Writer) { w.AddTensor("a", 43, 32) }, want: "type 43 is not known"},
		{
			name: "too much data",
			use:  func(w *Writer) { w.AddTensor("a", I8, 1<<62); w.AddTensor("b", I8, 1<<62) }, want: "2^63",
		},
		{
			name: "tensor after the header",
			use:  func(w *Writer) { w.WriteHeader(); w.AddTensor("a", F32, 1) }, want: "after the header",
		},
		{name: "header twice", use: func(w *Writer) { w.WriteHeader(); w.WriteHeader() }, want: "twice"},
		{
			name: "data before the header",
			use:  func(w *Writer) { w.AddTensor("a", F32, 2); w.WriteTensor("a", eight) }, want: "before",
		},
		{
			name: "wrong order",
			use:  func(w *Writer) { header(w); w.WriteTensor("b", eight) }, want: `when that of tensor "a" is due`,
		},
		{
			name: "short data",
			use:  func(w *Writer) { header(w); w.WriteTensor("a", eight[:7]) }, want: "7 bytes of data for 8",
		},
		{
			name: "long data",
			use:  func(w *Writer) { header(w); w.WriteTensor("a", make([]byte, 9)) }, want: "9 bytes of data for 8",
		},
		{
			name: "short reader",
			use:  func(w *Writer) { header(w); w.CopyTensor("a", strings.NewReader("abc")) }, want: "3 bytes of data for 8",
		},
		{
			name: "data of no tensor",
			use:  func(w *Writer) { w.WriteHeader(); w.WriteTensor("a", nil) }, want: "last tensor",
		},
		{name: "no header", use: func(w *Writer) {}, want: "before the header"},
		{name: "data missing", use: func(w *Writer) { header(w); w.WriteTensor("a", eight) }, want: `tensor "b", 2 of 2`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := NewWriter(io.Discard, tt.opts)
			tt.use(w)
			err := w.Close()
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("got %v, want an error that says %q", err, tt.want)
			}
			for name, again := range map[string]error{
				"Set": w.Set("x", true), "AddTensor": w.AddTensor("x", F32, 1), "WriteHeader": w.WriteHeader(),
				"WriteTensor": w.WriteTensor("x", nil), "CopyTensor": w.CopyTensor("x", nil),
			} {
				if !errors.Is(again, err) {
					t.Errorf("%s afterwards gives %v, want the same error", name, again)
				}
			}
		})
	}
}

func TestWriterReportsWriteErrors(t *testing.T) {
	t.Parallel()
	whole := rewrite(t, openFile(t, filepath.Join(goldenDir, "v2.gguf")), 0)
	m := openFile(t, filepath.Join(goldenDir, "v2.gguf"))
	for _, n := range []int{0, int(m.Parts()[0].DataOffset), len(whole) - 1} {
		w := NewWriter(&brokenPipe{n}, WriterOptions{Version: 2})
		for _, tensor := range m.Tensors() {
			w.AddTensor(tensor.Name, tensor.Type, tensor.Shape...)
		}
		w.Set("padding", make([]uint8, m.Parts()[0].DataOffset)) // so that the header alone exceeds the first two limits
		w.WriteHeader()
		for _, tensor := range m.Tensors() {
			w.CopyTensor(tensor.Name, bytes.NewReader(m.Data(&tensor)))
		}
		if err := w.Close(); !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("a writer that takes %d bytes: got %v, want %v", n, err, io.ErrClosedPipe)
		}
	}
}
