// Before and after k-means: neighbour similarity, farthest-first seeds, representatives. clustering.py is the definition.

#include "kmeans_common.cuh"

// As in clustering.py.
#define COVERED 1e-6
#define REACH 3

// sums [videos, parts, width] of w z over a part of each video's frames; the grid is (videos, parts).
extern "C" __global__ void __launch_bounds__(THREADS)
    column_sums(const void* x, const float* w, const int64_t* offsets, double* sums, int width, int kind) {
    const int64_t start = offsets[blockIdx.x], count = offsets[blockIdx.x + 1] - start;
    const int64_t first = start + count * blockIdx.y / gridDim.y, last = start + count * (blockIdx.y + 1) / gridDim.y;
    for (int d = threadIdx.x; d < width; d += THREADS) {
        double sum = 0;
        for (int64_t t = first; t < last; ++t) sum += static_cast<double>(w[t]) * value_at(x, kind, t * width + d);
        sums[(static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y) * width + d] = sum;
    }
}

// <z_t, z_u>, by a warp.
__device__ double frame_dot(const void* x, int kind, int width, int64_t t, int64_t u) {
    return warp_dot(
        width, [&](int d) { return value_at(x, kind, t * width + d); },
        [&](int d) { return value_at(x, kind, u * width + d); });
}

// A warp per frame. typical [videos]: |mean z|^2.
extern "C" __global__ void __launch_bounds__(THREADS)
    neighbour_similarity(const void* x, const int64_t* offsets, const double* typical, float* similarity, float* smooth,
                     int videos, int width, int kind) {
    const int64_t t = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (t >= offsets[videos]) return;
    int low = 0, high = videos;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (offsets[middle] <= t)
            low = middle;
        else
            high = middle;
    }
    const int64_t start = offsets[low], stop = offsets[low + 1];
    double best = 0, second = 0;
    int64_t nearest = -1, next = -1;
    for (int n = 0; n < 2 * REACH; ++n) {  // one before, one after, two before, ...: the first of equals wins
        const int64_t other = n % 2 ? t + n / 2 + 1 : t - n / 2 - 1;
        if (other < start || other >= stop) continue;
        const double cosine = frame_dot(x, kind, width, t, other);
        if (nearest < 0 || cosine > best)
            second = best, next = nearest, best = cosine, nearest = other;
        else if (next < 0 || cosine > second)
            second = cosine, next = other;
    }
    const bool first_counts = nearest >= 0 && best > typical[low], second_counts = next >= 0 && second > typical[low];
    const auto mixed = [&](int d) {
        double sum = value_at(x, kind, t * width + d);
        if (first_counts) sum += value_at(x, kind, nearest * width + d);
        if (second_counts) sum += value_at(x, kind, next * width + d);
        return sum;
    };
    double square = 0;
    for (int d = lane; d < width; d += 32) square += mixed(d) * mixed(d);
    for (int step = 16; step; step /= 2) square += __shfl_xor_sync(KR_FULL_WARP, square, step);
    const double shrink = 1 / fmax(sqrt(square), 1e-30);
    for (int d = lane; d < width; d += 32) smooth[t * width + d] = static_cast<float>(mixed(d) * shrink);
    if (lane == 0) similarity[t] = nearest < 0 ? 1.0f : static_cast<float>(next < 0 ? best : (best + second) / 2);
}

// Seeds of the videos. rows, gaps [videos, count]: filled with -1 and 0 before; sums [videos, parts, width] from
// `column_sums` with w; gap [frames] and board [teams, 2, CLUSTER, 2] are scratch. A team takes the videos team, team +
// teams, ...; staged: its frames fit into shared memory behind the sum and the last seed.
KR_CLUSTER_KERNEL __launch_bounds__(THREADS, 1)
    seed(const void* x, const float* w, const int64_t* offsets, const double* sums, double* gap, double* board,
         int64_t* rows, float* gaps, int videos, int count, int width, int kind, int wide, int parts,
         int staged) {
    KR_SHARED(double, small);
    double* total = small + 64;
    float* target = reinterpret_cast<float*>(total + (width + 1) / 2 * 2);
    constexpr int size = CLUSTER;
    const int teams = static_cast<int>(gridDim.x) / size, team = static_cast<int>(blockIdx.x) / size;
    const int rank = static_cast<int>(kr_cluster_rank());
    const int lane = threadIdx.x % 32, bytes = kind == FLOAT ? 4 : 2;
    board += static_cast<int64_t>(team) * 4 * size;
    int turn = 0;
    for (int video = team; video < videos; video += teams) {
        const int64_t start = offsets[video];
        const int frames = static_cast<int>(offsets[video + 1] - start);
        const int first = static_cast<int>(static_cast<int64_t>(frames) * rank / size);
        const int last = static_cast<int>(static_cast<int64_t>(frames) * (rank + 1) / size);
        const char* own = static_cast<const char*>(x) + (start + first) * width * bytes;
        __syncthreads();
        if (staged) {
            char* stage = reinterpret_cast<char*>(target) + (width * 4 + 15) / 16 * 16;
            const int64_t whole = static_cast<int64_t>(last - first) * width * bytes;
            if (wide)
                for (int64_t n = threadIdx.x * 16; n < whole; n += THREADS * 16) kr_copy_async_16(stage + n, own + n);
            else
                for (int64_t n = threadIdx.x * 2; n < whole; n += THREADS * 2)
                    *reinterpret_cast<uint16_t*>(stage + n) = *reinterpret_cast<const uint16_t*>(own + n);
            kr_copy_commit();
            kr_copy_wait();
            own = stage;
        }
        for (int d = threadIdx.x; d < width; d += THREADS) {
            double sum = 0;
            for (int part = 0; part < parts; ++part)
                sum += sums[(static_cast<int64_t>(video) * parts + part) * width + d];
            total[d] = sum;
        }
        __syncthreads();
        for (int n = 0; n < min(count, frames); ++n) {
            Best worst{-KR_INFINITY, frames};
            for (int t = first + static_cast<int>(threadIdx.x) / 32; t < last; t += WARPS) {
                const int64_t row = static_cast<int64_t>(t - first) * width;
                double found = 0;
                for (int d = lane * 8; d < width; d += 256) {
                    float v[8];
                    load_eight(own, kind, wide, row + d, min(8, width - d), v);
                    float sum = 0;
                    if (n == 0)
                        for (int e = 0; e < min(8, width - d); ++e) found += total[d + e] * v[e];
                    else
                        for (int e = 0; e < min(8, width - d); ++e) sum = fmaf(target[d + e], v[e], sum);
                    found += sum;
                }
                for (int step = 16; step; step /= 2) found += __shfl_xor_sync(KR_FULL_WARP, found, step);
                const double weight = w[start + t];
                if (n > 0) {
                    const double away = 1 - found > COVERED ? 1 - found : 0;
                    found = n == 1 ? away : fmin(gap[start + t], away);
                    __syncwarp();
                    if (lane == 0) gap[start + t] = found;
                }
                // A NaN or an infinity wins with row -1: such a video has no seeds.
                const double value = weight * found;
                if (value - value == 0)
                    worst.meet(value, t);
                else
                    worst.meet(KR_INFINITY, -1);
            }
            worst = block_best(worst, small);
            double* slots = board + turn * size * 2;
            if (threadIdx.x == 0) slots[rank * 2] = worst.value, slots[rank * 2 + 1] = worst.row;
            kr_cluster_sync();
            worst = {-KR_INFINITY, frames};
            for (int block = threadIdx.x; block < size; block += THREADS)
                worst.meet(slots[block * 2], static_cast<int>(slots[block * 2 + 1]));
            worst = block_best(worst, small);
            const int chosen = worst.row;
            turn = 1 - turn;
            if (chosen < 0 || (n > 0 && worst.value <= 0)) break;
            if (rank == 0 && threadIdx.x == 0) {
                rows[static_cast<int64_t>(video) * count + n] = start + chosen;
                gaps[static_cast<int64_t>(video) * count + n] = n ? static_cast<float>(worst.value) : w[start + chosen];
            }
            for (int d = threadIdx.x; d < width; d += THREADS)
                target[d] = value_at(x, kind, (start + chosen) * width + d);
            __syncthreads();
        }
    }
}

// The best frame of each cluster as one number: clean first, then by similarity, then the earliest. keys [problems,
// most]: zeros before; the grid is (problems, parts).
extern "C" __global__ void __launch_bounds__(THREADS)
    representatives(const int64_t* spans, const int64_t* starts, const int64_t* labels, const float* similarity,
                    const uint8_t* clean, unsigned long long* keys, int most) {
    const int64_t start = spans[2 * blockIdx.x], count = spans[2 * blockIdx.x + 1] - start;
    const int64_t step = static_cast<int64_t>(gridDim.y) * THREADS;
    for (int64_t t = static_cast<int64_t>(blockIdx.y) * THREADS + threadIdx.x; t < count; t += step) {
        const int64_t at = starts[blockIdx.x] + t;
        const unsigned bits = __float_as_uint(similarity[at] + 0.0f);  // no -0
        const unsigned ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
        const unsigned long long key = static_cast<unsigned long long>(clean[start + t] != 0) << 63 |
                                       static_cast<unsigned long long>(ordered) << 31 | (0x7fffffffull - t);
        atomicMax(keys + static_cast<int64_t>(blockIdx.x) * most + labels[at], key);
    }
}
