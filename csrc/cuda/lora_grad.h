// The walk down the rows of x that lora_grad and lora_backward share.
//
//     grad [R, I] = s [T, R]^T D(x [T, I])        and, on the same pass, ds [T, R] = x b [I, R]
//
// A block has a strip of 512 columns (float32: 256), 64 for each warp or pair of warps, and a range of rows.
// It walks down 16 rows, 16 KB, at a time, with three such stages under way. The sums of grad stay in
// registers; those of ds are complete after all strips, so each strip writes a part of them, R / 256 of what
// it reads.
#pragma once

#include "skinny.h"
#include "sums.h"

namespace fastlora::gpu {

constexpr int walk_rows = 16, walk_warps = 8, walk_threads = walk_warps * warp_size;
constexpr int ranks_per_tile = 16;

template <class T>
using Walk = Stages<T, walk_rows, walk_threads>;

// s of one stage as the left operand, ranks by rows, in bfloat16 parts: [tile][part][lane][4 words]. A word
// is two neighbouring rows of a rank, and made by one thread.
template <int most_tiles>
struct WalkFactor {
    static constexpr int parts = 3, words = 4 * warp_size, tile_bytes = parts * words * 4;
    static constexpr int most = (int)ceil_div(most_tiles * words, walk_threads);
    float values[most][2];

    static __device__ __forceinline__ int word(int i) { return i * walk_threads + (int)threadIdx.x; }

    __device__ __forceinline__ void read(const ConstMatrix& s, int64_t first, int row, int rows, int rank,
                                         int tiles) {
#pragma unroll
        for (int i = 0; i < most; ++i)
            if (word(i) < tiles * words) {
                const int j = rank + word(i) / words * ranks_per_tile + word(i) % ranks_per_tile;
                const int t = row + word(i) % words / ranks_per_tile * 2;
#pragma unroll
                for (int h = 0; h < 2; ++h)
                    values[i][h] = j < s.cols && t + h < rows
                                       ? ((const float*)s.data)[(first + t + h) * s.pitch + j]
                                       : 0;
            }
    }

    __device__ __forceinline__ void write(char* shared, int tiles) const {
#pragma unroll
        for (int i = 0; i < most; ++i)
            if (word(i) < tiles * words) {
                const int j = word(i) % ranks_per_tile, pair = word(i) % words / ranks_per_tile;
                auto* to = reinterpret_cast<uint32_t*>(shared + word(i) / words * tile_bytes) +
                           (j % 8 * 4 + pair % 4) * 4 + pair / 4 * 2 + j / 8;
                uint32_t pairs[parts];
                cut(values[i][0], values[i][1], pairs);
#pragma unroll
                for (int q = 0; q < parts; ++q) to[q * words] = pairs[q];
            }
    }

    static __device__ __forceinline__ void load(const char* tile, uint32_t (&a)[parts][4]) {
        const auto* from = reinterpret_cast<const Pack<uint32_t>*>(tile) + lane();
#pragma unroll
        for (int q = 0; q < parts; ++q) {
            const Pack<uint32_t> pack = from[q * warp_size];
#pragma unroll
            for (int w = 0; w < 4; ++w) a[q][w] = pack.v[w];
        }
    }
};

// sums [16 ranks, columns of a segment] += s^T x over one stage, a [.., 16 ranks, 16 rows]. Column i of 8
// (float32: 4) neighbours is one of the columns that meet in the i-th product.
template <class T, int parts, int n>
FASTLORA_DEVICE void add_grad(const char* stage, int segment, const uint32_t (&a)[parts][4], bool exact,
                              float (&sums)[n][4]) {
    using Half = Chunk<T, 8>;
    constexpr int x_parts = Half::parts;
    const int g = lane() / 4, c = lane() % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        one_at_a_time();
        Half rows[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            rows[i] = reinterpret_cast<const Half*>(
                stage + chunk_at(segment * walk_rows + 2 * c + i % 2 + i / 2 * 8, g))[half];
#pragma unroll
        for (int i = 0; i < n / 2; ++i) {
            uint32_t upper[x_parts], lower[x_parts];
            rows[0].across(rows[1], i, upper);
            rows[2].across(rows[3], i, lower);
            float d[2][4] = {};  // of the largest parts, and of the others
            for_parts<x_parts, parts, 3>([&](int p, int q) {
                const uint32_t b[2] = {upper[p], lower[p]};
                if (exact || p + q < 2) mma<bf16>(d[p + q > 0], a[q], b);
            });
#pragma unroll
            for (int k = 0; k < 4; ++k) sums[half * (n / 2) + i][k] += d[0][k] + d[1][k];
        }
    }
}

// b of a segment's columns and 16 ranks in bfloat16 parts, in registers.
template <class T, int parts>
struct WalkColumns {
    static constexpr int size = Chunk<T>::size, words = size / 2;
    uint32_t pairs[2][2][parts][words];  // [half of the segment][8 ranks of 2]

    __device__ __forceinline__ WalkColumns(const Factor& b, int64_t rank, int64_t col) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                float v[size];
                b.read<parts>(rank + n * 8 + lane() / 4, col + (half * 4 + lane() % 4) * size, v);
#pragma unroll
                for (int w = 0; w < words; ++w) {
                    uint32_t cut_pair[parts];
                    cut(v[2 * w], v[2 * w + 1], cut_pair);
#pragma unroll
                    for (int q = 0; q < parts; ++q) pairs[half][n][q][w] = cut_pair[q];
                }
            }
    }

    // to [16 rows, 16 ranks] = x b over one segment of a stage.
    __device__ __forceinline__ void multiply(const char* stage, int segment, float* to) const {
        constexpr int x_parts = Chunk<T>::parts, steps = size / 4;
        const int g = lane() / 4, c = lane() % 4;
        float terms[2][4] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t a[steps][x_parts][4];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const auto chunk = *reinterpret_cast<const Chunk<T>*>(
                    stage + chunk_at(segment * walk_rows + h * 8 + g, half * 4 + c));
#pragma unroll
                for (int i = 0; i < 2 * steps; ++i) {
                    uint32_t cut_pair[x_parts];
                    chunk.along(i, cut_pair);
#pragma unroll
                    for (int p = 0; p < x_parts; ++p) a[i / 2][p][i % 2 * 2 + h] = cut_pair[p];
                }
            }
            float d[2][2][4] = {};  // of the largest parts, and of the others
#pragma unroll
            for (int k = 0; k < steps; ++k)
                for_parts<x_parts, parts, 3>([&](int p, int q) {
#pragma unroll
                    for (int n = 0; n < 2; ++n) {
                        const uint32_t b[2] = {pairs[half][n][q][2 * k], pairs[half][n][q][2 * k + 1]};
                        mma<bf16>(d[p + q > 0][n], a[k][p], b);
                    }
                });
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int k = 0; k < 4; ++k) terms[n][k] += d[0][n][k] + d[1][n][k];
        }
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int k = 0; k < 4; ++k)
                to[(k / 2 * 8 + g) * ranks_per_tile + n * 8 + 2 * c + k % 2] = terms[n][k];
    }
};

template <class T>
struct WalkColumns<T, 0> {
    __device__ __forceinline__ WalkColumns(const Factor&, int64_t, int64_t) {}
};

struct WalkPlan {
    int64_t strips, rank_blocks, block_tiles;
    Cut cut;

    WalkPlan(const ConstMatrix& x, int64_t ranks, int64_t most_tiles)
        : strips(ceil_div(x.cols * (x.dtype == DType::f32 ? 4 : 2), walk_warps * segment_bytes)),
          rank_blocks(ceil_div(ranks, most_tiles * ranks_per_tile)),
          block_tiles(ceil_div(ceil_div(ranks, ranks_per_tile), rank_blocks)),
          cut(strips * rank_blocks, ceil_div(x.rows, walk_rows), multiprocessors()) {}

    dim3 grid() const { return dim3((unsigned)(strips * rank_blocks), (unsigned)cut.parts); }
};

constexpr int walk_exchange = walk_warps * walk_rows * ranks_per_tile;  // floats: a stage's ds, by warps

inline int64_t walk_shared(const WalkPlan& plan, bool with_ds) {
    return pipeline_bytes() + 2 * plan.block_tiles * WalkFactor<1>::tile_bytes +
           (with_ds ? 2 * walk_exchange * 4 : 0);
}

// blockIdx.x = (strip, ranks), blockIdx.y = range of rows. b_parts: of b, or 0 for grad alone; exact: to
// float32's digits, not 16 bits.
template <class T, int most_tiles, int b_parts>
__global__ void FASTLORA_LAUNCH_BOUNDS(walk_threads, 1)
    walk_down(ConstMatrix s, ConstMatrix x, DropoutMask mask, bool packed, int rank_blocks, int block_tiles,
              int64_t block_rows, bool exact, bool transposed, PartOf grad, Factor b, PartOf ds) {
    using Ring = Walk<T>;
    using Left = WalkFactor<most_tiles>;
    constexpr int cols = segment_chunks * Chunk<T>::size;
    FASTLORA_SHARED(shared);
    char* const factors = shared + Ring::bytes;
    float* const exchange = reinterpret_cast<float*>(factors + 2 * block_tiles * Left::tile_bytes);
    const int warp = threadIdx.x / warp_size;
    const int strip = blockIdx.x / rank_blocks, col = strip * Ring::cols, warp_col = col + warp * cols;
    const int rank = blockIdx.x % rank_blocks * block_tiles * ranks_per_tile;
    const int left_tiles = (int)ceil_div(s.cols - rank, ranks_per_tile);
    const int tiles = left_tiles < block_tiles ? left_tiles : block_tiles;
    const int64_t first = blockIdx.y * block_rows;
    const int rows = (int)(x.rows - first < block_rows ? x.rows - first : block_rows);

    Ring stages(x, mask, packed, shared, first, rows);
#pragma unroll
    for (int i = 0; i < pipeline - 1; ++i) stages.fetch(i * walk_rows < rows, i * walk_rows, col);
    Left factor;
    factor.read(s, first, 0, rows, rank, tiles);
    factor.write(factors, tiles);
    const WalkColumns<T, b_parts> columns(b, rank, warp_col);

    // The warps' shares of ds of the stage at `row`, added.
    const auto finish_ds = [&](int row, int stage) {
        const int t = row + threadIdx.x / ranks_per_tile, j = rank + threadIdx.x % ranks_per_tile;
        float sum = 0;
#pragma unroll
        for (int i = 0; i < walk_warps; ++i)
            sum += exchange[stage * walk_exchange + i * walk_rows * ranks_per_tile + threadIdx.x];
        if (t < rows && j < s.cols) ds.store(strip, first + t, j, sum);
    };

    float sums[most_tiles][Chunk<T>::size][4] = {};
    int now = 0;
    for (int row = 0; row < rows; row += walk_rows, now ^= 1) {
        const char* stage = stages.wait();
        __syncthreads();
        const int ahead = row + (pipeline - 1) * walk_rows;
        stages.fetch(ahead < rows, ahead, col);
        factor.read(s, first, row + walk_rows, rows, rank, tiles);
        if constexpr (b_parts > 0) {
            if (row) finish_ds(row - walk_rows, now ^ 1);
            columns.multiply(stage, warp, exchange + now * walk_exchange + warp * walk_rows * ranks_per_tile);
        }
        if (warp_col < x.cols)
#pragma unroll
            for (int tile = 0; tile < most_tiles; ++tile)
                if (tile < tiles) {
                    uint32_t a[Left::parts][4];
                    Left::load(factors + (now * block_tiles + tile) * Left::tile_bytes, a);
                    add_grad<T>(stage, warp, a, exact, sums[tile]);
                }
        factor.write(factors + (now ^ 1) * block_tiles * Left::tile_bytes, tiles);
    }
    __syncthreads();
    if constexpr (b_parts > 0)
        if (rows) finish_ds((rows - 1) / walk_rows * walk_rows, now ^ 1);

    // Out through shared memory, so that neighbouring lanes write neighbours.
    constexpr int pitch = cols + 1;
    static_assert(walk_warps * ranks_per_tile * pitch * 4 <= Ring::bytes + 2 * Left::tile_bytes,
                  "in place of the stages and s");
    float* const tile_sums = reinterpret_cast<float*>(shared) + warp * ranks_per_tile * pitch;
    const int g = lane() / 4, c = lane() % 4;
#pragma unroll
    for (int tile = 0; tile < most_tiles; ++tile) {
#pragma unroll
        for (int k = 0; k < 4 * Chunk<T>::size; ++k)
            tile_sums[(k % 4 / 2 * 8 + g) * pitch + (2 * c + k % 2) * Chunk<T>::size + k / 4] =
                sums[tile][k / 4][k % 4];
        __syncthreads();
        const int tile_rank = rank + tile * ranks_per_tile;
        for (int k = lane(); k < ranks_per_tile * cols; k += warp_size) {
            const int r = transposed ? k % ranks_per_tile : k / cols, j = tile_rank + r;
            const int o = transposed ? k / ranks_per_tile : k % cols, at = warp_col + o;
            if (tile < tiles && j < s.cols && at < x.cols)
                grad.store(blockIdx.y, transposed ? at : j, transposed ? j : at, tile_sums[r * pitch + o]);
        }
        __syncthreads();
    }
}

}  // namespace fastlora::gpu
