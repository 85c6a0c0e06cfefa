// lora_shrink: out [T, R] = scale * D(x [T, I]) a^T
//
// Reads x once in its own dtype, whatever the factor's, and never writes a widened or dropped-out copy of it.
// All levels add in the order of k; they differ by the rounding of fused multiply-adds only.
#ifdef FASTLORA_LEVEL
#include "skinny.h"

namespace fastlora::FASTLORA_LEVEL {

template <class T>
void shrink_rows_as(const ConstMatrix& x, const float* packed, int64_t ranks, const DropoutMask& mask,
                    float scale, float* out, int64_t begin, int64_t end) {
    const int64_t width = padded(ranks);
    constexpr int64_t pass = 64;  // ranks beyond 64 in passes, so that the sums stay in L1
    float wide[row_tile * depth_block], sums[row_tile * pass];
    for (int64_t t0 = begin; t0 < end; t0 += row_tile) {
        const int64_t rows = end - t0 < row_tile ? end - t0 : row_tile;
        for (int64_t j0 = 0; j0 < width; j0 += pass) {
            const int64_t columns = width - j0 < pass ? width - j0 : pass;
            for (int64_t i = 0; i < row_tile * pass; ++i) sums[i] = 0;
            for (int64_t k0 = 0; k0 < x.cols; k0 += depth_block) {
                const int64_t depth = x.cols - k0 < depth_block ? x.cols - k0 : depth_block;
                for (int64_t t = t0; t < t0 + rows; ++t)
                    widen((const T*)x.data + t * x.pitch + k0, depth,
                          mask.bits ? mask.bits + t * mask.pitch : nullptr, k0, mask.scale,
                          wide + (t - t0) * depth_block);
                multiply_rows(wide, depth_block, rows, packed + k0 * width + j0, width, columns, depth, sums,
                              pass);
            }
            for (int64_t t = 0; t < rows; ++t)
                for (int64_t j = 0; j < columns && j0 + j < ranks; ++j)
                    out[(t0 + t) * ranks + j0 + j] = scale * sums[t * pass + j];
        }
    }
}

void shrink_rows(const ConstMatrix& x, const float* packed, int64_t ranks, const DropoutMask& mask,
                 float scale, float* out, int64_t begin, int64_t end) {
    if (x.dtype == DType::f32) return shrink_rows_as<float>(x, packed, ranks, mask, scale, out, begin, end);
    if (x.dtype == DType::bf16) return shrink_rows_as<bf16>(x, packed, ranks, mask, scale, out, begin, end);
    shrink_rows_as<f16>(x, packed, ranks, mask, scale, out, begin, end);
}

void pack_shrink_factor(const ConstMatrix& a, bool transposed, float* packed) {
    pack_factor(a, transposed, packed);
}
int64_t shrink_width(int64_t ranks) {
    return padded(ranks);
}

}  // namespace fastlora::FASTLORA_LEVEL
#else
#define FASTLORA_KERNELS "lora_shrink.cpp"
#include "levels.h"
#include "scratch.h"
#include "tiles.h"

namespace fastlora::cpu {

void lora_shrink(const ConstMatrix& x, const ConstMatrix& a, bool a_transposed, const DropoutMask& mask,
                 float scale, const Matrix& out, ParallelFor run) {
    static thread_local Scratch scratch;
#ifdef FASTLORA_TILES
    if (tiles::takes(x.dtype, a.dtype)) {
        auto* packed = (uint16_t*)scratch.floats(tiles::shrink_factor_bytes(a, out.cols, x.cols) / 4);
        tiles::pack_shrink_factor(a, a_transposed, out.cols, x.cols, packed);
        const int parts = tiles::shrink_parts(a.dtype);
        return parallel(run, (x.rows + 31) / 32, tiles::grain(32 * x.cols), [&](int64_t begin, int64_t end) {
            tiles::shrink_blocks(x, packed, parts, out.cols, mask, scale, (float*)out.data, begin, end);
        });
    }
#endif
    const auto rows = FASTLORA_PICK(shrink_rows);
    float* packed = scratch.floats(x.cols * FASTLORA_PICK(shrink_width)(out.cols));
    FASTLORA_PICK(pack_shrink_factor)(a, a_transposed, packed);
    const int64_t grain =
        8 + (1 << 19) / (x.cols * out.cols + 1) / 8 * 8;  // ~0.5 M multiply-adds, some 10 us
    parallel(run, x.rows, grain, [&](int64_t begin, int64_t end) {
        rows(x, packed, out.cols, mask, scale, (float*)out.data, begin, end);
    });
}

}  // namespace fastlora::cpu
#endif
