package gguf

import (
	"iter"
	"math"
	"unsafe"
)

// Value is a metadata value: a scalar, a text or an array. It stays valid after the file is closed. The zero Value is
// no value: all its accessors return false or nothing, and it prints as "none".
type Value struct {
	kind, elem ValueKind
	n          int    // elements of an array
	data       string // the encoded value: of an array its elements, of a text its bytes
	set        bool   // false in the zero Value only, whose kind would otherwise read as uint8
}

// newValue decodes a value that scan has checked.
func newValue(k ValueKind, data string) Value {
	v := Value{kind: k, data: data, set: true}
	switch k {
	case KindString:
		v.data = data[8:]
	case KindArray:
		v.elem, v.n, v.data = ValueKind(le(data[:4])), int(le(data[4:12])), data[12:]
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
func (v Value) Kind() ValueKind { return v.kind }

// Text returns the value of a string. It need not be UTF-8.
func (v Value) Text() (s string, ok bool) {
	if !v.is(KindString) {
		return "", false
	}
	return v.data, true
}

// Uint returns the value of an integer of any kind. ok is false if it is negative.
func (v Value) Uint() (u uint64, ok bool) {
	if v.is(KindUint64) {
		return le(v.data), true
	}
	if i, ok := v.Int(); ok && i >= 0 {
		return uint64(i), true
	}
	return 0, false
}

// Int returns the value of an integer of any kind. ok is false if it exceeds int64.
func (v Value) Int() (i int64, ok bool) {
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
func (v Value) Float() (f float64, ok bool) {
	if !v.set || !v.kind.floating() {
		return 0, false
	}
	return toFloat(v.data), true
}

// Bool returns the value of a bool.
func (v Value) Bool() (b, ok bool) {
	if !v.is(KindBool) {
		return false, false
	}
	return toBool(v.data), true
}

func (v Value) is(k ValueKind) bool { return v.set && v.kind == k }

func signExtend(u uint64, nbytes int) int64 { return int64(u<<(64-8*nbytes)) >> (64 - 8*nbytes) }

func toInt(s string) int64 { return signExtend(le(s), len(s)) }
func toBool(s string) bool { return s[0] != 0 }

func toFloat(s string) float64 {
	if len(s) == 4 {
		return float64(math.Float32frombits(uint32(le(s))))
	}
	return math.Float64frombits(le(s))
}

// ElemKind returns the kind of an array's elements. ok is false if the value is no array.
func (v Value) ElemKind() (k ValueKind, ok bool) { return v.elem, v.is(KindArray) }

// Len returns the number of elements of an array, and 0 for other values.
func (v Value) Len() int { return v.n }

// Strings iterates over an array of strings, with indices. For other values it yields nothing.
func (v Value) Strings() iter.Seq2[int, string] {
	return func(yield func(int, string) bool) {
		if !v.is(KindArray) || v.elem != KindString {
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

// Uints iterates over an array of unsigned integers of any width, with indices. For other values it yields nothing.
func (v Value) Uints() iter.Seq2[int, uint64] { return elems(v, ValueKind.unsigned, le) }

// Ints iterates over an array of signed integers of any width, or of unsigned ones up to uint32, with indices. For
// other values it yields nothing.
func (v Value) Ints() iter.Seq2[int, int64] {
	return elems(v, func(k ValueKind) bool { return k.integer() && k != KindUint64 }, func(s string) int64 {
		if v.elem.unsigned() {
			return int64(le(s))
		}
		return toInt(s)
	})
}

// Floats iterates over an array of float32 or float64, with indices. For other values it yields nothing.
func (v Value) Floats() iter.Seq2[int, float64] { return elems(v, ValueKind.floating, toFloat) }

// Bools iterates over an array of bools, with indices. For other values it yields nothing.
func (v Value) Bools() iter.Seq2[int, bool] {
	return elems(v, func(k ValueKind) bool { return k == KindBool }, toBool)
}

// elems decodes an array whose elements have a fixed size.
func elems[T any](v Value, has func(ValueKind) bool, decode func(string) T) iter.Seq2[int, T] {
	return func(yield func(int, T) bool) {
		if !v.is(KindArray) || !has(v.elem) {
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

// Arrays iterates over an array of arrays, with indices. For other values it yields nothing.
func (v Value) Arrays() iter.Seq2[int, Value] {
	return func(yield func(int, Value) bool) {
		if !v.is(KindArray) || v.elem != KindArray {
			return
		}
		// Nobody writes to what the cursor reads, so it needs no copy.
		c := cursor{data: unsafe.Slice(unsafe.StringData(v.data), len(v.data)), size: uint64(len(v.data))}
		for i := range v.n {
			start := c.pos
			c.array(1)
			if !yield(i, newValue(KindArray, v.data[start:c.pos])) {
				return
			}
		}
	}
}
