package gguf

import (
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"strings"
	"unicode"
)

// encode concatenates values in the form of the file: numbers little-endian, a string with its length, bytes as they
// are.
func encode(values ...any) []byte {
	var b []byte
	for _, v := range values {
		switch v := v.(type) {
		case string:
			b = appendString(b, v)
		case []byte:
			b = append(b, v...)
		default:
			var err error
			if b, err = binary.Append(b, binary.LittleEndian, v); err != nil {
				panic(fmt.Sprintf("encode %T: %v", v, err))
			}
		}
	}
	return b
}

// raw describes a file that need not be right.
type raw struct {
	magic   string   // default GGUF
	version uint32   // default 3
	keys    [][]byte // made by key
	infos   [][]byte // made by info
	nkeys   any      // default: len(keys)
	ninfos  any      // default: len(infos)
	align   int      // of the data section; default 32
	data    int      // bytes of data
}

func key(name string, k ValueKind, value ...any) []byte {
	return encode(name, uint32(k), encode(value...))
}

func info(name string, t Type, offset uint64, dims ...uint64) []byte {
	return encode(name, uint32(len(dims)), dims, uint32(t), offset)
}

func (r raw) bytes() []byte {
	orDefault := func(v, def any) any {
		if v == nil {
			return def
		}
		return v
	}
	if r.magic == "" {
		r.magic = "GGUF"
	}
	if r.version == 0 {
		r.version = 3
	}
	if r.align == 0 {
		r.align = defaultAlignment
	}
	b := encode([]byte(r.magic), r.version,
		orDefault(r.ninfos, uint64(len(r.infos))), orDefault(r.nkeys, uint64(len(r.keys))))
	b = append(b, slices.Concat(r.keys...)...)
	b = append(b, slices.Concat(r.infos...)...)
	if len(r.infos) > 0 {
		b = append(b, make([]byte, -len(b)&(r.align-1))...)
	}
	for i := range r.data {
		b = append(b, byte(i))
	}
	return b
}

// parseBytes reads a file that lies in memory.
func parseBytes(data []byte) (*Part, error) {
	p := &Part{Path: "x.gguf", Size: int64(len(data))}
	if err := p.parse(data); err != nil {
		return p, err
	}
	_, err := newFile([]*Part{p})
	return p, err
}

// walk reads all that a part tells, and reports a tensor outside the file.
func walk(p *Part) error {
	for k, v := range p.Metadata().All() {
		if k == "" || v.String() == "" || strings.ContainsFunc(v.String(), unicode.IsControl) {
			return fmt.Errorf("key %q has value %q", k, v.String())
		}
		walkValue(v)
	}
	if text := p.Metadata().String(); strings.Count(text, "\n") != p.Metadata().Len() {
		return fmt.Errorf("metadata of %d keys is %q", p.Metadata().Len(), text)
	}
	end := p.DataOffset
	for _, t := range p.tensors {
		aligned := (t.Offset-p.DataOffset)%int64(p.Alignment) == 0
		if !aligned || t.Offset < end || t.Size < unknownSize || t.Offset > p.Size-max(t.Size, 0) {
			return fmt.Errorf("tensor %+v does not lie in %v", t, p)
		}
		if n, ok := t.Type.Bytes(t.Elems()); ok != t.Type.Valid() || ok && n != uint64(t.Size) {
			return fmt.Errorf("tensor %+v: size is not %d", t, n)
		}
		if (t.Type.Err() == nil) != t.Type.Valid() || t.Type.Valid() && !t.Sized() {
			return fmt.Errorf("tensor %+v: %v", t, t.Type.Err())
		}
		end = t.end()
	}
	return nil
}

func walkValue(v Value) {
	for _, e := range v.Arrays() {
		walkValue(e)
	}
	_ = arrayTexts(v)
}

const huge = uint64(math.MaxUint64)
