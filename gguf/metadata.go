package gguf

import (
	"fmt"
	"iter"
	"strings"

	"github.com/gguf2gpu/gguf2gpu/internal/term"
)

// Metadata holds the typed key-value pairs of a file. It stays valid after the file is closed. With %v it prints a line
// "key = value" for each pair; long texts and arrays are cut, and control characters are escaped.
type Metadata struct {
	text  string   // the file's header, checked by scan
	pos   []uint32 // where each record starts, in file order, and where the last one ends
	index *names
}

// newMetadata builds the index of records that scan has checked. The error reports a key that is given twice.
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

// key returns the key of record i.
func (md *Metadata) key(i int) string {
	rec := md.text[md.pos[i]:md.pos[i+1]]
	return rec[8 : 8+le(rec[:8])]
}

// at decodes record i.
func (md *Metadata) at(i int) (key string, v Value) {
	rec := md.text[md.pos[i]:md.pos[i+1]]
	n := int(le(rec[:8]))
	return rec[8 : 8+n], newValue(ValueKind(le(rec[8+n:12+n])), rec[12+n:])
}

// Len returns the number of keys.
func (md *Metadata) Len() int { return len(md.pos) - 1 }

// All iterates over keys and values in file order.
func (md *Metadata) All() iter.Seq2[string, Value] {
	return func(yield func(string, Value) bool) {
		for i := range md.Len() {
			if !yield(md.at(i)) {
				return
			}
		}
	}
}

// Keys iterates over the keys in file order.
func (md *Metadata) Keys() iter.Seq[string] {
	return func(yield func(string) bool) {
		for key := range md.All() {
			if !yield(key) {
				return
			}
		}
	}
}

// Get returns the value of a key. ok is false if the key is missing.
func (md *Metadata) Get(key string) (v Value, ok bool) {
	i, ok := md.index.find(key)
	if !ok {
		return Value{}, false
	}
	_, v = md.at(i)
	return v, true
}

// Text returns the string under a key. ok is false if the key is missing or holds another kind.
func (md *Metadata) Text(key string) (s string, ok bool) { return lookup(md, key, Value.Text) }

// Uint returns the integer under a key. ok is false if the key is missing, holds no integer, or a negative one.
func (md *Metadata) Uint(key string) (u uint64, ok bool) { return lookup(md, key, Value.Uint) }

// Int returns the integer under a key. ok is false if the key is missing, holds no integer, or one that exceeds int64.
func (md *Metadata) Int(key string) (i int64, ok bool) { return lookup(md, key, Value.Int) }

// Float returns the floating-point number under a key. ok is false if the key is missing or holds another kind.
func (md *Metadata) Float(key string) (f float64, ok bool) { return lookup(md, key, Value.Float) }

// Bool returns the bool under a key. ok is false if the key is missing or holds another kind.
func (md *Metadata) Bool(key string) (b, ok bool) { return lookup(md, key, Value.Bool) }

func lookup[T any](md *Metadata, key string, as func(Value) (T, bool)) (T, bool) {
	v, _ := md.Get(key) // the zero Value of a missing key fails every conversion
	return as(v)
}

// String returns all pairs, a line "key = value" each, in file order. A text is cut after some 200 bytes, an array
// after a few elements.
func (md Metadata) String() string {
	var b strings.Builder
	if md.index == nil { // the zero Metadata
		return ""
	}
	for key, v := range md.All() {
		fmt.Fprintf(&b, "%s = %s\n", term.Safe(key), v.brief(briefText))
	}
	return b.String()
}

// GoString is String, so that %#v does not print the raw header either.
func (md Metadata) GoString() string { return md.String() }
