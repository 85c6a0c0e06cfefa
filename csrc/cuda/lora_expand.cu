// lora_expand: out [T, O] = gain * (y + scale * D(s [T, R] b^T)) + offset
//
// One read and one write per element of y, and bound by them. A warp makes 16 rows of 128 bytes at a time: it
// asks for y, multiplies while y is on its way, and ends in the registers where y has arrived, so that
// nothing else passes through memory. The factor's part of the block's columns is cut once and stays in
// shared memory while the block walks down its rows; s is read by every strip of columns, from the caches.
//
// The columns of a product may come in any order, and so may the ranks: a lane's two columns of each of the 4
// (float32: 2) tiles of 8 are 16 bytes of a row, its 4 ranks neighbours in s.
#include "skinny.h"

namespace fastlora::gpu {

constexpr int threads = 256, warps = threads / warp_size, tile_rows = 16, ranks_per_step = 16;
constexpr int y_tiles = 2;  // of a warp: one at hand, one on its way
// Of shared memory: so that two blocks fit on a multiprocessor of most chips, and one on that of any.
constexpr int64_t comfortable_bytes = 64 << 10, most_bytes = 96 << 10;

template <class T>
struct ExpandTile {
    static constexpr int pack = Pack<T>::size, cols = 8 * pack, eights = cols / 8;
    // Of parts that count, see skinny.h. A bfloat16 output keeps 8 bits, so that 16 of the product will do;
    // the 11 of a float16 want more, where y and the term all but cancel.
    static constexpr int orders = is_bf16<T> ? 2 : 3;

    // The first column of this lane's pack p of 2.
    static __device__ __forceinline__ int pack_col(int p) { return (p * 4 + lane() % 4) * pack; }

    // Which column is the j-th of the i-th 8 that meet in one product.
    static __device__ __forceinline__ int col(int i, int j) {
        return (i / (pack / 2) * 4 + j / 2) * pack + i % (pack / 2) * 2 + j % 2;
    }
};

// This lane's share of the factor: two 8s of columns from `eight`, 4 ranks, in parts.
template <class T, int parts>
FASTLORA_DEVICE void read_factor(const Factor& b, int col, int eight, int rank,
                                 Pack<uint32_t, 4> (&out)[parts]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float v[4];
        b.read<parts>(col + ExpandTile<T>::col(eight + i, lane() / 4), rank + lane() % 4 * 4, v);
#pragma unroll
        for (int w = 0; w < 2; ++w) {
            uint32_t pairs[parts];
            cut(v[2 * w], v[2 * w + 1], pairs);
#pragma unroll
            for (int p = 0; p < parts; ++p) out[p].v[2 * i + w] = pairs[p];
        }
    }
}

constexpr int tile_bytes = tile_rows * segment_bytes;

struct ExpandPlan {
    int across;       // warps side by side; the others are below
    int steps, held;  // of 16 ranks: all, and those whose factor shared memory holds at a time
    int64_t shared, strips, pass_rows;
    Cut cut;

    ExpandPlan(const Matrix& out, int64_t ranks, int64_t tile_cols, int64_t step_bytes)
        : across(warps), steps(ranks ? (int)ceil_div(ranks, ranks_per_step) : 1), cut(1, 1, 1) {
        const int64_t vectors = 2 * tile_cols * 4, y_bytes = warps * y_tiles * tile_bytes;
        // Narrow where the factor is large, and where wide strips would be too few for the chip.
        const auto blocks = [&] {
            return ceil_div(out.cols, across * tile_cols) * ceil_div(out.rows, warps / across * tile_rows);
        };
        while (across > 1 && (y_bytes + across * (steps * step_bytes + vectors) > comfortable_bytes ||
                              blocks() < multiprocessors()))
            across /= 2;
        const int64_t limit = smaller(most_bytes, shared_memory_of_block());
        const int64_t most = ((limit - y_bytes) / across - vectors) / step_bytes;
        held = steps < most ? steps : (int)most;
        shared = y_bytes + across * (held * step_bytes + vectors);
        strips = ceil_div(out.cols, across * tile_cols);
        pass_rows = warps / across * tile_rows;
        cut = Cut(strips, ceil_div(out.rows, pass_rows), 2 * multiprocessors());
    }
};

// blockIdx.x = strip of columns, blockIdx.y = range of rows.
template <class T, int parts>
__global__ void FASTLORA_LAUNCH_BOUNDS(threads, 2)
    expand(ConstMatrix y, ConstMatrix s, Factor b, DropoutMask mask, float scale, const float* gain,
           const float* offset, Matrix out, int across, int steps, int held, bool packed, bool s_packed,
           int64_t block_rows) {
    using Tile = ExpandTile<T>;
    constexpr int pairs = Tile::eights / 2;
    FASTLORA_SHARED(shared);
    float* const gains = reinterpret_cast<float*>(shared + warps * y_tiles * tile_bytes);
    float* const offsets = gains + across * Tile::cols;
    auto* const factor = reinterpret_cast<Pack<uint32_t, 4>*>(offsets + across * Tile::cols);
    const int warp = threadIdx.x / warp_size, left = warp % across * Tile::cols;
    const int g = lane() / 4, c = lane() % 4;
    const int cols = (int)out.cols, strip = blockIdx.x * across * Tile::cols, col = strip + left;
    for (int i = threadIdx.x; i < across * Tile::cols; i += threads) {
        const bool inside = strip + i < cols;
        gains[i] = gain && inside ? gain[strip + i] : 1;
        offsets[i] = offset && inside ? offset[strip + i] : 0;
    }

    // Rows count from the block's first; this warp's begin at `below`.
    const int64_t first = blockIdx.y * block_rows;
    const int rows = (int)(out.rows - first < block_rows ? out.rows - first : block_rows);
    const int below = warp / across * tile_rows, pass_rows = warps / across * tile_rows;

    // This lane's two chunks of two rows, in slots of its own.
    const auto slot = [&](int now, int h, int p) -> Chunk<T>& {
        char* const tile = shared + (warp * y_tiles + now) * tile_bytes;
        return reinterpret_cast<Chunk<T>*>(tile)[(h * 2 + p) * warp_size + lane()];
    };
    const auto fetch = [&](int row, int now) {
        if (row < rows)
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
                for (int p = 0; p < 2; ++p) {
                    const int t = row + below + h * 8 + g, k = col + Tile::pack_col(p);
                    const T* from = y.data ? element<T>(y, first + t, k) : nullptr;
                    const int width = from && t < rows ? cols - k : 0;
                    if (packed && width >= Chunk<T>::size)
                        copy_async(&slot(now, h, p), from);
                    else
                        copy_elements((T*)&slot(now, h, p), from, width);
                }
        commit_copies();
    };

    fetch(0, 0);
    int now = 0;
    for (int pass = 0; pass < rows; pass += pass_rows, now ^= 1) {
        fetch(pass + pass_rows, now ^ 1);
        const int row = pass + below + g;
        uint32_t kept[2][2];
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int p = 0; p < 2; ++p) {
                const int t = row + h * 8, k = col + Tile::pack_col(p);
                kept[h][p] = mask.bits && t < rows && k < cols
                                 ? mask.bits[(first + t) * mask.pitch + k / 8] >> (k & 7)
                                 : ~0u;
            }

        float terms[Tile::eights][4] = {};
#pragma unroll 1
        for (int step = 0, at = 0; step < steps; ++step, ++at) {
            if (at == held) at = 0;
            if (at == 0 && (pass == 0 || held < steps)) {
                __syncthreads();
                for (int piece = warp; piece < across * held * pairs; piece += warps) {
                    Pack<uint32_t, 4> cut_factor[parts];
                    read_factor<T>(b, strip + piece / pairs / held * Tile::cols, piece % pairs * 2,
                                   (step + piece / pairs % held) * ranks_per_step, cut_factor);
#pragma unroll
                    for (int q = 0; q < parts; ++q)
                        factor[(piece * parts + q) * warp_size + lane()] = cut_factor[q];
                }
                __syncthreads();
            }
            if (pass + below >= rows) continue;
            uint32_t a[Tile::orders][4];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float v[4];
                read_run<float>(s, s_packed, first + row + h * 8, step * ranks_per_step + c * 4, v);
#pragma unroll
                for (int w = 0; w < 2; ++w) {
                    uint32_t words[Tile::orders];
                    cut(v[2 * w], v[2 * w + 1], words);
#pragma unroll
                    for (int p = 0; p < Tile::orders; ++p) a[p][2 * w + h] = words[p];
                }
            }
#pragma unroll
            for (int pair = 0; pair < pairs; ++pair) {
                const int piece = (warp % across * held + at) * pairs + pair;
                Pack<uint32_t, 4> right[parts];
#pragma unroll
                for (int q = 0; q < parts; ++q) right[q] = factor[(piece * parts + q) * warp_size + lane()];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float d[2][4] = {};  // of the largest parts, and of the others
                    float (&eight)[4] = terms[2 * pair + i];
                    for_parts<Tile::orders, parts, Tile::orders>([&](int p, int q) {
                        const uint32_t words[2] = {right[q].v[2 * i], right[q].v[2 * i + 1]};
                        mma<bf16>(sizeof(T) == 4 ? d[p + q > 0] : eight, a[p], words);
                    });
                    if constexpr (sizeof(T) == 4)
#pragma unroll
                        for (int k = 0; k < 4; ++k) eight[k] += d[0][k] + d[1][k];
                }
            }
        }

        wait_copies<1>();
#pragma unroll
        for (int p = 0; p < 2; ++p) {
            one_at_a_time();
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int t = row + h * 8, k = col + Tile::pack_col(p), width = t < rows ? cols - k : 0;
                T* to = element<T>(out, first + t, k);
                Chunk<T> chunk = slot(now, h, p);
#pragma unroll
                for (int e = 0; e < Chunk<T>::size; e += 4) {
                    const int at = left + Tile::pack_col(p) + e;
                    const Pack<float> scales = load_pack(gains + at), shifts = load_pack(offsets + at);
                    float v[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float term = scale * terms[(p * Chunk<T>::size + e + i) / 2][h * 2 + i % 2];
                        v[i] = chunk.value(e + i) + (kept[h][p] >> (e + i) & 1 ? term : 0);
                        v[i] = scales.v[i] * v[i] + shifts.v[i];
                    }
                    chunk.set(e / 2, v[0], v[1]);
                    chunk.set(e / 2 + 1, v[2], v[3]);
                }
                if (packed && width >= Chunk<T>::size)
                    chunk.store(to);
                else
                    chunk.store(to, width);
            }
        }
    }
}

// ---- launcher ---------------------------------------------------------------

int lora_expand(const ConstMatrix& y, const ConstMatrix& s, const ConstMatrix& b, bool b_transposed,
                const DropoutMask& mask, float scale, const float* gain, const float* offset,
                const Matrix& out, Stream stream) {
    const auto run = [&](auto type, auto parts) {
        using T = decltype(type);
        using Tile = ExpandTile<T>;
        const ExpandPlan plan(out, s.cols, Tile::cols, Tile::eights / 2 * parts * warp_size * 16);
        return launch(expand<T, parts()>, dim3((unsigned)plan.strips, (unsigned)plan.cut.parts),
                      dim3(threads), plan.shared, stream, y, s, Factor(b, b_transposed), mask,
                      mask.bits ? scale * mask.scale : scale, gain, offset, out, plan.across, plan.steps,
                      plan.held, rows_on_16_bytes(y, sizeof(T)) && rows_on_16_bytes(out, sizeof(T)),
                      rows_on_16_bytes(s, 4), plan.cut.steps * plan.pass_rows);
    };
    return with_type(out.dtype, [&](auto type) {
        constexpr int parts = ExpandTile<decltype(type)>::orders;
        return b.dtype == DType::bf16 ? run(type, std::integral_constant<int, 1>())
                                      : run(type, std::integral_constant<int, parts>());
    });
}

}  // namespace fastlora::gpu
