// The ternary formats: outputs are -d, 0 or d.

// trits returns a base-3 digit of each byte of v. A byte is a fraction of 256; multiplying it by a power of 3 drops the
// first digits, and the result is the leading one of the rest.
DEVICE u32 trits(u32 v, u32 power) {
    const u32 even = (v & 0x00ff00ff) * power & 0x00ff00ff, odd = (v >> 8 & 0x00ff00ff) * power & 0x00ff00ff;
    return (even * 3 >> 8 & 0x00030003) | (odd * 3 & 0x03000300);
}

// tq1_0: 48 bytes of five trits, 4 bytes of four, d; (trit-1)*d. Trit n of 32 bytes, then of 16, then of the last 4
// gives a run of as many outputs.
struct tq1_0 {
    enum { elems = 256, bytes = 54 };
    template <int N> DEVICE void decode(f32 (&x)[N], block b, u32 j) {
        const bool last = j >= 240;
        const u32 n = last ? (j - 240) / 4 : j < 160 ? j / 32 : (j - 160) / 16;
        const u32 at = last ? 48 : j < 160 ? j % 32 : 32 + j % 16;
        u32 power = n < 4 ? 0x1b090301 >> (8 * n) & 0xff : 81, w[N / 4];
        b.words<2>(w, at);
        for (int k = 0; k < N / 4; k++) {
            codes<1>(x + 4 * k, trits(last ? w[0] : w[k], power));
            if (last) power *= 3;
        }
        scale(x, b.half(52));
    }
};

// tq2_0: 64 bytes of 2-bit codes as in q2_k, d; (code-1)*d. No quantizer writes code 3, which gives 2d.
struct tq2_0 {
    enum { elems = 256, bytes = 66 };
    template <int N> DEVICE void decode(f32 (&x)[N], block b, u32 j) {
        u32 w[N / 4];
        b.words<2>(w, j / 128 * 32 + j % 32);
        for (int k = 0; k < N / 4; k++) codes<1>(x + 4 * k, w[k] >> (j / 32 % 4 * 2) & 0x03030303);
        scale(x, b.half(64));
    }
};
