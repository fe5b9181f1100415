package kernels

import "encoding/binary"

// The formats of small blocks, most with one binary16 scale d. Decoders subtract the offset of a code before they
// multiply it by d: then the code zero gives a zero with the sign of d, as in ggml.

// decodeQ4_0: d, then 16 bytes whose low nibbles are the codes of the first 16 outputs and whose high nibbles those of
// the second; (code-8)*d.
func decodeQ4_0(x *[maxBlock]float32, b []byte) {
	d, q := half(b), b[2:18]
	for j, v := range q {
		x[j] = float32(int(v&15)-8) * d
		x[16+j] = float32(int(v>>4)-8) * d
	}
}

// decodeQ4_1: d, a minimum m, nibbles as Q4_0; code*d + m.
func decodeQ4_1(x *[maxBlock]float32, b []byte) {
	d, m, q := half(b), half(b[2:]), b[4:20]
	for j, v := range q {
		x[j] = float32(v&15)*d + m
		x[16+j] = float32(v>>4)*d + m
	}
}

// decodeQ5_0: d, 32 bits that are the fifth bit of each code, nibbles as Q4_0; (code-16)*d.
func decodeQ5_0(x *[maxBlock]float32, b []byte) {
	d, h, q := half(b), binary.LittleEndian.Uint32(b[2:]), b[6:22]
	for j, v := range q {
		x[j] = float32(int(v&15|fifth(h, j))-16) * d
		x[16+j] = float32(int(v>>4|fifth(h, 16+j))-16) * d
	}
}

// decodeQ5_1: d, a minimum m, fifth bits and nibbles as Q5_0; code*d + m.
func decodeQ5_1(x *[maxBlock]float32, b []byte) {
	d, m, h, q := half(b), half(b[2:]), binary.LittleEndian.Uint32(b[4:]), b[8:24]
	for j, v := range q {
		x[j] = float32(v&15|fifth(h, j))*d + m
		x[16+j] = float32(v>>4|fifth(h, 16+j))*d + m
	}
}

// fifth returns bit i of h in the place of a code's bit 4.
func fifth(h uint32, i int) byte { return byte(h>>i&1) << 4 }

// decodeQ8_0: d, 32 signed codes; code*d.
func decodeQ8_0(x *[maxBlock]float32, b []byte) { scaleBytes(x, b[2:34], half(b)) }

// decodeQ8_1: as Q8_0 with the sum of the codes after d, which only dot products use.
func decodeQ8_1(x *[maxBlock]float32, b []byte) { scaleBytes(x, b[4:36], half(b)) }

// scaleBytes writes each signed byte of q times d.
func scaleBytes(x *[maxBlock]float32, q []byte, d float32) {
	for j, v := range q {
		x[j] = float32(int8(v)) * d
	}
}

// decodeQ1_0: d, 128 sign bits, low bit first; a set bit is +d, a clear one -d.
func decodeQ1_0(x *[maxBlock]float32, b []byte) {
	d, q := half(b), b[2:18]
	for j := range 128 {
		x[j] = -d
		if q[j/8]>>(j%8)&1 != 0 {
			x[j] = d
		}
	}
}

// decodeQ2_0: d, 64 codes of two bits in sequence, low bits first; (code-1)*d.
func decodeQ2_0(x *[maxBlock]float32, b []byte) {
	d, q := half(b), b[2:18]
	for j := range 64 {
		x[j] = float32(int(q[j/4]>>(2*(j%4))&3)-1) * d
	}
}

// kvaluesIQ4NL are the values of the non-linear 4-bit codes of IQ4_NL and IQ4_XS.
var kvaluesIQ4NL = [16]int8{-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113}

// decodeIQ4_NL: d, nibbles as Q4_0; d*kvaluesIQ4NL[code].
func decodeIQ4_NL(x *[maxBlock]float32, b []byte) {
	lookupNibbles(x[:32], b[2:18], &kvaluesIQ4NL, half(b))
}

// lookupNibbles writes the values of the codes in the low nibbles of q, times d, to the first half of x and of those in
// the high nibbles to the second.
func lookupNibbles(x []float32, q []byte, values *[16]int8, d float32) {
	for j, v := range q {
		x[j] = d * float32(values[v&15])
		x[len(q)+j] = d * float32(values[v>>4])
	}
}
