// What every kernel file stands on: the few things of CUDA C++ that need headers or PTX, under names of our own.
//
// cuda.py puts this file before each .cu. NVRTC needs no header for it; a program that defines KEYREEL_HOST brings its
// own definitions, so that the same .cu files run on a CPU. Only full warps may call what says "whole warp".
#pragma once

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

__device__ __forceinline__ float kr_bfloat_to_float(uint16_t bits) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

// d [16, 8] += a [16, 16] b [16, 8]; halves in, floats out; the registers of a lane as PTX's mma.m16n8k16 has them.
// Whole warp. Turing multiplies [16, 8] by [8, 8] only: two of those.
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

__device__ __forceinline__ unsigned kr_cluster_size() { return CLUSTER; }

// All threads of the cluster; what they wrote, to shared and to device memory, is seen by all of them afterwards.
__device__ __forceinline__ void kr_cluster_sync() {
#if CLUSTER > 1
    __threadfence();
    // Not `.aligned`: nothing promises that a warp is in step again after a branch of one lane.
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
#else
    __syncthreads();
#endif
}

// The same place in the shared memory of another block of the cluster. No block may end while others look at it.
template <class T>
__device__ __forceinline__ T* kr_cluster_shared(T* mine, unsigned rank) {
#if CLUSTER > 1
    uint64_t out;
    asm volatile("mapa.u64 %0, %1, %2;" : "=l"(out) : "l"(reinterpret_cast<uint64_t>(mine)), "r"(rank));
    return reinterpret_cast<T*>(out);
#else
    return mine;
#endif
}

// All blocks of a cooperative launch. barrier [2]: zeros before the first launch, back at a resting state after each.
__device__ __forceinline__ void kr_grid_sync(unsigned* barrier) {
    __syncthreads();
    if (threadIdx.x == 0) {
        volatile unsigned* generation = barrier + 1;
        const unsigned before = *generation;
        __threadfence();
        if (atomicAdd(barrier, 1u) == gridDim.x * gridDim.y * gridDim.z - 1) {
            *barrier = 0;
            __threadfence();
            atomicAdd(barrier + 1, 1u);
        } else {
            while (*generation == before) {
            }
        }
        __threadfence();
    }
    __syncthreads();
}

// 16 bytes from device to shared memory, both aligned to 16; there after kr_copy_wait() and a barrier.
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

// Waits for the copies that this thread has begun.
__device__ __forceinline__ void kr_copy_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

#endif  // KEYREEL_HOST
