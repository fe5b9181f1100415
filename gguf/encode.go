package gguf

import (
	"encoding/binary"
	"errors"
	"fmt"
)

func appendString(b []byte, s string) []byte {
	return append(binary.LittleEndian.AppendUint64(b, uint64(len(s))), s...)
}

// appendValue appends the kind and the value in the form of the file.
func appendValue(b []byte, value any) ([]byte, error) {
	if v, ok := value.(Value); ok {
		return appendCopy(b, v)
	}
	k, n := kindOf(value)
	if n != scalar {
		return appendArray(binary.LittleEndian.AppendUint32(b, uint32(Array)), value, 1)
	}
	b = binary.LittleEndian.AppendUint32(b, uint32(k))
	if s, ok := value.(string); ok {
		return appendTexts(b, []string{s})
	}
	return binary.Append(b, binary.LittleEndian, value)
}

// appendArray appends an array without its own kind: the kind of its elements, their number, the elements.
func appendArray(b []byte, value any, depth int) ([]byte, error) {
	k, n := kindOf(value)
	switch {
	case n < 0:
		return nil, fmt.Errorf("a value of type %T cannot be stored: "+
			"use a number with a width, a bool, a string, a slice of these, or []any of slices", value)
	case n > maxArray:
		return nil, fmt.Errorf("an array of %d elements, limit %d", n, maxArray)
	case depth > maxDepth:
		return nil, fmt.Errorf("arrays nest more than %d deep", maxDepth)
	}
	b = binary.LittleEndian.AppendUint32(b, uint32(k))
	b = binary.LittleEndian.AppendUint64(b, uint64(n))
	switch v := value.(type) {
	case []string:
		return appendTexts(b, v)
	case []any:
		var err error
		for _, e := range v {
			if b, err = appendArray(b, e, depth+1); err != nil {
				return nil, err
			}
		}
		return b, nil
	}
	return binary.Append(b, binary.LittleEndian, value)
}

func appendTexts(b []byte, texts []string) ([]byte, error) {
	for _, s := range texts {
		if len(s) > maxText {
			return nil, fmt.Errorf("a text of %d bytes, limit %d", len(s), maxText)
		}
		b = appendString(b, s)
	}
	return b, nil
}

// appendCopy appends a value that was read from a file.
func appendCopy(b []byte, v Value) ([]byte, error) {
	if !v.set {
		return nil, errors.New("the value is empty")
	}
	b = binary.LittleEndian.AppendUint32(b, uint32(v.kind))
	switch v.kind {
	case String:
		return appendString(b, v.data), nil
	case Array:
		b = binary.LittleEndian.AppendUint32(b, uint32(v.elem))
		b = binary.LittleEndian.AppendUint64(b, uint64(v.n))
	}
	return append(b, v.data...), nil
}

// What kindOf says of values that are not arrays.
const (
	scalar    = -1
	unknownGo = -2
)

// kindOf returns the kind of a scalar, or of an array's elements and their number.
func kindOf(value any) (k Kind, n int) {
	switch v := value.(type) {
	case uint8:
		return Uint8, scalar
	case int8:
		return Int8, scalar
	case uint16:
		return Uint16, scalar
	case int16:
		return Int16, scalar
	case uint32:
		return Uint32, scalar
	case int32:
		return Int32, scalar
	case uint64:
		return Uint64, scalar
	case int64:
		return Int64, scalar
	case float32:
		return Float32, scalar
	case float64:
		return Float64, scalar
	case bool:
		return Bool, scalar
	case string:
		return String, scalar
	case []uint8:
		return Uint8, len(v)
	case []int8:
		return Int8, len(v)
	case []uint16:
		return Uint16, len(v)
	case []int16:
		return Int16, len(v)
	case []uint32:
		return Uint32, len(v)
	case []int32:
		return Int32, len(v)
	case []uint64:
		return Uint64, len(v)
	case []int64:
		return Int64, len(v)
	case []float32:
		return Float32, len(v)
	case []float64:
		return Float64, len(v)
	case []bool:
		return Bool, len(v)
	case []string:
		return String, len(v)
	case []any:
		return Array, len(v)
	}
	return 0, unknownGo
}
