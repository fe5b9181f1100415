package synth

import (
	"encoding/binary"
	"math"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels"
)

// Fill fills dst with blocks of random weights of type t, which must not be an integer type. They decode to finite
// numbers of the size that real weights have. dst must be whole blocks. The same seed gives the same bytes.
func Fill(dst []byte, t gguf.Type, seed uint64) { newWeights(t, seed).fill(dst, 0) }

// weights generates the bytes of one tensor from a seed. Each eight bytes depend only on the seed and on their
// offset, so the parts of a tensor may be filled in any order and by any number of goroutines.
//
// The bytes are random, with two exceptions that make every block decode to finite numbers of the size of real
// weights (around ±0.05): the exponents of plain floats, and the scales of blocks.
type weights struct {
	typ    gguf.Type
	seed   uint64
	keep   uint64 // which bits of eight bytes are random
	put    uint64 // which of the others are 1
	scales []kernels.Scale
}

const (
	weightSize = 0.06 // about the largest weight

	// The bytes of an NVFP4 scale are from 1 to 8, which stand for that many times 2^-10: up to 2^-7, and codes reach 12.
	nvfp4Least, nvfp4Spread = 1, 7
	// The bytes of an MXFP4 scale are from so many below the largest one up to that.
	mxfp4Spread = 3

	halfFraction = 0x83ff             // sign and fraction of a binary16
	subnormalTop = 0x0200             // the highest bit of the fraction: keeps a subnormal scale away from zero
	golden       = 0x9e3779b97f4a7c15 // 2^64 divided by the golden ratio: the step of SplitMix64
)

// newWeights returns the weights of a tensor of type t, which must not be an integer type.
func newWeights(t gguf.Type, seed uint64) *weights {
	w := &weights{typ: t, seed: seed, keep: math.MaxUint64, scales: kernels.Scales(t)}
	// Plain floats keep the sign, the fraction and the two lowest bits of the exponent; the rest of the exponent puts
	// the values between 2^-7 and 2^-3.
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
	return w
}

// newNormWeights returns the weights of a normalization: F32 between 1 and 1.125.
func newNormWeights(seed uint64) *weights {
	return &weights{typ: gguf.F32, seed: seed, keep: 0x000f_ffff_000f_ffff, put: 0x3f80_0000_3f80_0000}
}

// fill sets dst to the bytes of the tensor that begin at offset. Both must be whole blocks, and offset a multiple of
// eight.
func (w *weights) fill(dst []byte, offset int64) {
	w.random(dst, uint64(offset)/8)
	step := w.typ.BlockBytes()
	for _, s := range w.scales {
		exponent := exponentFor(s.Factor)
		for at := s.Offset; at < len(dst); at += step {
			setScale(dst[at:], s.Format, exponent)
		}
	}
}

// exponentFor returns the exponent, without bias, of a number whose product with factor is about weightSize.
func exponentFor(factor float64) int {
	if factor == 0 {
		factor = 1 // no element depends on the number
	}
	return math.Ilogb(weightSize / factor)
}

// setScale gives the scale at the beginning of b that exponent, or one close to it. The rest of the scale stays random.
func setScale(b []byte, format kernels.ScaleFormat, exponent int) {
	switch format {
	case kernels.ScaleF16:
		binary.LittleEndian.PutUint16(b, withExponent(binary.LittleEndian.Uint16(b), exponent))
	case kernels.ScaleF32:
		binary.LittleEndian.PutUint32(b, binary.LittleEndian.Uint32(b)&0x807f_ffff|uint32(exponent+127)<<23)
	case kernels.ScaleSplitF16: // four nibbles, the upper ones of every second byte
		var h uint16
		for i := range 4 {
			h |= uint16(b[2*i+1]>>4) << (4 * i)
		}
		h = withExponent(h, exponent)
		for i := range 4 {
			b[2*i+1] = b[2*i+1]&0x0f | byte(h>>(4*i))<<4
		}
	case kernels.ScaleE8M0:
		b[0] = byte(exponent+128) - mxfp4Spread + b[0]&mxfp4Spread
	case kernels.ScaleUE4M3:
		b[0] = nvfp4Least + b[0]&nvfp4Spread
	}
}

// random fills dst with the outputs of SplitMix64 from the n-th on, with keep and put applied (Steele, Lea, Flood:
// Fast Splittable Pseudorandom Number Generators, 2014). Its n-th output is a function of n alone.
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

// withExponent gives the binary16 h that exponent, or that of subnormal numbers if it is too small. The result is
// finite and not zero.
func withExponent(h uint16, exponent int) uint16 {
	biased := uint16(max(0, exponent+15))
	h = h&halfFraction | biased<<10
	if biased == 0 {
		h |= subnormalTop
	}
	return h
}
