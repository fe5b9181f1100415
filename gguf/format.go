package gguf

import (
	"fmt"
	"iter"
	"math"
	"strconv"
	"strings"

	"github.com/gguf2gpu/gguf2gpu/internal/term"
)

const (
	// briefElems is how many elements of an array are printed: a longer array is cut, and its length is printed.
	briefElems = 5
	// briefText and briefElem are where a text is cut, in bytes: one that is a value, and one that is an element.
	briefText = 200
	briefElem = 40
	// briefDepth is how deep arrays in arrays are printed: of deeper ones the length alone.
	briefDepth = 3
)

// String returns the value as a person would write it: a number, true or false, a text in quotes with its control
// characters escaped, or an array in brackets. An array of more than five elements is cut, and its length follows:
//
//	["<unk>", "<s>", "</s>", "<0x00>", "<0x01>", …] (32000 strings)
//
// A text is not cut.
func (v Value) String() string { return v.brief(math.MaxInt) }

// GoString is String, so that %#v does not print the encoded value.
func (v Value) GoString() string { return v.String() }

// brief is String with texts cut after limit bytes.
func (v Value) brief(limit int) string {
	switch {
	case !v.set:
		return "none"
	case v.kind == KindArray:
		return v.briefArray(briefDepth)
	case v.kind == KindString:
		return term.Quote(v.data, limit)
	}
	return scalarText(v.kind, v.data)
}

// briefArray prints the first elements of an array, and of arrays in it down to the given depth.
func (v Value) briefArray(depth int) string {
	var texts []string
	switch v.elem {
	case KindString:
		texts = firstTexts(v.Strings(), func(s string) string { return term.Quote(s, briefElem) })
	case KindArray:
		if depth > 1 {
			texts = firstTexts(v.Arrays(), func(a Value) string { return a.briefArray(depth - 1) })
		}
	default:
		all := elems(v, func(ValueKind) bool { return true }, func(s string) string { return scalarText(v.elem, s) })
		texts = firstTexts(all, func(s string) string { return s })
	}
	switch {
	case v.n <= len(texts):
		return "[" + strings.Join(texts, ", ") + "]"
	case len(texts) == 0:
		return fmt.Sprintf("[…] (%d %vs)", v.n, v.elem)
	}
	return fmt.Sprintf("[%s, …] (%d %vs)", strings.Join(texts, ", "), v.n, v.elem)
}

// firstTexts returns the texts of the first elements.
func firstTexts[T any](all iter.Seq2[int, T], text func(T) string) []string {
	var texts []string
	for i, e := range all {
		if i == briefElems {
			break
		}
		texts = append(texts, text(e))
	}
	return texts
}

// scalarText prints an encoded number or bool.
func scalarText(k ValueKind, data string) string {
	switch {
	case k == KindBool:
		return strconv.FormatBool(toBool(data))
	case k.floating():
		return strconv.FormatFloat(toFloat(data), 'g', -1, 8*len(data))
	case k.signed():
		return strconv.FormatInt(toInt(data), 10)
	}
	return strconv.FormatUint(le(data), 10)
}
