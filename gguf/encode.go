package gguf

import (
	"encoding/binary"
	"errors"
	"fmt"
)

func appendString(b []byte, s string) []byte {
	return append(binary.LittleEndian.AppendUint64(b, uint64(len(s))), s...)
}

// appendValue appends the kind and the value, encoded as in a file.
func appendValue(b []byte, value any) ([]byte, error) {
	if v, ok := value.(Value); ok {
		return appendCopy(b, v)
	}
	k, n := kindOf(value)
	if n != scalar {
		return appendArray(binary.LittleEndian.AppendUint32(b, uint32(KindArray)), value, 1)
	}
	b = binary.LittleEndian.AppendUint32(b, uint32(k))
	if s, ok := value.(string); ok {
		return appendTexts(b, []string{s})
	}
	return binary.Append(b, binary.LittleEndian, value)
}

// appendArray appends an array after its own kind: the kind of its elements, their number, the elements.
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
	case KindString:
		return appendString(b, v.data), nil
	case KindArray:
		b = binary.LittleEndian.AppendUint32(b, uint32(v.elem))
		b = binary.LittleEndian.AppendUint64(b, uint64(v.n))
	}
	return append(b, v.data...), nil
}

// What kindOf returns as n for values that are not arrays.
const (
	scalar    = -1
	unknownGo = -2
)

// kindOf returns the kind of a scalar, with n being scalar, or the kind of an array's elements and their number n. For
// other Go types, n is unknownGo.
func kindOf(value any) (k ValueKind, n int) {
	switch v := value.(type) {
	case uint8:
		return KindUint8, scalar
	case int8:
		return KindInt8, scalar
	case uint16:
		return KindUint16, scalar
	case int16:
		return KindInt16, scalar
	case uint32:
		return KindUint32, scalar
	case int32:
		return KindInt32, scalar
	case uint64:
		return KindUint64, scalar
	case int64:
		return KindInt64, scalar
	case float32:
		return KindFloat32, scalar
	case float64:
		return KindFloat64, scalar
	case bool:
		return KindBool, scalar
	case string:
		return KindString, scalar
	case []uint8:
		return KindUint8, len(v)
	case []int8:
		return KindInt8, len(v)
	case []uint16:
		return KindUint16, len(v)
	case []int16:
		return KindInt16, len(v)
	case []uint32:
		return KindUint32, len(v)
	case []int32:
		return KindInt32, len(v)
	case []uint64:
		return KindUint64, len(v)
	case []int64:
		return KindInt64, len(v)
	case []float32:
		return KindFloat32, len(v)
	case []float64:
		return KindFloat64, len(v)
	case []bool:
		return KindBool, len(v)
	case []string:
		return KindString, len(v)
	case []any:
		return KindArray, len(v)
	}
	return 0, unknownGo
}
