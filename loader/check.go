package loader

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels"
)

// ValueError is what Options.Check finds: an element that is no finite number, or would be none on the device.
type ValueError struct {
	Tensor  string
	Type    gguf.Type // in the file
	Target  gguf.Type // on the device
	Offset  int64     // of the element, or of the block that it is in, in the tensor's bytes in the file
	Element uint64    // counted from the beginning of the tensor, in the order of the file
	Value   float64   // NaN also stands for a block whose scale is NaN by its format
}

// Error says which element is what.
func (e *ValueError) Error() string {
	where := fmt.Sprintf("element %d of tensor %q, in the %v block at byte %d of its data,", e.Element, e.Tensor, e.Type, e.Offset)
	if math.IsNaN(e.Value) || math.IsInf(e.Value, 0) {
		return fmt.Sprintf("%s is %v", where, e.Value)
	}
	return fmt.Sprintf("%s is %v, which is infinite as %v", where, e.Value, e.Target)
}

// Most weights cannot be bad, and that shows without decoding them: quantized ones are products of a scale and a code, which
// is bounded, so that it suffices to look at the exponent of the scale. What is too large for that is suspicious; it is decoded
// and looked at in earnest.
//
// What is looked at is first ORed together for some blocks or words in a row. The result is no smaller than any of them, and
// since weights and scales are nearly always less than 2, whose exponents have no bit in common with those of much larger
// numbers but the lower ones, it is rarely large unless one of them is.
//
// The source of the block formats is the table in kernels: ggml's reference decoder.

// scaled is a block format whose elements are sums of products of binary16 numbers with bounded codes.
type scaled struct {
	at   [2]int // where the numbers are in the block; the same twice if there is one
	gain int    // no element's magnitude exceeds the largest of the numbers times 2^gain
}

var scaledTypes = map[gguf.Type]scaled{
	gguf.Q1_0: {[2]int{0, 0}, 0}, gguf.Q2_0: {[2]int{0, 0}, 1}, gguf.Q4_0: {[2]int{0, 0}, 3}, gguf.Q4_1: {[2]int{0, 2}, 4},
	gguf.Q5_0: {[2]int{0, 0}, 4}, gguf.Q5_1: {[2]int{0, 2}, 5}, gguf.Q8_0: {[2]int{0, 0}, 7}, gguf.Q8_1: {[2]int{0, 0}, 7},
	gguf.Q2_K: {[2]int{80, 82}, 6}, gguf.Q3_K: {[2]int{108, 108}, 7}, gguf.Q4_K: {[2]int{0, 2}, 10},
	gguf.Q5_K: {[2]int{0, 2}, 11}, gguf.Q6_K: {[2]int{208, 208}, 12}, gguf.TQ1_0: {[2]int{52, 52}, 0},
	gguf.TQ2_0: {[2]int{64, 64}, 1}, gguf.IQ1_S: {[2]int{0, 0}, 5}, gguf.IQ2_XXS: {[2]int{0, 0}, 8},
	gguf.IQ2_XS: {[2]int{0, 0}, 8}, gguf.IQ2_S: {[2]int{0, 0}, 8}, gguf.IQ3_XXS: {[2]int{0, 0}, 9},
	gguf.IQ3_S: {[2]int{0, 0}, 9}, gguf.IQ4_NL: {[2]int{0, 0}, 7}, gguf.IQ4_XS: {[2]int{0, 0}, 12},
}

// Exponents as IEEE 754 and its relatives store them: bias, and that of infinity and NaN.
const (
	biasF16, endF16 = 15, 31
	biasF32, endF32 = 127, 255 // of BF16, too
	biasF64, endF64 = 1023, 2047
)

// topF16 is an exponent, without bias, such that smaller numbers stay finite as binary16, rounding included.
const topF16 = 15

// suspect returns the offset in b of the first block or element of type t, from offset from on, that may be bad as target; -1
// if there is none. b holds whole blocks.
func suspect(b []byte, from int, t, target gguf.Type) int {
	half := target == gguf.F16
	switch t {
	case gguf.F16:
		return largeElement(b, from, 2, 10, endF16)
	case gguf.BF16:
		return largeElement(b, from, 2, 7, pick(half, biasF32+topF16, endF32))
	case gguf.F32: // the largest numbers become infinite as BF16
		return largeElement(b, from, 4, 23, pick(half, biasF32+topF16, pick(target == gguf.BF16, endF32-1, endF32)))
	case gguf.F64:
		return largeElement(b, from, 8, 52, pick(half, biasF64+topF16, pick(target == gguf.F64, endF64, biasF64+biasF32)))
	case gguf.MXFP4: // the scale is 2^(e-128), codes are up to 12
		return largeByte(b, from, t.BlockBytes(), [2]int{}, 0xff, byte(pick(half, topF16+124, biasF32+124)))
	case gguf.Q8_K: // a binary32 scale, and codes up to 128
		limit := uint32(pick(half, biasF32+topF16-7, endF32-1-7)) << 23
		for at := from; at < len(b); at += t.BlockBytes() {
			if binary.LittleEndian.Uint32(b[at:])&^(1<<31) >= limit {
				return at
			}
		}
	case gguf.IQ1_M: // the exponent is in the upper two of the four nibbles that make up the scale
		limit := uint16(pick(half, biasF16+topF16-5, endF16)) << 10
		for at := from; at < len(b); at += t.BlockBytes() {
			w := b[at+48:][:8]
			if (uint16(w[7]>>4)<<12|uint16(w[5]>>4)<<8|uint16(w[3]>>4)<<4|uint16(w[1]>>4))&0x7fff >= limit {
				return at
			}
		}
	default:
		if s, ok := scaledTypes[t]; ok {
			at := [2]int{s.at[0] + 1, s.at[1] + 1} // the bytes with sign, exponent and two more bits
			return largeByte(b, from, t.BlockBytes(), at, 0x7f, byte(pick(half, biasF16+topF16-s.gain, endF16))<<2)
		}
	}
	return -1 // integers, and NVFP4, whose elements are at most 2880
}

func pick(first bool, a, b int) int {
	if first {
		return a
	}
	return b
}

// largeByte looks for a block of size bytes in which the byte at one of two places, with mask, is limit or more.
func largeByte(b []byte, from, size int, at [2]int, mask, limit byte) int {
	const together = 4
	first, second := at[0], at[1]
	for ; from+together*size <= len(b); from += together * size {
		p := b[from : from+together*size]
		or := p[first] | p[first+size] | p[first+2*size] | p[first+3*size]
		if second != first {
			or |= p[second] | p[second+size] | p[second+2*size] | p[second+3*size]
		}
		if or&mask < limit {
			continue
		}
		for block := range together {
			if p := p[block*size:]; max(p[first]&mask, p[second]&mask) >= limit {
				return from + block*size
			}
		}
	}
	for ; from < len(b); from += size {
		if max(b[from+first]&mask, b[from+second]&mask) >= limit {
			return from
		}
	}
	return -1
}

// largeElement looks for a number of size bytes, with its exponent from bit shift on and a sign above that, whose exponent is
// limit or more. It adds what is missing to the next power of two to the exponents of all the numbers in eight bytes at once:
// the sum reaches the place of the sign where an exponent is large.
func largeElement(b []byte, from, size, shift, limit int) int {
	const together = 64
	bits := 8 * size
	lanes := ^uint64(0) / (1<<(bits-1)<<1 - 1) // a 1 at the lowest bit of every number
	sign := lanes << (bits - 1)
	exponent := sign - lanes<<shift
	add := sign - lanes*uint64(limit)<<shift
	for ; from < len(b); from += together {
		p := b[from:]
		if len(p) >= together {
			p = p[:together]
			or := le(p, 0) | le(p, 8) | le(p, 16) | le(p, 24) | le(p, 32) | le(p, 40) | le(p, 48) | le(p, 56)
			if (or&exponent+add)&sign == 0 {
				continue
			}
		}
		for at := 0; at < min(len(p), together); at += size {
			var x [8]byte
			copy(x[:size], p[at:])
			if (binary.LittleEndian.Uint64(x[:])&exponent+add)&(1<<(bits-1)) != 0 {
				return from + at
			}
		}
	}
	return -1
}

// le is the number in the eight bytes from i on.
func le(b []byte, i int) uint64 { return binary.LittleEndian.Uint64(b[i : i+8]) }

// checkValues looks for elements in src, which begins at offset off of tensor t's bytes in the file, that are not finite on
// the device. The error is a *TensorError that wraps a *ValueError.
func checkValues(t *PlannedTensor, off int64, src []byte) error {
	block := t.Type.BlockBytes()
	for at := suspect(src, 0, t.Type, t.Target); at >= 0; at = suspect(src, at+block, t.Type, t.Target) {
		i, value, err := badElement(src[at:at+block], t.Type, t.Target)
		if err == nil && i >= 0 {
			start := t.inWhole(off + int64(at))
			err = &ValueError{
				Tensor: t.Name, Type: t.Type, Target: t.Target, Offset: start, Value: value,
				Element: uint64(start/int64(block))*uint64(t.Type.BlockElems()) + uint64(i),
			}
		}
		if err != nil {
			return &TensorError{Tensor: t.Name, Op: "check", Offset: off + int64(at), Bytes: block, Err: err}
		}
	}
	return nil
}

// badElement decodes one block and returns the first element that is not finite as target, -1 if there is none.
func badElement(block []byte, t, target gguf.Type) (i int, value float64, err error) {
	if t == gguf.F64 && target == gguf.F64 {
		return 0, math.Float64frombits(binary.LittleEndian.Uint64(block)), nil // suspicious ones are bad
	}
	if t == gguf.MXFP4 && block[0] == 0xff {
		return 0, math.NaN(), nil // says the format's specification (OCP MX 1.0, 5.4.1); ggml decodes it as 2^127
	}
	ref, err := kernels.For(kernels.Generic)
	if err != nil {
		return 0, 0, err
	}
	var exact, out [4 * 256]byte
	n := t.BlockElems()
	if err := ref.Dequantize(exact[:4*n], gguf.F32, block, t); err != nil {
		return 0, 0, err
	}
	size, shift, end := 4, 23, endF32
	switch target {
	case gguf.F16:
		size, shift, end = 2, 10, endF16
	case gguf.BF16:
		size, shift, end = 2, 7, endF32
	default:
		target = gguf.F32 // quantized blocks that stay so are judged by what they stand for
	}
	if err := ref.Dequantize(out[:size*n], target, block, t); err != nil {
		return 0, 0, err
	}
	at := largeElement(out[:size*n], 0, size, shift, end)
	if at < 0 {
		return -1, 0, nil
	}
	i = at / size
	if t == gguf.F64 {
		return i, math.Float64frombits(binary.LittleEndian.Uint64(block)), nil
	}
	return i, float64(math.Float32frombits(binary.LittleEndian.Uint32(exact[4*i:]))), nil
}
