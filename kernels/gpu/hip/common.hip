// What all dequantization kernels share: types, loads, conversions and the loop. A program is this file, the file with
// the format, and one line that defines the kernel. It is HIP C++ without any header: hipRTC, NVRTC and host compilers
// can compile it.
//
// A format is a struct with the name of its ggml type in lower case:
//
//   struct q8_0 {
//       enum { elems = 32, bytes = 34 };                 // of one block; elems is a power of two, up to 1024
//       // decode writes N outputs of b from the j-th on; N is 4 or 8, and j is a multiple of N.
//       template <int N> DEVICE void decode(f32 (&x)[N], block b, u32 j);
//   };
//
// A thread writes 16 bytes in each iteration, so neighbours in a wavefront of any width write neighbouring addresses.
// What several threads read comes from the first-level cache. A thread has the same place in every tile, so that the
// compiler can move all arithmetic on j out of the loop.

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef int i32;
typedef unsigned long long u64;
typedef float f32;
struct f16 { u16 bits; };
struct bf16 { u16 bits; };

#define DEVICE static __device__ inline __attribute__((always_inline))

// THREADS is the number of threads of a block. UNROLL is the number of tiles that a block of threads decodes in one
// iteration: so many loads are under way before the first result is stored.
enum { THREADS = 256 };
#ifndef UNROLL
#define UNROLL 1
#endif

// AMD GPUs read words at any address, NVIDIA GPUs only at their natural alignment.
#if !defined(UNALIGNED_LOADS) && defined(__AMDGCN__)
#define UNALIGNED_LOADS 1
#endif

typedef u16 __attribute__((may_alias)) word16;
typedef u32 __attribute__((may_alias)) word32;
struct __attribute__((may_alias, aligned(8))) pair { u32 w[2]; };
struct __attribute__((may_alias, aligned(16))) quad { u32 w[4]; };

union number { u32 bits; f32 f; };
DEVICE f32 as_f32(u32 bits) { return number{bits}.f; }
DEVICE u32 as_u32(f32 f) { number n; n.f = f; return n.bits; }

// funnel returns four of the eight bytes high:low, from byte n on; n is 0 to 3.
DEVICE u32 funnel(u32 low, u32 high, u32 n) {
#if defined(__CUDA_ARCH__)
    u32 r;
    asm("shf.r.wrap.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(low), "r"(high), "r"(8 * n));
    return r;
#else
    return (u32)(((u64)high << 32 | low) >> (8 * n));
#endif
}

// widen returns the binary16 in the low half of bits as a float, exactly; subnormals are kept.
DEVICE f32 widen(u32 bits) {
#if defined(__CUDA_ARCH__)
    f32 f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"((u16)bits));
    return f;
#elif defined(__AMDGCN__)
    const u16 low = (u16)bits;
    _Float16 h;
    __builtin_memcpy(&h, &low, 2);
    return (f32)h;
#else
    // Shifted into the place of a float, the exponent is 112 too low, as the biases are 15 and 127. The multiplication,
    // which is exact, corrects that for normal and subnormal numbers alike.
    u32 b = as_u32(as_f32((bits & 0x7fffu) << 13) * 0x1p112f);
    if ((bits & 0x7c00) == 0x7c00) b = 0x7f800000 | (bits & 0x3ffu) << 13 | (bits & 0x3ff ? 1u << 22 : 0);
    return as_f32(b | (bits & 0x8000u) << 16);
#endif
}

// block is where a block of a format is: its first byte is base[at]. base is aligned to 4 bytes, and to 16 if the
// format's bytes are a multiple of 16. It is the same for all threads, so that a thread needs only 32 bits for
// addresses.
struct block {
    const u8 *base;
    u32 at;

    // byte, short16 and half read the number at offset o; short16 and half need an even address.
    __device__ u32 byte(u32 o) const { return base[at + o]; }
    __device__ u32 short16(u32 o) const { return *(const word16 *)(base + (at + o)); }
    __device__ f32 half(u32 o) const { return widen(short16(o)); }

    // words reads n (1, 2 or 4) words of four bytes from offset o on. The address must be a multiple of align. It may
    // also read up to 4 bytes before and after them.
    template <int align, int n> __device__ void words(u32 (&w)[n], u32 o) const {
        const u32 p = at + o;
#if UNALIGNED_LOADS
        __builtin_memcpy(w, __builtin_assume_aligned(base + p, align), 4 * n);
#else
        if (align % 4) {
            const word32 *q = (const word32 *)(base + (p & ~3u));
            u32 low = q[0];
            for (int i = 0; i < n; i++) {
                const u32 high = q[i + 1];
                w[i] = funnel(low, high, p & 3);
                low = high;
            }
        } else if (align % 16 == 0 && n == 4) {
            const quad v = *(const quad *)(base + p);
            for (int i = 0; i < n; i++) w[i] = v.w[i];
        } else if (align % 8 == 0 && n % 2 == 0) {
            for (int i = 0; i < n; i += 2) {
                const pair v = *(const pair *)(base + p + 4 * i);
                w[i] = v.w[0], w[i + 1] = v.w[1];
            }
        } else {
            for (int i = 0; i < n; i++) w[i] = *(const word32 *)(base + p + 4 * i);
        }
#endif
    }
    template <int align> __device__ u32 word(u32 o) const {
        u32 w[1];
        words<align>(w, o);
        return w[0];
    }
};

// whole makes AMD's compiler compute v as it is written. It would otherwise split a masked word into its bytes again,
// with two instructions for each; subtract offsets from integers instead of floats; and join a sum and its rounding to
// f16 in one instruction, which may round once instead of twice.
template <class V> DEVICE void whole(V &v) {
#if defined(__AMDGCN__)
    asm("" : "+v"(v));
#else
    (void)v;
#endif
}

// codes writes the four bytes of w, minus offset, as floats. Subtracting the offset before multiplying by the scale
// makes the code zero +0, so that the product has the sign of the scale, as in ggml.
template <int offset> DEVICE void codes(f32 *x, u32 w) {
    whole(w);
    for (int k = 0; k < 4; k++) {
#if defined(__CUDA_ARCH__)
        // The float 2^23 with a byte in its last place is 2^23 + byte. Conversions run at a quarter of the rate of
        // this.
        x[k] = as_f32(__byte_perm(w, 0x4b000000, 0x7440 + k)) - (f32)(0x800000 + offset);
#else
        x[k] = (f32)(w >> (8 * k) & 0xff);
        if (offset) whole(x[k]), x[k] -= (f32)offset;
#endif
    }
}

// signed_codes writes the four signed bytes of w as floats.
DEVICE void signed_codes(f32 *x, u32 w) { codes<128>(x, w ^ 0x80808080); }

// nibbles writes the low (shift 0) or high (shift 4) nibbles of the bytes of w, minus offset, as floats.
template <int offset, int N, int n> DEVICE void nibbles(f32 (&x)[N], const u32 (&w)[n], u32 shift) {
    for (int k = 0; k < n; k++) codes<offset>(x + 4 * k, w[k] >> shift & 0x0f0f0f0f);
}

// spread returns a word whose byte k is bit k of bits, for the lowest four bits.
DEVICE u32 spread(u32 bits) { return (bits & 15) * 0x204081 & 0x01010101; }

// lookup replaces each byte of v, which is 0 to 15, by the byte with that number of the table t0, t1, t2, t3.
DEVICE u32 lookup(u32 t0, u32 t1, u32 t2, u32 t3, u32 v) {
#if defined(__CUDA_ARCH__)
    const u32 n = __byte_perm(v | v >> 4, 0, 0x4420), low = n & 0x7777; // selectors are nibbles
    return __byte_perm(__byte_perm(t0, t1, low), __byte_perm(t2, t3, low), 0x3210 | (n >> 1 & 0x4444));
#elif defined(__AMDGCN__)
    const u32 low = v & 0x07070707;
    const u32 a = __builtin_amdgcn_perm(t1, t0, low), b = __builtin_amdgcn_perm(t3, t2, low);
    return __builtin_amdgcn_perm(b, a, 0x03020100 | (v >> 1 & 0x04040404));
#else
    const u32 t[4] = {t0, t1, t2, t3};
    u32 r = 0;
    for (int k = 0; k < 32; k += 8) {
        const u32 c = v >> k & 15;
        r |= (t[c / 4] >> (8 * (c % 4)) & 0xff) << k;
    }
    return r;
#endif
}

// scale multiplies all of x by d.
template <int N> DEVICE void scale(f32 (&x)[N], f32 d) {
    for (int k = 0; k < N; k++) x[k] *= d;
}

// affine sets x to d*x - minimum. The product of a scale and a code is exact, so only the difference rounds, and a
// fused instruction gives the same.
template <int N> DEVICE void affine(f32 (&x)[N], f32 d, f32 minimum) {
    for (int k = 0; k < N; k++) x[k] = d * x[k] - minimum;
}

// narrow_f16 and narrow_bf16 return a (in the low half) and b (in the high half), rounded to nearest, ties to even.
DEVICE u32 narrow_f16(f32 a, f32 b) {
#if defined(__CUDA_ARCH__)
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
    return r;
#elif defined(__AMDGCN__)
    typedef _Float16 __attribute__((ext_vector_type(2))) f16x2;
    whole(a), whole(b);
    const f16x2 h = {(_Float16)a, (_Float16)b};
    u32 r;
    __builtin_memcpy(&r, &h, 4);
    return r;
#else
    u32 r = 0;
    const f32 x[2] = {a, b};
    for (int k = 0; k < 2; k++) {
        const u32 m = as_u32(x[k]) & 0x7fffffff;
        u32 h;
        if (m > 0x7f800000) h = 0x7e00; // NaN
        else if (m >= 0x477ff000) h = 0x7c00; // 65520 and more: infinity
        else if (m < 0x38800000) h = as_u32(as_f32(m) + 0.5f) - 0x3f000000; // subnormal: 0.5 has the same last place
        else h = (m + 0xfff + (m >> 13 & 1) - (112u << 23)) >> 13;
        r |= (h | (as_u32(x[k]) >> 16 & 0x8000)) << (16 * k);
    }
    return r;
#endif
}

DEVICE u32 narrow_bf16(f32 a, f32 b) {
#if defined(__CUDA_ARCH__)
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
    return r;
#else
    const f32 x[2] = {a, b};
    u32 h[2];
    for (int k = 0; k < 2; k++) {
        const u32 m = as_u32(x[k]);
        h[k] = x[k] != x[k] ? 0x7fc00000 : m + (0x7fff + (m >> 16 & 1)); // a NaN's payload could carry out of it
    }
#if defined(__AMDGCN__)
    return __builtin_amdgcn_perm(h[1], h[0], 0x07060302);
#else
    return h[0] >> 16 | (h[1] & 0xffff0000);
#endif
#endif
}

// pack returns 16 bytes of outputs.
DEVICE quad pack(const f32 (&x)[4], const f32 *) {
    return quad{{as_u32(x[0]), as_u32(x[1]), as_u32(x[2]), as_u32(x[3])}};
}
DEVICE quad pack(const f32 (&x)[8], const f16 *) {
    return quad{{narrow_f16(x[0], x[1]), narrow_f16(x[2], x[3]), narrow_f16(x[4], x[5]), narrow_f16(x[6], x[7])}};
}
DEVICE quad pack(const f32 (&x)[8], const bf16 *) {
    return quad{{narrow_bf16(x[0], x[1]), narrow_bf16(x[2], x[3]), narrow_bf16(x[4], x[5]), narrow_bf16(x[6], x[7])}};
}

// unit returns 16 bytes of outputs of block b, from the j-th on.
template <class F, class T> DEVICE quad unit(block b, u32 j) {
    f32 x[16 / sizeof(T)];
    F::decode(x, b, j);
    return pack(x, (T *)0);
}

// grid returns the number of blocks of threads. On AMD gridDim.x would be a division by a variable.
DEVICE u32 grid() {
#if defined(__AMDGCN__)
    return __builtin_amdgcn_grid_size_x() / THREADS;
#else
    return gridDim.x;
#endif
}

// dequantize decodes blocks from in to out, tile by tile. A tile is what the threads of a block write with one store
// each. It is always whole blocks of the format.
template <class F, class T> DEVICE void dequantize(T *out, const u8 *in, u64 blocks) {
    enum { N = 16 / sizeof(T), tile = THREADS * N / F::elems, tiles = UNROLL * tile };
    const u32 first = threadIdx.x * N; // this thread's first output in a tile
    const u32 mine = first / F::elems, j = first % F::elems; // the block that this output is in, and where
    const u64 step = (u64)grid() * tiles;
    for (u64 t = (u64)blockIdx.x * tiles; t < blocks; t += step) {
        const u8 *from = in + t * F::bytes;
        T *to = out + t * F::elems + first;
        const u64 left = blocks - t;
        if (left >= tiles) {
            quad q[UNROLL];
            for (u32 k = 0; k < UNROLL; k++) q[k] = unit<F, T>(block{from, (mine + k * tile) * F::bytes}, j);
            for (u32 k = 0; k < UNROLL; k++) *(quad *)(to + k * THREADS * N) = q[k];
        } else {
            for (u32 b = mine; b < left; b += tile, to += THREADS * N) {
                *(quad *)to = unit<F, T>(block{from, b * F::bytes}, j);
            }
        }
    }
}
