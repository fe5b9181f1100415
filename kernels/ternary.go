package kernels

// The ternary formats: super-blocks of 256 outputs that are -d, 0 or +d.

// decodeTQ1_0: 48 bytes of five trits, 4 bytes of four, d; (trit-1)*d. Trit n of 32 bytes, then of 16, then of the last
// 4 gives a run of as many outputs.
func decodeTQ1_0(x *[maxBlock]float32, b []byte) {
	d, out := half(b[52:]), x[:]
	for _, run := range []struct {
		q     []byte
		trits int
	}{{b[:32], 5}, {b[32:48], 5}, {b[48:52], 4}} {
		power := byte(1)
		for range run.trits {
			for m, v := range run.q {
				out[m] = float32(int(trit(v*power))-1) * d
			}
			out = out[len(run.q):]
			power *= 3
		}
	}
}

// trit returns the leading base-3 digit of a fraction of 256: the multiplications by powers of three before it drop the
// digits in front.
func trit(v byte) byte { return byte(uint16(v) * 3 >> 8) }

// decodeTQ2_0: 64 bytes of 2-bit codes laid out as in Q2_K, d; (code-1)*d. No quantizer writes code 3, which gives 2d.
func decodeTQ2_0(x *[maxBlock]float32, b []byte) {
	q, d := b[:64], half(b[64:])
	for h := range 2 {
		for j := range 4 {
			for m, v := range q[32*h : 32*h+32] {
				x[128*h+32*j+m] = float32(int(v>>(2*j)&3)-1) * d
			}
		}
	}
}
