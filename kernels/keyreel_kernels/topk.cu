// Exact top-k over rows in device memory. HALF says what the rows are, 4 * TILES how many queries fit into a pass.
//
// Each block streams a span of rows once, with 16-byte loads straight into registers, and keeps for each query a list of
// candidates in shared memory: what passes the k-th best so far goes in, and a full list is sorted and cut to k. A second
// kernel merges the lists of the blocks. Candidates are 64-bit keys, score above, row below: the order is total, ties go
// to the lowest row, and the result does not depend on who came first.

#if HALF
typedef uint16_t Element;
#else
typedef float Element;
#endif

constexpr int PER = 16 / int(sizeof(Element));
constexpr int UNROLL = 4;
constexpr int BLOCK = 4 * PER;  // columns of a row that a team of four lanes loads at once
constexpr int QUERIES = 4 * TILES;
constexpr int MOST_QUERIES = 64;
constexpr uint64_t NO_ROW = 0xffffffffu;

// NaN counts as the least; both zeros are one number.
__device__ __forceinline__ uint64_t key_of(float score, int64_t row) {
    score = score == score ? score + 0.0f : -KR_INFINITY;
    const unsigned bits = __float_as_uint(score);
    const unsigned high = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return static_cast<uint64_t>(high) << 32 | (NO_ROW - static_cast<uint64_t>(row));
}

// The candidates of each query, in shared memory.
struct Lists {
    uint64_t* floor;   // [MOST_QUERIES] the k-th best so far; what is not above it is out
    unsigned* held;    // [MOST_QUERIES] how many were offered a place
    unsigned* full;    // [3] a list was full in turn n % 3
    uint64_t* keys;    // [queries, capacity]
    int queries, capacity, k;
};

__device__ __forceinline__ Lists lists_in(void* shared, int queries, int capacity, int k) {
    Lists lists;
    lists.floor = static_cast<uint64_t*>(shared);
    lists.held = reinterpret_cast<unsigned*>(lists.floor + MOST_QUERIES);
    lists.full = lists.held + MOST_QUERIES;
    lists.keys = reinterpret_cast<uint64_t*>(lists.full + 4);
    lists.queries = queries, lists.capacity = capacity, lists.k = k;
    for (int n = threadIdx.x; n < MOST_QUERIES; n += blockDim.x) lists.floor[n] = 0, lists.held[n] = 0;
    if (threadIdx.x < 3) lists.full[threadIdx.x] = 0;
    return lists;
}

// Sorts all lists, best first (bitonic, Batcher 1968; capacity is a power of two), and cuts them to k. Whole block.
__device__ __forceinline__ void settle(const Lists& lists) {
    const int total = lists.queries * lists.capacity, inside = lists.capacity - 1;
    for (int n = threadIdx.x; n < total; n += blockDim.x)
        if (static_cast<unsigned>(n & inside) >= lists.held[n / lists.capacity]) lists.keys[n] = 0;
    __syncthreads();
    for (int size = 2; size <= lists.capacity; size *= 2)
        for (int stride = size / 2; stride; stride /= 2) {
            for (int n = threadIdx.x; n < total / 2; n += blockDim.x) {
                const int low = 2 * n - (n & (stride - 1));
                const uint64_t a = lists.keys[low], b = lists.keys[low + stride];
                const bool down = (low & inside & size) == 0;
                if (down ? a < b : b < a) lists.keys[low] = b, lists.keys[low + stride] = a;
            }
            __syncthreads();
        }
    if (threadIdx.x < lists.queries) {
        lists.floor[threadIdx.x] = lists.keys[threadIdx.x * lists.capacity + lists.k - 1];
        lists.held[threadIdx.x] = min(lists.held[threadIdx.x], static_cast<unsigned>(lists.k));
    }
    __syncthreads();
}

// Whether the key still waits for a place.
__device__ __forceinline__ bool waits(const Lists& lists, int query, uint64_t key, unsigned turn) {
    if (key <= lists.floor[query]) return false;
    const unsigned place = atomicAdd(lists.held + query, 1u);
    if (place < static_cast<unsigned>(lists.capacity)) {
        lists.keys[query * lists.capacity + place] = key;
        return false;
    }
    atomicExch(lists.full + turn % 3, 1u);
    return true;
}

// Ends a turn of offers: true where a list was full, which has been cut; what still waits is to be offered again. Three
// flags in turn, since one is cleared between the barriers that part its last reader from its next writer.
__device__ __forceinline__ bool was_full(const Lists& lists, unsigned& turn) {
    __syncthreads();
    const bool again = lists.full[turn % 3] != 0;
    if (threadIdx.x == 0) lists.full[(turn + 2) % 3] = 0;
    if (again) settle(lists);
    ++turn;
    return again;
}

#if HALF

constexpr float LOW_PART = 2048;  // 2^11: a half holds 11 bits

// A query becomes two rows of halves, q = (high + low / 2048) * scale, which is exact to 22 bits; the scale is a power of
// two that keeps it in range. Whole warp.
__device__ __forceinline__ void place_query(const float* query, int columns, int padded, uint16_t* placed, float* scale) {
    const int lane = threadIdx.x % 32, pitch = padded + BLOCK;
    float most = 0;
    for (int n = lane; n < columns; n += 32) most = fmaxf(most, fabsf(query[n]));
#pragma unroll
    for (int bits = 16; bits; bits /= 2) most = fmaxf(most, __shfl_xor_sync(KR_FULL_WARP, most, bits));
    const unsigned exponent = __float_as_uint(most) & 0x7f800000u;
    const float unit = exponent ? __uint_as_float(exponent) : 1.0f;
    for (int n = lane; n < padded; n += 32) {
        const float value = n < columns ? query[n] / unit : 0.0f;
        const uint16_t high = kr_float_to_half(value);
        placed[n] = high;
        placed[pitch + n] = kr_float_to_half((value - kr_half_to_float(high)) * LOW_PART);
    }
    if (lane == 0) *scale = unit;
}

// scores of query 4 * tile + lane % 4 with rows lane / 4 and lane / 4 + 8 of the warp's sixteen. The order of the columns
// within a product is free: a lane's 16 bytes serve as its share of two matrix steps, rows and queries alike.
__device__ __forceinline__ void score_rows(const uint4* one, const uint4* other, int chunks, int padded,
                                           const uint16_t* placed, const float* scales, float (&scores)[TILES][2]) {
    const int lane = threadIdx.x % 32, team = lane % 4, pitch = padded + BLOCK;
    const uint16_t* own = placed + lane / 4 * pitch + team * PER;
    float sums[TILES][4] = {};
    for (int block = 0; block < padded / BLOCK; block += UNROLL) {
        uint4 a[UNROLL], b[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const int at = (block + u) * 4 + team;
            a[u] = at < chunks ? one[at] : make_uint4(0, 0, 0, 0);
            b[u] = at < chunks ? other[at] : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const uint32_t left[2][4] = {{a[u].x, b[u].x, a[u].y, b[u].y}, {a[u].z, b[u].z, a[u].w, b[u].w}};
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                const uint4 q = *reinterpret_cast<const uint4*>(own + tile * 8 * pitch + (block + u) * BLOCK);
                const uint32_t right[2][2] = {{q.x, q.y}, {q.z, q.w}};
                kr_mma_16x8x16(sums[tile], left[0], right[0]);
                kr_mma_16x8x16(sums[tile], left[1], right[1]);
            }
        }
    }
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        const float scale = scales[tile * 4 + team];
        scores[tile][0] = (sums[tile][0] + sums[tile][1] * (1 / LOW_PART)) * scale;
        scores[tile][1] = (sums[tile][2] + sums[tile][3] * (1 / LOW_PART)) * scale;
    }
}

#else

__device__ __forceinline__ void place_query(const float* query, int columns, int padded, float* placed, float*) {
    for (int n = threadIdx.x % 32; n < padded; n += 32) placed[n] = n < columns ? query[n] : 0.0f;
}

__device__ __forceinline__ float dot_4(const uint4& a, const float4& b) {
    float sum = __uint_as_float(a.x) * b.x;
    sum += __uint_as_float(a.y) * b.y;
    sum += __uint_as_float(a.z) * b.z;
    sum += __uint_as_float(a.w) * b.w;
    return sum;
}

// As with halves. A team of four lanes shares the columns of a row; its sums meet so that lane n is left with query n.
__device__ __forceinline__ void score_rows(const uint4* one, const uint4* other, int chunks, int padded,
                                           const float* placed, const float*, float (&scores)[TILES][2]) {
    const int team = threadIdx.x % 4;
    float sums[2][QUERIES] = {};
    for (int block = 0; block < padded / BLOCK; block += UNROLL) {
        uint4 a[UNROLL], b[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const int at = (block + u) * 4 + team;
            a[u] = at < chunks ? one[at] : make_uint4(0, 0, 0, 0);
            b[u] = at < chunks ? other[at] : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u)
#pragma unroll
            for (int query = 0; query < QUERIES; ++query) {
                const float4 q = *reinterpret_cast<const float4*>(placed + query * padded + (block + u) * BLOCK + team * PER);
                sums[0][query] += dot_4(a[u], q);
                sums[1][query] += dot_4(b[u], q);
            }
    }
    const bool upper = team & 2, odd = team & 1;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const float* s = sums[n] + tile * 4;
            const float even_sum = (upper ? s[2] : s[0]) + __shfl_xor_sync(KR_FULL_WARP, upper ? s[0] : s[2], 2);
            const float odd_sum = (upper ? s[3] : s[1]) + __shfl_xor_sync(KR_FULL_WARP, upper ? s[1] : s[3], 2);
            scores[tile][n] = (odd ? odd_sum : even_sum) + __shfl_xor_sync(KR_FULL_WARP, odd ? even_sum : odd_sum, 1);
        }
}

#endif

// lists [blocks, number, k]: the best keys of each block's `span` rows, best first, zeros where there are fewer.
extern "C" __global__ void __launch_bounds__(256)
    top_k_stream(const Element* rows, int64_t count, int64_t span, const float* queries, int number, int columns, int k,
                 int capacity, uint64_t* out) {
    KR_SHARED(unsigned char, shared);
    Lists lists = lists_in(shared, number, capacity, k);
    float* scales = reinterpret_cast<float*>(lists.keys + number * capacity);
    Element* placed = reinterpret_cast<Element*>(scales + MOST_QUERIES);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int padded = (columns + UNROLL * BLOCK - 1) / (UNROLL * BLOCK) * (UNROLL * BLOCK);
    const int size = HALF ? 2 * (padded + BLOCK) : padded;  // of a placed query
    for (int n = warp; n < QUERIES; n += warps)
        place_query(queries + static_cast<int64_t>(n) * columns, n < number ? columns : 0, padded, placed + n * size,
                    scales + n);
    __syncthreads();

    const int64_t start = blockIdx.x * span, stop = min(start + span, count);
    unsigned turn = 0;
    for (int64_t base = start; base < stop; base += 16 * warps) {
        const int64_t row = base + warp * 16 + lane / 4;
        float scores[TILES][2];
        score_rows(reinterpret_cast<const uint4*>(rows + min(row, stop - 1) * columns),
                   reinterpret_cast<const uint4*>(rows + min(row + 8, stop - 1) * columns), columns / PER, padded, placed,
                   scales, scores);
        unsigned open = 0;  // one bit for each score that waits for a place
#pragma unroll
        for (int n = 0; n < 2 * TILES; ++n)
            if (row + n % 2 * 8 < stop && n / 2 * 4 + lane % 4 < number) open |= 1u << n;
        do {
#pragma unroll
            for (int n = 0; n < 2 * TILES; ++n)
                if ((open >> n & 1) &&
                    !waits(lists, n / 2 * 4 + lane % 4, key_of(scores[n / 2][n % 2], row + n % 2 * 8), turn))
                    open &= ~(1u << n);
        } while (was_full(lists, turn));
    }
    settle(lists);
    for (int n = threadIdx.x; n < number * k; n += blockDim.x)
        out[static_cast<int64_t>(blockIdx.x) * number * k + n] = lists.keys[n / k * capacity + n % k];
}

// scores and rows [number, k] from lists [parts, number, k]; a block for each query.
extern "C" __global__ void __launch_bounds__(256) top_k_merge(const uint64_t* candidates, int parts, int number, int k,
                                                              int capacity, float* scores, int64_t* rows) {
    KR_SHARED(unsigned char, shared);
    Lists lists = lists_in(shared, 1, capacity, k);
    __syncthreads();
    const int64_t query = blockIdx.x, total = static_cast<int64_t>(parts) * k;
    unsigned turn = 0;
    for (int64_t base = 0; base < total; base += blockDim.x) {
        const int64_t at = base + threadIdx.x;
        const uint64_t key = at < total ? candidates[(at / k * number + query) * k + at % k] : 0;
        bool open = true;
        do open = open && waits(lists, 0, key, turn);
        while (was_full(lists, turn));
    }
    settle(lists);
    for (int n = threadIdx.x; n < k; n += blockDim.x) {
        const uint64_t key = lists.keys[n];
        const unsigned high = static_cast<unsigned>(key >> 32);
        scores[query * k + n] = __uint_as_float(high & 0x80000000u ? high ^ 0x80000000u : ~high);
        rows[query * k + n] = static_cast<int64_t>(NO_ROW - (key & NO_ROW));
    }
}
