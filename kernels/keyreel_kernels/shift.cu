// Temporal shift of patch tokens and pixels; shift.py is the definition. T frames, P patches, C columns, S steps.

#define SHIFT_WARPS 4

__device__ __forceinline__ float first_of(uint32_t pair) { return kr_half_to_float(static_cast<uint16_t>(pair)); }
__device__ __forceinline__ float second_of(uint32_t pair) { return kr_half_to_float(static_cast<uint16_t>(pair >> 16)); }

// Sum of the products of 16 bytes of numbers each.
__device__ __forceinline__ float dot_16(const uint4& a, const uint4& b, uint16_t) {
    const uint32_t left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
    float sum = 0;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
        sum += first_of(left[n]) * first_of(right[n]);
        sum += second_of(left[n]) * second_of(right[n]);
    }
    return sum;
}
__device__ __forceinline__ float dot_16(const uint4& a, const uint4& b, float) {
    float sum = __uint_as_float(a.x) * __uint_as_float(b.x);
    sum += __uint_as_float(a.y) * __uint_as_float(b.y);
    sum += __uint_as_float(a.z) * __uint_as_float(b.z);
    sum += __uint_as_float(a.w) * __uint_as_float(b.w);
    return sum;
}

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
    for (int bits = 16; bits; bits /= 2) value += __shfl_xor_sync(KR_FULL_WARP, value, bits);
    return value;
}

// --- which patches, which step ---------------------------------------------------------------------------------------

// products [S+1, T, P] += <x[t,i], x[t-s,i]> over some columns; s = 0 is the square. A warp walks along the frames of one
// patch and keeps the last S+1 rows and the next one in shared memory, so that each token is read from device memory
// once. A lane reads only what it copied itself: no barrier, only the copy to wait for.
template <class T>
__device__ __forceinline__ void products_of(uint4* shared, const T* tokens, int64_t frame_stride, int row_stride, int count,
                                            int places, int column, int columns, int aligned, int steps, int span,
                                            float* products) {
    constexpr int PER = 16 / sizeof(T);
    const int lane = threadIdx.x % 32, place = blockIdx.x * SHIFT_WARPS + threadIdx.x / 32;
    if (place >= places) return;
    const int chunks = (columns + PER - 1) / PER, slots = steps + 2;
    uint4* ring = shared + threadIdx.x / 32 * slots * chunks;
    const int start = blockIdx.y * span, stop = min(start + span, count), first = max(start - steps, 0);
    const T* rows = tokens + static_cast<int64_t>(place) * row_stride + column;

    auto fetch = [&](int frame) {
        const T* from = rows + frame * frame_stride;
        uint4* to = ring + frame % slots * chunks;
        for (int chunk = lane; chunk < chunks; chunk += 32) {
            if (aligned) {
                kr_copy_async_16(to + chunk, from + chunk * PER);
            } else {
                T* single = reinterpret_cast<T*>(to + chunk);
                for (int n = 0; n < PER; ++n) single[n] = chunk * PER + n < columns ? from[chunk * PER + n] : T(0);
            }
        }
    };
    fetch(first);
    for (int frame = first; frame < stop; ++frame) {
        kr_copy_wait();
        if (frame + 1 < stop) fetch(frame + 1);
        if (frame < start) continue;
        const uint4* own = ring + frame % slots * chunks;
        const int reach = min(steps, frame);
        for (int base = 0; base <= reach; base += 4) {
            float sums[4] = {};
            int older[4];
#pragma unroll
            for (int n = 0; n < 4; ++n) older[n] = (frame - min(base + n, reach)) % slots * chunks;
            for (int chunk = lane; chunk < chunks; chunk += 32) {
                const uint4 here = own[chunk];
#pragma unroll
                for (int n = 0; n < 4; ++n) sums[n] += dot_16(here, ring[older[n] + chunk], T());
            }
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const float sum = warp_sum(sums[n]);
                if (lane == 0 && base + n <= reach)
                    products[(static_cast<int64_t>(base + n) * count + frame) * places + place] += sum;
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(32 * SHIFT_WARPS, 4)
    patch_products_half(const uint16_t* tokens, int64_t frame_stride, int row_stride, int count, int places, int column,
                        int columns, int aligned, int steps, int span, float* products) {
    KR_SHARED(uint4, ring);
    products_of(ring, tokens, frame_stride, row_stride, count, places, column, columns, aligned, steps, span, products);
}
extern "C" __global__ void __launch_bounds__(32 * SHIFT_WARPS, 4)
    patch_products_float(const float* tokens, int64_t frame_stride, int row_stride, int count, int places, int column,
                         int columns, int aligned, int steps, int span, float* products) {
    KR_SHARED(uint4, ring);
    products_of(ring, tokens, frame_stride, row_stride, count, places, column, columns, aligned, steps, span, products);
}

// Maps floats to unsigned integers of the same order, and back.
__device__ __forceinline__ unsigned ordered(float value) {
    const unsigned bits = __float_as_uint(value);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_ordered(unsigned key) {
    return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

struct Cutoff {
    unsigned key;  // the n-th largest
    int above;     // how many are larger
};

// The n-th largest of row [places], n >= 1, bit by bit. Whole warp; lane l reads l, l + 32, ...
__device__ __forceinline__ Cutoff nth_largest(const float* row, int places, int n) {
    const int lane = threadIdx.x % 32;
    Cutoff found = {0, 0};
    for (unsigned bit = 0x80000000u; bit; bit >>= 1) {
        const unsigned trial = found.key | bit;
        int reach = 0;
        for (int i = lane; i < places; i += 32) reach += ordered(row[i]) >= trial;
        reach = warp_sum(reach);
        if (reach >= n) found.key = trial;
        else found.above = reach;
    }
    return found;
}

__device__ __forceinline__ int64_t taken_from(int frame, int offset, int count, const int* shot) {
    const int there = frame + offset;
    return there >= 0 && there < count && shot[there] == shot[frame] ? there : frame;
}

// source [T, P]; a block per frame. products as above; shot [T]: number of cuts up to each frame.
extern "C" __global__ void __launch_bounds__(32 * SHIFT_WARPS, 8)
    decide_sources(const float* products, const int* shot, int count, int places, int grid_columns, int steps,
                   float threshold, int64_t* source) {
    KR_SHARED(float, shared);
    const int frame = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float *row = shared + warp * places, *most = shared + SHIFT_WARPS * places;
    const int64_t plane = static_cast<int64_t>(count) * places;

    auto fill = [&](int step) {
        const bool reachable = frame >= step && shot[max(frame - step, 0)] == shot[frame];
        const float* squares = products + static_cast<int64_t>(frame) * places;
        for (int i = lane; i < places; i += 32) {
            float change = 0;
            if (reachable) {
                const float own = fmaxf(sqrtf(squares[i]), 1e-12f);
                const float other = fmaxf(sqrtf(squares[i - static_cast<int64_t>(step) * places]), 1e-12f);
                change = 1 - squares[step * plane + i] / (own * other);
            }
            row[i] = change;
        }
    };
    const int quarter = (places + 3) / 4;
    for (int step = 1 + warp; step <= steps; step += SHIFT_WARPS) {
        fill(step);
        const Cutoff last = nth_largest(row, places, quarter);
        float sum = 0;
        for (int i = lane; i < places; i += 32) sum += ordered(row[i]) > last.key ? row[i] : 0;
        sum = warp_sum(sum) + (quarter - last.above) * from_ordered(last.key);
        if (lane == 0) most[step - 1] = sum / quarter;
    }
    __syncthreads();
    if (warp) return;

    float high = most[0];
    for (int n = 1; n < steps; ++n) high = fmaxf(high, most[n]);
    int step = 0;
    while (step < steps && !(most[step] >= 0.5f * high)) ++step;
    step = step < steps ? step + 1 : 1;
    fill(step);
    const int half = places / 2;
    const Cutoff last = nth_largest(row, places, max(half, 1));
    int ties = 0;
    for (int base = 0; base < places; base += 32) {
        const int i = base + lane;
        const float change = i < places ? row[i] : 0;
        const bool tie = i < places && ordered(change) == last.key;
        const unsigned tied = __ballot_sync(KR_FULL_WARP, tie);
        // Of equal changes the first patches are chosen.
        const bool in = ordered(change) > last.key || (tie && last.above + ties + __popc(tied & ((1u << lane) - 1)) < half);
        ties += __popc(tied);
        if (i >= places) continue;
        const int direction = (i / grid_columns + i % grid_columns) % 2 ? 1 : -1;
        const bool chosen = in && half && change > threshold;
        source[static_cast<int64_t>(frame) * places + i] =
            chosen ? taken_from(frame, direction * step, count, shot) : frame;
    }
}

// --- gathering -------------------------------------------------------------------------------------------------------

// A warp per token of `words` words.
template <class Word>
__device__ __forceinline__ void gather_row(const Word* tokens, const int64_t* source, int64_t rows, int words, int prefix,
                                           int places, Word* out) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    const int64_t frame = row / (prefix + places);
    const int place = static_cast<int>(row % (prefix + places));
    const int64_t from = place < prefix ? frame : source[frame * places + place - prefix];
    const Word* old = tokens + (from * (prefix + places) + place) * words;
#pragma unroll 4
    for (int n = threadIdx.x % 32; n < words; n += 32) out[row * words + n] = old[n];
}

extern "C" __global__ void __launch_bounds__(256) gather_tokens_16(const uint4* tokens, const int64_t* source, int64_t rows,
                                                                   int words, int prefix, int places, uint4* out) {
    gather_row(tokens, source, rows, words, prefix, places, out);
}
extern "C" __global__ void __launch_bounds__(256) gather_tokens_2(const uint16_t* tokens, const int64_t* source, int64_t rows,
                                                                  int words, int prefix, int places, uint16_t* out) {
    gather_row(tokens, source, rows, words, prefix, places, out);
}

// The patch that covers pixel `at`: the last one that starts, at patch * size / patches, not after it.
__device__ __forceinline__ int patch_at(int at, int size, int patches) {
    return static_cast<int>((static_cast<int64_t>(at + 1) * patches - 1) / size);
}

// A block per row of pixels. A word of up to 4 bytes covers one pixel or two.
template <class Word>
__device__ __forceinline__ void gather_line(const Word* frames, const int64_t* source, int height, int width, int patch_rows,
                                            int patch_columns, Word* out) {
    const int frame = blockIdx.x / height, y = blockIdx.x % height, words = 3 * width / int(sizeof(Word));
    source += (static_cast<int64_t>(frame) * patch_rows + patch_at(y, height, patch_rows)) * patch_columns;
    for (int n = threadIdx.x; n < words; n += blockDim.x) {
        const int low = n * int(sizeof(Word)), pixel = low / 3, next = (low + int(sizeof(Word)) - 1) / 3;
        const int64_t from = source[patch_at(pixel, width, patch_columns)];
        Word value = frames[(from * height + y) * words + n];
        if (next != pixel) {
            const int64_t other = source[patch_at(next, width, patch_columns)];
            const Word mask = static_cast<Word>((1u << (8 * (3 - low % 3))) - 1);
            value = (value & mask) | (frames[(other * height + y) * words + n] & ~mask);
        }
        out[static_cast<int64_t>(blockIdx.x) * words + n] = value;
    }
}

extern "C" __global__ void __launch_bounds__(128) gather_pixels_4(const uint32_t* frames, const int64_t* source, int height,
                                                                  int width, int rows, int columns, uint32_t* out) {
    gather_line(frames, source, height, width, rows, columns, out);
}
extern "C" __global__ void __launch_bounds__(128) gather_pixels_1(const uint8_t* frames, const int64_t* source, int height,
                                                                  int width, int rows, int columns, uint8_t* out) {
    gather_line(frames, source, height, width, rows, columns, out);
}
