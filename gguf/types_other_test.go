package gguf

import (
	"bytes"
	"errors"
	"path/filepath"
	"strings"
	"testing"
)

// TestOtherTypes checks names, origins and sizes of types that ggml does not have. The sizes were computed by hand from
// the formulas of the programs that write them.
func TestOtherTypes(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		typ    Type
		name   string
		origin string
		shape  []uint64
		size   int64
	}{
		{4, "Q4_2", "retired", []uint64{32}, unknownSize},
		{31, "Q4_0_4_4", "retired", []uint64{64, 4}, 4 * 2 * 18},
		{33, "Q4_0_8_8", "retired", []uint64{32, 8, 2}, 16 * 18},
		{36, "I2_S", "BitNet", []uint64{256, 2}, 512/4 + 32},
		{36, "I2_S", "BitNet", []uint64{3, 2}, unknownSize}, // not whole bytes
		{37, "IQ4_NL_4_8", "BitNet uses the number for I8_S", []uint64{32}, unknownSize},
		{38, "IQ4_NL_8_8", "BitNet uses the number for TL1", []uint64{32}, unknownSize},
		{43, "type 43", "", []uint64{32}, unknownSize},
		{134, "IQ1_BN", "ik_llama.cpp", []uint64{128, 3}, 3 * (2 + 2*13)},
		{139, "IQ4_K", "ik_llama.cpp", []uint64{512, 3}, 3 * 2 * 144},
		{144, "IQ4_KS", "ik_llama.cpp", []uint64{512, 3}, 3 * (4 + 2*136)},
		{156, "IQ3_KS", "ik_llama.cpp", []uint64{256, 2}, 2 * (2 + 102)},
		{156, "IQ3_KS", "ik_llama.cpp", []uint64{256, 0}, 0},
		{156, "IQ3_KS", "ik_llama.cpp", []uint64{100, 2}, unknownSize}, // not whole blocks
		{156, "IQ3_KS", "ik_llama.cpp", nil, unknownSize},
		{230, "BF16_R16", "ik_llama.cpp", []uint64{8, 16}, 8 * 16 * 2},
		{335, "IQ2_BN_R4", "ik_llama.cpp", []uint64{256, 4}, 4 * (4 + 4*16)},
		{1<<32 - 1, "type 4294967295", "", []uint64{1}, unknownSize},
	} {
		err := tt.typ.Err()
		if tt.typ.String() != tt.name || !strings.Contains(tt.typ.Origin(), tt.origin) ||
			(tt.origin == "") != (tt.typ.Origin() == "") {
			t.Errorf("type %d is %v of %q, want %s of %q", uint32(tt.typ), tt.typ, tt.typ.Origin(), tt.name, tt.origin)
		}
		if !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), tt.name) ||
			!strings.Contains(err.Error(), tt.origin) {
			t.Errorf("%v: got %v, want an error that names the type and its origin", tt.typ, err)
		}
		if size, err := shapeSize(tt.typ, tt.shape); err != nil || size != tt.size {
			t.Errorf("%v of %v: %d bytes, %v; want %d", tt.typ, tt.shape, size, err, tt.size)
		}
	}
	if size, err := shapeSize(230, []uint64{1 << 62}); err != nil || size != unknownSize {
		t.Errorf("a size above 2^63: %d bytes, %v", size, err)
	}
	for _, typ := range Types() {
		if typ.Err() != nil || typ.Origin() != "ggml" {
			t.Errorf("%v: origin %q, %v", typ, typ.Origin(), typ.Err())
		}
	}
}

// TestTypeText: what MarshalText returns, UnmarshalText accepts. No two types share a name.
func TestTypeText(t *testing.T) {
	t.Parallel()
	all := append(Types(), 43, 1<<32-1)
	for typ := range otherTypes {
		all = append(all, typ)
	}
	for _, typ := range all {
		text, err := typ.MarshalText()
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range [][]byte{text, bytes.ToLower(text)} {
			var got Type
			if err := got.UnmarshalText(name); err != nil || got != typ {
				t.Errorf("%q is %d, %v; want %d", name, uint32(got), err, uint32(typ))
			}
		}
	}
	for _, name := range []string{"", "Q9_X", "type", "type ", "type -1", "type 4294967296", "43", "\x1b[31m"} {
		typ := Type(7)
		err := typ.UnmarshalText([]byte(name))
		if err == nil || typ != 7 || strings.Contains(err.Error(), "\x1b") {
			t.Errorf("%q is %v, %v; want an error", name, typ, err)
		}
	}
}

// TestFileOfOtherTypes opens a file with types that this package cannot decode: everything else is there, and so are
// the bytes of tensors whose size is known.
func TestFileOfOtherTypes(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	w := NewWriter(&b, WriterOptions{})
	w.Set("general.architecture", "bitnet")
	w.AddTensor("known", 36, 128, 2)
	w.AddTensor("plain", F32, 2)
	w.WriteHeader()
	data := bytes.Repeat([]byte{7}, 128*2/4+32)
	w.WriteTensor("known", data)
	w.WriteTensor("plain", make([]byte, 8))
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	f := openFile(t, writeFile(t, filepath.Join(t.TempDir(), "m.gguf"), b.Bytes()))
	known, _ := f.Tensor("known")
	if f.Architecture() != "bitnet" || known.Type.String() != "I2_S" || !known.Sized() ||
		!bytes.Equal(f.Data(known), data) {
		t.Errorf("%s: %+v", f.Architecture(), known)
	}
	fe, ok := errors.AsType[*FormatError](f.TypeError(known))
	if !ok || fe.Tensor != "known" || fe.Path != f.Parts()[0].Path || !errors.Is(fe, ErrUnsupported) {
		t.Errorf("got %v", f.TypeError(known))
	}
	if plain, _ := f.Tensor("plain"); f.TypeError(plain) != nil {
		t.Error(f.TypeError(plain))
	}

	path := writeFile(t, filepath.Join(t.TempDir(), "m.gguf"), withTensors(info("a", 43, 0, 8), info("b", I8, 32, 8)))
	f = openFile(t, path)
	unknown, _ := f.Tensor("a")
	if unknown.Sized() || unknown.Size != -1 || unknown.Elems() != 8 || f.Data(unknown) != nil {
		t.Errorf("%+v has %d bytes of data", unknown, len(f.Data(unknown)))
	}
	if err := f.TypeError(unknown); err == nil ||
		!strings.Contains(err.Error(), `tensor "a", type: unsupported: tensor type 43`) {
		t.Errorf("got %v", err)
	}
	if err := f.TypeError(unknown); !strings.Contains(err.Error(), "the size of a tensor [8] is not known") {
		t.Errorf("got %v", err)
	}
	if beside, _ := f.Tensor("b"); len(f.Data(beside)) != 8 {
		t.Errorf("the tensor beside it has %d bytes", len(f.Data(beside)))
	}
}

// TestOtherTypesWithoutRoom: where a tensor of a fork's type would not fit, what is known of the type is wrong, or the
// file is truncated. The file can be opened nevertheless.
func TestOtherTypesWithoutRoom(t *testing.T) {
	t.Parallel()
	for name, infos := range map[string][][]byte{
		"overlap":      {info("a", 139, 0, 256), info("b", I8, 32, 8)},
		"past the end": {info("b", I8, 0, 8), info("a", 139, 32, 256)},
	} {
		f := openFile(t, writeFile(t, filepath.Join(t.TempDir(), "m.gguf"), withTensors(infos...)))
		a, _ := f.Tensor("a")
		if err := f.TypeError(a); a.Sized() || err == nil || !strings.Contains(err.Error(), "no room for the 144 bytes") {
			t.Errorf("%s: %+v, %v", name, a, err)
		}
		if b, _ := f.Tensor("b"); len(f.Data(b)) != 8 {
			t.Errorf("%s: the tensor beside it has %d bytes", name, len(f.Data(b)))
		}
	}
}
