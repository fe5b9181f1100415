// The i-quants whose codes are indices into a grid of 8 or 4 outputs at a time. They are super-blocks of 256 outputs;
// output j is in group j/32 and in run j/8. The program has the grids before this file: grid_iq2_xxs and so on, whose
// entries are bytes.

// entry reads an entry of 8 outputs, from output j % 8 on.
template <int n> DEVICE void entry(u32 (&w)[n], const u32 *grid, u32 index, u32 j) {
    block{(const u8 *)grid, 8 * index}.words<4 * n>(w, j % 8);
}

// signed_scale writes the bytes of w times d, negated where the byte's bit in signs is set.
template <int N, int n> DEVICE void signed_scale(f32 (&x)[N], const u32 (&w)[n], u32 signs, f32 d) {
    for (int k = 0; k < n; k++) codes<0>(x + 4 * k, w[k]);
    for (int k = 0; k < N; k++) x[k] = as_f32(as_u32(x[k]) | (signs << (31 - k) & 0x80000000)) * d;
}

// even_signs expands the seven lowest bits to eight: the number of set bits is always even.
DEVICE u32 even_signs(u32 s) {
    s &= 127;
    return s | (0x6996 >> ((s ^ s >> 4) & 15) & 1) << 7;
}

// iq2_xxs: d, then for each group four indices and a word of four 7-bit signs and a 4-bit scale; d*(0.5+scale)/4.
struct iq2_xxs {
    enum { elems = 256, bytes = 66 };
    template <int N> DEVICE void decode(f32 (&x)[N], block b, u32 j) {
        const u32 group = 2 + j / 32 * 8, run = j / 8 % 4, s = b.word<2>(group + 4);
        u32 w[N / 4];
        entry(w, grid_iq2_xxs, b.byte(group + run), j);
        signed_scale(x, w, even_signs(s >> (7 * run)) >> (j % 8), b.half(0) * ((f32)(s >> 28) + 0.5f) * 0.25f);
    }
};

// iq2_xs: d, 32 words of a 9-bit index and 7-bit signs, 4-bit scales for 16 outputs each; d*(0.5+scale)/4.
struct iq2_xs {
    enum { elems = 256, bytes = 74 };
    template <int N> DEVICE void decode(f32 (&x)[N], block b, u32 j) {
        const u32 q = b.short16(2 + j / 8 * 2), s = b.byte(66 + j / 32) >> (j / 16 % 2 * 4) & 15;
        u32 w[N / 4];
        entry(w, grid_iq2_xs, q & 511, j);
        signed_scale(x, w, even_signs(q >> 9) >> (j % 8), b.half(0) * ((f32)s + 0.5f) * 0.25f);
    }
};

// iq2_s: d, low bytes of 10-bit indices, eight signs for each, the upper bits of the indices, scales as iq2_xs.
struct iq2_s {
    enum { elems = 256, bytes = 82 };
    template <int N> DEVICE void decode(f32 (&x)[N], block b, u32 j) {
        const u32 low = b.byte(2 + j / 8), high = b.byte(66 + j / 32) >> (j / 8 % 4 * 2) & 3;
        const u32 s = b.byte(74 + j / 32) >> (j / 16 % 2 * 4) & 15;
        u32 w[N / 4];
        entry(w, grid_iq2_s, low | high << 8, j);
        signed_scale(x, w, b.byte(34 + j / 8) >> (j % 8), b.half(0) * ((f32)s + 0.5f) * 0.25f);
    }
};

// iq3_xxs: d, indices for 4 outputs each, then for each group a word of four 7-bit signs and a 4-bit scale;
// d*(0.5+scale)/2.
struct iq3_xxs {
    enum { elems = 256, bytes = 98 };
    template <int N> DEVICE void decode(f32 (&x)[N], block b, u32 j) {
        const u32 q = N == 8 ? b.short16(2 + j / 4) : b.byte(2 + j / 4), s = b.word<2>(66 + j / 32 * 4);
        u32 w[N / 4];
        for (int k = 0; k < N / 4; k++) w[k] = grid_iq3_xxs[q >> (8 * k) & 0xff];
        signed_scale(x, w, even_signs(s >> (j / 8 % 4 * 7)) >> (j % 8), b.half(0) * ((f32)(s >> 28) + 0.5f) * 0.5f);
    }
};

// iq3_s: d, low bytes of 9-bit indices for 4 outputs each, their upper bits, eight signs for each two, 4-bit scales for
// 32 outputs each; d*(1+2*scale).
struct iq3_s {
    enum { elems = 256, bytes = 110 };
    template <int N> DEVICE void decode(f32 (&x)[N], block b, u32 j) {
        const u32 q = N == 8 ? b.short16(2 + j / 4) : b.byte(2 + j / 4), high = b.byte(66 + j / 32) >> (j / 4 % 8);
        const u32 s = b.byte(106 + j / 64) >> (j / 32 % 2 * 4) & 15;
        u32 w[N / 4];
        for (int k = 0; k < N / 4; k++) w[k] = grid_iq3_s[(q >> (8 * k) & 0xff) | (high >> k & 1) << 8];
        signed_scale(x, w, b.byte(74 + j / 8) >> (j % 8), b.half(0) * (f32)(2 * s + 1));
    }
};

// shifted_scale reads outputs of an entry of grid_iq1, from output j % 8 on. They are -1, 0 or 1; it subtracts or adds
// 1/8 and multiplies by d. The entry has output + 1 in eighths: of outputs 0 to 3 from bit 3 of their bytes on, of 4 to
// 7 from bit 5 on.
template <int N> DEVICE void shifted_scale(f32 (&x)[N], u32 index, u32 j, bool down, f32 d) {
    const u32 w = grid_iq1[index] >> (j % 8 / 2), up = down ? 0 : 0x02020202;
    for (int k = 0; k < N; k += 4) codes<9>(x + k, (w >> (k / 2) & 0x18181818) + up);
    scale(x, d * 0.125f);
}

// iq1_s: d, low bytes of 11-bit indices, then for each group a word of their upper bits, a 3-bit scale and whether
// outputs are moved down; d*(2*scale+1).
struct iq1_s {
    enum { elems = 256, bytes = 50 };
    template <int N> DEVICE void decode(f32 (&x)[N], block b, u32 j) {
        const u32 low = b.byte(2 + j / 8), h = b.short16(34 + j / 32 * 2), high = h >> (j / 8 % 4 * 3) & 7;
        shifted_scale(x, low | high << 8, j, h >> 15, b.half(0) * (f32)(2 * (h >> 12 & 7) + 1));
    }
};

// iq1_m: low bytes of 11-bit indices, a nibble for each with its upper bits and whether outputs are moved down, and
// four words of four 3-bit scales, for 16 outputs each, whose upper nibbles together are d.
struct iq1_m {
    enum { elems = 256, bytes = 56 };
    template <int N> DEVICE void decode(f32 (&x)[N], block b, u32 j) {
        const u32 low = b.byte(j / 8), h = b.byte(32 + j / 16) >> (j / 8 % 2 * 4);
        u32 w[2];
        b.words<8>(w, 48);
        const u32 d = (w[0] >> 12 & 0xf) | (w[0] >> 24 & 0xf0) | (w[1] >> 4 & 0xf00) | (w[1] >> 16 & 0xf000);
        const u32 s = (j < 128 ? w[0] : w[1]) >> (j / 64 % 2 * 16 + j / 16 % 4 * 3) & 7;
        shifted_scale(x, low | (h & 7) << 8, j, h & 8, widen(d) * (f32)(2 * s + 1));
    }
};
