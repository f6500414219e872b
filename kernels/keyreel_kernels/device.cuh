// The parts of CUDA C++ that need headers or PTX, under our own names; cuda.py puts this file before each .cu.
//
// NVRTC needs no header for it. A program that defines KEYREEL_HOST brings its own definitions, so that the same .cu
// files run on a CPU. Functions marked "whole warp" must be called by all 32 lanes.

#ifndef CLUSTER
#define CLUSTER 1  // blocks in a thread-block cluster
#endif

#ifndef KEYREEL_HOST

#ifdef __CUDACC_RTC__
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <cstdint>
#endif

#define KR_FULL_WARP 0xffffffffu
#define KR_INFINITY __int_as_float(0x7f800000)

// Dynamic shared memory of the block, aligned for 16-byte accesses.
#define KR_SHARED(T, name)                                       \
    extern __shared__ __align__(16) unsigned char kr_shared_[]; \
    T* name = reinterpret_cast<T*>(kr_shared_)

#if CLUSTER > 1
#define KR_CLUSTER_KERNEL extern "C" __global__ __cluster_dims__(CLUSTER, 1, 1) void
#else
#define KR_CLUSTER_KERNEL extern "C" __global__ void
#endif

__device__ __forceinline__ float kr_half_to_float(uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// To the nearest, ties to even.
__device__ __forceinline__ uint16_t kr_float_to_half(float value) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// d [16, 8] += a [16, 16] b [16, 8]; halves in, floats out; fragments as in PTX's mma.m16n8k16. Whole warp. Turing only
// has [16, 8] by [8, 8]: two of those.
__device__ __forceinline__ void kr_mma_16x8x16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    for (int part = 0; part < 2; ++part)
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[2 * part]), "r"(a[2 * part + 1]), "r"(b[part]));
#endif
}

__device__ __forceinline__ unsigned kr_cluster_rank() {
#if CLUSTER > 1
    unsigned rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
#else
    return 0;
#endif
}

// The same place in the shared memory of another block of the cluster.
template <class T>
__device__ __forceinline__ T* kr_cluster_shared(T* own, int rank) {
#if CLUSTER > 1
    T* there;
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(own), "r"(rank));
    return there;
#else
    return own;
#endif
}

// Barrier of all threads of the cluster. Writes before it, to shared or device memory, are visible after it.
__device__ __forceinline__ void kr_cluster_sync() {
#if CLUSTER > 1
    __threadfence();
    // Not `.aligned`: a warp may not have reconverged after a branch of one lane.
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
#else
    __syncthreads();
#endif
}

// Copies 16 bytes from device to shared memory, both aligned to 16. This thread sees them after kr_copy_wait(), others
// after a barrier.
__device__ __forceinline__ void kr_copy_async_16(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                     static_cast<unsigned>(__cvta_generic_to_shared(shared))),
                 "l"(global)
                 : "memory");
#else
    *reinterpret_cast<uint4*>(shared) = *reinterpret_cast<const uint4*>(global);
#endif
}

// Ends a group of this thread's copies.
__device__ __forceinline__ void kr_copy_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for this thread's groups of copies but the last `ahead`.
template <int ahead = 0>
__device__ __forceinline__ void kr_copy_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(ahead) : "memory");
#endif
}

#endif  // KEYREEL_HOST
