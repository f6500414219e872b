// Moving centroids: inner products of centroids and sums, J and the moves from them, and carrying the moves out.

// Inner products of all pairs of centroids and sums over this block's columns: the upper 4 x 4 tiles of a matrix whose
// rows are the centroids and, from the `half`-th on, S. Short runs are summed in float32, the runs in float64; with a
// penalty that may nearly cancel S, all in float64, slow as that is.
__device__ __noinline__ void multiply_pairs(const Work& p, const float* centre) {
    const int fours = (p.k + 3) / 4, half = fours * 4, side = 2 * half, tiles = fours * (2 * fours + 1);
    const int low = p.padded / 4 * p.rank / CLUSTER * 4, high = p.padded / 4 * (p.rank + 1) / CLUSTER * 4;
    float* stage = reinterpret_cast<float*>(p.panel);
    const bool all_digits = p.penalty >= 1;
    double* out = p.pairs + static_cast<int64_t>(p.rank) * 4 * p.most * p.most;
    // The terms of J and of a move's gain: float64.
    for (int j = threadIdx.x / 32; j < p.k; j += WARPS) {
        double own = 0, mixed = 0, square = 0;
        for (int d = low + threadIdx.x % 32; d < high; d += 32) {
            const double c = centre[static_cast<int64_t>(j) * p.padded + d],
                         sum = p.sums[static_cast<int64_t>(j) * p.padded + d];
            own += c * c, mixed += c * sum, square += sum * sum;
        }
        for (int half_warp = 16; half_warp; half_warp /= 2) {
            own += __shfl_xor_sync(KR_FULL_WARP, own, half_warp),
                mixed += __shfl_xor_sync(KR_FULL_WARP, mixed, half_warp);
            square += __shfl_xor_sync(KR_FULL_WARP, square, half_warp);
        }
        double* row = out + static_cast<int64_t>(j) * (2 * p.k + 1);
        if (threadIdx.x % 32 == 0) row[0] = own, row[p.k] = mixed, row[2 * p.k * p.k + p.k] = square;
    }
    const int step = max(4, min(128, p.work_floats / side / 4 * 4));
    for (int from = low; from == low || from < high; from += step) {
        const int columns = min(step, high - from), quads = columns / 4;
        __syncthreads();
        for (int base = threadIdx.x; base < side * quads; base += 4 * THREADS) {
            float4 v[4] = {};
#pragma unroll
            for (int u = 0; u < 4; ++u) {
                const int n = base + u * THREADS, row = n % side, j = row < half ? row : row - half;
                if (n < side * quads && j < p.k)
                    v[u] = reinterpret_cast<const float4*>((row < half ? centre : p.sums) +
                                                           static_cast<int64_t>(j) * p.padded + from)[n / side];
            }
#pragma unroll
            for (int u = 0; u < 4; ++u) {
                const int n = base + u * THREADS;
                if (n >= side * quads) break;
                float* to = stage + n / side * 4 * side + n % side;
                to[0] = v[u].x, to[side] = v[u].y, to[2 * side] = v[u].z, to[3 * side] = v[u].w;
            }
        }
        __syncthreads();
        // Two lanes per tile: one for the even columns, one for the odd.
        for (int base = 0; base < tiles; base += THREADS / 2) {
            const int tile = base + static_cast<int>(threadIdx.x) / 2;
            int right = static_cast<int>((sqrtf(8.0f * static_cast<float>(tile) + 1) - 1) / 2);
            while (right * (right + 1) / 2 > tile) --right;
            while ((right + 1) * (right + 2) / 2 <= tile) ++right;
            const int left = tile - right * (right + 1) / 2;
            double total[4][4] = {};
            for (int run = 0; run < columns && tile < tiles; run += 32) {
                float sum[4][4] = {};
                for (int c = run + static_cast<int>(threadIdx.x) % 2; c < min(run + 32, columns); c += 2) {
                    const float4 a = *reinterpret_cast<const float4*>(stage + c * side + left * 4);
                    const float4 b = *reinterpret_cast<const float4*>(stage + c * side + right * 4);
                    const float u[4] = {a.x, a.y, a.z, a.w}, v[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
                    for (int n = 0; n < 16; ++n)
                        if (all_digits)
                            total[n / 4][n % 4] += static_cast<double>(u[n / 4]) * v[n % 4];
                        else
                            sum[n / 4][n % 4] = fmaf(u[n / 4], v[n % 4], sum[n / 4][n % 4]);
                }
#pragma unroll
                for (int n = 0; n < 16; ++n) total[n / 4][n % 4] += sum[n / 4][n % 4];
            }
#pragma unroll
            for (int n = 0; n < 16; ++n) {
                const double both = total[n / 4][n % 4] + __shfl_xor_sync(KR_FULL_WARP, total[n / 4][n % 4], 1);
                const int i = left * 4 + n / 4, j = right * 4 + n % 4;
                const int row = i < half ? i : i - half + p.k, column = j < half ? j : j - half + p.k;
                const bool wanted = (i < half ? i < p.k : row < 2 * p.k) && (j < half ? j < p.k : column < 2 * p.k);
                if (tile < tiles && wanted && column != row && column != row + p.k &&
                    static_cast<int>(threadIdx.x % 2) == n / 8) {
                    double* place = out + static_cast<int64_t>(row) * 2 * p.k + column;
                    *place = from == low ? both : *place + both;
                }
            }
        }
    }
}

// Products of all pairs: cc[i, j] = <c_i, c_j>, cs[i, j] = <c_i, S_j>, ss[i, j] = <S_i, S_j>.
struct Products {
    double *cc, *cs, *ss;
};

__device__ double over(double closeness) { return closeness > 0 ? closeness : 0; }

// clustering.move from inner products, by one warp: the multiples of S_j, c_j and the centroids close to it that make the
// new c_j. Returns whether any was close.
__device__ __noinline__ bool moves_in_turn(const Work& p, Products m) {
    const int lane = threadIdx.x % 32, words = (p.most + 31) / 32;
    const double mu = p.penalty / p.k;
    bool any = false;
    for (int j = 0; j < p.k; ++j) {
        double sums_share = 0, own_share = 1;
        double *cc = m.cc + j * p.k, *cs = m.cs + j * p.k, *ss = m.ss + j * p.k;
        const double fit = cs[j];
        double excess = 0, square = 0;
        for (int word = 0; word < (p.k + 31) / 32; ++word) {
            const int i = word * 32 + lane;
            const bool close = i < p.k && i != j && cc[i] > p.margin;
            if (close) excess += cc[i] - p.margin;
            const unsigned bits = __ballot_sync(KR_FULL_WARP, close);
            if (lane == 0) p.close[j * words + word] = bits;
        }
        __syncwarp();
        // Products of the goal S_j - mu sum of close c with each c_i and S_i.
        double *with_c = m.cc + p.k * p.k * 3, *with_s = with_c + p.k;
        for (int i = lane; i < p.k; i += 32) {
            double c = m.cs[i * p.k + j], s = ss[i];
            for (int word = 0; word < (p.k + 31) / 32; ++word)
                for (unsigned bits = p.close[j * words + word]; bits; bits &= bits - 1) {
                    const int l = word * 32 + __ffs(static_cast<int>(bits)) - 1;
                    c -= mu * m.cc[l * p.k + i], s -= mu * m.cs[l * p.k + i];
                }
            with_c[i] = c, with_s[i] = s;
            if (i != j && cc[i] > p.margin) square += c;
        }
        __syncwarp();
        for (int step = 16; step; step /= 2) {
            excess += __shfl_xor_sync(KR_FULL_WARP, excess, step);
            square += __shfl_xor_sync(KR_FULL_WARP, square, step);
        }
        const double length = sqrt(fmax(with_s[j] - mu * square, 0.0));
        // The hinges lie above their linear parts, so that no move gains more than the linear minimiser promises.
        bool moving = ss[j] > 0 && length >= 1e-12 && length - with_c[j] > TOLERANCE;
        const double cost = mu * excess - fit;
        for (double part = 1; moving && part >= 0.25; part /= 2) {
            const double stay = 1 - part, along = part / length;
            const double norm = stay * stay * cc[j] + 2 * stay * along * with_c[j] + part * part;
            const double shrink = 1 / fmax(sqrt(norm), 1e-30);
            double now = 0;
            for (int i = lane; i < p.k; i += 32)
                if (i != j) now += over((stay * cc[i] + along * with_c[i]) * shrink - p.margin);
            for (int step = 16; step; step /= 2) now += __shfl_xor_sync(KR_FULL_WARP, now, step);
            if (mu * now - (stay * fit + along * with_s[j]) * shrink >= cost - TOLERANCE) continue;
            __syncwarp();
            for (int i = lane; i < p.k; i += 32) {
                const double c = i == j ? 1 : (stay * cc[i] + along * with_c[i]) * shrink;
                cc[i] = c, m.cc[i * p.k + j] = c;
                cs[i] = (stay * cs[i] + along * with_s[i]) * shrink;
            }
            sums_share = along * shrink, own_share = stay * shrink;
            moving = false;
            any |= excess > 0;
        }
        if (lane == 0) p.moves[j] = sums_share, p.moves[p.most + j] = own_share;
        __syncwarp();
    }
    return any;
}

// In the first block: J from the products, whether the last round is taken, the moves of the next. Returns the verdict.
__device__ __noinline__ int decide(Work& p, int turn, int round, int rounds, double* objective,
                                   double* history) {
    const int squares = p.k * p.k;
    Products m;
    m.cc = p.most <= MOST_LEAD ? reinterpret_cast<double*>(p.panel) : p.lead;
    m.cs = m.cc + squares, m.ss = m.cs + squares;
    __syncthreads();
    double part = 0;
    bool near = false;
    for (int base = threadIdx.x; base < 3 * squares; base += 4 * THREADS) {
        double sum[4] = {};
#pragma unroll
        for (int u = 0; u < 4; ++u) {
            const int n = base + u * THREADS, kind = n / squares, i = n % squares / p.k, j = n % p.k;
            if (kind > 2) break;
            // Only the upper tiles are there.
            const int row = kind == 1 ? i : min(i, j) + kind / 2 * p.k,
                      column = kind == 1 ? j + p.k : max(i, j) + kind / 2 * p.k;
            const double* pair = p.pairs + row * 2 * p.k + column;
            for (int block = 0; block < CLUSTER; ++block)
                sum[u] += pair[static_cast<int64_t>(block) * 4 * p.most * p.most];
        }
#pragma unroll
        for (int u = 0; u < 4; ++u) {
            const int n = base + u * THREADS, kind = n / squares, i = n % squares / p.k, j = n % p.k;
            if (kind > 2) break;
            m.cc[n] = sum[u];
            if (kind == 0 && i < j) part += p.penalty / p.k * over(sum[u] - p.margin);
            if (kind == 1 && i == j) part -= sum[u];
        }
    }
    const double now = block_sum(part, p.small);
    int verdict = 0;
    // Rounding centroids and sums may raise J by a few ulp at rest.
    const bool taken = round == 0 || now < p.objective - STILL, last = !taken || round == rounds;
    __syncthreads();
    if (taken && threadIdx.x == 0) p.objective = now;
    __syncthreads();
    for (int n = round + threadIdx.x; n <= (last ? rounds : round); n += THREADS) history[n] = p.objective;
    if (last) {
        if (threadIdx.x == 0) p.mail[2] = taken ? turn : 1 - turn, *objective = p.objective;
        return STOP;
    }
    __syncthreads();
    // If no centroid is close to another, before or after its move, the moves are independent.
    if (p.penalty > 0)
        for (int n = threadIdx.x; n < squares; n += THREADS) {
            const int i = n / p.k, j = n % p.k;
            if (i == j) continue;
            const double to = sqrt(m.ss[j * p.k + j]), from = sqrt(m.ss[i * p.k + i]);
            near |= !(m.cc[n] <= p.margin && m.cs[n] <= p.margin * to && m.ss[n] <= p.margin * to * from);
        }
    if (block_sum(near, p.small) > 0) {
        if (threadIdx.x < 32 && moves_in_turn(p, m)) verdict |= CLOSE;
    } else {
        for (int j = threadIdx.x; j < p.k; j += THREADS) {
            const double length = sqrt(m.ss[j * p.k + j]);
            const bool moving = length >= 1e-12 && length - m.cs[j * p.k + j] > TOLERANCE;
            p.moves[j] = moving ? 1 / length : 0, p.moves[p.most + j] = moving ? 0 : 1;
        }
    }
    for (int j = threadIdx.x; j < p.k; j += THREADS) {
        if (!p.filled(turn)[j]) verdict |= EMPTY;
        p.filled(1 - turn)[j] = 0;
    }
    const double close = block_sum(verdict & CLOSE ? 1 : 0, p.small),
                 empty = block_sum(verdict & EMPTY ? 1 : 0, p.small);
    return (close > 0 ? CLOSE : 0) | (empty > 0 ? EMPTY : 0);
}

// Applies the moves to this block's columns.
__device__ void move(const Work& p, const float* before, float* after, bool close) {
    const int low = p.padded / 4 * p.rank / CLUSTER * 4, wide = p.padded / 4 * (p.rank + 1) / CLUSTER * 4 - low;
    const int words = (p.most + 31) / 32;
    const double mu = p.penalty / p.k;
    if (!close) {
        const auto fours = [&](const float* rows, int n) {
            return reinterpret_cast<const float4*>(rows + static_cast<int64_t>(n / (wide / 4)) * p.padded + low) +
                   n % (wide / 4);
        };
        for (int base = threadIdx.x; base < p.k * wide / 4; base += 2 * THREADS) {
            float4 from[2] = {}, to[2] = {};
            double stay[2] = {}, along[2] = {};
#pragma unroll
            for (int u = 0; u < 2; ++u) {
                const int n = base + u * THREADS;
                if (n >= p.k * wide / 4) break;
                from[u] = *fours(before, n), to[u] = *fours(p.sums, n);
                along[u] = p.moves[n / (wide / 4)], stay[u] = p.moves[p.most + n / (wide / 4)];
            }
#pragma unroll
            for (int u = 0; u < 2; ++u) {
                const int n = base + u * THREADS;
                if (n >= p.k * wide / 4) break;
                const auto moved = [&](float own, float sum) {
                    return static_cast<float>(stay[u] * own + along[u] * sum);
                };
                *const_cast<float4*>(fours(after, n)) = {moved(from[u].x, to[u].x), moved(from[u].y, to[u].y),
                                                         moved(from[u].z, to[u].z), moved(from[u].w, to[u].w)};
            }
        }
        return;
    }
    for (int column = low + threadIdx.x; column < low + wide; column += THREADS)
        for (int j = 0; j < p.k; ++j) {
            const int64_t place = static_cast<int64_t>(j) * p.padded + column;
            double goal = p.sums[place];
            if (p.moves[j] != 0)
                for (int word = 0; word < (p.k + 31) / 32; ++word)
                    for (unsigned bits = p.close[j * words + word]; bits; bits &= bits - 1) {
                        const int l = word * 32 + __ffs(static_cast<int>(bits)) - 1;
                        goal -= mu * (l < j ? after : before)[static_cast<int64_t>(l) * p.padded + column];
                    }
            after[place] = static_cast<float>(p.moves[p.most + j] * before[place] + p.moves[j] * goal);
        }
}
