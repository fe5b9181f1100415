package kernels

import "github.com/gguf2gpu/gguf2gpu/gguf"

// ScaleFormat says how a [Scale] is stored. All are little-endian.
type ScaleFormat uint8

const (
	// ScaleF16 is an IEEE 754 binary16: two bytes.
	ScaleF16 ScaleFormat = iota
	// ScaleF32 is an IEEE 754 binary32: four bytes.
	ScaleF32
	// ScaleSplitF16 is a binary16 in pieces: the upper four bits of four 16-bit words, the lowest piece first. It is
	// eight bytes with other fields between the pieces.
	ScaleSplitF16
	// ScaleE8M0 is a power of two in one byte e: 2^(e-128). The format's specification (OCP MX 1.0, section 5.4.1) says
	// that 0xff is NaN; ggml decodes it as 2^127.
	ScaleE8M0
	// ScaleUE4M3 is a float in one byte: four bits of exponent above three of fraction, halved. The sign bit is
	// ignored, and 0x7f is zero, so that it is always finite.
	ScaleUE4M3
)

// Scale is a floating-point number in a block that the codes in the block are multiplied with, or that is added to the
// product.
type Scale struct {
	Offset int // of its first byte in the block
	Format ScaleFormat
	// Factor is the largest magnitude that the scale is multiplied with. No element of the block has a larger magnitude
	// than the sum over the block's scales of scale times factor. It is 0 for a number that no element depends on.
	Factor float64
}

// scales has the places of the block layouts of ggml (ggml-common.h) and the largest factors that the decoders of this
// package can make of codes and of the small integers that scale them further.
var scales = [gguf.NumTypes][]Scale{
	gguf.Q1_0: {{0, ScaleF16, 1}},
	gguf.Q2_0: {{0, ScaleF16, 2}},
	gguf.Q4_0: {{0, ScaleF16, 8}},
	gguf.Q4_1: {{0, ScaleF16, 15}, {2, ScaleF16, 1}},
	gguf.Q5_0: {{0, ScaleF16, 16}},
	gguf.Q5_1: {{0, ScaleF16, 31}, {2, ScaleF16, 1}},
	gguf.Q8_0: {{0, ScaleF16, 128}},
	gguf.Q8_1: {{0, ScaleF16, 128}, {2, ScaleF16, 0}}, // the second is the sum of the codes, for dot products

	gguf.Q2_K: {{80, ScaleF16, 15 * 3}, {82, ScaleF16, 15}},
	gguf.Q3_K: {{108, ScaleF16, 32 * 4}},
	gguf.Q4_K: {{0, ScaleF16, 63 * 15}, {2, ScaleF16, 63}},
	gguf.Q5_K: {{0, ScaleF16, 63 * 31}, {2, ScaleF16, 63}},
	gguf.Q6_K: {{208, ScaleF16, 128 * 32}},
	gguf.Q8_K: {{0, ScaleF32, 128}},

	gguf.IQ1_S:   {{0, ScaleF16, 15 * 1.125}},
	gguf.IQ1_M:   {{48, ScaleSplitF16, 15 * 1.125}},
	gguf.IQ2_XXS: {{0, ScaleF16, 15.5 * 0.25 * 43}},
	gguf.IQ2_XS:  {{0, ScaleF16, 15.5 * 0.25 * 43}},
	gguf.IQ2_S:   {{0, ScaleF16, 15.5 * 0.25 * 43}},
	gguf.IQ3_XXS: {{0, ScaleF16, 15.5 * 0.5 * 62}},
	gguf.IQ3_S:   {{0, ScaleF16, 31 * 15}},
	gguf.IQ4_NL:  {{0, ScaleF16, 127}},
	gguf.IQ4_XS:  {{0, ScaleF16, 32 * 127}},

	gguf.TQ1_0: {{52, ScaleF16, 1}},
	gguf.TQ2_0: {{64, ScaleF16, 2}},
	gguf.MXFP4: {{0, ScaleE8M0, 12}},
	// Each of the four is for 16 elements.
	gguf.NVFP4: {{0, ScaleUE4M3, 12}, {1, ScaleUE4M3, 12}, {2, ScaleUE4M3, 12}, {3, ScaleUE4M3, 12}},
}

// Scales returns where in a block of type t its scales are, in the order of their offsets: all that can make the
// elements of a block infinite or NaN. It is empty for plain types and for types that no GGUF file may hold.
func Scales(t gguf.Type) []Scale {
	if !t.Valid() {
		return nil
	}
	return append([]Scale(nil), scales[t]...) // a copy: the table stays as it is
}
