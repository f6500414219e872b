// Shared by kmeans.cu and kmeans_seed.cu: frames of two types, and reductions over a block.

#ifndef THREADS
#define THREADS 512
#endif
#define WARPS (THREADS / 32)

enum Kind { HALF, FLOAT };

__device__ __forceinline__ float value_at(const void* x, int kind, int64_t at) {
    if (kind == FLOAT) return static_cast<const float*>(x)[at];
    return kr_half_to_float(static_cast<const uint16_t*>(x)[at]);
}

// Eight values from the at-th on; zeros beyond the first `there`. wide: pieces of 16 bytes are aligned.
__device__ __forceinline__ void load_eight(const void* x, int kind, bool wide, int64_t at, int there, float v[8]) {
    if (wide && there == 8 && kind == FLOAT) {
        const float4* four = reinterpret_cast<const float4*>(static_cast<const float*>(x) + at);
        const float4 a = four[0], b = four[1];
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    } else if (wide && there == 8) {
        const uint4 bits = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(x) + at);
        const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
        for (int e = 0; e < 8; ++e) v[e] = kr_half_to_float(static_cast<uint16_t>(words[e / 2] >> e % 2 * 16));
    } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) v[e] = e < there ? value_at(x, kind, at + e) : 0.0f;
    }
}

// The sum over the block, the same in all threads.
__device__ __noinline__ double block_sum(double value, double* small) {
    for (int step = 16; step; step /= 2) value += __shfl_xor_sync(KR_FULL_WARP, value, step);
    if (threadIdx.x % 32 == 0) small[threadIdx.x / 32] = value;
    __syncthreads();
    double total = 0;
    for (int n = 0; n < WARPS; ++n) total += small[n];
    __syncthreads();
    return total;
}

struct Best {
    double value;
    int row;

    // Keeps the larger value; of equals the lower row.
    __device__ __forceinline__ void meet(double other, int its) {
        if (other > value || (other == value && its < row)) value = other, row = its;
    }
};

// The best of the block, the same in all threads.
__device__ __noinline__ Best block_best(Best best, double* small) {
    int* rows = reinterpret_cast<int*>(small + 32);
    for (int step = 16; step; step /= 2) {
        const double other = __shfl_xor_sync(KR_FULL_WARP, best.value, step);
        best.meet(other, __shfl_xor_sync(KR_FULL_WARP, best.row, step));
    }
    if (threadIdx.x % 32 == 0) small[threadIdx.x / 32] = best.value, rows[threadIdx.x / 32] = best.row;
    __syncthreads();
    for (int n = 0; n < WARPS; ++n) best.meet(small[n], rows[n]);
    __syncthreads();
    return best;
}

// <a, b> of two vectors by a warp: short runs summed in float32, the runs in float64.
template <class A, class B>
__device__ double warp_dot(int width, A a, B b) {
    double total = 0;
    for (int from = threadIdx.x % 32; from < width; from += 32 * 8) {
        float sum = 0;
        for (int d = from; d < min(from + 32 * 8, width); d += 32) sum = fmaf(a(d), b(d), sum);
        total += sum;
    }
    for (int step = 16; step; step /= 2) total += __shfl_xor_sync(KR_FULL_WARP, total, step);
    return total;
}
