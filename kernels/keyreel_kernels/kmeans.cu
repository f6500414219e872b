// Spherical k-means with a diversity penalty; clustering.py is the definition.
//
// A team, the blocks of one thread-block cluster, works on one problem at a time and fetches problems until there are
// none. Each block has a contiguous share of the frames, in shared memory from the first round to the last if they fit,
// else loaded again in chunks in every round, one while the block works on another.
//
// A round: every frame finds its centroid and every block sums its frames by cluster (`survey`). | The blocks add their
// sums, each for its own columns, out of each other's shared memory (`add_up`), and multiply all pairs of sums S and
// centroids c (`multiply_pairs`). | From these inner products alone every block computes, alike, J, hence whether the
// last round is taken, and the moves of clustering.move one after the other without reading a vector again (`decide`): a
// move only needs the products of the new centroid with the others, which are linear in the known ones. A centroid that
// is far from the others becomes a multiple of its S, which all blocks see. | Others are made column by column (`move`).
// | is a barrier of the team: two in most rounds. Nothing leaves the device, and no sum's order depends on timing.

#include "kmeans_common.cuh"
#include "kmeans_frames.cuh"
#include "kmeans_moves.cuh"

// Labels of the block's frames and their sums by cluster.
__device__ __noinline__ void survey(Work& p, int turn) {
    if (p.k <= p.tile) load_panel(p, turn, 0);
    for_chunks(p, [&](int number, int from, int count) {
        assign_chunk(p, turn, count, false, nullptr);
        for (int n = threadIdx.x; n < count; n += THREADS) p.label(turn)[p.first + from + n] = p.here[n];
        __syncthreads();
        sum_chunk(p, count, number > 0, p.filled(turn));
    });
}

// clustering.relocate, for all clusters without a frame, one after the other.
__device__ __noinline__ void relocate(Work& p, int turn, const int* filled) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (p.k <= p.tile) load_panel(p, turn, 0);
    for_chunks(p, [&](int, int from, int count) {
        assign_chunk(p, turn, count, true, filled);
        for (int n = threadIdx.x; n < count; n += THREADS) p.cosine[p.first + from + n] = p.best[n];
    });
    for (int j = 0; j < p.k; ++j) {
        if (filled[j]) continue;
        Best gap{-KR_INFINITY, p.frames};
        for (int n = p.first + threadIdx.x; n < p.first + p.own; n += THREADS)
            gap.meet(static_cast<double>(p.w[n]) * (1.0 - p.cosine[n]), n);
        gap = block_best(gap, p.small);
        if (threadIdx.x == 0) p.board[p.rank * 4] = gap.value, p.board[p.rank * 4 + 1] = gap.row;
        kr_cluster_sync();
        gap = {-KR_INFINITY, p.frames};
        for (int n = threadIdx.x; n < CLUSTER; n += THREADS)
            gap.meet(p.board[n * 4], static_cast<int>(p.board[n * 4 + 1]));
        const int worst = min(block_best(gap, p.small).row, p.frames - 1);
        const auto there = [&](int d) { return value_at(p.x, p.kind, static_cast<int64_t>(worst) * p.width + d); };
        double gain = 0, excess = 0;
        for (int n = p.first + warp; n < p.first + p.own; n += WARPS) {
            const double to = warp_dot(
                p.width, there, [&](int d) { return value_at(p.x, p.kind, static_cast<int64_t>(n) * p.width + d); });
            const float gained = fmaxf(p.cosine[n], static_cast<float>(to));
            if (lane == 0)
                p.gained[n] = gained, gain += static_cast<double>(p.w[n]) * (static_cast<double>(gained) - p.cosine[n]);
        }
        for (int i = warp; i < p.k; i += WARPS) {
            if (i == j) continue;
            const Centre c = p.centre(turn, i), own = p.centre(turn, j);
            const auto other = [&](int d) { return c.at(d); };
            const double before = warp_dot(p.width, other, [&](int d) { return own.at(d); });
            const double after = warp_dot(p.width, other, there);
            if (lane == 0) excess += over(after - p.margin) - over(before - p.margin);
        }
        gain = block_sum(gain, p.small), excess = block_sum(excess, p.small);
        if (threadIdx.x == 0) p.board[p.rank * 4 + 2] = gain;
        kr_cluster_sync();
        gain = 0;
        for (int n = threadIdx.x; n < CLUSTER; n += THREADS) gain += p.board[n * 4 + 2];
        gain = block_sum(gain, p.small);
        if (p.penalty / p.k * excess - gain * p.share < -TOLERANCE) {
            for (int n = p.first + threadIdx.x; n < p.first + p.own; n += THREADS) p.cosine[n] = p.gained[n];
            const int made = p.spare(j);
            if (p.rank == 0)
                for (int d = threadIdx.x; d < p.padded; d += THREADS)
                    p.buffer(made, j)[d] = d < p.width ? there(d) : 0;
            __syncthreads();
            if (threadIdx.x == 0) p.place[turn * p.most + j] = made, p.scale[turn * p.most + j] = 1;
        }
        kr_cluster_sync();
    }
}

// Writes the final labels, cosines and centroids.
__device__ __noinline__ void finish(Work& p, int turn, int64_t* labels, float* similarity, float* centroids,
                                    int most) {
    const float unit = p.kind == HALF ? 1.0f : 1.0f / SCALE;
    for_chunks(p, [&](int, int from, int count) {
        for (int row = threadIdx.x / 32; row < count; row += WARPS) {
            const int at = p.first + from + row, own = p.label(turn)[at];
            const Centre c = p.centre(turn, own);
            const double to = warp_dot(
                p.width,
                [&](int d) {
                    const int place = piece_at(row, d / 8, p.padded) + d % 8;
                    const float high = kr_half_to_float(p.hi[place]);
                    return p.kind == FLOAT ? high + kr_half_to_float(p.lo[place]) : high;
                },
                [&](int d) { return c.at(d); });
            if (threadIdx.x % 32 == 0) labels[at] = own, similarity[at] = static_cast<float>(to) * unit;
        }
    });
    for (int n = p.rank * THREADS + threadIdx.x; n < most * p.width; n += CLUSTER * THREADS)
        centroids[n] = n < p.k * p.width ? p.centre(turn, n / p.width).at(n % p.width) : 0.0f;
}

// All problems. which [problems]: their order; spans [2], clusters and starts (of the labels) by problem; seeds
// [problems, most] rows of x; scratch as in cuda_kmeans.py, with clusters padded to a multiple of four; queue: a zero.
KR_CLUSTER_KERNEL __launch_bounds__(THREADS)
    kmeans(const void* x, const float* w, const int64_t* which, const int64_t* spans, const int64_t* clusters,
           const int64_t* starts, const int64_t* seeds, float* centroids, int64_t* labels, float* similarity,
           double* objective, double* history, float* floats, double* doubles, int* ints, int* label_scratch,
           float* frame_scratch, unsigned* queue, int64_t frames, int problems, int most, int width, int kind, int wide,
           int capacity, int tile, int work_bytes, int stage_bytes, int sums_bytes, int most_picks, int rounds,
           double penalty, double margin) {
    KR_SHARED(Work, shared);
    const Work& p = *shared;  // in shared memory: the products need the registers
    float* sums;              // of the block, where shared memory has no room for them
    {
        const int team = static_cast<int>(blockIdx.x) / CLUSTER, rank = static_cast<int>(kr_cluster_rank());
        const int four = (most + 3) / 4 * 4, padded = (width + 63) / 64 * 64;
        const int64_t rows = static_cast<int64_t>(four) * padded, square = static_cast<int64_t>(four) * four;
        floats += team * ((CLUSTER + 3) * rows + CLUSTER * 8 * square);
        sums = floats + (3 + rank) * rows;
        if (threadIdx.x == 0) {
            Work& p = *shared;
            p.rank = rank, p.most = four, p.width = width, p.padded = padded;
            p.low = padded / 4 * rank / CLUSTER * 4, p.high = padded / 4 * (rank + 1) / CLUSTER * 4;
            p.kind = kind, p.wide = wide, p.capacity = capacity, p.tile = tile;
            p.work_floats = work_bytes / 4, p.stage_floats = stage_bytes / 4, p.most_picks = most_picks;
            p.penalty = penalty, p.margin = margin, p.all_frames = frames;

            p.small = reinterpret_cast<double*>(shared) + WORK_BYTES / 8;
            p.panel = reinterpret_cast<uint16_t*>(p.small + 64), p.panel_lo = p.panel + tile * padded;
            p.stage = reinterpret_cast<float*>(p.panel) + work_bytes / 4;
            p.all_hi = reinterpret_cast<uint16_t*>(p.stage + (stage_bytes + sums_bytes) / 4);
            p.all_lo = p.all_hi + capacity * padded;
            p.key = reinterpret_cast<int*>(p.all_lo + (kind == FLOAT ? capacity * padded : 0));
            p.order = p.key + capacity, p.here = p.order + capacity;
            p.all_weight = reinterpret_cast<float*>(p.here + capacity), p.best = p.all_weight + capacity;
            p.picks = p.best + capacity, p.slack = p.picks + 3 * most_picks;
            p.begin = reinterpret_cast<int*>(p.slack + tile);

            // Large ones in device memory: what the block decides with, and its centroids' numbers and rows.
            const int64_t lead = four > MOST_LEAD ? 3 * square + four * (7 + (four + 31) / 32) : 0;
            doubles += team * CLUSTER * (lead + 2 * four + 4);
            p.rows = floats, p.pairs = floats + (CLUSTER + 3) * rows + rank * 8 * square;
            p.lead = lead ? doubles + rank * lead + 3 * four : reinterpret_cast<double*>(p.panel);
            p.scale = lead ? doubles + rank * lead : reinterpret_cast<double*>(p.begin + four + 4);
            p.place = reinterpret_cast<int*>(p.scale + 2 * four);
            p.diagonals = doubles + CLUSTER * lead + rank * 2 * four, p.board = doubles + CLUSTER * (lead + 2 * four);
            p.counts = ints + team * (2 * four + 4), p.mail = p.counts + 2 * four;
        }
    }
    __syncthreads();

    for (;;) {
        if (p.rank == 0 && threadIdx.x == 0) p.mail[0] = static_cast<int>(atomicAdd(queue, 1u));
        kr_cluster_sync();
        if (p.mail[0] >= problems) return;
        const int m = static_cast<int>(which[p.mail[0]]);
        const int64_t start = spans[2 * m], at = starts[m];
        if (threadIdx.x == 0) {
            Work& p = *shared;
            p.frames = static_cast<int>(spans[2 * m + 1] - start), p.k = static_cast<int>(clusters[m]);
            p.first = static_cast<int>(static_cast<int64_t>(p.frames) * p.rank / CLUSTER);
            p.own = static_cast<int>(static_cast<int64_t>(p.frames) * (p.rank + 1) / CLUSTER) - p.first;
            const bool whole = (p.frames + CLUSTER - 1) / CLUSTER <= capacity;
            p.chunk = whole ? capacity : capacity / 2, p.passes = 0;
            p.shares = stage_bytes > 0 && (sums_bytes > 0 || whole);
            p.partial = !p.shares ? sums : sums_bytes > 0 ? p.stage + stage_bytes / 4 : reinterpret_cast<float*>(p.panel);
            p.x = static_cast<const char*>(x) + start * width * (kind == FLOAT ? 4 : 2), p.w = w + start;
            p.labels = label_scratch + at, p.cosine = frame_scratch + at, p.gained = p.cosine + frames;
        }
        __syncthreads();

        double weight = 0;
        for (int n = p.first + threadIdx.x; n < p.first + p.own; n += THREADS) weight += p.w[n];
        weight = block_sum(weight, p.small);
        if (threadIdx.x == 0) p.board[p.rank * 4 + 3] = weight;
        for (int j = threadIdx.x; j < 2 * p.most; j += THREADS) {
            p.place[j] = 0, p.scale[j] = 1;
            if (p.rank == 0) p.counts[j] = 0;
        }
        const int columns = p.high - p.low;
        for (int n = threadIdx.x; n < p.k * columns; n += THREADS) {
            const int j = n / columns, d = p.low + n % columns;
            const int64_t row = static_cast<int64_t>(m) * most + j;
            float value = 0;
            if (d < width) value = seeds[row] < 0 ? KR_INFINITY : value_at(x, kind, seeds[row] * width + d);
            p.buffer(0, j)[d] = value;
        }
        kr_cluster_sync();
        weight = threadIdx.x < CLUSTER ? p.board[threadIdx.x * 4 + 3] : 0;
        weight = block_sum(weight, p.small);
        if (threadIdx.x == 0) shared->share = 1 / fmax(weight, 1e-30);

        int turn = 0;
        for (int round = 0;; ++round) {
            survey(*shared, turn);
            kr_cluster_sync();
            add_up(p);
            multiply_pairs(p, turn);
            if (p.rank == 0)
                for (int j = threadIdx.x; j < p.k; j += THREADS) p.filled(1 - turn)[j] = 0;
            kr_cluster_sync();
            const int verdict =
                decide(*shared, turn, round, rounds, objective + m, history + static_cast<int64_t>(m) * (rounds + 1));
            if (verdict & STOP) break;
            if (verdict & CLOSE) {
                __syncthreads();
                move(p, turn);
                kr_cluster_sync();
            }
            turn = 1 - turn;
            if (verdict & EMPTY) relocate(*shared, turn, p.filled(1 - turn));
        }
        finish(*shared, p.last, labels + at, similarity + at, centroids + static_cast<int64_t>(m) * most * width, most);
    }
}
