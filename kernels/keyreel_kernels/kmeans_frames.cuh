// The record of one problem, and everything that reads its frames: loading, products with centroids, sums by cluster.
//
// Tensor cores multiply in halves. A centroid is hi + lo, and <x, c> - <x, hi> is at most |c - hi|: only tiles in which
// that could change a label are multiplied by lo as well. float32 frames are hi + lo too and always take all products
// but lo * lo, 2^-22 of the whole. J, sums and moves never use halves.
//
// Columns are padded with zeros to a multiple of 64. Rows of halves are stored in pieces of 16 bytes, with the two
// 64-byte sides of each 128 swapped in odd rows: eight lanes, four in one row and four in the next, have no bank
// conflicts.

#define NT 4            // most centroids in shared memory at a time, in groups of eight
#define WORK_BYTES 512  // for the record, at the start of shared memory
#define MOST_LEAD 32    // most clusters for which what `decide` works on fits into shared memory

enum Verdict { STOP = 1, CLOSE = 2, EMPTY = 4 };

// As in clustering.py.
#define TOLERANCE 1e-10
#define STILL 1e-7
// Scale at which centroids, and frames of floats, become halves: far from the smallest half.
#define SCALE 256.0f
// Error of float32 sums in the bound on a label.
#define SUM_ERROR 4e-6f

// A centroid is a row times a number: most moves only choose another row and number, and carry nothing.
struct Centre {
    const float* row;
    float high, low;  // the number, as a sum

    __device__ __forceinline__ float of(float value) const { return fmaf(value, high, value * low); }
    __device__ __forceinline__ float at(int d) const { return of(row[d]); }
};

struct Work {
    // the problem
    const void* x;  // its first frame
    const float* w;
    float *rows, *partial;  // three buffers [k, padded] of S and centroids; this block's sums by cluster
    int *labels, *counts;   // two of each: [frames], [k]
    int64_t all_frames;
    float *cosine, *gained;  // [frames], for relocation
    float* pairs;
    double *diagonals, *lead, *board;
    int* mail;
    int kind, wide, width, padded, frames, first, own, k, most, tile, rank, low, high;
    int chunk, passes;  // frames that are loaded at a time; how often all have been gone through
    int shares;  // whether `partial` lies in shared memory: where the panel was, if no chunk needs it any more
    int last;    // the turn of the result
    double penalty, margin, share;
    double objective;  // of the last round taken
    // shared memory
    double *small, *scale;
    int* place;
    uint16_t *all_hi, *all_lo, *hi, *lo, *panel, *panel_lo;  // frames: of both chunks, and of the one at hand
    float *all_weight, *weight, *best, *slack, *stage, *picks;
    int *here, *key, *order, *begin;
    int capacity, work_floats, stage_floats, most_picks;

    // Double buffers: of this round and the one before.
    __device__ __forceinline__ int* label(int turn) const { return labels + turn * all_frames; }
    __device__ __forceinline__ int* filled(int turn) const { return counts + turn * most; }
    __device__ __forceinline__ float* buffer(int number, int j) const {
        return rows + (static_cast<int64_t>(number) * most + j) * padded;
    }
    __device__ __forceinline__ Centre centre(int turn, int j) const {
        const double by = scale[turn * most + j];
        const float high = static_cast<float>(by);
        return {buffer(place[turn * most + j], j), high, static_cast<float>(by - high)};
    }
    // The buffer that has neither this round's centroid nor that of the one before: S_j goes there.
    __device__ __forceinline__ int spare(int j) const {
        const int one = place[j], other = place[most + j];
        return one == other ? (one + 1) % 3 : 3 - one - other;
    }
    // The sums of a block of the team.
    __device__ __forceinline__ const float* part_of(int block) const {
        return shares ? kr_cluster_shared(partial, block)
                      : partial + static_cast<int64_t>(block - rank) * most * padded;
    }
    // The place of four columns of `partial`: tiles of four rows read it without bank conflicts.
    __device__ __forceinline__ int spot(int j, int quad) const { return j * padded + (quad ^ (j >> 2 & 7)) * 4; }
};

static_assert(sizeof(Work) <= WORK_BYTES, "the record does not fit");

// The place of eight columns, from 8 * piece on, of a row of halves.
__device__ __forceinline__ int piece_at(int row, int piece, int padded) {
    return row * padded + (piece ^ (row & 1) << 2) * 8;
}

__device__ __forceinline__ uint32_t two_halves(float first, float second) {
    return kr_float_to_half(first) | static_cast<uint32_t>(kr_float_to_half(second)) << 16;
}

// Eight floats as halves hi, and the remainders lo.
__device__ __forceinline__ void split(const float v[8], uint4& hi, uint4& lo) {
    uint32_t high[4], low[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
        high[n] = two_halves(v[2 * n], v[2 * n + 1]);
        low[n] = two_halves(v[2 * n] - kr_half_to_float(static_cast<uint16_t>(high[n])),
                            v[2 * n + 1] - kr_half_to_float(static_cast<uint16_t>(high[n] >> 16)));
    }
    hi = {high[0], high[1], high[2], high[3]}, lo = {low[0], low[1], low[2], low[3]};
}

// For each piece of a chunk of this block's frames, calls `body(its places in hi and lo, that in x, columns there)`.
template <class Body>
__device__ __forceinline__ void for_pieces(const Work& p, int chunk, Body body) {
    const int pieces = p.padded / 8, from = chunk * p.chunk, count = min(p.chunk, p.own - from);
    const int64_t base = p.first + from;
    for (int n = threadIdx.x; n < count * pieces; n += THREADS) {
        const int row = n / pieces, piece = n % pieces;
        const int place = chunk % 2 * p.chunk * p.padded + piece_at(row, piece, p.padded);
        body(p.all_hi + place, p.all_lo + place, (base + row) * p.width + piece * 8, min(8, p.width - piece * 8));
    }
}

// Begins to copy a chunk of this block's frames into its half of shared memory. Floats lie in the places of hi and lo
// until `settle`.
__device__ __noinline__ void fetch(const Work& p, int chunk) {
    for_pieces(p, chunk, [&](uint16_t* hi, uint16_t* lo, int64_t at, int there) {
        if (p.wide && there == 8) {
            kr_copy_async_16(hi, static_cast<const char*>(p.x) + at * (p.kind == FLOAT ? 4 : 2));
            if (p.kind == FLOAT) kr_copy_async_16(lo, static_cast<const float*>(p.x) + at + 4);
            return;
        }
        float v[8];
        load_eight(p.x, p.kind, false, at, there, v);
        if (p.kind == FLOAT) {
            *reinterpret_cast<float4*>(hi) = {v[0], v[1], v[2], v[3]};
            *reinterpret_cast<float4*>(lo) = {v[4], v[5], v[6], v[7]};
        } else {
            uint4 none;
            split(v, *reinterpret_cast<uint4*>(hi), none);
        }
    });
    kr_copy_commit();
}

// Waits for a chunk, and makes it the one at hand. ahead: another one was begun after it.
__device__ __noinline__ void settle(Work& p, int chunk, bool ahead) {
    ahead ? kr_copy_wait<1>() : kr_copy_wait<0>();
    // A thread converts what it has copied.
    if (p.kind == FLOAT)
        for_pieces(p, chunk, [&](uint16_t* hi, uint16_t* lo, int64_t, int) {
            const float4 a = *reinterpret_cast<const float4*>(hi), b = *reinterpret_cast<const float4*>(lo);
            const float v[8] = {a.x * SCALE, a.y * SCALE, a.z * SCALE, a.w * SCALE,
                                b.x * SCALE, b.y * SCALE, b.z * SCALE, b.w * SCALE};
            split(v, *reinterpret_cast<uint4*>(hi), *reinterpret_cast<uint4*>(lo));
        });
    const float unit = p.kind == HALF ? 1.0f : 1.0f / SCALE;
    const int from = chunk * p.chunk;
    for (int n = threadIdx.x; n < min(p.chunk, p.own - from); n += THREADS)
        p.all_weight[chunk % 2 * p.chunk + n] = p.w[p.first + from + n] * unit;
}

// Calls `body(number, from, count)` with the block's frames at hand, chunk by chunk; at least once. Two chunks are in
// shared memory: the next one is copied meanwhile, and as every pass begins where the last one ended, two need no copy.
template <class Body>
__device__ void for_chunks(Work& p, Body body) {
    const int chunks = max(1, (p.own + p.chunk - 1) / p.chunk), passes = p.passes, step = passes % 2 ? -1 : 1;
    const int held = passes ? 2 : 0;
    int chunk = passes % 2 ? chunks - 1 : 0;
    if (!held) fetch(p, chunk);
    for (int n = 0; n < chunks; ++n, chunk += step) {
        const bool ahead = n + 1 < chunks && n + 1 >= held;
        if (ahead) fetch(p, chunk + step);
        if (n >= held) settle(p, chunk, ahead);
        if (threadIdx.x == 0) {
            const int side = chunk % 2 * p.chunk;
            p.hi = p.all_hi + side * p.padded, p.lo = p.all_lo + side * p.padded, p.weight = p.all_weight + side;
        }
        __syncthreads();
        body(n, chunk * p.chunk, min(p.chunk, p.own - chunk * p.chunk));
        __syncthreads();
    }
    if (threadIdx.x == 0) p.passes = passes + 1;
    __syncthreads();
}

// Loads centroids from `from` on into shared memory, with the length of what their halves lack. A warp takes two rows at
// a time, to have more loads in flight.
__device__ __noinline__ void load_panel(const Work& p, int turn, int from) {
    __syncthreads();
    for (int row = threadIdx.x / 32; row < p.tile; row += 2 * WARPS) {
        float lacking[2] = {0, 0};
        for (int piece = threadIdx.x % 32; piece < p.padded / 8; piece += 32) {
            float v[2][8] = {};
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                const int j = from + row + side * WARPS;
                if (row + side * WARPS >= p.tile || j >= p.k) continue;
                const Centre c = p.centre(turn, j);
                load_eight(c.row, FLOAT, true, piece * 8, 8, v[side]);
                for (int e = 0; e < 8; ++e) v[side][e] = c.of(v[side][e]) * SCALE;
            }
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                if (row + side * WARPS >= p.tile) break;
                uint4 hi, lo;
                split(v[side], hi, lo);
                for (int e = 0; e < 8; ++e) {
                    const float lack = v[side][e] - kr_half_to_float(kr_float_to_half(v[side][e]));
                    lacking[side] = fmaf(lack, lack, lacking[side]);
                }
                *reinterpret_cast<uint4*>(p.panel + piece_at(row + side * WARPS, piece, p.padded)) = hi;
                *reinterpret_cast<uint4*>(p.panel_lo + piece_at(row + side * WARPS, piece, p.padded)) = lo;
            }
        }
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            for (int step = 16; step; step /= 2) lacking[side] += __shfl_xor_sync(KR_FULL_WARP, lacking[side], step);
            if (threadIdx.x % 32 == 0 && row + side * WARPS < p.tile)
                p.slack[row + side * WARPS] = sqrtf(lacking[side]) / SCALE;
        }
    }
    __syncthreads();
}

// sum += 16 rows of `a` (a lane has one and the 8th after it) times the panel `b`. The order of columns within a step is
// free as long as both sides agree: a lane takes eight adjacent ones. Whole warp.
__device__ __forceinline__ void multiply(const uint16_t* a, int top, int bottom, const uint16_t* b, int padded,
                                         int eights, float sum[NT][4]) {
    const int group = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
    for (int piece = pair; piece < padded / 8; piece += 4) {
        const uint4 upper = *reinterpret_cast<const uint4*>(a + piece_at(top, piece, padded));
        const uint4 lower = *reinterpret_cast<const uint4*>(a + piece_at(bottom, piece, padded));
        const uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y};
        const uint32_t second[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            if (n >= eights) break;
            const uint4 right = *reinterpret_cast<const uint4*>(b + piece_at(n * 8 + group, piece, padded));
            const uint32_t left_half[2] = {right.x, right.y}, right_half[2] = {right.z, right.w};
            kr_mma_16x8x16(sum[n], first, left_half);
            kr_mma_16x8x16(sum[n], second, right_half);
        }
    }
}

struct Pick {
    float best, second;
    int column;
};

// The best column of one row, held by four lanes; `side` 0 for the upper row of a lane, 1 for the lower.
__device__ __forceinline__ Pick pick(const float sum[NT][4], int side, int from, int wanted, const int* filled) {
    Pick out{-KR_INFINITY, -KR_INFINITY, 0};
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int column = n * 8 + threadIdx.x % 4 * 2 + e;
            if (column >= wanted || (filled && !filled[from + column])) continue;
            const float value = sum[n][side * 2 + e];
            if (value > out.best)
                out.second = out.best, out.best = value, out.column = column;
            else
                out.second = fmaxf(out.second, value);
        }
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
        const Pick other{__shfl_xor_sync(KR_FULL_WARP, out.best, step), __shfl_xor_sync(KR_FULL_WARP, out.second, step),
                         __shfl_xor_sync(KR_FULL_WARP, out.column, step)};
        const bool taken = other.best > out.best || (other.best == out.best && other.column < out.column);
        const float second = fmaxf(taken ? out.best : other.best, taken ? other.second : out.second);
        if (taken) out = other;
        out.second = second;
    }
    return out;
}

// The nearest centroid of each frame at hand, among this panel (from the from-th on) and earlier ones. exact: `best`
// gets the full cosine, as several panels need. filled: clusters to consider, null for all. Where there are more warps
// than tiles of 16 frames, a tile's centroids are shared by two or four of them.
__device__ __noinline__ void assign_rows(const Work& p, int count, int from, bool exact, const int* filled) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, wanted = min(p.k - from, p.tile);
    const int eights = (wanted + 7) / 8, tiles = (count + 15) / 16;
    const float unit = (p.kind == HALF ? 1.0f : 1.0f / SCALE) / SCALE;
    float lacking = lane < p.tile ? p.slack[lane] : 0.0f;
    for (int step = 16; step; step /= 2) lacking = fmaxf(lacking, __shfl_xor_sync(KR_FULL_WARP, lacking, step));
    const float bound = (2 * lacking + SUM_ERROR) / unit;
    int parts = 1;
    while (2 * parts * tiles <= WARPS && 2 * parts <= eights && 2 * parts * count <= p.most_picks) parts *= 2;
    // Of one part they lie where nothing else is needed yet.
    float* value = parts > 1 ? p.picks : reinterpret_cast<float*>(p.key);
    float* second = parts > 1 ? p.picks + p.most_picks : p.best;
    int* column = parts > 1 ? reinterpret_cast<int*>(p.picks + 2 * p.most_picks) : p.order;
    unsigned* unsure = reinterpret_cast<unsigned*>(p.small);  // a bit for each frame
    bool fine = exact || p.kind == FLOAT;
    for (bool again = false;; fine = again = true) {
        for (int n = warp; n < tiles * parts; n += WARPS) {
            const int tile = n / parts, part = n % parts;
            const int left = eights * part / parts, right = eights * (part + 1) / parts;
            if (again && !(unsure[tile / 2] >> tile % 2 * 16 & 0xffff)) continue;
            const int upper = min(tile * 16 + lane / 4, count - 1), lower = min(tile * 16 + lane / 4 + 8, count - 1);
            const int at = left * 8 * p.padded;
            float sum[NT][4] = {};
            if (fine) multiply(p.hi, upper, lower, p.panel_lo + at, p.padded, right - left, sum);
            if (p.kind == FLOAT) multiply(p.lo, upper, lower, p.panel + at, p.padded, right - left, sum);
            multiply(p.hi, upper, lower, p.panel + at, p.padded, right - left, sum);
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                const Pick found = pick(sum, side, from + left * 8, min(wanted, right * 8) - left * 8, filled);
                const int row = tile * 16 + lane / 4 + side * 8, place = part * count + row;
                if (lane % 4 != side || row >= count) continue;
                value[place] = found.best, column[place] = left * 8 + found.column;
                if (!fine) second[place] = found.second;
            }
        }
        __syncthreads();
        bool close = false;
        for (int base = warp * 32; base < count; base += THREADS) {
            const int row = base + lane;
            Pick found{-KR_INFINITY, -KR_INFINITY, 0};
            for (int part = 0; part < parts && row < count; ++part) {
                const int place = part * count + row;
                const float one = value[place], other = fine ? -KR_INFINITY : second[place];
                if (one > found.best)
                    found = {one, fmaxf(found.best, other), column[place]};
                else
                    found.second = fmaxf(found.second, one);
            }
            const bool near = row < count && !fine && !(found.best - found.second > bound);
            const unsigned bits = __ballot_sync(KR_FULL_WARP, near);
            if (lane == 0) unsure[base / 32] = bits;
            close |= near;
            if (row < count && (from == 0 || found.best * unit > p.best[row]))
                p.best[row] = found.best * unit, p.here[row] = from + found.column;
        }
        if (!__syncthreads_or(close)) return;
    }
}

__device__ void assign_chunk(const Work& p, int turn, int count, bool exact, const int* filled) {
    for (int from = 0; from < p.k; from += p.tile) {
        if (p.k > p.tile) load_panel(p, turn, from);
        assign_rows(p, count, from, exact || p.k > p.tile, filled);
    }
}

// Sums the weighted frames in shared memory by cluster, sorted by label, so that a thread sums its four columns of a
// cluster in registers. again: adds to the sums of earlier chunks.
__device__ __noinline__ void sum_chunk(const Work& p, int count, bool again, int* filled) {
    const int fours = (count + 3) / 4;
    for (int n = threadIdx.x; n < fours * 4; n += THREADS) p.key[n] = n < count ? p.here[n] * count + n : 0x7fffffff;
    __syncthreads();
    // A frame's place, or a cluster's begin, is the number of smaller keys.
    for (int n = threadIdx.x; n < count + p.k + 1; n += THREADS) {
        const int own = n < count ? p.key[n] : (n - count) * count;
        int smaller = 0;
        for (int m = 0; m < fours; ++m) {
            const int4 four = reinterpret_cast<const int4*>(p.key)[m];
            smaller += (four.x < own) + (four.y < own) + (four.z < own) + (four.w < own);
        }
        if (n < count)
            p.order[smaller] = n;
        else
            p.begin[n - count] = smaller;
    }
    __syncthreads();
    for (int j = threadIdx.x; j < p.k; j += THREADS)
        if (p.begin[j + 1] > p.begin[j]) atomicAdd(filled + j, p.begin[j + 1] - p.begin[j]);
    const int columns = p.padded / 4, groups = max(1, THREADS / columns), mine = threadIdx.x / columns;
    for (int column = groups > 1 ? threadIdx.x % columns : threadIdx.x; column < columns;
         column += max(THREADS, columns)) {
        if (groups > 1 && mine >= groups) break;
        for (int j = 0; j < p.k; ++j) {
            const int start = p.begin[j], stop = p.begin[j + 1];
            if (groups > 1 && min(start * groups / max(count, 1), groups - 1) != mine) continue;
            if (again && start == stop) continue;
            float4 sum{0, 0, 0, 0};
#pragma unroll 4
            for (int n = start; n < stop; ++n) {
                const int row = p.order[n], place = piece_at(row, column / 2, p.padded) + column % 2 * 4;
                const float weight = p.weight[row];
                const uint2 bits = *reinterpret_cast<const uint2*>(p.hi + place);
                float v[4] = {kr_half_to_float(static_cast<uint16_t>(bits.x)),
                              kr_half_to_float(static_cast<uint16_t>(bits.x >> 16)),
                              kr_half_to_float(static_cast<uint16_t>(bits.y)),
                              kr_half_to_float(static_cast<uint16_t>(bits.y >> 16))};
                if (p.kind == FLOAT) {
                    const uint2 low = *reinterpret_cast<const uint2*>(p.lo + place);
                    v[0] += kr_half_to_float(static_cast<uint16_t>(low.x)),
                        v[1] += kr_half_to_float(static_cast<uint16_t>(low.x >> 16));
                    v[2] += kr_half_to_float(static_cast<uint16_t>(low.y)),
                        v[3] += kr_half_to_float(static_cast<uint16_t>(low.y >> 16));
                }
                sum.x = fmaf(weight, v[0], sum.x), sum.y = fmaf(weight, v[1], sum.y);
                sum.z = fmaf(weight, v[2], sum.z), sum.w = fmaf(weight, v[3], sum.w);
            }
            float4* out = reinterpret_cast<float4*>(p.partial + p.spot(j, column));
            if (again) sum.x += out->x, sum.y += out->y, sum.z += out->z, sum.w += out->w;
            *out = sum;
        }
    }
}
