package kernels

import (
	"encoding/binary"
	"math"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// maxBlock is the number of elements of the largest block, and the number that plain types are converted in at a time.
const maxBlock = 256

// decoder writes the elements of the blocks in b to x: exactly one block of a quantized type, up to maxBlock elements
// of a plain type.
type decoder func(x *[maxBlock]float32, b []byte)

// decoders are the specification of the formats: one readable function for each type.
var decoders = [gguf.NumTypes]decoder{
	gguf.F32: decodeF32, gguf.F16: decodeF16, gguf.BF16: decodeBF16, gguf.F64: decodeF64,
	gguf.I8: decodeI8, gguf.I16: decodeI16, gguf.I32: decodeI32, gguf.I64: decodeI64,
	gguf.Q4_0: decodeQ4_0, gguf.Q4_1: decodeQ4_1, gguf.Q5_0: decodeQ5_0, gguf.Q5_1: decodeQ5_1,
	gguf.Q8_0: decodeQ8_0, gguf.Q8_1: decodeQ8_1, gguf.Q1_0: decodeQ1_0, gguf.Q2_0: decodeQ2_0,
	gguf.Q2_K: decodeQ2_K, gguf.Q3_K: decodeQ3_K, gguf.Q4_K: decodeQ4_K, gguf.Q5_K: decodeQ5_K,
	gguf.Q6_K: decodeQ6_K, gguf.Q8_K: decodeQ8_K, gguf.TQ1_0: decodeTQ1_0, gguf.TQ2_0: decodeTQ2_0,
	gguf.IQ1_S: decodeIQ1_S, gguf.IQ1_M: decodeIQ1_M, gguf.IQ2_XXS: decodeIQ2_XXS, gguf.IQ2_XS: decodeIQ2_XS,
	gguf.IQ2_S: decodeIQ2_S, gguf.IQ3_XXS: decodeIQ3_XXS, gguf.IQ3_S: decodeIQ3_S,
	gguf.IQ4_NL: decodeIQ4_NL, gguf.IQ4_XS: decodeIQ4_XS, gguf.MXFP4: decodeMXFP4, gguf.NVFP4: decodeNVFP4,
}

// encoders write x to dst as one output type.
var encoders = [numOutputs]func(dst []byte, x []float32){outF32: encodeF32, outF16: encodeF16, outBF16: encodeBF16}

// outputBytes is the size of one element of each output.
var outputBytes = [numOutputs]int{outF32: 4, outF16: 2, outBF16: 2}

// generic is the portable tier: it decodes whole blocks of any type from src and writes them to dst.
func generic(dst []byte, out output, src []byte, from gguf.Type) {
	decode, encode := decoders[from], encoders[out]
	elems := from.BlockElems()
	if elems == 1 {
		elems = maxBlock
	}
	blockBytes := elems / from.BlockElems() * from.BlockBytes()
	var x [maxBlock]float32
	for len(src) > 0 {
		blockBytes = min(blockBytes, len(src))
		elems = blockBytes / from.BlockBytes() * from.BlockElems()
		decode(&x, src[:blockBytes])
		encode(dst, x[:elems])
		src, dst = src[blockBytes:], dst[elems*outputBytes[out]:]
	}
}

func encodeF32(dst []byte, x []float32) {
	for i, v := range x {
		binary.LittleEndian.PutUint32(dst[4*i:], math.Float32bits(v))
	}
}

func encodeF16(dst []byte, x []float32) {
	for i, v := range x {
		binary.LittleEndian.PutUint16(dst[2*i:], toF16(v))
	}
}

func encodeBF16(dst []byte, x []float32) {
	for i, v := range x {
		binary.LittleEndian.PutUint16(dst[2*i:], toBF16(v))
	}
}
