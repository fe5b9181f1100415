package kernels

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// FirstNonFinite looks in src, whole blocks of type from, for the first element that is no finite number (an infinity
// or a NaN), or would be none once it is converted to type to. to is F32, F16 or BF16 as for Dequantize, or from itself
// for blocks that stay as they are: those are judged by the F32 (or F64) numbers that they stand for.
//
// elem counts the elements of src, and value is that element before the conversion: finite if only the conversion makes
// it infinite. A whole MXFP4 block is NaN if its scale is the NaN of that format, although Dequantize, like ggml, makes
// large numbers of it. found is false, and elem and value are 0, if all elements are finite.
//
// Sound blocks are not decoded, so that this takes a small part of Dequantize's time. Errors match ErrUnsupported or
// ErrLength.
func FirstNonFinite(src []byte, from, to gguf.Type) (elem int, value float64, found bool, err error) {
	if _, ok := outputOf(to); !from.Valid() || !ok && to != from {
		return 0, 0, false, fmt.Errorf("kernels: %v as %v: %w: values are checked as F32, F16, BF16 or the type that they have",
			from, to, ErrUnsupported)
	}
	block := from.BlockBytes()
	if len(src)%block != 0 {
		return 0, 0, false, wholeBlocksError(len(src), from, to)
	}
	suspect := newSuspects(from, to)
	for at := suspect(src, 0); at >= 0; at = suspect(src, at+block) {
		if i, value := nonFinite(src[at:at+block], from, to); i >= 0 {
			return at/block*from.BlockElems() + i, value, true, nil
		}
	}
	return 0, 0, false, nil
}

// How FirstNonFinite is quick: most weights cannot be bad, and that shows without decoding them. Quantized ones are
// products of a scale and a bounded code (see Scale.Factor), so it suffices to look at the exponents of the scales.
// Blocks with a larger scale than is always safe are suspects: they are decoded and looked at element by element.
//
// The search first ORs the exponents of some blocks or elements in a row. The OR is no smaller than any of them, so if
// it is small, all are. It is rarely large by accident: weights and scales are nearly always less than 2, and the
// exponents of such numbers share few bits with those of large ones.

// A search returns the offset in b, from offset from on, of the first block or element that may be bad, -1 if there is
// none. b holds whole blocks.
type search func(b []byte, from int) int

// Exponents as IEEE 754 and its relatives store them: bias, and the exponent of infinity and NaN.
const (
	biasF16, endF16 = 15, 31
	biasF32, endF32 = 127, 255 // of BF16, too
	biasF64, endF64 = 1023, 2047
)

// topF16 is an exponent without bias: numbers with smaller ones stay finite as binary16, rounding included.
const topF16 = 15

// newSuspects returns the search for suspects among blocks of type from that are to become type to.
func newSuspects(from, to gguf.Type) search {
	half := to == gguf.F16
	switch from {
	case gguf.F16:
		return largeElements(2, 10, endF16)
	case gguf.BF16:
		return largeElements(2, 7, pick(half, biasF32+topF16, endF32))
	case gguf.F32: // the largest numbers become infinite as BF16
		return largeElements(4, 23, pick(half, biasF32+topF16, pick(to == gguf.BF16, endF32-1, endF32)))
	case gguf.F64:
		return largeElements(8, 52, pick(half, biasF64+topF16, pick(to == gguf.F64, endF64, biasF64+biasF32)))
	}
	size := from.BlockBytes()
	offsets, sum := [2]int{}, 0.0
	for i, s := range scales[from] {
		if s.Factor != 0 {
			offsets[min(i, 1)] = s.Offset
			sum += s.Factor
		}
	}
	if sum == 0 {
		return func([]byte, int) int { return -1 } // integers
	}
	if len(scales[from]) == 1 || scales[from][1].Factor == 0 {
		offsets[1] = offsets[0]
	}
	// No element is 2^gain times the largest scale or more.
	gain := math.Ilogb(sum)
	if sum > math.Ldexp(1, gain) {
		gain++
	}
	switch scales[from][0].Format {
	case ScaleF16: // the second byte has sign, exponent and two bits of the fraction
		limit := pick(half, biasF16+topF16-gain, endF16)
		return largeBytes(size, [2]int{offsets[0] + 1, offsets[1] + 1}, 0x7f, byte(limit)<<2)
	case ScaleE8M0:
		return largeBytes(size, offsets, 0xff, byte(128+pick(half, topF16, biasF32)-gain))
	case ScaleF32:
		limit := uint32(pick(half, biasF32+topF16, endF32-1)-gain) << 23
		return largeScales(size, func(block []byte) bool {
			return binary.LittleEndian.Uint32(block[offsets[0]:])&^(1<<31) >= limit
		})
	case ScaleSplitF16:
		limit := uint16(pick(half, biasF16+topF16-gain, endF16)) << 10
		return largeScales(size, func(block []byte) bool { return splitF16(block[offsets[0]:])&0x7fff >= limit })
	case ScaleUE4M3:
	}
	return func([]byte, int) int { return -1 } // NVFP4: its elements are 2880 at most
}

func pick(first bool, a, b int) int {
	if first {
		return a
	}
	return b
}

// splitF16 returns the bits of a ScaleSplitF16 at the beginning of b.
func splitF16(b []byte) uint16 {
	return uint16(b[7]>>4)<<12 | uint16(b[5]>>4)<<8 | uint16(b[3]>>4)<<4 | uint16(b[1]>>4)
}

// largeScales returns the search for blocks of size bytes that large says yes to.
func largeScales(size int, large func(block []byte) bool) search {
	return func(b []byte, from int) int {
		for at := from; at < len(b); at += size {
			if large(b[at : at+size]) {
				return at
			}
		}
		return -1
	}
}

// largeBytes returns the search for blocks of size bytes in which the byte at one of two offsets, ANDed with mask, is
// at least limit. The offsets are equal if there is only one.
func largeBytes(size int, offsets [2]int, mask, limit byte) search {
	const together = 4
	first, second := offsets[0], offsets[1]
	return func(b []byte, from int) int {
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
}

// largeElements returns the search for elements of size bytes whose exponent is at least limit. The exponent begins at
// bit shift, and the sign is above it.
//
// The exponents of all the elements in eight bytes are compared at once: adding the distance from limit to the next
// power of two carries into the place of the sign if an exponent is large.
func largeElements(size, shift, limit int) search {
	const together = 64
	bits := 8 * size
	lanes := ^uint64(0) / (1<<(bits-1)<<1 - 1) // a 1 at the lowest bit of every element
	sign := lanes << (bits - 1)
	exponent := sign - lanes<<shift
	add := sign - lanes*uint64(limit)<<shift
	return func(b []byte, from int) int {
		for ; from < len(b); from += together {
			p := b[from:]
			if len(p) >= together {
				p = p[:together]
				or := word(p, 0) | word(p, 8) | word(p, 16) | word(p, 24) | word(p, 32) | word(p, 40) | word(p, 48) | word(p, 56)
				if (or&exponent+add)&sign == 0 {
					continue
				}
			}
			for at := 0; at < min(len(p), together); at += size {
				var x [8]byte
				copy(x[:size], p[at:])
				if (word(x[:], 0)&exponent+add)&(1<<(bits-1)) != 0 {
					return from + at
				}
			}
		}
		return -1
	}
}

// word returns the number in the eight bytes from i on.
func word(b []byte, i int) uint64 { return binary.LittleEndian.Uint64(b[i : i+8]) }

// nonFinite decodes one suspect and returns its first element that is not finite as type to; i is -1 if there is none.
func nonFinite(block []byte, from, to gguf.Type) (i int, value float64) {
	switch {
	case from == gguf.F64 && to == gguf.F64: // these are suspects only if they are bad
		return 0, math.Float64frombits(binary.LittleEndian.Uint64(block))
	case from == gguf.MXFP4 && block[0] == 0xff:
		return 0, math.NaN()
	}
	out, _ := outputOf(to) // outF32 for blocks that stay as they are
	size, n := outputBytes[out], from.BlockElems()
	var exact, converted [4 * maxBlock]byte
	generic(exact[:4*n], outF32, block, from)
	generic(converted[:size*n], out, block, from)
	var infinite search
	switch out {
	case outF16:
		infinite = largeElements(size, 10, endF16)
	case outBF16:
		infinite = largeElements(size, 7, endF32)
	default:
		infinite = largeElements(size, 23, endF32)
	}
	at := infinite(converted[:size*n], 0)
	if at < 0 {
		return -1, 0
	}
	i = at / size
	if from == gguf.F64 {
		return i, math.Float64frombits(binary.LittleEndian.Uint64(block))
	}
	return i, float64(math.Float32frombits(binary.LittleEndian.Uint32(exact[4*i:])))
}
