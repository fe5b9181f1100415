package gguf

import (
	"strings"
	"testing"
)

// TestGeometry checks the types against what ggml wrote; the sizes of whole tensors are checked by TestGoldenFiles.
func TestGeometry(t *testing.T) {
	t.Parallel()
	seen := make(map[Type]bool)
	for _, g := range readGolden(t, "all-types.gguf").Tensors {
		typ := Type(g.TypeID)
		seen[typ] = true
		n, ok := typ.Bytes(g.Elems)
		if !typ.Valid() || typ.String() != g.Type || !ok || n != uint64(g.Bytes) {
			t.Errorf("%s is %v with %d bytes (%v), want %s with %d", g.Name, typ, n, ok, g.Type, g.Bytes)
		}
		integer := strings.HasPrefix(g.Type, "I") && !strings.HasPrefix(g.Type, "IQ")
		if typ.Quantized() != (typ.BlockElems() > 1) || typ.Integer() != integer {
			t.Errorf("%v: quantized %v, integer %v", typ, typ.Quantized(), typ.Integer())
		}
		for _, name := range []string{g.Type, strings.ToLower(g.Type)} {
			var got Type
			if err := got.UnmarshalText([]byte(name)); got != typ || err != nil {
				t.Errorf("UnmarshalText(%q) gives %v, %v", name, got, err)
			}
		}
	}
	for _, typ := range Types() {
		if !seen[typ] {
			t.Errorf("ggml did not write a tensor of type %v", typ)
		}
	}
	if len(seen) != len(Types()) {
		t.Errorf("%d types, ggml wrote %d", len(Types()), len(seen))
	}
}

func TestInvalidTypes(t *testing.T) {
	t.Parallel()
	for _, typ := range []Type{4, 5, 31, 38, NumTypes, 1<<32 - 1} {
		_, ok := typ.Bytes(0)
		if typ.Valid() || ok || typ.BlockElems() != 0 || typ.BlockBytes() != 0 || typ.Quantized() || typ.Integer() {
			t.Errorf("%v counts as a type", typ)
		}
	}
	for _, tt := range []struct {
		typ   Type
		elems uint64
		want  uint64
		ok    bool
	}{
		{F32, 0, 0, true},
		{F32, 3, 12, true},
		{Q4_K, 512, 288, true},
		{Q4_K, 100, 0, false},
		{Q4_0, 33, 0, false},
		{I8, 1<<63 - 1, 1<<63 - 1, true},
		{I8, 1 << 63, 0, false},
		{F32, 1 << 62, 0, false},
		{F64, 1 << 60, 0, false},
	} {
		if got, ok := tt.typ.Bytes(tt.elems); ok != tt.ok || ok && got != tt.want {
			t.Errorf("%d elements of %v: %d bytes, %v; want %d, %v", tt.elems, tt.typ, got, ok, tt.want, tt.ok)
		}
	}
}
