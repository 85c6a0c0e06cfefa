// dora_norm: out[o] = ||W_o + s (B A)_o||, W dense or packed in 4 bits
//
// One pass over W, the bound for ranks up to 32 or so. A block makes a tile of B A in registers, adds it to
// the tile of W and squares: on tensor cores that is cheaper than ||W||^2 + 2 s <W A^T, B> + s^2 B (A A^T)
// B^T, which needs A A^T first, and nothing can cancel. Float32 factors go as three bfloat16 parts, 24 bits,
// in the six products that float32 could tell from none; each sum over 16 ranks starts at zero, because
// tensor cores cut where float32 rounds. The columns are shared among blocks for parallelism; what each finds
// for a row goes to the room, and a second kernel adds these in a fixed order.
//
// W passes from memory to the lanes that hold the sums of its elements, 8 columns at a time and the next
// tile's while this one's is worked on. That takes the columns of the product in another order: lane (g, c)
// of a warp has, of a tile of 32 columns, all of 8c .. 8c + 7, so column n of the j-th mma of such a tile is
// column 8 (n / 2) + 2 j + n % 2.
#include "decode_4bit.h"
#include "skinny.h"

namespace fastlora::gpu {

constexpr int norm_threads = 256, tile_rows = 128, tile_cols = 64;
constexpr int run = 8, runs_of_thread = 4;  // columns of W that are read together, and how often

// ---- weights ---------------------------------------------------------------
// at() reads one, whatever the layout; a Pipeline runs of them, ahead of their use.

template <class T>
struct DenseWeights {
    struct Table {
        __device__ void load(const DenseWeights&) {}
    };

    ConstMatrix w;

    __device__ float at(int64_t row, int64_t col, const Table&) const {
        return to_float(*element<T>(w, row, col));
    }

    // Through 32 KB of shared memory, where a thread has slots of its own: registers are scarce, and no other
    // thread has to wait. Float32 fills them with one tile.
    struct Pipeline {
        static constexpr int ahead = sizeof(T) == 2, packs = run / Pack<T>::size;
        static constexpr int64_t bytes = (ahead + 1) * runs_of_thread * packs * norm_threads * 16;

        Pack<T>* slots;
        const T* from;  // the first run of the next tile

        __device__ Pipeline(char* shared, const DenseWeights& weights, int row, int col)
            : slots(reinterpret_cast<Pack<T>*>(shared) + threadIdx.x),
              from(element<T>(weights.w, row, col)) {}

        __device__ Pack<T>& slot(int tile, int i, int p) const {
            return slots[((tile % (ahead + 1) * runs_of_thread + i) * packs + p) * norm_threads];
        }

        // The runs of a tile, 8 rows apart, as far as there are rows; zeros beyond.
        __device__ void fetch(const DenseWeights& weights, int tile, int rows) {
#pragma unroll
            for (int i = 0; i < runs_of_thread; ++i)
#pragma unroll
                for (int p = 0; p < packs; ++p)
                    if (8 * i < rows)
                        copy_async(&slot(tile, i, p), from + i * 8 * weights.w.pitch + p * Pack<T>::size);
                    else
                        slot(tile, i, p) = {};
            from += tile_cols;
        }

        __device__ void values(int tile, int i, float (&out)[run]) const {
#pragma unroll
            for (int p = 0; p < packs; ++p) {
                float part[Pack<T>::size];
                widen(slot(tile, i, p), part);
#pragma unroll
                for (int k = 0; k < Pack<T>::size; ++k) out[p * Pack<T>::size + k] = part[k];
            }
        }
    };
};

// Values are rounded to T, as in a dense copy.
template <class T>
struct PackedWeights {
    struct Table {
        Codes codes;
        __device__ void load(const PackedWeights& weights) { codes.load(weights.w.fp4); }
    };

    Packed4bit w;
    BlockShifts shifts;
    bool powers;  // of two, the block sizes: shifts hold

    __device__ float at(int64_t row, int64_t col, const Table& table) const {
        const int64_t weight = row * w.cols + col, block = powers ? 0 : weight / w.blocksize;
        const float scale =
            powers ? scale_at(w, shifts, weight) : scale_of(w, block, block / w.nested_blocksize);
        const uint32_t byte = w.packed[weight / 2];
        return to_float(from_float<T>(table.codes[weight % 2 ? byte & 15 : byte >> 4] * scale));
    }

    // Through registers, this tile's: a run is 4 bytes and its scale.
    struct Pipeline {
        static constexpr int ahead = 0;
        static constexpr int64_t bytes = 0;

        LaneCodes codes;
        uint32_t nibbles[runs_of_thread];
        float scales[runs_of_thread];
        int64_t from;

        __device__ Pipeline(char*, const PackedWeights& weights, int row, int col)
            : codes(weights.w.fp4), from(row * weights.w.cols + col) {}

        __device__ void fetch(const PackedWeights& weights, int, int rows) {
            int64_t at[runs_of_thread];  // beyond the rows the first weight, which is always there
#pragma unroll
            for (int i = 0; i < runs_of_thread; ++i) {
                at[i] = 8 * i < rows ? from + i * 8 * weights.w.cols : 0;
                nibbles[i] = *reinterpret_cast<const uint32_t*>(weights.w.packed + at[i] / 2);
            }
            scales_at(weights.w, weights.shifts, at, scales);
#pragma unroll
            for (int i = 0; i < runs_of_thread; ++i) scales[i] = 8 * i < rows ? scales[i] : 0.0f;
            from += tile_cols;
        }

        __device__ void values(int, int i, float (&out)[run]) const {
#pragma unroll
            for (int k = 0; k < run; ++k) {
                const float code = codes[nibbles[i] >> (k / 2 * 8 + (k % 2 ? 0 : 4))];
                out[k] = to_float(from_float<T>(code * scales[i]));
            }
        }
    };
};

// ---- on tensor cores ---------------------------------------------------------------

constexpr int step = 16;  // ranks of an mma
constexpr int row_tiles = tile_rows / 16, col_halves = tile_cols / 16;

// The fragments of one step of ranks, a 16-byte word for each lane: of B 16 rows each, of A 16 columns each,
// the columns of two mma. Ranks are in an order of their own too, which lets a lane read four neighbours.
template <int parts>
struct Fragments {
    using Word = Pack<uint32_t>;
    Word rows[parts][row_tiles][warp_size], cols[parts][col_halves][warp_size];
};

// The element, or zero outside the matrix.
template <class F>
FASTLORA_DEVICE float read(const ConstMatrix& m, int row, int col) {
    return row < m.rows && col < m.cols ? to_float(*element<F>(m, row, col)) : 0.0f;
}

template <int parts>
FASTLORA_DEVICE void store_parts(const float (&pairs)[4][2], Pack<uint32_t>* to, int pitch) {
    uint32_t words[4][parts];
#pragma unroll
    for (int i = 0; i < 4; ++i) cut<parts>(pairs[i][0], pairs[i][1], words[i]);
#pragma unroll
    for (int p = 0; p < parts; ++p) to[p * pitch] = {words[0][p], words[1][p], words[2][p], words[3][p]};
}

template <class F>
FASTLORA_DEVICE void stage_rows(const ConstMatrix& b, int row, int rank, int steps,
                                Fragments<parts_of<F>>* to) {
    const int g = lane() / 4, c = lane() % 4;
#pragma unroll 1
    for (int item = (int)threadIdx.x / warp_size; item < steps * row_tiles;
         item += norm_threads / warp_size) {
        const int s = item / row_tiles, tile = item % row_tiles;
        float pairs[4][2];
#pragma unroll
        for (int i = 0; i < 8; ++i)
            pairs[i / 2][i % 2] =
                read<F>(b, row + tile * 16 + i / 2 % 2 * 8 + g, rank + s * step + c * 4 + i / 4 * 2 + i % 2);
        store_parts<parts_of<F>>(pairs, &to[s].rows[0][tile][lane()], row_tiles * warp_size);
    }
}

template <class F>
FASTLORA_DEVICE void stage_cols(const ConstMatrix& a, int col, int rank, int steps,
                                Fragments<parts_of<F>>* to) {
    const int g = lane() / 4, c = lane() % 4;
#pragma unroll 1
    for (int item = (int)threadIdx.x / warp_size; item < steps * col_halves;
         item += norm_threads / warp_size) {
        const int s = item / col_halves, half = item % col_halves;
        const int first = col + half / 2 * 32 + g / 2 * 8 + half % 2 * 4 + g % 2;
        float pairs[4][2];
#pragma unroll
        for (int i = 0; i < 8; ++i)
            pairs[i / 2][i % 2] = read<F>(a, rank + s * step + c * 4 + i % 4, first + i / 4 * 2);
        store_parts<parts_of<F>>(pairs, &to[s].cols[0][half][lane()], col_halves * warp_size);
    }
}

// sums += rows [32, steps * 16] cols [.., 32] of this warp's part of the tile.
template <int parts>
FASTLORA_DEVICE void multiply(const Fragments<parts>* from, int steps, int row_tile, int col_half,
                              float (&sums)[2][4][4]) {
#pragma unroll 1
    for (int s = 0; s < steps; ++s) {
        Pack<uint32_t> rows[parts][2];
#pragma unroll
        for (int i = 0; i < 2 * parts; ++i)
            rows[i / 2][i % 2] = from[s].rows[i / 2][row_tile + i % 2][lane()];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            Pack<uint32_t> cols[parts];
#pragma unroll
            for (int p = 0; p < parts; ++p) cols[p] = from[s].cols[p][col_half + half][lane()];
            float products[4][4] = {};
            for_parts<parts, parts, 3>([&](int p, int q) {
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    mma<bf16>(products[i], rows[p][i / 2].v,
                              {cols[q].v[i % 2 * 2], cols[q].v[i % 2 * 2 + 1]});
            });
#pragma unroll
            for (int i = 0; i < 16; ++i) sums[i / 8][2 * half + i / 4 % 2][i % 4] += products[i / 4][i % 4];
        }
    }
}

// Eight warps share a tile: 4 by 2, of 32 rows and 32 columns each. partial is [gridDim.x, rows].
template <class Weights, class F>
__global__ void FASTLORA_LAUNCH_BOUNDS(norm_threads, 2)
    dora_norm_tiles(Weights weights, int rows, int cols, ConstMatrix a, ConstMatrix b, float scale,
                    int tiles_per_block, int ranks_held, float* partial) {
    FASTLORA_SHARED(shared);
    using Pipeline = typename Weights::Pipeline;
    auto* fragments = reinterpret_cast<Fragments<parts_of<F>>*>(shared + Pipeline::bytes);
    __shared__ float row_sums[2][tile_rows];
    const int warp = (int)threadIdx.x / warp_size, g = lane() / 4, c = lane() % 4;
    const int row_tile = warp % 4 * 2, col_half = warp / 4 * 2;
    const int row0 = (int)blockIdx.y * tile_rows, ranks = (int)a.rows;
    const int begin = (int)blockIdx.x * tiles_per_block * tile_cols;
    const int tiles = (int)ceil_div(smaller(cols - begin, tiles_per_block * tile_cols), tile_cols);

    // Runs of the rows g, g + 8, g + 16 and g + 24 of the warp's 32.
    const int row = row0 + row_tile * 16 + g, col = begin + col_half * 16 + c * run;
    Pipeline pipeline(shared, weights, row, col);
    const auto fetch = [&](int tile) {
        pipeline.fetch(weights, tile, tile < tiles && col + tile * tile_cols < cols ? rows - row : 0);
        commit_copies();
    };
    for (int tile = 0; tile < Pipeline::ahead; ++tile) fetch(tile);
    float squares[runs_of_thread] = {};
    for (int tile = 0; tile < tiles; ++tile) {
        fetch(tile + Pipeline::ahead);
        float sums[2][4][4] = {};
#pragma unroll 1
        for (int rank = 0; rank < ranks; rank += ranks_held) {
            const int steps = (int)ceil_div(smaller(ranks - rank, ranks_held), step);
            __syncthreads();
            if (tile == 0 || ranks > ranks_held) stage_rows<F>(b, row0, rank, steps, fragments);
            stage_cols<F>(a, begin + tile * tile_cols, rank, steps, fragments);
            __syncthreads();
            multiply(fragments, steps, row_tile, col_half, sums);
        }
        wait_copies<Pipeline::ahead>();
#pragma unroll
        for (int i = 0; i < runs_of_thread; ++i) {
            float w[run];
            pipeline.values(tile, i, w);
#pragma unroll
            for (int k = 0; k < run; ++k) {
                const float v = w[k] + scale * sums[i / 2][k / 2][i % 2 * 2 + k % 2];
                squares[i] += v * v;
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        squares[i] += shuffle_xor(squares[i], 1);
        squares[i] += shuffle_xor(squares[i], 2);
        if (c == 0) row_sums[warp / 4][row_tile * 16 + i * 8 + g] = squares[i];
    }
    __syncthreads();
    const int mine = (int)threadIdx.x;
    if (mine < tile_rows && row0 + mine < rows)
        partial[(int64_t)blockIdx.x * rows + row0 + mine] = row_sums[0][mine] + row_sums[1][mine];
}

// ---- any layout, and chips without mma ---------------------------------------------------------------

FASTLORA_DEVICE float read_any(const ConstMatrix& m, int row, int col) {
    return m.dtype == DType::f32    ? read<float>(m, row, col)
           : m.dtype == DType::bf16 ? read<bf16>(m, row, col)
                                    : read<f16>(m, row, col);
}

// 64 rows of a tile, 4 by 4 elements to a thread, 16 apart.
template <class Weights>
__global__ void FASTLORA_LAUNCH_BOUNDS(norm_threads, 3)
    dora_norm_each(Weights weights, int rows, int cols, ConstMatrix a, ConstMatrix b, float scale,
                   int tiles_per_block, float* partial) {
    constexpr int side = 64;
    static_assert(tile_cols == side, "one number of columns for both kernels: `room` depends on it");
    __shared__ typename Weights::Table table;
    __shared__ float factor_a[step][side], factor_b[step][side + 1];
    table.load(weights);
    const int x = (int)threadIdx.x % 16, y = (int)threadIdx.x / 16;
    const int row0 = (int)blockIdx.y * side, begin = (int)blockIdx.x * tiles_per_block * side;
    const int end = (int)smaller(begin + tiles_per_block * side, cols);
    float squares[4] = {};
    for (int col0 = begin; col0 < end; col0 += side) {
        float sums[4][4] = {};
        for (int rank = 0; rank < a.rows; rank += step) {
            __syncthreads();
            for (int at = (int)threadIdx.x; at < step * side; at += norm_threads) {
                factor_a[at / side][at % side] = read_any(a, rank + at / side, col0 + at % side);
                factor_b[at % step][at / step] = read_any(b, row0 + at / step, rank + at % step);
            }
            __syncthreads();
#pragma unroll 4
            for (int r = 0; r < step; ++r)
#pragma unroll
                for (int i = 0; i < 4; ++i)
#pragma unroll
                    for (int j = 0; j < 4; ++j)
                        sums[i][j] += factor_b[r][y + 16 * i] * factor_a[r][x + 16 * j];
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int row = row0 + y + 16 * i, col = col0 + x + 16 * j;
                if (row < rows && col < end) {
                    const float v = weights.at(row, col, table) + scale * sums[i][j];
                    squares[i] += v * v;
                }
            }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        for (int lanes = 8; lanes; lanes /= 2) squares[i] += shuffle_xor(squares[i], lanes);
        const int row = row0 + y + 16 * i;
        if (x == 0 && row < rows) partial[(int64_t)blockIdx.x * rows + row] = squares[i];
    }
}

__global__ void __launch_bounds__(norm_threads)
    dora_norm_roots(const float* partial, int blocks, int rows, float* out) {
    const int row = (int)(blockIdx.x * norm_threads + threadIdx.x);
    if (row >= rows) return;
    float sum = 0;
    for (int i = 0; i < blocks; ++i) sum += partial[(int64_t)i * rows + row];
    out[row] = sqrtf(sum);
}

// ---- launchers ---------------------------------------------------------------

// Tiles to a block: up to 4, so that B is read once for them, as long as four blocks remain for each
// multiprocessor.
static int64_t tiles_per_block(int64_t rows, int64_t cols) {
    const int64_t share = ceil_div(rows, tile_rows) * ceil_div(cols, tile_cols) / (4 * multiprocessors());
    return share < 1 ? 1 : smaller(share, 4);
}

static int64_t column_blocks(int64_t rows, int64_t cols) {
    return ceil_div(cols, tile_cols * tiles_per_block(rows, cols));
}

int64_t dora_norm_room(int64_t rows, int64_t cols) {
    return column_blocks(rows, cols) * rows;
}

int64_t dora_norm_4bit_room(int64_t rows, int64_t cols) {
    return dora_norm_room(rows, cols);
}

template <class F, class Weights>
static int norm_tiles(const Weights& weights, int64_t rows, int64_t cols, const ConstMatrix& a,
                      const ConstMatrix& b, float scale, float* room, Stream stream) {
    constexpr int64_t step_bytes = sizeof(Fragments<parts_of<F>>), bytes = Weights::Pipeline::bytes;
    const int64_t most = (shared_memory_of_block() - bytes - 4096) / step_bytes;
    const int64_t steps = smaller(smaller(ceil_div(a.rows, step), 4), most);
    return launch(dora_norm_tiles<Weights, F>,
                  dim3((unsigned)column_blocks(rows, cols), (unsigned)ceil_div(rows, tile_rows)),
                  dim3(norm_threads), bytes + steps * step_bytes, stream, weights, rows, cols, a, b, scale,
                  (int)tiles_per_block(rows, cols), (int)steps * step, room);
}

template <class Weights>
static int norm_squares(const Weights& weights, bool in_runs, int64_t rows, int64_t cols,
                        const ConstMatrix& a, const ConstMatrix& b, float scale, float* room, Stream stream) {
    if constexpr (has_mma)
        if (in_runs && a.dtype == b.dtype)
            return with_type(a.dtype, [&](auto type) {
                return norm_tiles<decltype(type)>(weights, rows, cols, a, b, scale, room, stream);
            });
    return launch(dora_norm_each<Weights>,
                  dim3((unsigned)column_blocks(rows, cols), (unsigned)ceil_div(rows, tile_cols)),
                  dim3(norm_threads), 0, stream, weights, rows, cols, a, b, scale,
                  (int)tiles_per_block(rows, cols), room);
}

template <class Weights>
static int norm(const Weights& weights, bool in_runs, int64_t rows, int64_t cols, const ConstMatrix& a,
                const ConstMatrix& b, float scale, float* out, float* room, Stream stream) {
    if (cols)
        if (const int status = norm_squares(weights, in_runs, rows, cols, a, b, scale, room, stream))
            return status;
    return launch(dora_norm_roots, dim3((unsigned)ceil_div(rows, norm_threads)), dim3(norm_threads), 0,
                  stream, room, column_blocks(rows, cols), rows, out);
}

int dora_norm(const ConstMatrix& w, const ConstMatrix& a, const ConstMatrix& b, float scale, float* out,
              float* room, Stream stream) {
    return with_type(w.dtype, [&](auto type) {
        using T = decltype(type);
        const bool in_runs = w.cols % run == 0 && rows_on_16_bytes(w, sizeof(T));
        return norm(DenseWeights<T>{w}, in_runs, w.rows, w.cols, a, b, scale, out, room, stream);
    });
}

int dora_norm_4bit(const Packed4bit& w, DType weight_dtype, const ConstMatrix& a, const ConstMatrix& b,
                   float scale, float* out, float* room, Stream stream) {
    return with_type(weight_dtype, [&](auto type) {
        const bool powers = BlockShifts::fit(w);
        const bool in_runs =
            powers && w.cols % run == 0 && w.blocksize % run == 0 && (uintptr_t)w.packed % 4 == 0;
        return norm(PackedWeights<decltype(type)>{w, BlockShifts(w), powers}, in_runs, w.rows, w.cols, a, b,
                    scale, out, room, stream);
    });
}

}  // namespace fastlora::gpu
