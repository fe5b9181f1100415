// The fingerprints that kernels/FINGERPRINT.md specifies, one for each block of 64 KiB. A block of threads takes a block
// of bytes: each thread takes the words of one column, at the same place in every stripe of 1 KiB, so neighbours read
// neighbouring words. The constants word_keys and stripe_keys are in front of this file.

enum { STRIPES = 64, STRIPE = 4 * THREADS, BLOCK = STRIPES * STRIPE, BATCH = 8, GROUP = 16 };

// word reads the four bytes at p. It reads no other bytes, or whole words at multiples of four that have some of them.
template <bool aligned> DEVICE u32 word(const u8 *p) {
    if (aligned) return *(const word32 *)p;
#if UNALIGNED_LOADS
    u32 w;
    __builtin_memcpy(&w, p, 4);
    return w;
#else
    const u32 n = (u64)p & 3;
    const word32 *q = (const word32 *)(p - n);
    return funnel(q[0], q[1], n);
#endif
}

// edge returns the word at byte at of a block that ends at byte n and has nothing before byte lo. Missing bytes count as
// zeros, and are not read.
template <bool aligned> DEVICE u32 edge(const u8 *p, u32 at, u32 lo, u32 n) {
    if (at >= lo && at + 4 <= n) return word<aligned>(p);
    u32 w = 0;
    for (u32 k = 0; k < 4; k++) {
        if (at + k >= lo && at + k < n) w |= (u32)p[k] << (8 * k);
    }
    return w;
}

// column returns the sum of this thread's words in bytes lo to n of a block, each times the key of its stripe. So many
// loads are under way at a time as a batch has. The first and the last word may be incomplete.
template <bool aligned> DEVICE u64 column(const u8 *from, u32 lo, u32 n) {
    const u32 stripes = n / STRIPE;
    from += 4 * threadIdx.x;
    u64 sum = 0;
    u32 s = 0;
    if (lo > 0) {
        s = lo / STRIPE;
        sum += stripe_keys[s] * edge<aligned>(from + s * STRIPE, s * STRIPE + 4 * threadIdx.x, lo, n);
        s++;
    }
    for (; s + BATCH <= stripes; s += BATCH) {
        u32 w[BATCH];
        for (u32 k = 0; k < BATCH; k++) w[k] = word<aligned>(from + (s + k) * STRIPE);
        for (u32 k = 0; k < BATCH; k++) sum += stripe_keys[s + k] * w[k];
    }
    for (; s < stripes; s++) sum += stripe_keys[s] * word<aligned>(from + s * STRIPE);
    if (s * STRIPE < n) sum += stripe_keys[s] * edge<aligned>(from + s * STRIPE, s * STRIPE + 4 * threadIdx.x, 0, n);
    return sum;
}

// total returns the sum of x over all threads, to thread 0. All threads must call it.
DEVICE u64 total(u64 x) {
    __shared__ u64 sums[THREADS];
    const u32 t = threadIdx.x;
    sums[t] = x;
    __syncthreads();
    if (t < GROUP) {
        x = 0;
        for (u32 k = 0; k < THREADS; k += GROUP) x += sums[k + t];
        sums[t] = x;
    }
    __syncthreads();
    x = 0;
    if (t == 0) {
        for (u32 k = 0; k < GROUP; k++) x += sums[k];
    }
    __syncthreads();
    return x;
}

// fingerprints writes what bytes bytes at in contribute, which begin at byte at of the first block.
DEVICE void fingerprints(u64 *sums, const u8 *in, u64 bytes, u64 at) {
    in -= at; // where the first block begins
    bytes += at;
    const u64 blocks = (bytes + BLOCK - 1) / BLOCK;
    for (u64 b = blockIdx.x; b < blocks; b += grid()) {
        const u8 *from = in + b * BLOCK;
        const u64 left = bytes - b * BLOCK;
        const u32 lo = b ? 0 : (u32)at, n = left < BLOCK ? (u32)left : (u32)BLOCK;
        const u64 mine = (u64)in & 3 ? column<false>(from, lo, n) : column<true>(from, lo, n);
        const u64 sum = total(mine * word_keys[threadIdx.x]);
        if (threadIdx.x == 0) sums[b] = sum;
    }
}
