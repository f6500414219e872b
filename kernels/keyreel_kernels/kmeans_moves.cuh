// Moving centroids: S, inner products of centroids and sums, J and the moves from them.

#define LANES 16  // that read one row
#define GROUPS (THREADS / LANES)
#define AT_ONCE 4  // loads of inner products in flight, for each block of the team

// The sum over LANES lanes, the same in each of them. Whole warp.
__device__ __forceinline__ double lanes_sum(double value) {
    for (int step = LANES / 2; step; step /= 2) value += __shfl_xor_sync(KR_FULL_WARP, value, step);
    return value;
}

// S, the blocks' sums divided by the total weight, for this block's columns: where all blocks read it, and in place of
// the block's own sums. And the block's part of <S_j, S_j>, in float64 as all terms of J and of a move's gain.
__device__ __noinline__ void add_up(const Work& p) {
    for (int base = 0; base < p.k; base += GROUPS) {
        const int j = base + static_cast<int>(threadIdx.x) / LANES;
        double square = 0;
        for (int quad = p.low / 4 + threadIdx.x % LANES; j < p.k && quad < p.high / 4; quad += LANES) {
            const int place = p.spot(j, quad);
            float4 sum{0, 0, 0, 0};
#pragma unroll
            for (int block = 0; block < CLUSTER; ++block) {
                const float4 part = *reinterpret_cast<const float4*>(p.part_of(block) + place);
                sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
            }
            sum = {static_cast<float>(sum.x * p.share), static_cast<float>(sum.y * p.share),
                   static_cast<float>(sum.z * p.share), static_cast<float>(sum.w * p.share)};
            square += static_cast<double>(sum.x) * sum.x + static_cast<double>(sum.y) * sum.y +
                      static_cast<double>(sum.z) * sum.z + static_cast<double>(sum.w) * sum.w;
            *reinterpret_cast<float4*>(p.partial + place) = sum;
            reinterpret_cast<float4*>(p.buffer(p.spare(j), j))[quad] = sum;
        }
        square = lanes_sum(square);
        if (threadIdx.x % LANES == 0 && j < p.k) p.diagonals[p.most + j] = square;
    }
}

// The block's part of the inner products of all pairs of centroids and sums: <c_j, S_j> in float64, and with a penalty
// the upper 4 x 4 tiles of a matrix whose rows are the centroids and, from the `half`-th on, S. Short runs are summed in
// float32, the runs in float64; with a penalty that may nearly cancel S, all in float64, slow as that is.
__device__ __noinline__ void multiply_pairs(const Work& p, int turn) {
    const int fours = (p.k + 3) / 4, half = fours * 4, tiles = p.penalty > 0 ? fours * (2 * fours + 1) : 0;
    float* stage = p.shares ? p.stage : reinterpret_cast<float*>(p.panel);
    const int floats = p.shares ? p.stage_floats : p.work_floats;
    const bool all_digits = p.penalty >= 1;
    int step = 4;  // columns of c that are staged at a time
    while (step < p.high - p.low && 2 * step * half <= floats) step *= 2;
    const int swap = min(7, step / 4 - 1);
    // Two lanes per tile, for two of its rows each.
    for (int first = 0; first == 0 || first < tiles; first += THREADS / 2) {
        const int tile = first + static_cast<int>(threadIdx.x) / 2;
        int right = static_cast<int>((sqrtf(8.0f * static_cast<float>(tile) + 1) - 1) / 2);
        while (right * (right + 1) / 2 > tile) --right;
        while ((right + 1) * (right + 2) / 2 <= tile) ++right;
        const int top = (tile - right * (right + 1) / 2) * 4 + static_cast<int>(threadIdx.x) % 2 * 2;
        double total[2][4] = {};
        for (int from = p.low; from < p.high; from += step) {
            const int quads = min(step, p.high - from) / 4;
            const auto piece = [&](int row, int quad) {
                return *reinterpret_cast<const float4*>(
                    row < half ? stage + row * step + (quad ^ (row >> 2 & swap)) * 4
                               : p.partial + p.spot(row - half, from / 4 + quad));
            };
            if (first == 0 || step < p.high - p.low) {
                __syncthreads();
                for (int base = 0; base < p.k; base += GROUPS) {
                    const int j = base + static_cast<int>(threadIdx.x) / LANES;
                    const Centre c = p.centre(turn, min(j, p.k - 1));
                    double mixed = 0;
                    for (int quad = threadIdx.x % LANES; j < p.k && quad < quads; quad += LANES) {
                        float4 v = reinterpret_cast<const float4*>(c.row + from)[quad];
                        v = {c.of(v.x), c.of(v.y), c.of(v.z), c.of(v.w)};
                        *reinterpret_cast<float4*>(stage + j * step + (quad ^ (j >> 2 & swap)) * 4) = v;
                        const float4 sum = piece(half + j, quad);
                        mixed += static_cast<double>(v.x) * sum.x + static_cast<double>(v.y) * sum.y +
                                 static_cast<double>(v.z) * sum.z + static_cast<double>(v.w) * sum.w;
                    }
                    mixed = lanes_sum(mixed);
                    if (first == 0 && threadIdx.x % LANES == 0 && j < p.k)
                        p.diagonals[j] = from == p.low ? mixed : p.diagonals[j] + mixed;
                }
                __syncthreads();
            }
            for (int run = 0; run < quads && tile < tiles; run += 4) {
                float sum[2][4] = {};
                for (int quad = run; quad < min(run + 4, quads); ++quad) {
                    const float4 a[2] = {piece(top, quad), piece(top + 1, quad)};
#pragma unroll
                    for (int m = 0; m < 4; ++m) {
                        const float4 b = piece(right * 4 + m, quad);
#pragma unroll
                        for (int n = 0; n < 2; ++n)
                            if (all_digits)
                                total[n][m] += static_cast<double>(a[n].x) * b.x + static_cast<double>(a[n].y) * b.y +
                                               static_cast<double>(a[n].z) * b.z + static_cast<double>(a[n].w) * b.w;
                            else
                                sum[n][m] = fmaf(a[n].x, b.x, fmaf(a[n].y, b.y,
                                                 fmaf(a[n].z, b.z, fmaf(a[n].w, b.w, sum[n][m]))));
                    }
                }
#pragma unroll
                for (int n = 0; n < 8; ++n) total[n / 4][n % 4] += sum[n / 4][n % 4];
            }
        }
#pragma unroll
        for (int n = 0; n < 8; ++n) {
            const int i = top + n / 4, j = right * 4 + n % 4;
            const int row = i < half ? i : i - half + p.k, column = j < half ? j : j - half + p.k;
            const bool wanted = (i < half ? i < p.k : row < 2 * p.k) && (j < half ? j < p.k : column < 2 * p.k);
            if (tile < tiles && wanted && row <= column) {
                float* place = p.pairs + static_cast<int64_t>(row) * 2 * p.k + column;
                const float high = static_cast<float>(total[n / 4][n % 4]);
                *place = high;
                if (all_digits) place[4 * p.most * p.most] = static_cast<float>(total[n / 4][n % 4] - high);
            }
        }
    }
}

// Products of all pairs: cc[i, j] = <c_i, c_j>, cs[i, j] = <c_i, S_j>, ss[i, j] = <S_i, S_j>; and what is made of them:
// the multiples of S_j and c_j that make the new c_j, and bits for the centroids close to it.
struct Lead {
    double *cc, *cs, *ss, *with_c, *with_s, *along, *stay;
    unsigned* close;

    __device__ __forceinline__ explicit Lead(const Work& p) {
        cc = p.lead, cs = cc + p.k * p.k, ss = cs + p.k * p.k;
        with_c = ss + p.k * p.k, with_s = with_c + p.k, along = with_s + p.k, stay = along + p.k;
        close = reinterpret_cast<unsigned*>(stay + p.k);
    }
};

__device__ double over(double closeness) { return closeness > 0 ? closeness : 0; }

// Adds up two numbers, mostly zero, over the block or over a warp that is alone: the same in all threads. A barrier.
__device__ void sparse_sums(double& one, double& two, bool alone, double* small) {
    const bool any = one != 0 || two != 0;
    if (alone) __syncwarp();
    if (!(alone ? __ballot_sync(KR_FULL_WARP, any) : __syncthreads_or(any))) return;
    for (int step = 16; step; step /= 2)
        one += __shfl_xor_sync(KR_FULL_WARP, one, step), two += __shfl_xor_sync(KR_FULL_WARP, two, step);
    if (alone) return;
    if (threadIdx.x % 32 == 0) small[threadIdx.x / 32] = one, small[32 + threadIdx.x / 32] = two;
    __syncthreads();
    one = two = 0;
    for (int n = 0; n < WARPS; ++n) one += small[n], two += small[32 + n];
    __syncthreads();
}

// clustering.move from inner products, by the block; by its first warp alone where a lane has one centroid: barriers
// would cost more than the others could do. Returns whether any move takes more than S_j.
__device__ __noinline__ bool moves_in_turn(const Work& p, bool alone) {
    const Lead m(p);
    const int threads = alone ? 32 : THREADS, words = (p.k + 31) / 32, me = threadIdx.x;
    const double mu = p.penalty / p.k;
    const auto meet = [&] {
        if (alone)
            __syncwarp();
        else
            __syncthreads();
    };
    bool any = false;
    for (int j = 0; j < p.k; ++j) {
        double *cc = m.cc + j * p.k, *cs = m.cs + j * p.k, *ss = m.ss + j * p.k;
        unsigned* close = m.close + j * words;
        const double fit = cs[j];
        for (int i = me; i < words * 32; i += threads) {
            const unsigned bits = __ballot_sync(KR_FULL_WARP, i < p.k && i != j && cc[min(i, p.k - 1)] > p.margin);
            if (i % 32 == 0) close[i / 32] = bits;
        }
        meet();
        // Products of the goal S_j - mu sum of close c with each c_i and S_i.
        double excess = 0, square = 0;
        for (int i = me; i < p.k; i += threads) {
            double c = m.cs[i * p.k + j], s = ss[i];
            for (int word = 0; word < words; ++word)
                for (unsigned bits = close[word]; bits; bits &= bits - 1) {
                    const int l = word * 32 + __ffs(static_cast<int>(bits)) - 1;
                    c -= mu * m.cc[l * p.k + i], s -= mu * m.cs[l * p.k + i];
                }
            m.with_c[i] = c, m.with_s[i] = s;
            if (close[i / 32] >> i % 32 & 1) excess += cc[i] - p.margin, square += c;
        }
        sparse_sums(excess, square, alone, p.small);
        // The hinges lie above their linear parts, so that no move gains more than the linear minimiser promises.
        const double goal = fmax(m.with_s[j] - mu * square, 1e-30), shrunk = rsqrt(goal), length = goal * shrunk;
        bool moving = ss[j] > 0 && length >= 1e-12 && length - m.with_c[j] > TOLERANCE;
        const double cost = mu * excess - fit;
        double sums_share = 0, own_share = 1;
        for (double part = 1; moving && part >= 0.25; part /= 2) {
            const double stay = 1 - part, along = part * shrunk;
            const double norm = stay * stay * cc[j] + 2 * stay * along * m.with_c[j] + part * part;
            const double shrink = rsqrt(fmax(norm, 1e-60));
            double now = 0, none = 0;
            for (int i = me; i < p.k; i += threads)
                if (i != j) now += over((stay * cc[i] + along * m.with_c[i]) * shrink - p.margin);
            sparse_sums(now, none, alone, p.small);
            if (mu * now - (stay * fit + along * m.with_s[j]) * shrink >= cost - TOLERANCE) continue;
            for (int i = me; i < p.k; i += threads) {
                const double c = i == j ? 1 : (stay * cc[i] + along * m.with_c[i]) * shrink;
                cc[i] = c, m.cc[i * p.k + j] = c;
                cs[i] = (stay * cs[i] + along * m.with_s[i]) * shrink;
            }
            sums_share = along * shrink, own_share = stay * shrink;
            moving = false;
            any |= excess > 0 || stay > 0;
        }
        if (me == 0) m.along[j] = sums_share, m.stay[j] = own_share;
        meet();
    }
    return any;
}

// From the products of all blocks, in each of them alike: J, whether the last round is taken, and the centroids of the
// next, as rows and numbers. Returns the verdict.
__device__ __noinline__ int decide(Work& p, int turn, int round, int rounds, double* objective, double* history) {
    const int squares = p.k * p.k, square = 4 * p.most * p.most;
    const Lead m(p);
    __syncthreads();
    double part = 0;
    for (int n = threadIdx.x; n < 2 * p.k; n += THREADS) {
        const int kind = n / p.k, j = n % p.k;
        double sum = 0;
#pragma unroll
        for (int block = 0; block < CLUSTER; ++block)
            sum += p.diagonals[(block - p.rank) * 2 * p.most + kind * p.most + j];
        (kind ? m.ss : m.cs)[j * p.k + j] = sum;
        if (!kind) part -= sum;
    }
    // The other pairs, row <= column of [2 k, 2 k]: the first row and the last, which have 2 k + 1 together, are one here,
    // and so on. Several at a time, as each waits for device memory.
    const int long_row = 2 * p.k + 1, pairs = p.penalty > 0 ? p.k * long_row : 0;
    for (int first = threadIdx.x; first < pairs; first += AT_ONCE * THREADS) {
        int rows[AT_ONCE], columns[AT_ONCE];
        double sums[AT_ONCE] = {};
#pragma unroll
        for (int n = 0; n < AT_ONCE; ++n) {
            const int pair = min(first + n * THREADS, pairs - 1);
            const int place = pair % long_row, left = 2 * p.k - pair / long_row;
            rows[n] = place < left ? 2 * p.k - left : left - 1;
            columns[n] = rows[n] + (place < left ? place : place - left);
        }
        for (int digits = 0; digits < (p.penalty >= 1 ? 2 : 1); ++digits)
#pragma unroll
            for (int block = 0; block < CLUSTER; ++block)
#pragma unroll
                for (int n = 0; n < AT_ONCE; ++n)
                    sums[n] += p.pairs[static_cast<int64_t>(block - p.rank) * 2 * square + digits * square +
                                       rows[n] * 2 * p.k + columns[n]];
#pragma unroll
        for (int n = 0; n < AT_ONCE; ++n) {
            const int i = rows[n] % p.k, j = columns[n] % p.k;
            const bool sum_row = rows[n] >= p.k, sum_column = columns[n] >= p.k;
            if (first + n * THREADS >= pairs || (i == j && sum_column)) continue;
            if (sum_row == sum_column)
                (sum_row ? m.ss : m.cc)[i * p.k + j] = (sum_row ? m.ss : m.cc)[j * p.k + i] = sums[n];
            else
                m.cs[i * p.k + j] = sums[n];
            if (!sum_column && i < j) part += p.penalty / p.k * over(sums[n] - p.margin);
        }
    }
    const double now = block_sum(part, p.small);
    // Rounding centroids and sums may raise J by a few ulp at rest.
    const bool taken = round == 0 || now < p.objective - STILL, last = !taken || round == rounds;
    __syncthreads();
    if (threadIdx.x == 0) {
        if (taken) p.objective = now;
        p.last = taken ? turn : 1 - turn;
    }
    __syncthreads();
    if (p.rank == 0) {
        for (int n = round + threadIdx.x; n <= (last ? rounds : round); n += THREADS) history[n] = p.objective;
        if (last && threadIdx.x == 0) *objective = p.objective;
    }
    if (last) return STOP;
    // If no centroid is close to another, before or after its move, the moves are independent.
    bool near = false, close = false;
    if (p.penalty > 0)
        for (int n = threadIdx.x; n < squares; n += THREADS) {
            const int i = n / p.k, j = n % p.k;
            if (i == j) continue;
            const double to = sqrt(m.ss[j * p.k + j]), from = sqrt(m.ss[i * p.k + i]);
            near |= !(m.cc[n] <= p.margin && m.cs[n] <= p.margin * to && m.ss[n] <= p.margin * to * from);
        }
    if (block_sum(near, p.small) > 0) {
        const bool alone = p.k <= 32;
        close = (!alone || threadIdx.x < 32) && moves_in_turn(p, alone);
        close = block_sum(close, p.small) > 0;
    } else {
        for (int j = threadIdx.x; j < p.k; j += THREADS) {
            const double length = sqrt(m.ss[j * p.k + j]);
            m.along[j] = length >= 1e-12 && length - m.cs[j * p.k + j] > TOLERANCE ? 1 / length : 0;
        }
    }
    bool empty = false;
    for (int j = threadIdx.x; j < p.k; j += THREADS) {
        const int own = p.place[turn * p.most + j], sums = p.spare(j);
        const bool moving = m.along[j] != 0;
        p.place[(1 - turn) * p.most + j] = close ? 3 - own - sums : moving ? sums : own;
        p.scale[(1 - turn) * p.most + j] = close ? 1 : moving ? m.along[j] : p.scale[turn * p.most + j];
        empty |= !p.filled(turn)[j];
    }
    return (close ? CLOSE : 0) | (block_sum(empty, p.small) > 0 ? EMPTY : 0);
}

// Makes this block's columns of centroids that are more than a multiple of S_j.
__device__ void move(const Work& p, int turn) {
    const Lead m(p);
    const int words = (p.k + 31) / 32;
    const double mu = p.penalty / p.k;
    for (int column = p.low + threadIdx.x; column < p.high; column += THREADS)
        for (int j = 0; j < p.k; ++j) {
            const int own = p.place[turn * p.most + j], made = p.place[(1 - turn) * p.most + j];
            double goal = p.buffer(3 - own - made, j)[column];
            if (m.along[j] != 0)
                for (int word = 0; word < words; ++word)
                    for (unsigned bits = m.close[j * words + word]; bits; bits &= bits - 1) {
                        const int l = word * 32 + __ffs(static_cast<int>(bits)) - 1;
                        goal -= mu * p.centre(l < j ? 1 - turn : turn, l).at(column);
                    }
            p.buffer(made, j)[column] =
                static_cast<float>(m.stay[j] * p.centre(turn, j).at(column) + m.along[j] * goal);
        }
}
