package kernels

import "math"

// scalesE8M0 and scalesUE4M3 have the results of scaleE8M0 and scaleUE4M3 for every byte. The assembly reads them, too.
var (
	scalesE8M0  = scaleTable(scaleE8M0)
	scalesUE4M3 = scaleTable(scaleUE4M3)
)

// scaleTable returns the results of scale for every byte.
func scaleTable(scale func(byte) float32) (table [256]float32) {
	for i := range table {
		table[i] = scale(byte(i))
	}
	return table
}

// The 4-bit floats: E2M1 codes with a scale of 8 bits.

// kvaluesFP4 are the values of E2M1, doubled so that they are integers. Code 8 would be minus zero and decodes to plus
// zero.
var kvaluesFP4 = [16]int8{0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12}

// decodeMXFP4: a byte e, nibbles as Q4_0; value*2^(e-127), where the power is halved because the values are doubled.
func decodeMXFP4(x *[maxBlock]float32, b []byte) {
	lookupNibbles(x[:32], b[1:17], &kvaluesFP4, scalesE8M0[b[0]])
}

// scaleE8M0 is 2^(e-128). Its two smallest values are subnormal.
func scaleE8M0(e byte) float32 {
	if e < 2 {
		return math.Float32frombits(0x00200000 << e)
	}
	return math.Float32frombits(uint32(e-1) << 23)
}

// decodeNVFP4: four scale bytes, each for 16 outputs whose nibbles are 8 bytes, low nibbles first.
func decodeNVFP4(x *[maxBlock]float32, b []byte) {
	scales, q := b[:4], b[4:36]
	for k, s := range scales {
		lookupNibbles(x[16*k:16*k+16], q[8*k:8*k+8], &kvaluesFP4, scalesUE4M3[s])
	}
}

// scaleUE4M3 is the value of an unsigned E4M3 float, halved because the values are doubled. As in ggml, 0x7f, which is
// a NaN in the format, gives zero; the sign bit is ignored, and 0xff, unlike 0x7f, gives the number that its bits stand
// for.
func scaleUE4M3(b byte) float32 {
	if b == 0x7f {
		return 0
	}
	e, m := int(b>>3&15), float32(b&7)
	if e == 0 {
		return m * 0x1p-10
	}
	return float32(math.Ldexp(float64(1+m/8), e-8))
}
