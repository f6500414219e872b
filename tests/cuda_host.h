// Runs CUDA kernels on a CPU, the blocks of one cluster at a time; each CUDA thread is a fiber.
//
// Compiled before device.cuh and a .cu file, with KEYREEL_HOST defined. With KR_THREADS each CUDA thread is a system
// thread, for ThreadSanitizer. A barrier that not all threads reach ends the launch with a message. Dynamic shared
// memory is an allocation of exactly the requested size, filled with 0xAB, so that AddressSanitizer sees overruns.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>
#ifdef KR_THREADS
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __noinline__
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define KR_FULL_WARP 0xffffffffu
#define KR_INFINITY std::numeric_limits<float>::infinity()
#define KR_SHARED(T, name) T* name = reinterpret_cast<T*>(krh::self().block->shared.get())
#define KR_CLUSTER_KERNEL extern "C" void

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct uint3 {
    unsigned x, y, z;
};
template <class T, int N>
struct krh_vector;
template <class T>
struct alignas(sizeof(T) * 2) krh_vector<T, 2> {
    T x, y;
};
template <class T>
struct alignas(sizeof(T) * 4) krh_vector<T, 4> {
    T x, y, z, w;
};
using float4 = krh_vector<float, 4>;
using int4 = krh_vector<int, 4>;
using uint2 = krh_vector<unsigned, 2>;
using uint4 = krh_vector<unsigned, 4>;

namespace krh {

enum class State { run, warp, block, group, done };

#ifdef KR_THREADS
// std::barrier spins before it sleeps, which hundreds of threads on a few cores cannot afford.
class Barrier {
    const unsigned count;
    std::atomic<unsigned> left, turn = 0;

public:
    explicit Barrier(size_t count) : count(unsigned(count)), left(unsigned(count)) {}
    void arrive_and_wait() {
        const unsigned now = turn.load(std::memory_order_acquire);
        if (left.fetch_sub(1, std::memory_order_acq_rel) == 1) {
            left.store(count, std::memory_order_relaxed);
            turn.fetch_add(1, std::memory_order_acq_rel);
            syscall(SYS_futex, &turn, FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
        } else {
            while (turn.load(std::memory_order_acquire) == now)
                syscall(SYS_futex, &turn, FUTEX_WAIT_PRIVATE, now, nullptr, nullptr, 0);
        }
    }
};
#endif

struct Block {
    std::unique_ptr<unsigned char[]> shared;
    uint3 index{};
    unsigned rank = 0;  // in its cluster
    std::vector<uint64_t> mailbox;  // of shuffles, one word per thread
    std::vector<uint32_t> operands;  // of mma, six words per thread
#ifdef KR_THREADS
    std::unique_ptr<Barrier> barrier;
    std::vector<std::unique_ptr<Barrier>> warps;
#endif
};

struct Thread {
    uint3 index{};
    unsigned linear = 0;
    Block* block = nullptr;
    struct Copy {
        void* to;
        const void* from;
    };
    std::vector<std::vector<Copy>> copies{1};  // groups: done when they are waited for, the last is open
#ifndef KR_THREADS
    State state = State::run;
    std::unique_ptr<char[]> stack;
#ifdef __x86_64__
    void* pointer = nullptr;
#else
    ucontext_t context;
#endif
#endif
};

struct Launch {
    dim3 grid, threads;
    std::vector<Block> blocks;
    std::function<void()> body;
};
inline Launch current;

#ifdef KR_THREADS
inline thread_local Thread* here;
inline std::unique_ptr<Barrier> group_barrier;
inline void wait(State state) {
    if (state == State::warp) here->block->warps[here->linear / 32]->arrive_and_wait();
    else if (state == State::block) here->block->barrier->arrive_and_wait();
    else group_barrier->arrive_and_wait();
}
#else
inline Thread* here;
#ifdef __x86_64__
// Saves the callee-saved registers and the stack pointer to *from, goes on at `to` (System V ABI).
extern "C" void krh_switch(void** from, void* to);
asm(R"(
.weak krh_switch
krh_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
inline void* scheduler;
#else
inline ucontext_t scheduler;
#endif
inline void leave(State state) {
    Thread* me = here;
    me->state = state;
#ifdef __x86_64__
    krh_switch(&me->pointer, scheduler);
#else
    swapcontext(&me->context, &scheduler);
#endif
}
inline void wait(State state) { leave(state); }
inline void enter() {
    current.body();
    leave(State::done);
}
inline void prepare(Thread& thread) {
    constexpr size_t bytes = 64 << 10;
    if (!thread.stack) thread.stack.reset(new char[bytes]);
    thread.state = State::run;
#ifdef __x86_64__
    auto top = reinterpret_cast<uintptr_t>(thread.stack.get() + bytes) & ~uintptr_t(15);
    void** stack = reinterpret_cast<void**>(top);
    *--stack = nullptr;  // as after a call: the stack is 16-byte aligned plus the return address
    *--stack = reinterpret_cast<void*>(&enter);
    for (int saved = 0; saved < 6; ++saved) *--stack = nullptr;
    thread.pointer = stack;
#else
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = bytes;
    thread.context.uc_link = &scheduler;
    makecontext(&thread.context, enter, 0);
#endif
}
inline void resume(Thread& thread) {
    here = &thread;
#ifdef __x86_64__
    krh_switch(&scheduler, thread.pointer);
#else
    swapcontext(&scheduler, &thread.context);
#endif
}
#endif

// Not inlined: a fiber must look itself up again after each switch.
__attribute__((noinline)) inline Thread& self() {
    asm volatile("");
    return *here;
}

#ifdef KR_THREADS
// System threads, kept from cluster to cluster: under a sanitizer they are slow to start.
class Crew {
    std::vector<std::thread> running;
    std::unique_ptr<Barrier> turn;
    std::vector<Thread>* work = nullptr;  // null: end

    void dismiss() {
        work = nullptr;
        if (turn) turn->arrive_and_wait();
        for (std::thread& thread : running) thread.join();
        running.clear();
    }
    void serve(size_t n) {
        for (turn->arrive_and_wait(); work; turn->arrive_and_wait()) {
            here = &(*work)[n];
            current.body();
            turn->arrive_and_wait();
        }
    }

public:
    ~Crew() { dismiss(); }
    void run(std::vector<Thread>& threads) {
        if (running.size() != threads.size()) {
            dismiss();
            turn = std::make_unique<Barrier>(threads.size() + 1);
            for (size_t n = 0; n < threads.size(); ++n) running.emplace_back([this, n] { serve(n); });
        }
        work = &threads;
        turn->arrive_and_wait();
        turn->arrive_and_wait();
    }
};

inline std::string run_group(std::vector<Thread>& threads, size_t count) {
    group_barrier = std::make_unique<Barrier>(threads.size());
    for (Block& block : current.blocks) {
        block.barrier = std::make_unique<Barrier>(count);
        block.warps.clear();
        for (size_t warp = 0; warp < count; warp += 32)
            block.warps.push_back(
                std::make_unique<Barrier>(std::min<size_t>(32, count - warp)));
    }
    static Crew crew;
    crew.run(threads);
    return "";
}
#else
inline std::string run_group(std::vector<Thread>& threads, size_t count) {
    for (Thread& thread : threads) prepare(thread);
    auto all = [&](size_t first, size_t last, State state) {
        for (size_t n = first; n < last; ++n)
            if (threads[n].state != state) return false;
        return true;
    };
    auto release = [&](size_t first, size_t last) {
        for (size_t n = first; n < last; ++n) threads[n].state = State::run;
    };
    while (!all(0, threads.size(), State::done)) {
        bool moved = false;
        for (size_t base = 0; base < threads.size(); base += count) {
            for (size_t warp = base; warp < base + count; warp += 32) {
                const size_t end = std::min(warp + 32, base + count);
                do {
                    for (size_t n = warp; n < end; ++n)
                        if (threads[n].state == State::run) resume(threads[n]), moved = true;
                } while (all(warp, end, State::warp) && (release(warp, end), true));
            }
            if (all(base, base + count, State::block)) release(base, base + count), moved = true;
        }
        if (all(0, threads.size(), State::group)) release(0, threads.size()), moved = true;
        if (!moved) {
            int waiting[5] = {};
            for (Thread& thread : threads) ++waiting[static_cast<int>(thread.state)];
            char text[200];
            std::snprintf(text, sizeof text,
                          "barrier not reached by all: %d threads wait for their warp, %d for their block, %d for their "
                          "group, %d have ended",
                          waiting[1], waiting[2], waiting[3], waiting[4]);
            return text;
        }
    }
    return "";
}
#endif

// Runs `body` for all threads of the grid, `together` blocks at a time. Returns "" or the error.
inline std::string launch(dim3 grid, dim3 block, size_t shared, size_t together, std::function<void()> body) {
    const size_t count = size_t(block.x) * block.y * block.z, blocks = size_t(grid.x) * grid.y * grid.z;
    if (blocks % together) return "the grid is not a multiple of the cluster";
    if (block.y * block.z != 1 || count % 32 || count > 1024) return "blocks must be 1-D, of a multiple of 32 threads";
    current.grid = grid, current.threads = block, current.body = std::move(body);
    current.blocks.resize(together);
    std::vector<Thread> threads(together * count);
    for (size_t first = 0; first < blocks; first += together) {
        for (size_t rank = 0; rank < together; ++rank) {
            Block& own = current.blocks[rank];
            const auto at = static_cast<unsigned>(first + rank);
            own.index = {at % grid.x, at / grid.x % grid.y, at / grid.x / grid.y};
            own.rank = static_cast<unsigned>(rank);
            own.shared.reset(new unsigned char[shared]);
            std::memset(own.shared.get(), 0xAB, shared);
            own.mailbox.assign(count, 0);
            own.operands.assign(count * 6, 0);
            for (size_t n = 0; n < count; ++n) {
                Thread& thread = threads[rank * count + n];
                thread.index = {static_cast<unsigned>(n), 0, 0};
                thread.linear = static_cast<unsigned>(n);
                thread.block = &own;
                thread.copies.assign(1, {});
            }
        }
        std::string error = run_group(threads, count);
        if (!error.empty()) return error;
    }
    return "";
}

template <class T>
T exchange(T value, unsigned source) {
    static_assert(sizeof(T) <= 8);
    Thread& me = self();
    std::memcpy(&me.block->mailbox[me.linear], &value, sizeof(T));
    wait(State::warp);
    T result;
    std::memcpy(&result, &me.block->mailbox[(me.linear & ~31u) + (source & 31)], sizeof(T));
    wait(State::warp);
    return result;
}

inline void full(unsigned mask) {
    if (mask != KR_FULL_WARP) std::fprintf(stderr, "krh: a warp call with mask %08x\n", mask), std::abort();
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_cv_t<A>*>(arguments[I])...);
}

// Called from Python: checks number and size of the arguments, then runs the kernel. Returns "" or the error.
template <class... A>
const char* start(void (*kernel)(A...), const unsigned* grid, const unsigned* block, size_t shared, size_t together,
                  void** arguments, const size_t* sizes, size_t count) {
    static std::string error;
    const size_t wanted[] = {sizeof(A)..., 0};
    if (count != sizeof...(A)) error = "the kernel takes " + std::to_string(sizeof...(A)) + " arguments";
    else {
        error.clear();
        for (size_t n = 0; n < count; ++n)
            if (sizes[n] != wanted[n])
                error = "argument " + std::to_string(n) + " has " + std::to_string(sizes[n]) + " bytes, the kernel takes " +
                        std::to_string(wanted[n]);
        if (error.empty())
            error = launch({grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared, together,
                           [=] { call(kernel, arguments, std::index_sequence_for<A...>{}); });
    }
    return error.c_str();
}

}  // namespace krh

#define threadIdx (krh::self().index)
#define blockIdx (krh::self().block->index)
#define blockDim (krh::current.threads)
#define gridDim (krh::current.grid)

inline void __syncthreads() { krh::wait(krh::State::block); }
inline int __syncthreads_or(int predicate) {
    krh::Thread& me = krh::self();
    me.block->mailbox[me.linear] = predicate != 0;
    krh::wait(krh::State::block);
    bool any = false;
    for (const uint64_t one : me.block->mailbox) any |= one != 0;
    krh::wait(krh::State::block);
    return any;
}
inline void __syncwarp(unsigned mask = KR_FULL_WARP) { krh::full(mask), krh::wait(krh::State::warp); }
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int = 32) {
    return krh::full(mask), krh::exchange(value, (krh::self().linear & 31) ^ bits);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    krh::full(mask);
    krh::Thread& me = krh::self();
    me.block->mailbox[me.linear] = predicate != 0;
    krh::wait(krh::State::warp);
    unsigned bits = 0;
    for (unsigned lane = 0; lane < 32; ++lane) bits |= unsigned(me.block->mailbox[(me.linear & ~31u) + lane]) << lane;
    krh::wait(krh::State::warp);
    return bits;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

template <class T>
T atomicAdd(T* place, std::type_identity_t<T> value) {
    return std::atomic_ref<T>(*place).fetch_add(value, std::memory_order_relaxed);
}
template <class T>
T atomicMax(T* place, std::type_identity_t<T> value) {
    std::atomic_ref<T> at(*place);
    T old = at.load(std::memory_order_relaxed);
    while (old < value && !at.compare_exchange_weak(old, value, std::memory_order_relaxed)) {
    }
    return old;
}
using std::max;
using std::min;
inline unsigned __float_as_uint(float value) { return __builtin_bit_cast(unsigned, value); }
inline float __uint_as_float(unsigned bits) { return __builtin_bit_cast(float, bits); }

inline float kr_half_to_float(uint16_t bits) { return float(__builtin_bit_cast(_Float16, bits)); }
inline uint16_t kr_float_to_half(float value) { return __builtin_bit_cast(uint16_t, _Float16(value)); }
inline float kr_bfloat_to_float(uint16_t bits) { return __uint_as_float(unsigned(bits) << 16); }

// PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type".
inline void kr_mma_16x8x16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    krh::Thread& me = krh::self();
    uint32_t* own = &me.block->operands[me.linear * 6];
    std::copy(a, a + 4, own), std::copy(b, b + 2, own + 4);
    krh::wait(krh::State::warp);
    const uint32_t* warp = &me.block->operands[(me.linear & ~31u) * 6];
    const unsigned group = (me.linear & 31) / 4, pair = me.linear % 4;
    for (int n = 0; n < 4; ++n) {
        const unsigned row = group + n / 2 * 8, column = pair * 2 + n % 2;
        for (unsigned k = 0; k < 16; ++k) {
            const unsigned shift = k % 2 * 16;
            const uint32_t left = warp[(row % 8 * 4 + k % 8 / 2) * 6 + row / 8 + k / 8 * 2];
            const uint32_t right = warp[(column * 4 + k % 8 / 2) * 6 + 4 + k / 8];
            d[n] += kr_half_to_float(uint16_t(left >> shift)) * kr_half_to_float(uint16_t(right >> shift));
        }
    }
    krh::wait(krh::State::warp);
}

inline unsigned kr_cluster_rank() { return krh::self().block->rank; }
template <class T>
T* kr_cluster_shared(T* own, int rank) {
    const ptrdiff_t at = reinterpret_cast<unsigned char*>(own) - krh::self().block->shared.get();
    return reinterpret_cast<T*>(krh::current.blocks[rank].shared.get() + at);
}
inline void kr_cluster_sync() { krh::wait(krh::State::group); }
inline void kr_copy_async_16(void* shared, const void* global) {
    if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16)
        std::fprintf(stderr, "krh: a copy of 16 bytes that is not aligned\n"), std::abort();
    krh::self().copies.back().push_back({shared, global});
}
inline void kr_copy_commit() { krh::self().copies.emplace_back(); }
template <int ahead = 0>
void kr_copy_wait() {
    auto& groups = krh::self().copies;
    const auto last = groups.end() - 1 - std::min<ptrdiff_t>(ahead, groups.end() - groups.begin() - 1);
    for (auto group = groups.begin(); group != last; ++group)
        for (const auto& copy : *group) std::memcpy(copy.to, copy.from, 16);
    groups.erase(groups.begin(), last);
}
inline double rsqrt(double value) { return 1 / std::sqrt(value); }
