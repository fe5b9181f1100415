package main

import (
	"encoding/binary"
	"math"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// weights makes up the bytes of one tensor from a seed. Every eight bytes depend on the seed and on their place alone, so
// the parts of a tensor may be filled in any order and by any number of goroutines.
//
// The bytes are random but for two things, so that every block decodes to finite numbers of a size that real weights
// have (around ±0.05): the exponents of plain floats, and the fields that scale a block.
type weights struct {
	typ    gguf.Type
	seed   uint64
	keep   uint64 // the random bits that stay, of eight bytes
	put    uint64 // the bits that are set in all of them
	scales []halfScale
}

// halfScale is a binary16 of a block that its codes are multiplied with.
type halfScale struct {
	offset   int
	exponent uint16 // the biased one that it gets; sign and fraction stay random
}

// scaleFields tells, for the quantized types, where the binary16 scales are (the block layouts of ggml) and the largest
// factor that each is multiplied with.
var scaleFields = map[gguf.Type][]struct {
	offset int
	factor float64
}{
	gguf.Q1_0:    {{0, 1}},
	gguf.Q2_0:    {{0, 2}},
	gguf.Q4_0:    {{0, 8}},
	gguf.Q4_1:    {{0, 15}, {2, 1}},
	gguf.Q5_0:    {{0, 16}},
	gguf.Q5_1:    {{0, 31}, {2, 1}},
	gguf.Q8_0:    {{0, 127}},
	gguf.Q8_1:    {{0, 127}, {2, 1}},
	gguf.Q2_K:    {{80, 15 * 3}, {82, 15}},
	gguf.Q3_K:    {{108, 32 * 4}},
	gguf.Q4_K:    {{0, 63 * 15}, {2, 63}},
	gguf.Q5_K:    {{0, 63 * 31}, {2, 63}},
	gguf.Q6_K:    {{208, 128 * 32}},
	gguf.IQ1_S:   {{0, 15 * 1.125}},
	gguf.IQ2_XXS: {{0, 15.5 * 0.25 * 43}},
	gguf.IQ2_XS:  {{0, 15.5 * 0.25 * 43}},
	gguf.IQ2_S:   {{0, 15.5 * 0.25 * 43}},
	gguf.IQ3_XXS: {{0, 15.5 * 0.5 * 62}},
	gguf.IQ3_S:   {{0, 31 * 15}},
	gguf.IQ4_NL:  {{0, 127}},
	gguf.IQ4_XS:  {{0, 32 * 127}},
	gguf.TQ1_0:   {{52, 1}},
	gguf.TQ2_0:   {{64, 2}},
	gguf.IQ1_M:   nil, // its scale is spread over four words
	gguf.Q8_K:    nil, // a float32
	gguf.MXFP4:   nil, // a power of two in a byte
	gguf.NVFP4:   nil, // four bytes, each a small float
}

const (
	weightSize  = 0.06       // about the largest weight
	iq1mFactor  = 15 * 1.125 // what the scale of an IQ1_M block is multiplied with at most
	q8kExponent = 127 - 12   // of a binary32: 127 * 2^-12 is about 0.03

	// An MXFP4 scale byte e stands for 2^(e-128), and codes reach 12: from 12 * 2^-11 up to 12 * 2^-8.
	mxfp4Least, mxfp4Spread = 117, 3
	// An NVFP4 scale byte from 1 to 8 stands for that many times 2^-10, and codes reach 12.
	nvfp4Least, nvfp4Spread = 1, 7

	halfFraction = 0x83ff             // sign and fraction of a binary16
	subnormalTop = 0x0200             // the highest bit of the fraction: keeps a subnormal scale away from zero
	golden       = 0x9e3779b97f4a7c15 // 2^64 divided by the golden ratio: the step of SplitMix64
)

// newWeights returns the weights of a tensor of type t, which must not be an integer type.
func newWeights(t gguf.Type, seed uint64) *weights {
	w := &weights{typ: t, seed: seed, keep: math.MaxUint64}
	// Plain floats keep the sign, the fraction and the two lowest bits of the exponent; the rest of the exponent puts the
	// values between 2^-7 and 2^-3.
	switch t {
	case gguf.F16:
		w.keep, w.put = 0x8fff_8fff_8fff_8fff, 0x2000_2000_2000_2000
	case gguf.BF16:
		w.keep, w.put = 0x81ff_81ff_81ff_81ff, 0x3c00_3c00_3c00_3c00
	case gguf.F32:
		w.keep, w.put = 0x81ff_ffff_81ff_ffff, 0x3c00_0000_3c00_0000
	case gguf.F64:
		w.keep, w.put = 0x803f_ffff_ffff_ffff, 0x3f80_0000_0000_0000
	}
	for _, f := range scaleFields[t] {
		w.scales = append(w.scales, halfScale{f.offset, halfExponent(f.factor)})
	}
	return w
}

// newNormWeights returns the weights of a normalization: F32 between 1 and 1.125.
func newNormWeights(seed uint64) *weights {
	return &weights{typ: gguf.F32, seed: seed, keep: 0x000f_ffff_000f_ffff, put: 0x3f80_0000_3f80_0000}
}

// halfExponent is the biased exponent of a binary16 that times factor is about weightSize; 0, a subnormal, is the least.
func halfExponent(factor float64) uint16 {
	return uint16(max(0, math.Ilogb(weightSize/factor)+15))
}

// fill sets dst to the bytes of the tensor from offset on. Both must be whole blocks, and offset a multiple of eight.
func (w *weights) fill(dst []byte, offset int64) {
	w.random(dst, uint64(offset)/8)
	step := w.typ.BlockBytes()
	for _, s := range w.scales {
		for at := s.offset; at < len(dst); at += step {
			field := dst[at : at+2]
			binary.LittleEndian.PutUint16(field, withExponent(binary.LittleEndian.Uint16(field), s.exponent))
		}
	}
	switch w.typ {
	case gguf.Q8_K:
		for at := 0; at < len(dst); at += step {
			field := dst[at : at+4]
			binary.LittleEndian.PutUint32(field, binary.LittleEndian.Uint32(field)&0x807f_ffff|q8kExponent<<23)
		}
	case gguf.MXFP4:
		for at := 0; at < len(dst); at += step {
			dst[at] = mxfp4Least + dst[at]&mxfp4Spread
		}
	case gguf.NVFP4:
		for at := 0; at < len(dst); at += step {
			for i := range 4 {
				dst[at+i] = nvfp4Least + dst[at+i]&nvfp4Spread
			}
		}
	case gguf.IQ1_M:
		for at := 0; at < len(dst); at += step {
			setIQ1MScale(dst[at+48 : at+56])
		}
	}
}

// random fills dst with SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014), whose n-th
// output is a function of n.
func (w *weights) random(dst []byte, n uint64) {
	state, keep, put := w.seed+n*golden, w.keep, w.put
	for len(dst) >= 8 {
		binary.LittleEndian.PutUint64(dst, mix(state)&keep|put)
		state += golden
		dst = dst[8:]
	}
	if len(dst) > 0 {
		var last [8]byte
		binary.LittleEndian.PutUint64(last[:], mix(state)&keep|put)
		copy(dst, last[:])
	}
}

// mix is the output function of SplitMix64.
func mix(z uint64) uint64 {
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}

// withExponent gives the binary16 h another exponent. The result is finite and not zero.
func withExponent(h, exponent uint16) uint16 {
	h = h&halfFraction | exponent<<10
	if exponent == 0 {
		h |= subnormalTop
	}
	return h
}

// setIQ1MScale mends the scale of an IQ1_M block. It is a binary16 in the top four bits of the four words of w.
func setIQ1MScale(w []byte) {
	var d uint16
	for i := range 4 {
		d |= uint16(w[2*i+1]>>4) << (4 * i)
	}
	d = withExponent(d, halfExponent(iq1mFactor))
	for i := range 4 {
		w[2*i+1] = w[2*i+1]&0x0f | byte(d>>(4*i))<<4
	}
}
