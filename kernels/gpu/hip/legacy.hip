// The formats of small blocks with one binary16 scale d.

// q4_0: d, then 16 bytes whose low nibbles are the codes of the first 16 outputs and whose high nibbles those of the
// second; (code-8)*d.
struct q4_0 {
    enum { elems = 32, bytes = 18 };
    template <int N> DEVICE void decode(f32 (&x)[N], block b, u32 j) {
        u32 w[N / 4];
        b.words<2>(w, 2 + j % 16);
        nibbles<8>(x, w, j / 16 * 4);
        scale(x, b.half(0));
    }
};

// q4_1: d, a minimum m, nibbles as q4_0; code*d + m.
struct q4_1 {
    enum { elems = 32, bytes = 20 };
    template <int N> DEVICE void decode(f32 (&x)[N], block b, u32 j) {
        const u32 dm = b.word<4>(0);
        u32 w[N / 4];
        b.words<4>(w, 4 + j % 16);
        nibbles<0>(x, w, j / 16 * 4);
        affine(x, widen(dm), -widen(dm >> 16));
    }
};

// fifths writes codes of five bits: nibble k of w, which is at bit shift of its byte, with bit k of h above it.
template <int offset, int N, int n> DEVICE void fifths(f32 (&x)[N], const u32 (&w)[n], u32 shift, u32 h) {
    for (int k = 0; k < n; k++) codes<offset>(x + 4 * k, (w[k] >> shift & 0x0f0f0f0f) | spread(h >> (4 * k)) << 4);
}

// q5_0: d, 32 bits that are the fifth bit of each code, nibbles as q4_0; (code-16)*d.
struct q5_0 {
    enum { elems = 32, bytes = 22 };
    template <int N> DEVICE void decode(f32 (&x)[N], block b, u32 j) {
        u32 w[N / 4];
        b.words<2>(w, 6 + j % 16);
        fifths<16>(x, w, j / 16 * 4, b.word<2>(2) >> j);
        scale(x, b.half(0));
    }
};

// q5_1: d, a minimum m, fifth bits and nibbles as q5_0; code*d + m.
struct q5_1 {
    enum { elems = 32, bytes = 24 };
    template <int N> DEVICE void decode(f32 (&x)[N], block b, u32 j) {
        u32 head[2], w[N / 4];
        b.words<8>(head, 0);
        b.words<N>(w, 8 + j % 16);
        fifths<0>(x, w, j / 16 * 4, head[1] >> j);
        affine(x, widen(head[0]), -widen(head[0] >> 16));
    }
};

// q8_0: d, 32 signed codes; code*d.
struct q8_0 {
    enum { elems = 32, bytes = 34 };
    template <int N> DEVICE void decode(f32 (&x)[N], block b, u32 j) {
        u32 w[N / 4];
        b.words<2>(w, 2 + j);
        for (int k = 0; k < N / 4; k++) signed_codes(x + 4 * k, w[k]);
        scale(x, b.half(0));
    }
};

// q8_1: as q8_0 with the sum of the codes after d, which only dot products use.
struct q8_1 {
    enum { elems = 32, bytes = 36 };
    template <int N> DEVICE void decode(f32 (&x)[N], block b, u32 j) {
        u32 w[N / 4];
        b.words<4>(w, 4 + j);
        for (int k = 0; k < N / 4; k++) signed_codes(x + 4 * k, w[k]);
        scale(x, b.half(0));
    }
};

// q1_0: d, 128 sign bits, low bit first; a set bit is +d, a clear one -d.
struct q1_0 {
    enum { elems = 128, bytes = 18 };
    template <int N> DEVICE void decode(f32 (&x)[N], block b, u32 j) {
        const u32 minus = ~b.byte(2 + j / 8) >> (j % 8), d = as_u32(b.half(0));
        for (int k = 0; k < N; k++) x[k] = as_f32(d ^ (minus << (31 - k) & 0x80000000));
    }
};

// q2_0: d, 64 codes of two bits in sequence, low bits first; (code-1)*d.
struct q2_0 {
    enum { elems = 64, bytes = 18 };
    template <int N> DEVICE void decode(f32 (&x)[N], block b, u32 j) {
        const u32 q = N == 8 ? b.short16(2 + j / 4) : b.byte(2 + j / 4);
        for (int k = 0; k < N; k += 4) {
            u32 w = q >> (2 * k) & 0xff;
            w = (w | w << 12) & 0x000f000f;
            codes<1>(x + k, (w | w << 6) & 0x03030303);
        }
        scale(x, b.half(0));
    }
};
