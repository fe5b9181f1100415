package gguf

import (
	"fmt"
	"math"
	"testing"
)

// getters shows what every typed getter says of a key.
func getters(md *Metadata, key string) string {
	s, okS := md.Text(key)
	u, okU := md.Uint(key)
	i, okI := md.Int(key)
	f, okF := md.Float(key)
	b, okB := md.Bool(key)
	got := ""
	for _, g := range []struct {
		name  string
		ok    bool
		value any
	}{{"string", okS, s}, {"uint", okU, u}, {"int", okI, i}, {"float", okF, f}, {"bool", okB, b}} {
		if g.ok {
			got += fmt.Sprintf("%s %v;", g.name, g.value)
		}
	}
	return got
}

func TestGetters(t *testing.T) {
	t.Parallel()
	p, err := parseBytes(raw{keys: [][]byte{
		key("u8", KindUint8, uint8(200)), key("i8", KindInt8, int8(-5)), key("i32", KindInt32, int32(7)),
		key("u64", KindUint64, uint64(math.MaxUint64)), key("u63", KindUint64, uint64(math.MaxInt64)),
		key("i64", KindInt64, int64(math.MinInt64)), key("f32", KindFloat32, float32(0.5)), key("f64", KindFloat64, -0.25),
		key("yes", KindBool, true), key("no", KindBool, false), key("text", KindString, "abc"), key("empty", KindString, ""),
		key("array", KindArray, uint32(KindUint8), uint64(1), uint8(1)),
	}}.bytes())
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct{ key, want, text string }{
		{"u8", "uint 200;int 200;", "200"},
		{"i8", "int -5;", "-5"},
		{"i32", "uint 7;int 7;", "7"},
		{"u64", "uint 18446744073709551615;", "18446744073709551615"},
		{"u63", "uint 9223372036854775807;int 9223372036854775807;", "9223372036854775807"},
		{"i64", "int -9223372036854775808;", "-9223372036854775808"},
		{"f32", "float 0.5;", "0.5"},
		{"f64", "float -0.25;", "-0.25"},
		{"yes", "bool true;", "true"},
		{"no", "bool false;", "false"},
		{"text", "string abc;", `"abc"`},
		{"empty", "string ;", `""`},
		{"array", "", "[1]"},
		{"missing", "", "none"},
	}
	for _, tt := range tests {
		if got := getters(p.Metadata(), tt.key); got != tt.want {
			t.Errorf("%s: getters give %q, want %q", tt.key, got, tt.want)
		}
		v, ok := p.Metadata().Get(tt.key)
		if v.String() != tt.text || ok != (tt.key != "missing") {
			t.Errorf("%s: Get gives %q, %v; want %q", tt.key, v.String(), ok, tt.text)
		}
	}
}

// TestIterators: each gives the arrays of its kinds, nothing of others, and stops when told to.
func TestIterators(t *testing.T) {
	t.Parallel()
	counts := func(v Value) map[string]int {
		n := make(map[string]int)
		for range v.Strings() {
			n["strings"]++
		}
		for range v.Uints() {
			n["uints"]++
		}
		for range v.Ints() {
			n["ints"]++
		}
		for range v.Floats() {
			n["floats"]++
		}
		for range v.Bools() {
			n["bools"]++
		}
		for range v.Arrays() {
			n["arrays"]++
		}
		return n
	}
	three := uint64(3)
	tests := []struct {
		name  string
		value []byte // of an array, or nil for the zero Value
		want  map[string]int
	}{
		{"uint8", encode(uint32(KindUint8), three, []byte{1, 2, 255}), map[string]int{"uints": 3, "ints": 3}},
		{"uint64", encode(uint32(KindUint64), three, make([]byte, 24)), map[string]int{"uints": 3}},
		{"int16", encode(uint32(KindInt16), three, make([]byte, 6)), map[string]int{"ints": 3}},
		{"float32", encode(uint32(KindFloat32), three, make([]byte, 12)), map[string]int{"floats": 3}},
		{"bool", encode(uint32(KindBool), three, make([]byte, 3)), map[string]int{"bools": 3}},
		{"string", encode(uint32(KindString), three, "", "a", "b"), map[string]int{"strings": 3}},
		{"array", encode(uint32(KindArray), three, nested(2), nested(1), nested(1)), map[string]int{"arrays": 3}},
		{"none", nil, map[string]int{}},
	}
	for _, tt := range tests {
		var v Value
		if tt.value != nil {
			v = newValue(KindArray, string(tt.value))
		}
		if got := counts(v); fmt.Sprint(got) != fmt.Sprint(tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
		for range v.Strings() {
			break
		}
		for range v.Uints() {
			break
		}
		for range v.Arrays() {
			break
		}
	}
	for i, n := range newValue(KindArray, string(tests[0].value)).Ints() {
		if want := []int64{1, 2, 255}[i]; n != want {
			t.Errorf("Ints of uint8: element %d is %d, want %d", i, n, want)
		}
	}
	md := openFile(t, tinyLlama).Metadata()
	for range md.Keys() {
		break
	}
}
