package gguf

import (
	"fmt"
	"iter"
	"math"
	"strconv"
)

// Kind is the type of a metadata value. The numbers are those of the file format (enum gguf_metadata_value_type).
type Kind uint32

// The kinds of metadata values.
const (
	Uint8 Kind = iota
	Int8
	Uint16
	Int16
	Uint32
	Int32
	Float32
	Bool
	String
	Array
	Uint64
	Int64
	Float64
	numKinds
)

var kindNames = [numKinds]string{
	"uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "bool", "string", "array",
	"uint64", "int64", "float64",
}

// kindSizes are bytes per value; 0 where that varies.
var kindSizes = [numKinds]uint64{
	Uint8: 1, Int8: 1, Uint16: 2, Int16: 2, Uint32: 4, Int32: 4, Float32: 4, Bool: 1, Uint64: 8, Int64: 8, Float64: 8,
}

// String returns "uint8", "string", "array" and so on.
func (k Kind) String() string {
	if k >= numKinds {
		return fmt.Sprintf("kind %d", uint32(k))
	}
	return kindNames[k]
}

func (k Kind) unsigned() bool { return k == Uint8 || k == Uint16 || k == Uint32 || k == Uint64 }
func (k Kind) signed() bool   { return k == Int8 || k == Int16 || k == Int32 || k == Int64 }
func (k Kind) integer() bool  { return k.signed() || k.unsigned() }
func (k Kind) floating() bool { return k == Float32 || k == Float64 }

// Metadata is the typed key-value section of a file. It stays valid after the model is closed.
type Metadata struct {
	text  string   // the file's header, checked by scan
	pos   []uint32 // where each record starts, in file order, and where the last one ends
	index *names
}

// newMetadata indexes checked records.
func newMetadata(path, text string, pos []uint32) (*Metadata, error) {
	md := &Metadata{text: text, pos: pos}
	md.index = newNames(md.Len(), md.key)
	for i := range md.Len() {
		if !md.index.add(i) {
			return nil, &FormatError{Path: path, Offset: int64(pos[i]), Field: md.key(i), Err: errDuplicateKey}
		}
	}
	return md, nil
}

// key is the key of record i.
func (md *Metadata) key(i int) string {
	rec := md.text[md.pos[i]:md.pos[i+1]]
	return rec[8 : 8+le(rec[:8])]
}

// at decodes record i.
func (md *Metadata) at(i int) (key string, v Value) {
	rec := md.text[md.pos[i]:md.pos[i+1]]
	n := int(le(rec[:8]))
	return rec[8 : 8+n], value(Kind(le(rec[8+n:12+n])), rec[12+n:])
}

// Len returns the number of keys.
func (md *Metadata) Len() int { return len(md.pos) - 1 }

// All returns keys and values in file order.
func (md *Metadata) All() iter.Seq2[string, Value] {
	return func(yield func(string, Value) bool) {
		for i := range md.Len() {
			if !yield(md.at(i)) {
				return
			}
		}
	}
}

// Keys returns the keys in file order.
func (md *Metadata) Keys() iter.Seq[string] {
	return func(yield func(string) bool) {
		for key := range md.All() {
			if !yield(key) {
				return
			}
		}
	}
}

// Get returns the value of a key.
func (md *Metadata) Get(key string) (Value, bool) {
	i, ok := md.index.find(key)
	if !ok {
		return Value{}, false
	}
	_, v := md.at(i)
	return v, true
}

// String returns the text under a key; false when the key is missing or holds something else.
func (md *Metadata) String(key string) (string, bool) { return lookup(md, key, Value.Text) }

// Uint returns the integer under a key; false when the key is missing, not an integer, or negative.
func (md *Metadata) Uint(key string) (uint64, bool) { return lookup(md, key, Value.Uint) }

// Int returns the integer under a key; false when the key is missing, not an integer, or above the range of int64.
func (md *Metadata) Int(key string) (int64, bool) { return lookup(md, key, Value.Int) }

// Float returns the floating-point number under a key; false when the key is missing or holds something else.
func (md *Metadata) Float(key string) (float64, bool) { return lookup(md, key, Value.Float) }

// Bool returns the truth value under a key; false when the key is missing or holds something else.
func (md *Metadata) Bool(key string) (v, ok bool) { return lookup(md, key, Value.Bool) }

func lookup[T any](md *Metadata, key string, as func(Value) (T, bool)) (T, bool) {
	v, _ := md.Get(key) // a missing key gives the zero Value, which is of no kind
	return as(v)
}

// Value is a metadata value: a scalar, a text or an array. It stays valid after the model is closed. The zero Value is of no
// kind; all its accessors give false or nothing.
type Value struct {
	kind, elem Kind
	n          int    // elements of an array
	data       string // the encoded value; of an array its elements, of a text its bytes
	set        bool   // false in the zero Value, whose kind would read as uint8
}

// value decodes a value that scan has checked.
func value(k Kind, data string) Value {
	v := Value{kind: k, data: data, set: true}
	switch k {
	case String:
		v.data = data[8:]
	case Array:
		v.elem, v.n, v.data = Kind(le(data[:4])), int(le(data[4:12])), data[12:]
	}
	return v
}

// le decodes up to eight little-endian bytes.
func le(s string) (u uint64) {
	for i := range len(s) {
		u |= uint64(s[i]) << (8 * i)
	}
	return u
}

// Kind returns the type of the value.
func (v Value) Kind() Kind { return v.kind }

// Text returns the value of a string. It need not be UTF-8.
func (v Value) Text() (string, bool) {
	if !v.is(String) {
		return "", false
	}
	return v.data, true
}

// Uint returns the value of an integer of any kind that is not negative.
func (v Value) Uint() (uint64, bool) {
	if v.is(Uint64) {
		return le(v.data), true
	}
	if i, ok := v.Int(); ok && i >= 0 {
		return uint64(i), true
	}
	return 0, false
}

// Int returns the value of an integer of any kind that fits int64.
func (v Value) Int() (int64, bool) {
	if !v.set || !v.kind.integer() {
		return 0, false
	}
	u := le(v.data)
	if v.kind.signed() {
		return signExtend(u, len(v.data)), true
	}
	return int64(u), u <= math.MaxInt64
}

// Float returns the value of a float32 or float64.
func (v Value) Float() (float64, bool) {
	if !v.set || !v.kind.floating() {
		return 0, false
	}
	return toFloat(v.data), true
}

// Bool returns the value of a bool.
func (v Value) Bool() (val, ok bool) {
	if !v.is(Bool) {
		return false, false
	}
	return v.data[0] != 0, true
}

func (v Value) is(k Kind) bool { return v.set && v.kind == k }

func signExtend(u uint64, nbytes int) int64 { return int64(u<<(64-8*nbytes)) >> (64 - 8*nbytes) }

func toFloat(s string) float64 {
	if len(s) == 4 {
		return float64(math.Float32frombits(uint32(le(s))))
	}
	return math.Float64frombits(le(s))
}

// ElemKind returns the type of an array's elements; false for other values.
func (v Value) ElemKind() (Kind, bool) { return v.elem, v.is(Array) }

// Len returns the number of an array's elements; 0 for other values.
func (v Value) Len() int { return v.n }

// Strings returns the elements of an array of strings with their indices, and nothing for other values.
func (v Value) Strings() iter.Seq2[int, string] {
	return func(yield func(int, string) bool) {
		if !v.is(Array) || v.elem != String {
			return
		}
		rest := v.data
		for i := range v.n {
			n := 8 + int(le(rest[:8]))
			if !yield(i, rest[8:n]) {
				return
			}
			rest = rest[n:]
		}
	}
}

// Uints returns the elements of an array of unsigned integers of any width, and nothing for other values.
func (v Value) Uints() iter.Seq2[int, uint64] { return elems(v, Kind.unsigned, le) }

// Ints returns the elements of an array of signed integers of any width or of unsigned ones up to uint32, and nothing for
// other values.
func (v Value) Ints() iter.Seq2[int, int64] {
	return elems(v, func(k Kind) bool { return k.integer() && k != Uint64 }, func(s string) int64 {
		if v.elem.unsigned() {
			return int64(le(s))
		}
		return signExtend(le(s), len(s))
	})
}

// Floats returns the elements of an array of float32 or float64, and nothing for other values.
func (v Value) Floats() iter.Seq2[int, float64] { return elems(v, Kind.floating, toFloat) }

// Bools returns the elements of an array of bools, and nothing for other values.
func (v Value) Bools() iter.Seq2[int, bool] {
	return elems(v, func(k Kind) bool { return k == Bool }, func(s string) bool { return s[0] != 0 })
}

// elems decodes an array of fixed-size elements.
func elems[T any](v Value, has func(Kind) bool, decode func(string) T) iter.Seq2[int, T] {
	return func(yield func(int, T) bool) {
		if !v.is(Array) || !has(v.elem) {
			return
		}
		size := int(kindSizes[v.elem])
		for i := range v.n {
			if !yield(i, decode(v.data[i*size:(i+1)*size])) {
				return
			}
		}
	}
}

// Arrays returns the elements of an array of arrays, and nothing for other values.
func (v Value) Arrays() iter.Seq2[int, Value] {
	return func(yield func(int, Value) bool) {
		if !v.is(Array) || v.elem != Array {
			return
		}
		c := cursor{data: []byte(v.data), size: uint64(len(v.data))}
		for i := range v.n {
			start := c.pos
			c.array(1)
			if !yield(i, value(Array, v.data[start:c.pos])) {
				return
			}
		}
	}
}

// String returns the value for display: a scalar's value, a text in quotes, the kind and length of an array.
func (v Value) String() string {
	if t, ok := v.Text(); ok {
		return strconv.Quote(t)
	}
	if b, ok := v.Bool(); ok {
		return strconv.FormatBool(b)
	}
	if i, ok := v.Int(); ok {
		return strconv.FormatInt(i, 10)
	}
	if u, ok := v.Uint(); ok {
		return strconv.FormatUint(u, 10)
	}
	if f, ok := v.Float(); ok {
		return strconv.FormatFloat(f, 'g', -1, 8*len(v.data))
	}
	if k, ok := v.ElemKind(); ok {
		return fmt.Sprintf("[%d × %v]", v.n, k)
	}
	return "none"
}
