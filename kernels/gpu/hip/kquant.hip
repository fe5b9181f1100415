// The k-quants: super-blocks of 256 outputs whose scales are themselves quantized. Most store the codes of four (or
// two) runs of 32 outputs in the same 32 bytes, each run in bits of its own. Output j is in half j/128, in run j/32,
// and has scale j/16.

// q2_k: 16 bytes that hold a 4-bit scale and a 4-bit minimum for 16 outputs each, 64 bytes of 2-bit codes, d, dmin;
// (d*scale)*code - dmin*min.
struct q2_k {
    enum { elems = 256, bytes = 84 };
    template <int N> DEVICE void decode(f32 (&x)[N], block b, u32 j) {
        const u32 d = b.word<4>(80), s = b.byte(j / 16);
        u32 w[N / 4];
        b.words<4>(w, 16 + j / 128 * 32 + j % 32);
        for (int k = 0; k < N / 4; k++) codes<0>(x + 4 * k, w[k] >> (j / 32 % 4 * 2) & 0x03030303);
        affine(x, widen(d) * (f32)(s & 15), widen(d >> 16) * (f32)(s >> 4));
    }
};

// q3_k: 32 bytes of third bits (bit n is for run n), 64 bytes of 2-bit codes, 12 bytes of 6-bit scales for 16 outputs
// each, d; (d*(scale-32))*code, where a clear third bit subtracts 4 from the code. Of the scales the first eight bytes
// hold the low nibbles and then the high nibbles, the last four two more bits each.
struct q3_k {
    enum { elems = 256, bytes = 110 };
    template <int N> DEVICE void decode(f32 (&x)[N], block b, u32 j) {
        const u32 k = j / 16;
        const u32 low = b.byte(96 + k % 8) >> (k / 8 * 4) & 15, high = b.byte(104 + k % 4) >> (k / 4 * 2) & 3;
        u32 h[N / 4], w[N / 4];
        b.words<2>(h, j % 32);
        b.words<2>(w, 32 + j / 128 * 32 + j % 32);
        for (int k = 0; k < N / 4; k++) {
            codes<4>(x + 4 * k, (w[k] >> (j / 32 % 4 * 2) & 0x03030303) | (h[k] >> (j / 32) & 0x01010101) << 2);
        }
        scale(x, b.half(108) * (f32)((i32)(low | high << 4) - 32));
    }
};

// factors are what the codes of one run of q4_k and q5_k are scaled with. Both begin with d, dmin, and 12 bytes of
// 6-bit scales and minima for 32 outputs each. Those of the first four runs are the low six bits of the first eight
// bytes; those of the others are nibbles of the last four bytes and the two bits left over in the first eight.
struct factors {
    f32 scale, minimum;
    static __device__ factors of(block b, u32 run) {
        u32 h[4];
        b.words<16>(h, 0);
        const u32 s = run % 4 * 8, low = h[1] >> s, high = h[2] >> s, last = h[3] >> s;
        const u32 mask = run < 4 ? 63 : 15, upper = run < 4 ? 0 : 48;
        const u32 sc = ((run < 4 ? low : last) & mask) | (low >> 2 & upper);
        const u32 m = ((run < 4 ? high : last >> 4) & mask) | (high >> 2 & upper);
        return {widen(h[0]) * (f32)sc, widen(h[0] >> 16) * (f32)m};
    }
};

// q4_k: the head, 128 bytes of nibbles; d*scale*code - dmin*min. Two runs share 32 bytes: low nibbles, then high
// nibbles.
struct q4_k {
    enum { elems = 256, bytes = 144 };
    template <int N> DEVICE void decode(f32 (&x)[N], block b, u32 j) {
        u32 w[N / 4];
        b.words<N>(w, 16 + j / 64 * 32 + j % 32);
        nibbles<0>(x, w, j / 32 % 2 * 4);
        const factors f = factors::of(b, j / 32);
        affine(x, f.scale, f.minimum);
    }
};

// q5_k: as q4_k with 32 bytes before the nibbles whose bit n is the fifth bit of the codes of run n.
struct q5_k {
    enum { elems = 256, bytes = 176 };
    template <int N> DEVICE void decode(f32 (&x)[N], block b, u32 j) {
        u32 h[N / 4], w[N / 4];
        b.words<N>(h, 16 + j % 32);
        b.words<N>(w, 48 + j / 64 * 32 + j % 32);
        for (int k = 0; k < N / 4; k++) {
            codes<0>(x + 4 * k, (w[k] >> (j / 32 % 2 * 4) & 0x0f0f0f0f) | (h[k] >> (j / 32) & 0x01010101) << 4);
        }
        const factors f = factors::of(b, j / 32);
        affine(x, f.scale, f.minimum);
    }
};

// q6_k: 128 bytes of low nibbles, 64 bytes of upper 2 bits, 16 signed scales for 16 outputs each, d;
// (d*scale)*(code-32).
struct q6_k {
    enum { elems = 256, bytes = 210 };
    template <int N> DEVICE void decode(f32 (&x)[N], block b, u32 j) {
        const u32 half = j / 128, run = j / 32 % 4;
        u32 low[N / 4], high[N / 4];
        b.words<2>(low, half * 64 + run % 2 * 32 + j % 32);
        b.words<2>(high, 128 + half * 32 + j % 32);
        for (int k = 0; k < N / 4; k++) {
            codes<32>(x + 4 * k, (low[k] >> (run / 2 * 4) & 0x0f0f0f0f) | (high[k] >> (run * 2) & 0x03030303) << 4);
        }
        scale(x, b.half(208) * (f32)(i8)b.byte(192 + j / 16));
    }
};

// q8_k: a float32 d, 256 signed codes, sums that only dot products use; d*code.
struct q8_k {
    enum { elems = 256, bytes = 292 };
    template <int N> DEVICE void decode(f32 (&x)[N], block b, u32 j) {
        u32 w[N / 4];
        b.words<4>(w, 4 + j);
        for (int k = 0; k < N / 4; k++) signed_codes(x + 4 * k, w[k]);
        scale(x, as_f32(b.word<4>(0)));
    }
};
