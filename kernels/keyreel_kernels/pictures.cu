// Pictures: YUV to RGB, antialiased resize, orientation, crop and padding in one pass; and the signals of a frame.
//
// The definitions are in pictures.py. A block makes one tile of one picture. It walks over the coded pixels under the
// tile, LINES rows by SPAN columns at a time, converts them, filters along the rows, then along the columns; nothing of
// the coded size is written to device memory. Lanes are rows in the first filter and columns in the second, PITCH
// floats apart: weights are uniform in a warp and there are no bank conflicts.

constexpr int TILE = 32;
constexpr int SPAN = 64;
constexpr int LINES = 32;
constexpr int PITCH = LINES + 1;
constexpr int THREADS = 256;
constexpr int OWN = TILE / (THREADS / 32);  // rows, or columns, of the tile that a warp makes

enum Kind { RGB_BYTES, YUV_BYTES, YUV_WORDS };
enum Turn { TRANSPOSE = 1, FLIP_ROWS = 2, FLIP_COLUMNS = 4 };

// The layout of SOURCE in cuda_pictures.py. Rows and columns are those of the coded picture, before it is turned.
struct Source {
    const uint8_t* planes[3];  // RGB, or luma, Cb, Cr
    int pitches[3];            // bytes from row to row
    int kind, height, width;
    int chroma_step, chroma_half;    // samples from one to the next; 1: half the rows and columns
    int rows, columns;               // after the resize
    int top, left;                   // where the first tile begins after the resize; negative: padding
    int turn;
    int row_taps, row_count;         // in words of the table: first tap of each row, then its weights
    int column_taps, column_count;
    float matrix[3][4];              // R, G, B in 0..255 of luma, Cb, Cr and 1
};

struct Axis {
    const int* first;      // [new]
    const float* weights;  // [new, count]
    int count, begin, end;  // the coded pixels under the tile
    int low, high;          // the resized pixels of the picture in the tile

    __device__ __forceinline__ Axis(const int* table, int taps, int taps_count, int size, int start, int stop) {
        first = table + taps;
        weights = reinterpret_cast<const float*>(first + size);
        count = taps_count;
        low = max(start, 0);
        high = min(stop, size);
        begin = low < high ? first[low] : 0;
        end = low < high ? first[high - 1] + count : 0;
    }
};

template <class T>
__device__ __forceinline__ float sample(const uint8_t* row, int at) {
    return static_cast<float>(reinterpret_cast<const T*>(row)[at]);
}

// Two pixels of a row, `column` is even. Chroma lies on the even columns and between the rows.
template <class T>
__device__ __forceinline__ void pair_of_yuv(const Source& source, int row, int column, float rgb[2][3]) {
    const int second = min(column + 1, source.width - 1), step = source.chroma_step;
    const uint8_t* line = source.planes[0] + static_cast<int64_t>(row) * source.pitches[0];
    const float luma[2] = {sample<T>(line, column), sample<T>(line, second)};
    float chroma[2][2];
    if (source.chroma_half) {
        const int last_row = (source.height - 1) / 2, last = (source.width - 1) / 2;
        const int above = max((row - 1) >> 1, 0), below = min((row + 1) >> 1, last_row);
        const float part = row & 1 ? 0.25f : 0.75f;
        const int here = column / 2 * step, next = min(column / 2 + 1, last) * step;
        for (int n = 0; n < 2; ++n) {
            const uint8_t* upper = source.planes[1 + n] + static_cast<int64_t>(above) * source.pitches[1 + n];
            const uint8_t* lower = source.planes[1 + n] + static_cast<int64_t>(below) * source.pitches[1 + n];
            const float left = sample<T>(upper, here) * (1 - part) + sample<T>(lower, here) * part;
            const float right = sample<T>(upper, next) * (1 - part) + sample<T>(lower, next) * part;
            chroma[0][n] = left;
            chroma[1][n] = 0.5f * (left + right);
        }
    } else {
        for (int n = 0; n < 2; ++n) {
            const uint8_t* values = source.planes[1 + n] + static_cast<int64_t>(row) * source.pitches[1 + n];
            chroma[0][n] = sample<T>(values, column * step);
            chroma[1][n] = sample<T>(values, second * step);
        }
    }
    for (int n = 0; n < 2; ++n)
        for (int c = 0; c < 3; ++c) {
            const float* m = source.matrix[c];
            const float value = m[0] * luma[n] + m[1] * chroma[n][0] + m[2] * chroma[n][1] + m[3];
            rgb[n][c] = fminf(fmaxf(value, 0.0f), 255.0f);
        }
}

__device__ __forceinline__ void pair_of_rgb(const Source& source, int row, int column, float rgb[2][3]) {
    const uint8_t* line = source.planes[0] + static_cast<int64_t>(row) * source.pitches[0];
    const int second = min(column + 1, source.width - 1);
    for (int c = 0; c < 3; ++c) {
        rgb[0][c] = line[column * 3 + c];
        rgb[1][c] = line[second * 3 + c];
    }
}

// table: a Source for each picture, then the taps of the filters. out [N, height, width, 3]. tiles: of each picture.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
    pictures(const int* __restrict__ table, uint8_t* out, int tiles, int height, int width, int fill) {
    KR_SHARED(float, lines);                   // [3, SPAN, PITCH], first the even columns, then the odd ones
    float* narrow = lines + 3 * SPAN * PITCH;  // [3, TILE, PITCH]
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int picture = blockIdx.x / tiles, tile = blockIdx.x % tiles;
    const Source& source = reinterpret_cast<const Source*>(table)[picture];
    const bool turned = source.turn & TRANSPOSE;
    const int high = turned ? width : height, wide = turned ? height : width;
    const int across = (wide + TILE - 1) / TILE;
    const int y = tile / across * TILE, x = tile % across * TILE;
    const Axis down(table, source.row_taps, source.row_count, source.rows, y + source.top,
                    min(y + TILE, high) + source.top);
    const Axis along(table, source.column_taps, source.column_count, source.columns, x + source.left,
                     min(x + TILE, wide) + source.left);
    const bool shown = down.low < down.high && along.low < along.high;

    float sums[OWN][3] = {};
    for (int line = down.begin; shown && line < down.end; line += LINES) {
        const int left = along.begin & ~1;
        for (int start = left; start < along.end; start += SPAN) {
            __syncthreads();
            const int column = start + 2 * lane;
            if (column < along.end) {
#pragma unroll
                for (int n = 0; n < LINES / (THREADS / 32); ++n) {
                    const int place = n * (THREADS / 32) + warp;
                    const int row = min(line + place, source.height - 1);
                    float rgb[2][3];
                    if (source.kind == YUV_BYTES) pair_of_yuv<uint8_t>(source, row, column, rgb);
                    else if (source.kind == YUV_WORDS) pair_of_yuv<uint16_t>(source, row, column, rgb);
                    else pair_of_rgb(source, row, column, rgb);
                    for (int c = 0; c < 3; ++c) {
                        lines[(c * SPAN + lane) * PITCH + place] = rgb[0][c];
                        lines[(c * SPAN + SPAN / 2 + lane) * PITCH + place] = rgb[1][c];
                    }
                }
            }
            __syncthreads();
            for (int n = warp * OWN; n < (warp + 1) * OWN; ++n) {
                const int at = min(max(x + source.left + n, along.low), along.high - 1);
                const int first = along.first[at], stop = min(first + along.count, start + SPAN);
                const float* weights = along.weights + at * along.count - first;
                float* place = narrow + n * PITCH + lane;
                float part[3];
                for (int c = 0; c < 3; ++c) part[c] = start == left ? 0.0f : place[c * TILE * PITCH];
                for (int tap = max(first, start); tap < stop; ++tap) {
                    const int from = tap - start;
                    const float* values = lines + ((from & 1) * (SPAN / 2) + from / 2) * PITCH + lane;
                    const float weight = weights[tap];
                    for (int c = 0; c < 3; ++c) part[c] += weight * values[c * SPAN * PITCH];
                }
                for (int c = 0; c < 3; ++c) place[c * TILE * PITCH] = part[c];
            }
        }
        __syncthreads();
#pragma unroll
        for (int n = 0; n < OWN; ++n) {
            const int at = min(max(y + source.top + warp * OWN + n, down.low), down.high - 1);
            const int first = down.first[at], stop = min(first + down.count, line + LINES);
            const float* weights = down.weights + at * down.count - first;
            for (int tap = max(first, line); tap < stop; ++tap)
                for (int c = 0; c < 3; ++c)
                    sums[n][c] += weights[tap] * narrow[(c * TILE + lane) * PITCH + tap - line];
        }
    }

    const int at_column = x + source.left + lane;
#pragma unroll
    for (int n = 0; n < OWN; ++n) {
        const int own = y + warp * OWN + n;
        if (own >= high || x + lane >= wide) continue;
        const int at_row = own + source.top;
        const bool inside =
            at_row >= down.low && at_row < down.high && at_column >= along.low && at_column < along.high;
        int row = turned ? x + lane : own, column = turned ? own : x + lane;
        if (source.turn & FLIP_ROWS) row = height - 1 - row;
        if (source.turn & FLIP_COLUMNS) column = width - 1 - column;
        uint8_t* pixel = out + ((static_cast<int64_t>(picture) * height + row) * width + column) * 3;
        for (int c = 0; c < 3; ++c)
            pixel[c] = static_cast<uint8_t>(inside ? fminf(fmaxf(rintf(sums[n][c]), 0.0f), 255.0f) : fill);
    }
}

// The sum over the block, the same in all threads, in a fixed order. scratch [32].
__device__ float sum_of_block(float value, float* scratch) {
    for (int bits = 16; bits; bits /= 2) value += __shfl_xor_sync(KR_FULL_WARP, value, bits);
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = 0;
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) sum += scratch[warp];
    return sum;
}

__device__ __forceinline__ float laplacian(const float* at, int width) {
    return at[-width] + at[width] + at[-1] + at[1] - 4 * at[0];
}

// A block per frame. luma [N, H, W] is scratch; signals [3, N]: sharpness, mean and deviation of the luma. Deviations
// are summed in a second sweep, from the mean, so that nothing cancels.
extern "C" __global__ void __launch_bounds__(1024, 1)
    frame_signals(const uint8_t* frames, float* luma, float* signals, float* histogram, int height, int width) {
    KR_SHARED(unsigned, counts);  // [512]
    float* scratch = reinterpret_cast<float*>(counts + 512);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int64_t pixels = static_cast<int64_t>(height) * width;
    const uint8_t* frame = frames + blockIdx.x * pixels * 3;
    float* light = luma + blockIdx.x * pixels;
    for (int bin = threadIdx.x; bin < 512; bin += blockDim.x) counts[bin] = 0;
    __syncthreads();

    float sum = 0;
    for (int row = warp; row < height; row += warps)
        for (int column = lane; column < width; column += 32) {
            const int64_t at = static_cast<int64_t>(row) * width + column;
            const int red = frame[at * 3], green = frame[at * 3 + 1], blue = frame[at * 3 + 2];
            const float value = (red * 0.2126f + green * 0.7152f + blue * 0.0722f) / 255;
            light[at] = value;
            sum += value;
            atomicAdd(&counts[(red >> 5) * 64 + (green >> 5) * 8 + (blue >> 5)], 1u);
        }
    const float mean = sum_of_block(sum, scratch) / pixels;

    float spread = 0, edges = 0;
    for (int row = warp; row < height; row += warps)
        for (int column = lane; column < width; column += 32) {
            const float* at = light + static_cast<int64_t>(row) * width + column;
            spread += (*at - mean) * (*at - mean);
            if (row > 0 && row < height - 1 && column > 0 && column < width - 1) edges += laplacian(at, width);
        }
    const float deviation = sqrtf(sum_of_block(spread, scratch) / pixels);
    const float inner = static_cast<float>(max(height - 2, 0)) * max(width - 2, 0);
    const float edge = sum_of_block(edges, scratch) / fmaxf(inner, 1);

    float sharp = 0;
    for (int row = 1 + warp; row < height - 1; row += warps)
        for (int column = 1 + lane; column < width - 1; column += 32) {
            const float off = laplacian(light + static_cast<int64_t>(row) * width + column, width) - edge;
            sharp += off * off;
        }
    const float sharpness = sum_of_block(sharp, scratch) / fmaxf(inner, 1);
    if (threadIdx.x == 0) {
        signals[blockIdx.x] = sharpness;
        signals[gridDim.x + blockIdx.x] = mean;
        signals[2 * gridDim.x + blockIdx.x] = deviation;
    }
    for (int bin = threadIdx.x; bin < 512; bin += blockDim.x)
        histogram[blockIdx.x * 512 + bin] = static_cast<float>(counts[bin]) / pixels;
}
