package gguf

import (
	"fmt"
	"math/bits"
	"strconv"
	"strings"

	"github.com/gguf2gpu/gguf2gpu/internal/term"
)

// Type is the type of a tensor as GGUF files store it. The numbers are ggml's own (enum ggml_type, ggml 0.21.0), which
// forks of ggml extend with their own: see [Type.Origin].
type Type uint32

// The tensor types of ggml 0.21.0. The gaps (4, 5, 31 to 33, 36 to 38) are types that ggml has retired; 43 is the first
// number that it does not use. The names keep ggml's spelling.
const (
	F32     Type = 0
	F16     Type = 1
	Q4_0    Type = 2
	Q4_1    Type = 3
	Q5_0    Type = 6
	Q5_1    Type = 7
	Q8_0    Type = 8
	Q8_1    Type = 9
	Q2_K    Type = 10
	Q3_K    Type = 11
	Q4_K    Type = 12
	Q5_K    Type = 13
	Q6_K    Type = 14
	Q8_K    Type = 15
	IQ2_XXS Type = 16
	IQ2_XS  Type = 17
	IQ3_XXS Type = 18
	IQ1_S   Type = 19
	IQ4_NL  Type = 20
	IQ3_S   Type = 21
	IQ2_S   Type = 22
	IQ4_XS  Type = 23
	I8      Type = 24
	I16     Type = 25
	I32     Type = 26
	I64     Type = 27
	F64     Type = 28
	IQ1_M   Type = 29
	BF16    Type = 30
	TQ1_0   Type = 34
	TQ2_0   Type = 35
	MXFP4   Type = 39
	NVFP4   Type = 40
	Q1_0    Type = 41
	Q2_0    Type = 42

	// NumTypes is one more than the largest number of a type of ggml: the length of a table that such a Type indexes.
	// Types of forks have larger numbers.
	NumTypes = 43
)

// class says what the elements of a type are.
type class uint8

const (
	retired class = iota
	float
	integer
	quantized
)

// typeInfo is the geometry of a type. A block is the smallest run of elements that can be stored.
type typeInfo struct {
	name       string
	class      class
	blockElems int
	blockBytes int
}

var ggmlTypes = [NumTypes]typeInfo{
	F32: {"F32", float, 1, 4}, F16: {"F16", float, 1, 2}, BF16: {"BF16", float, 1, 2}, F64: {"F64", float, 1, 8},
	I8: {"I8", integer, 1, 1}, I16: {"I16", integer, 1, 2}, I32: {"I32", integer, 1, 4}, I64: {"I64", integer, 1, 8},
	Q4_0: {"Q4_0", quantized, 32, 18}, Q4_1: {"Q4_1", quantized, 32, 20},
	Q5_0: {"Q5_0", quantized, 32, 22}, Q5_1: {"Q5_1", quantized, 32, 24},
	Q8_0: {"Q8_0", quantized, 32, 34}, Q8_1: {"Q8_1", quantized, 32, 36},
	Q2_K: {"Q2_K", quantized, 256, 84}, Q3_K: {"Q3_K", quantized, 256, 110}, Q4_K: {"Q4_K", quantized, 256, 144},
	Q5_K: {"Q5_K", quantized, 256, 176}, Q6_K: {"Q6_K", quantized, 256, 210}, Q8_K: {"Q8_K", quantized, 256, 292},
	IQ2_XXS: {"IQ2_XXS", quantized, 256, 66}, IQ2_XS: {"IQ2_XS", quantized, 256, 74},
	IQ2_S:   {"IQ2_S", quantized, 256, 82},
	IQ3_XXS: {"IQ3_XXS", quantized, 256, 98}, IQ3_S: {"IQ3_S", quantized, 256, 110},
	IQ1_S: {"IQ1_S", quantized, 256, 50}, IQ1_M: {"IQ1_M", quantized, 256, 56},
	IQ4_NL: {"IQ4_NL", quantized, 32, 18}, IQ4_XS: {"IQ4_XS", quantized, 256, 136},
	TQ1_0: {"TQ1_0", quantized, 256, 54}, TQ2_0: {"TQ2_0", quantized, 256, 66},
	MXFP4: {"MXFP4", quantized, 32, 17}, NVFP4: {"NVFP4", quantized, 64, 36},
	Q1_0: {"Q1_0", quantized, 128, 18}, Q2_0: {"Q2_0", quantized, 64, 18},
}

// Types returns the types of ggml 0.21.0, by number. Retired types and those of forks are not among them.
func Types() []Type {
	var all []Type
	for t := range Type(NumTypes) {
		if t.Valid() {
			all = append(all, t)
		}
	}
	return all
}

// Valid reports whether t is a type of ggml 0.21.0. It is false for retired types and for those of forks.
func (t Type) Valid() bool { return t < NumTypes && ggmlTypes[t].class != retired }

// Origin names the program that a type which ggml does not have (any more) comes from, such as "ik_llama.cpp". It is
// "ggml" for types that are Valid, and "" for numbers that this package does not know.
func (t Type) Origin() string {
	if t.Valid() {
		return "ggml"
	}
	return otherTypes[t].origin
}

// Err returns nil for a type of ggml. For others it is an error that matches [ErrUnsupported] and says what is known of
// the type: its name and the program that it comes from.
func (t Type) Err() error {
	switch o, known := otherTypes[t]; {
	case t.Valid():
		return nil
	case known:
		return fmt.Errorf("%w: tensor type %d is %s of %s", ErrUnsupported, uint32(t), o.name, o.origin)
	}
	return fmt.Errorf("%w: tensor type %d is not known, neither of ggml nor of its forks", ErrUnsupported, uint32(t))
}

// String returns ggml's name of the type in upper case, such as "Q4_K", or the name that a fork gives it. For a number
// that nobody is known to use it is "type 99".
func (t Type) String() string {
	if t.Valid() {
		return ggmlTypes[t].name
	}
	if o, known := otherTypes[t]; known {
		return o.name
	}
	return typePrefix + strconv.FormatUint(uint64(t), 10)
}

const typePrefix = "type "

// MarshalText returns the type's name, as String does. It never fails.
func (t Type) MarshalText() ([]byte, error) { return []byte(t.String()), nil }

// UnmarshalText sets t to the type with the given name, in upper or lower case. It accepts all that String returns: the
// types of ggml, those of forks, and "type 99".
func (t *Type) UnmarshalText(name []byte) error {
	s := string(name)
	for g := range Type(NumTypes) {
		if g.Valid() && strings.EqualFold(ggmlTypes[g].name, s) {
			*t = g
			return nil
		}
	}
	for o, info := range otherTypes {
		if strings.EqualFold(info.name, s) {
			*t = o
			return nil
		}
	}
	if number, ok := strings.CutPrefix(s, typePrefix); ok {
		if n, err := strconv.ParseUint(number, 10, 32); err == nil {
			*t = Type(n)
			return nil
		}
	}
	return fmt.Errorf("gguf: %s is not the name of a tensor type", term.Quote(s, briefElem))
}

// BlockElems returns the number of elements of a block: 1 for plain types, 32 to 256 for quantized ones. It is 0 for a
// type that is not Valid: its tensors are opaque bytes, whose number [Tensor.Size] knows.
func (t Type) BlockElems() int {
	if !t.Valid() {
		return 0
	}
	return ggmlTypes[t].blockElems
}

// BlockBytes returns the size of a block in bytes. Blocks follow each other without padding. It is 0 for a type that is
// not Valid.
func (t Type) BlockBytes() int {
	if !t.Valid() {
		return 0
	}
	return ggmlTypes[t].blockBytes
}

// Quantized reports whether t is a type of ggml that packs several elements into a block with a shared scale.
func (t Type) Quantized() bool { return t.Valid() && ggmlTypes[t].class == quantized }

// Integer reports whether t is one of I8, I16, I32 and I64, which are never converted.
func (t Type) Integer() bool { return t.Valid() && ggmlTypes[t].class == integer }

// Bytes returns the size in bytes of elems elements. ok is false if the type is not Valid, if elems is not a whole
// number of blocks, or if the size exceeds 63 bits.
func (t Type) Bytes(elems uint64) (n uint64, ok bool) {
	if !t.Valid() || elems%uint64(t.BlockElems()) != 0 {
		return 0, false
	}
	hi, lo := bits.Mul64(elems/uint64(t.BlockElems()), uint64(t.BlockBytes()))
	return lo, hi == 0 && lo < 1<<63
}
