package kernels

import (
	"encoding/binary"
	"math"
)

// The plain types: a block is one element, and each is converted to float32, rounded to nearest where it does not fit.

func decodeF32(x *[maxBlock]float32, b []byte) {
	for i := range len(b) / 4 {
		x[i] = math.Float32frombits(binary.LittleEndian.Uint32(b[4*i:]))
	}
}

func decodeF16(x *[maxBlock]float32, b []byte) {
	for i := range len(b) / 2 {
		x[i] = half(b[2*i:])
	}
}

func decodeBF16(x *[maxBlock]float32, b []byte) {
	for i := range len(b) / 2 {
		x[i] = fromBF16(binary.LittleEndian.Uint16(b[2*i:]))
	}
}

func decodeF64(x *[maxBlock]float32, b []byte) {
	for i := range len(b) / 8 {
		x[i] = float32(math.Float64frombits(binary.LittleEndian.Uint64(b[8*i:])))
	}
}

func decodeI8(x *[maxBlock]float32, b []byte) {
	for i, v := range b {
		x[i] = float32(int8(v))
	}
}

func decodeI16(x *[maxBlock]float32, b []byte) {
	for i := range len(b) / 2 {
		x[i] = float32(int16(binary.LittleEndian.Uint16(b[2*i:])))
	}
}

func decodeI32(x *[maxBlock]float32, b []byte) {
	for i := range len(b) / 4 {
		x[i] = float32(int32(binary.LittleEndian.Uint32(b[4*i:])))
	}
}

func decodeI64(x *[maxBlock]float32, b []byte) {
	for i := range len(b) / 8 {
		x[i] = float32(int64(binary.LittleEndian.Uint64(b[8*i:])))
	}
}
