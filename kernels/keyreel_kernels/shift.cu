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

// --- products of patches ---------------------------------------------------------------------------------------------

#define MOVES 9

// Displacement n as in shift.py's OFFSETS: hexadecimal digit n of the constants, less 1.
__device__ __forceinline__ int rows_down(int move) { return static_cast<int>(0x220021101ull >> (4 * move) & 15) - 1; }
__device__ __forceinline__ int columns_right(int move) { return static_cast<int>(0x202012011ull >> (4 * move) & 15) - 1; }
__device__ __forceinline__ int opposite(int move) { return move ? (move < 5 ? 5 : 13) - move : 0; }

// The place that a displacement leads to; -1 outside the grid.
__device__ __forceinline__ int place_after(int move, int place, int height, int width) {
    const int row = place / width + rows_down(move), column = place % width + columns_right(move);
    return row >= 0 && row < height && column >= 0 && column < width ? row * width + column : -1;
}

__device__ __forceinline__ float float_of(uint16_t half) { return kr_half_to_float(half); }
__device__ __forceinline__ float float_of(float number) { return number; }

// sums[n] = <own, others[n]>; none where others[n] is null. Whole warp.
template <int N, class T>
__device__ __forceinline__ void dots(const T* own, const T* const (&others)[N], int columns, int aligned, float (&sums)[N]) {
    constexpr int PER = 16 / sizeof(T);
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < N; ++n) sums[n] = 0;
    if (aligned) {
#pragma unroll 1  // else registers spill where N is 1
        for (int c = lane * PER; c < columns; c += 32 * PER) {
            const uint4 here = *reinterpret_cast<const uint4*>(own + c);
#pragma unroll
            for (int n = 0; n < N; ++n)
                if (others[n]) sums[n] += dot_16(here, *reinterpret_cast<const uint4*>(others[n] + c), T());
        }
    } else {
        for (int c = lane; c < columns; c += 32) {
            const float here = float_of(own[c]);
#pragma unroll
            for (int n = 0; n < N; ++n)
                if (others[n]) sums[n] += here * float_of(others[n][c]);
        }
    }
#pragma unroll
    for (int n = 0; n < N; ++n)
        if (others[n]) sums[n] = warp_sum(sums[n]);
}

// products [S, N, T, P]: <x[t,i], x[t+s,i+o]> of the first N displacements o, not written where i+o or t+s is outside.
// lengths [T, P]: |x[t,i]|, at least 1e-12. A warp per patch.
template <int N, class T>
__device__ __forceinline__ void products_of(const T* tokens, int64_t frame_stride, int columns, int aligned, int count,
                                            int height, int width, int steps, float* products, float* lengths) {
    const int lane = threadIdx.x % 32, places = height * width;
    const int64_t patch = static_cast<int64_t>(blockIdx.x) * SHIFT_WARPS + threadIdx.x / 32;
    const int64_t plane = static_cast<int64_t>(count) * places;
    if (patch >= plane) return;
    const int frame = static_cast<int>(patch / places), place = static_cast<int>(patch % places);
    const T* own = tokens + frame * frame_stride + static_cast<int64_t>(place) * columns;
    const T* const itself[1] = {own};
    float square[1];
    dots(own, itself, columns, aligned, square);
    if (lane == 0) lengths[patch] = fmaxf(sqrtf(square[0]), 1e-12f);
    for (int step = 1; step <= min(steps, count - 1 - frame); ++step) {
        const T* others[N];
        float sums[N];
#pragma unroll
        for (int move = 0; move < N; ++move) {
            const int there = place_after(move, place, height, width);
            others[move] =
                there < 0 ? nullptr : tokens + (frame + step) * frame_stride + static_cast<int64_t>(there) * columns;
        }
        dots(own, others, columns, aligned, sums);
#pragma unroll
        for (int move = 0; move < N; ++move)
            if (lane == 0 && others[move]) products[((step - 1) * N + move) * plane + patch] = sums[move];
    }
}

extern "C" __global__ void __launch_bounds__(32 * SHIFT_WARPS, 4)
    still_products_half(const uint16_t* tokens, int64_t frame_stride, int columns, int aligned, int count, int height,
                        int width, int steps, float* products, float* lengths) {
    products_of<1>(tokens, frame_stride, columns, aligned, count, height, width, steps, products, lengths);
}
extern "C" __global__ void __launch_bounds__(32 * SHIFT_WARPS, 4)
    still_products_float(const float* tokens, int64_t frame_stride, int columns, int aligned, int count, int height,
                        int width, int steps, float* products, float* lengths) {
    products_of<1>(tokens, frame_stride, columns, aligned, count, height, width, steps, products, lengths);
}
extern "C" __global__ void __launch_bounds__(32 * SHIFT_WARPS, 4)
    moved_products_half(const uint16_t* tokens, int64_t frame_stride, int columns, int aligned, int count, int height,
                        int width, int steps, float* products, float* lengths) {
    products_of<MOVES>(tokens, frame_stride, columns, aligned, count, height, width, steps, products, lengths);
}
extern "C" __global__ void __launch_bounds__(32 * SHIFT_WARPS, 4)
    moved_products_float(const float* tokens, int64_t frame_stride, int columns, int aligned, int count, int height,
                        int width, int steps, float* products, float* lengths) {
    products_of<MOVES>(tokens, frame_stride, columns, aligned, count, height, width, steps, products, lengths);
}

// --- which patches, which step ---------------------------------------------------------------------------------------

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

// source [T, P]; a block per frame. products with N = 1; shot [T]: number of cuts up to each frame.
extern "C" __global__ void __launch_bounds__(32 * SHIFT_WARPS, 8)
    decide_sources(const float* products, const float* lengths, const int* shot, int count, int places, int grid_columns,
                   int steps, float threshold, int64_t* source) {
    KR_SHARED(float, shared);
    const int frame = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float *row = shared + warp * places, *most = shared + SHIFT_WARPS * places;
    const int64_t plane = static_cast<int64_t>(count) * places;

    auto fill = [&](int step) {
        const bool reachable = frame >= step && shot[max(frame - step, 0)] == shot[frame];
        const int64_t own = static_cast<int64_t>(frame) * places, earlier = own - static_cast<int64_t>(step) * places;
        for (int i = lane; i < places; i += 32) {
            float change = 0;
            if (reachable)
                change = 1 - products[(step - 1) * plane + earlier + i] / (lengths[own + i] * lengths[earlier + i]);
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

// --- how much each patch changes -------------------------------------------------------------------------------------

// change [T, P]; a block per frame. products with N = MOVES. Pair 2 (s-1) is the frame with the one s ahead, the next pair with the one s back.
extern "C" __global__ void __launch_bounds__(32 * SHIFT_WARPS, 8)
    mean_change(const float* products, const float* lengths, const int* shot, int count, int height, int width, int steps,
                float still_bonus, float* change) {
    KR_SHARED(int, moves);  // of each pair; -1 where there is no such frame in the shot
    const int frame = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32, places = height * width;
    const int64_t plane = static_cast<int64_t>(count) * places;

    auto other_of = [&](int pair) { return pair % 2 ? frame - pair / 2 - 1 : frame + pair / 2 + 1; };
    // <e[frame, place], e[other, there]>. Back, the other frame is the earlier one: its patch moves the opposite way.
    auto cosine = [&](int pair, int move, int place, int there) {
        const int64_t own = static_cast<int64_t>(frame) * places + place;
        const int64_t other = static_cast<int64_t>(other_of(pair)) * places + there;
        const int kept = pair / 2 * MOVES + (pair % 2 ? opposite(move) : move);
        return products[kept * plane + (pair % 2 ? other : own)] / (lengths[own] * lengths[other]);
    };
    for (int pair = warp; pair < 2 * steps; pair += SHIFT_WARPS) {
        const int other = other_of(pair);
        int best = -1;
        float most = 0;
        if (other >= 0 && other < count && shot[other] == shot[frame]) {
            for (int move = 0; move < MOVES; ++move) {
                const int inside = (height - (rows_down(move) != 0)) * (width - (columns_right(move) != 0));
                if (inside == 0) continue;
                float sum = 0;
                for (int place = lane; place < places; place += 32) {
                    const int there = place_after(move, place, height, width);
                    if (there >= 0) sum += cosine(pair, move, place, there);
                }
                const float mean = warp_sum(sum) / inside + (move ? 0 : still_bonus);
                if (best < 0 || mean > most) best = move, most = mean;
            }
        }
        if (lane == 0) moves[pair] = best;
    }
    __syncthreads();
    for (int place = threadIdx.x; place < places; place += 32 * SHIFT_WARPS) {
        float sum = 0;
        int pairs = 0;
        for (int pair = 0; pair < 2 * steps; ++pair) {
            if (moves[pair] < 0) continue;
            const int there = place_after(moves[pair], place, height, width);
            const float far = 1 - (there < 0 ? cosine(pair, 0, place, place) : cosine(pair, moves[pair], place, there));
            sum += far < 0 ? 0 : far > 2 ? 2 : far;
            ++pairs;
        }
        change[static_cast<int64_t>(frame) * places + place] = pairs ? sum / pairs : 0;
    }
}
