package gguf

import "fmt"

// ValueKind is the type of a metadata value. The numbers are those of the file format (enum gguf_type of ggml). The
// types of tensors are another set: see [Type].
type ValueKind uint32

// The kinds of metadata values.
const (
	KindUint8 ValueKind = iota
	KindInt8
	KindUint16
	KindInt16
	KindUint32
	KindInt32
	KindFloat32
	KindBool
	KindString
	KindArray
	KindUint64
	KindInt64
	KindFloat64
	numKinds
)

var kindNames = [numKinds]string{
	"uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "bool", "string", "array",
	"uint64", "int64", "float64",
}

// kindSizes holds the bytes of a value of each kind, and 0 for kinds whose values differ in size.
var kindSizes = [numKinds]uint64{
	KindUint8: 1, KindInt8: 1, KindUint16: 2, KindInt16: 2, KindUint32: 4, KindInt32: 4, KindUint64: 8, KindInt64: 8,
	KindFloat32: 4, KindFloat64: 8, KindBool: 1,
}

// String returns the kind's name: "uint8", "string", "array" and so on.
func (k ValueKind) String() string {
	if k >= numKinds {
		return fmt.Sprintf("kind %d", uint32(k))
	}
	return kindNames[k]
}

func (k ValueKind) unsigned() bool {
	return k == KindUint8 || k == KindUint16 || k == KindUint32 || k == KindUint64
}

func (k ValueKind) signed() bool {
	return k == KindInt8 || k == KindInt16 || k == KindInt32 || k == KindInt64
}

func (k ValueKind) integer() bool  { return k.signed() || k.unsigned() }
func (k ValueKind) floating() bool { return k == KindFloat32 || k == KindFloat64 }
