package hold

import (
	"encoding/json"
	"errors"
	"iter"
	"math"
)

// list is a slice that costs no more memory than its elements when it is decoded: it counts them first.
type list[T any] []T

// UnmarshalJSON decodes an array, which is known to be valid JSON.
func (l *list[T]) UnmarshalJSON(b []byte) error {
	s := make([]T, 0, elements(b))
	if err := json.Unmarshal(b, &s); err != nil {
		return err
	}
	*l = s
	return nil
}

// elements counts the elements of a JSON array.
func elements(b []byte) (n int) {
	depth := 0
	for c := range outsideStrings(b) {
		switch {
		case c == '[' || c == '{':
			depth++
		case c == ']' || c == '}':
			depth--
		case c == ',' && depth == 1:
			n++
		}
	}
	return n + 1
}

// outsideStrings gives the bytes of JSON that are outside of its strings. JSON may be broken.
func outsideStrings(b []byte) iter.Seq[byte] {
	return func(yield func(byte) bool) {
		inside := false
		for i := 0; i < len(b); i++ {
			switch c := b[i]; {
			case inside && c == '\\':
				i++
			case c == '"':
				inside = !inside
			case !inside && !yield(c):
				return
			}
		}
	}
}

// numbers is a list of numbers, the shape of a tensor. There is one for each tensor, so that what a decoder costs
// counts.
type numbers []uint64

var errNumbers = errors.New("not a list of whole numbers from 0 to 2^64-1")

// UnmarshalJSON decodes an array of numbers, which is known to be valid JSON.
func (l *numbers) UnmarshalJSON(b []byte) error {
	if string(b) == "null" {
		return nil
	}
	all, err := parseNumbers(b, 1)
	*l = all
	return err
}

// rangeList is a list of pairs of numbers.
type rangeList [][2]uint64

// UnmarshalJSON decodes an array of arrays of two numbers, which is known to be valid JSON.
func (l *rangeList) UnmarshalJSON(b []byte) error {
	if string(b) == "null" {
		return nil
	}
	all, err := parseNumbers(b, 2)
	if err != nil {
		return err
	}
	*l = make(rangeList, 0, len(all)/2)
	for i := 0; i+1 < len(all); i += 2 {
		*l = append(*l, [2]uint64{all[i], all[i+1]})
	}
	return nil
}

// parseNumbers returns the numbers of a JSON array; with depth 2, those of an array of pairs. b is valid JSON.
func parseNumbers(b []byte, depth int) ([]uint64, error) {
	var all []uint64
	if depth == 1 {
		all = make([]uint64, 0, elements(b))
	} else {
		all = make([]uint64, 0, 2*elements(b))
	}
	level, pair, digits := 0, 0, false
	var n uint64
	for _, c := range b {
		switch {
		case c >= '0' && c <= '9' && level == depth:
			if n > (math.MaxUint64-uint64(c-'0'))/10 {
				return nil, errNumbers
			}
			n, digits = 10*n+uint64(c-'0'), true
			continue
		case c == '[' && level < depth:
			level++
			pair = 0
		case c == ',' || c == ']':
			if digits {
				all, pair = append(all, n), pair+1
				n, digits = 0, false
			}
			if c == ']' {
				if level == 2 && pair != 2 {
					return nil, errNumbers
				}
				level--
			}
		case c == ' ' || c == '\t' || c == '\n' || c == '\r':
		default: // another kind of value, a sign, a fraction, an array too deep
			return nil, errNumbers
		}
	}
	return all, nil
}
