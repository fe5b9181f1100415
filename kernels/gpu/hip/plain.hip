// The plain types, element by element.

// plain says how a type is read: decode reads N elements, as that of a format does; one reads a single element.
template <class F> struct plain;

template <> struct plain<f32> {
    DEVICE f32 one(block b) { return as_f32(b.word<4>(0)); }
    template <int N> DEVICE void decode(f32 (&x)[N], block b, u32) {
        u32 w[4];
        for (int k = 0; k < N; k++) {
            if (k % 4 == 0) b.words<16>(w, 4 * k);
            x[k] = as_f32(w[k % 4]);
        }
    }
};

template <> struct plain<f16> {
    DEVICE f32 one(block b) { return b.half(0); }
    template <int N> DEVICE void decode(f32 (&x)[N], block b, u32) {
        u32 w[N / 2];
        b.words<2 * N>(w, 0);
        for (int k = 0; k < N; k++) x[k] = widen(w[k / 2] >> (16 * (k % 2)));
    }
};

template <> struct plain<bf16> {
    DEVICE f32 one(block b) { return as_f32(b.short16(0) << 16); }
    template <int N> DEVICE void decode(f32 (&x)[N], block b, u32) {
        u32 w[N / 2];
        b.words<2 * N>(w, 0);
        for (int k = 0; k < N; k++) x[k] = as_f32(k % 2 ? w[k / 2] & 0xffff0000 : w[k / 2] << 16);
    }
};

// put writes one element.
DEVICE void put(f32 *to, f32 x) { *to = x; }
DEVICE void put(f16 *to, f32 x) { to->bits = (u16)narrow_f16(x, x); }
DEVICE void put(bf16 *to, f32 x) { to->bits = (u16)narrow_bf16(x, x); }

// convert converts count elements of type F. In each iteration a thread writes 16 bytes of outputs.
template <class F, class T> DEVICE void convert(T *out, const u8 *in, u64 count) {
    enum { N = 16 / sizeof(T), tile = THREADS * N };
    const u32 mine = threadIdx.x * N;
    const u64 step = (u64)grid() * tile;
    for (u64 t = (u64)blockIdx.x * tile; t < count; t += step) {
        const u8 *from = in + t * sizeof(F);
        T *to = out + t + mine;
        const u64 left = count - t;
        if (left >= mine + N) {
            *(quad *)to = unit<plain<F>, T>(block{from, mine * (u32)sizeof(F)}, 0);
        } else {
            for (u32 k = mine; k < left; k++) put(to++, plain<F>::one(block{from, k * (u32)sizeof(F)}));
        }
    }
}
