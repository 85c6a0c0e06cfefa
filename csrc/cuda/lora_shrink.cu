// lora_shrink: out [T, R] = scale * D(x [T, I]) a^T
//
// Bound by reading x. A block walks along 128 rows of x in stages of 16 KB, three of them under way, and
// keeps the sums of up to 64 ranks in registers; more ranks are more blocks, neighbours, so that x comes to
// them from the L2 cache. Few rows are cut along the columns too, for blocks enough to fill the chip. The
// factor's part of a stage is cut once, by the whole block, and laid out as the tensor cores take it. Of the
// 16 warps each has 32 rows, half of a stage's columns and every other 8 ranks.
//
// The k of a product may come in any order: a lane's 4 elements of a k16 step are neighbours in memory.
#include "skinny.h"
#include "sums.h"

namespace fastlora::gpu {

constexpr int threads = 512, block_rows = 128, most_tiles = 4, ranks_per_tile = 16;

template <class T>
using Rows = Stages<T, block_rows, threads>;

// One stage's part of the factor in bfloat16 parts, [tile][part][8 ranks of 2][half][lane][words].
template <class T, int parts>
struct FactorStage {
    static constexpr int n = Chunk<T>::size, words = n / 2;
    static constexpr int piece_bytes = warp_size * words * 4, tile_bytes = 4 * piece_bytes;

    float values[n];

    // A warp reads one piece, a lane n neighbours along k.
    __device__ __forceinline__ void read(const Factor& a, int64_t rank, int64_t k, int tiles) {
        const int piece = threadIdx.x / warp_size;
        if (piece < 4 * tiles)
            a.read<parts>(rank + piece / 2 * 8 + lane() / 4, k + (piece % 2 * 4 + lane() % 4) * n, values);
    }

    __device__ __forceinline__ void write(char* shared, int tiles) const {
        const int piece = threadIdx.x / warp_size;
        if (piece >= 4 * tiles) return;
        Pack<uint32_t, words> out[parts];
#pragma unroll
        for (int w = 0; w < words; ++w) {
            uint32_t pairs[parts];
            cut(values[2 * w], values[2 * w + 1], pairs);
#pragma unroll
            for (int p = 0; p < parts; ++p) out[p].v[w] = pairs[p];
        }
#pragma unroll
        for (int p = 0; p < parts; ++p) at(shared, piece / 4, p, piece / 2 % 2, piece % 2) = out[p];
    }

    // Of this lane.
    static __device__ __forceinline__ Pack<uint32_t, words>& at(char* shared, int tile, int part, int eight,
                                                                int half) {
        return reinterpret_cast<Pack<uint32_t, words>*>(shared + (tile * parts + part) * tile_bytes +
                                                        (eight * 2 + half) * piece_bytes)[lane()];
    }
};

// blockIdx.x = (rows, ranks), blockIdx.y = a part of the columns.
template <class T, int parts>
__global__ void __launch_bounds__(threads)
    shrink(ConstMatrix x, Factor a, DropoutMask mask, bool packed, int64_t ranks, int rank_blocks,
           int block_tiles, int block_cols, PartOf out) {
    using Ring = Rows<T>;
    using Right = FactorStage<T, parts>;
    constexpr int x_parts = Chunk<T>::parts, steps = Chunk<T>::size / 4;
    constexpr bool one_part = x_parts * parts == 1;
    FASTLORA_SHARED(shared);
    char* const factor = shared + Ring::bytes;
    const int warp = threadIdx.x / warp_size, half = warp / 4 % 2, eight = warp / 8;
    const int g = lane() / 4, c = lane() % 4, warp_row = warp % 4 * 32;
    const int64_t row = blockIdx.x / rank_blocks * (int64_t)block_rows;
    const int rows = x.rows - row < block_rows ? (int)(x.rows - row) : block_rows;
    const int64_t rank = blockIdx.x % rank_blocks * (int64_t)(block_tiles * ranks_per_tile);
    const int64_t left_tiles = ceil_div(ranks - rank, ranks_per_tile);
    const int tiles = left_tiles < block_tiles ? (int)left_tiles : block_tiles;
    const int begin = blockIdx.y * block_cols;
    const int end = begin + block_cols < x.cols ? begin + block_cols : (int)x.cols;

    Ring ring(x, mask, packed, shared, row, rows);
    Right right;
#pragma unroll
    for (int i = 0; i < pipeline - 1; ++i)
        ring.fetch(begin + i * Ring::cols < end, 0, begin + i * Ring::cols);
    right.read(a, rank, begin, tiles);
    right.write(factor, tiles);

    float sums[most_tiles][2][4] = {};
    for (int col = begin; col < end; col += Ring::cols) {
        const char* stage = ring.wait();
        __syncthreads();
        const int ahead = col + (pipeline - 1) * Ring::cols;
        ring.fetch(ahead < end, 0, ahead);
        right.read(a, rank, col + Ring::cols, tiles);
        if (warp_row < rows) {
            uint32_t left[steps][x_parts][2][4];
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int segment = warp_row + m * 16 + h * 8 + g;
                    const auto chunk =
                        *reinterpret_cast<const Chunk<T>*>(stage + chunk_at(segment, half * 4 + c));
#pragma unroll
                    for (int i = 0; i < 2 * steps; ++i) {
                        uint32_t pairs[x_parts];
                        chunk.along(i, pairs);
#pragma unroll
                        for (int p = 0; p < x_parts; ++p) left[i / 2][p][m][i % 2 * 2 + h] = pairs[p];
                    }
                }
#pragma unroll
            for (int tile = 0; tile < most_tiles; ++tile)
                if (tile < tiles) {
                    Pack<uint32_t, Right::words> b[parts];
#pragma unroll
                    for (int q = 0; q < parts; ++q) b[q] = Right::at(factor, tile, q, eight, half);
                    float d[2][2][4] = {};  // of the largest parts, and of the others
#pragma unroll
                    for (int k = 0; k < steps; ++k)
                        for_parts<x_parts, parts, 3>([&](int p, int q) {
                            const uint32_t words[2] = {b[q].v[2 * k], b[q].v[2 * k + 1]};
                            mma<bf16>(d[p + q > 0][0], left[k][p][0], words);
                            mma<bf16>(d[p + q > 0][1], left[k][p][1], words);
                        });
#pragma unroll
                    for (int m = 0; m < 2; ++m)
#pragma unroll
                        for (int i = 0; i < 4; ++i)
                            sums[tile][m][i] += one_part ? d[0][m][i] : d[0][m][i] + d[1][m][i];
                }
        }
        __syncthreads();
        right.write(factor, tiles);
    }

    // The sums over the second half of the columns go to the warps that have the first half.
    float* const passed = reinterpret_cast<float*>(shared);
    static_assert(most_tiles * ranks_per_tile * block_rows * 4 <= Ring::bytes, "in place of the stages");
#pragma unroll
    for (int h = 1; h >= 0; --h) {
        if (half == h)
#pragma unroll
            for (int tile = 0; tile < most_tiles; ++tile)
                if (tile < tiles)
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        const int r = warp_row + i / 4 * 16 + i % 4 / 2 * 8 + g;
                        const int j = tile * ranks_per_tile + eight * 8 + 2 * c + i % 2;
                        float& other = passed[j * block_rows + r];
                        const float sum = sums[tile][i / 4][i % 4];
                        if (h)
                            other = sum;
                        else if (r < rows && rank + j < ranks)
                            out.store(blockIdx.y, row + r, rank + j, sum + other);
                    }
        __syncthreads();
    }
}

// ---- launcher ---------------------------------------------------------------

struct ShrinkPlan {
    int64_t rank_blocks, block_tiles, row_blocks;
    Cut cut;

    ShrinkPlan(const ConstMatrix& x, int64_t ranks)
        : rank_blocks(ceil_div(ranks, most_tiles * ranks_per_tile)),
          block_tiles(ceil_div(ceil_div(ranks, ranks_per_tile), rank_blocks)),
          row_blocks(ceil_div(x.rows, block_rows)),
          cut(row_blocks * rank_blocks, ceil_div(x.cols * (x.dtype == DType::f32 ? 4 : 2), segment_bytes),
              multiprocessors()) {}
};

int64_t lora_shrink_room(const ConstMatrix& x, int64_t ranks) {
    return ShrinkPlan(x, ranks).cut.room(x.rows * ranks);
}

int lora_shrink(const ConstMatrix& x, const ConstMatrix& a, bool a_transposed, const DropoutMask& mask,
                float scale, const Matrix& out, float* room, Stream stream) {
    const ShrinkPlan plan(x, out.cols);
    const dim3 grid((unsigned)(plan.row_blocks * plan.rank_blocks), (unsigned)plan.cut.parts);
    const Sum sum{room, plan.cut.parts, mask.bits ? (double)scale * mask.scale : scale, out};
    const auto run = [&](auto type, auto parts) {
        using T = decltype(type);
        const int64_t shared =
            pipeline_bytes() + plan.block_tiles * parts * FactorStage<T, parts()>::tile_bytes;
        return launch(shrink<T, parts()>, grid, dim3(threads), shared, stream, x, Factor(a, a_transposed),
                      mask, rows_on_16_bytes(x, sizeof(T)), out.cols, (int)plan.rank_blocks,
                      (int)plan.block_tiles, (int)plan.cut.steps * Rows<T>::cols, sum);
    };
    const int status = with_type(x.dtype, [&](auto type) {
        return factor_parts(a.dtype) == 1 ? run(type, std::integral_constant<int, 1>())
                                          : run(type, std::integral_constant<int, 3>());
    });
    return status ? status : add(sum, {}, stream);
}

}  // namespace fastlora::gpu
