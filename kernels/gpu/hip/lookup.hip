// The formats whose 4-bit codes are indices into a table of values. The tables have the values as bytes, plus an offset
// that makes them unsigned.

// iq4_nl: d, then 16 bytes whose low nibbles are the codes of the first 16 outputs and whose high nibbles those of the
// second; d*value. The values are -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89 and 113.
struct iq4_nl {
    enum { elems = 32, bytes = 18 };
    template <int N, int n> DEVICE void values(f32 (&x)[N], const u32 (&w)[n], u32 shift) {
        for (int k = 0; k < n; k++) {
            codes<128>(x + 4 * k, lookup(0x3f2d1801, 0x766a5d4f, 0xa6998d81, 0xf1d9c5b5, w[k] >> shift & 0x0f0f0f0f));
        }
    }
    template <int N> DEVICE void decode(f32 (&x)[N], block b, u32 j) {
        u32 w[N / 4];
        b.words<2>(w, 2 + j % 16);
        values(x, w, j / 16 * 4);
        scale(x, b.half(0));
    }
};

// iq4_xs: d, the upper 2 bits and then the low nibbles of scales for 32 outputs each, which have nibbles as iq4_nl;
// (d*(scale-32))*value.
struct iq4_xs {
    enum { elems = 256, bytes = 136 };
    template <int N> DEVICE void decode(f32 (&x)[N], block b, u32 j) {
        const u32 run = j / 32;
        u32 head[2], w[N / 4];
        b.words<8>(head, 0);
        b.words<N>(w, 8 + run * 16 + j % 16);
        iq4_nl::values(x, w, j / 16 % 2 * 4);
        const u32 low = head[1] >> (4 * run) & 15, high = head[0] >> (16 + 2 * run) & 3;
        scale(x, widen(head[0]) * (f32)((i32)(low | high << 4) - 32));
    }
};

// mxfp4: a byte e, nibbles as iq4_nl; 2^(e-128)*value. The values are those of E2M1, doubled so that they are integers:
// 0, 1, 2, 3, 4, 6, 8, 12, then the same with a minus, except that minus zero is plus zero.
struct mxfp4 {
    enum { elems = 32, bytes = 17 };
    template <int N, int n> DEVICE void values(f32 (&x)[N], const u32 (&w)[n], u32 shift) {
        for (int k = 0; k < n; k++) {
            codes<12>(x + 4 * k, lookup(0x0f0e0d0c, 0x18141210, 0x090a0b0c, 0x00040608, w[k] >> shift & 0x0f0f0f0f));
        }
    }
    template <int N> DEVICE void decode(f32 (&x)[N], block b, u32 j) {
        const u32 e = b.byte(0);
        u32 w[N / 4];
        b.words<1>(w, 1 + j % 16);
        values(x, w, j / 16 * 4);
        scale(x, as_f32(e < 2 ? 0x00200000 << e : (e - 1) << 23)); // the two smallest are subnormal
    }
};

// nvfp4: four bytes, each the scale of 16 outputs, whose nibbles are 8 bytes: low nibbles for the first 8 outputs, then
// high ones; scale*value, values as mxfp4. Scales are E4M3 without the sign, halved because the values are doubled.
struct nvfp4 {
    enum { elems = 64, bytes = 36 };
    template <int N> DEVICE void decode(f32 (&x)[N], block b, u32 j) {
        const u32 run = j / 16, s = b.byte(run);
        u32 w[N / 4];
        b.words<4>(w, 4 + run * 8 + j % 8);
        mxfp4::values(x, w, j / 8 % 2 * 4);
        // As a binary16 the scale's exponent is 7 too low, subnormal or not. 0x7f, a NaN, is zero to ggml; 0xff is not.
        scale(x, s == 0x7f ? 0.0f : widen((s & 0x7f) << 7) * 128.0f);
    }
};
