// dora_norm: out[o] = ||W_o + s (B A)_o|| = sqrt(||W_o||^2 + 2 s <W_o A^T, B_o> + s^2 B_o (A A^T) B_o^T)
//
// One pass over W, dense or packed, gives both ||W_o||^2 and W_o A^T, so nothing about W is cached and B A is
// never made. Bound by the 2 O I r flops of W A^T in float32. The three terms cancel only where s B A is
// nearly -W.
#ifdef FASTLORA_LEVEL
#include "decode_4bit.h"
#include "skinny.h"

namespace fastlora::FASTLORA_LEVEL {

// Columns [col, col + depth) of one row of W as float32. Packed weights are rounded to their dtype on the
// way, as a dense copy would be. A pointer, not a template: the product that follows is compiled once.
using ReadRow = void (*)(const ConstMatrix* dense, const Packed4bit* packed, int64_t row, int64_t col,
                         int64_t depth, float* out);

template <class T>
void read_dense(const ConstMatrix* w, const Packed4bit*, int64_t row, int64_t col, int64_t depth,
                float* out) {
    widen((const T*)w->data + row * w->pitch + col, depth, nullptr, 0, 1.0f, out);
}

template <class T>
void read_packed(const ConstMatrix*, const Packed4bit* w, int64_t row, int64_t col, int64_t depth,
                 float* out) {
    alignas(64) T decoded[depth_block];
    decode(*w, row * w->cols + col, depth, decoded);
    widen(decoded, depth, nullptr, 0, 1.0f, out);
}

// out[t] from P = W A^T, ||W_t||^2 and rows of B [rows, width], with gram = A A^T.
static void finish_rows(const float* p, const float* squares, const float* b, const float* gram, int64_t rows,
                        int64_t ranks, float scale, float* bg, float* out) {
    const int64_t width = padded(ranks);
    for (int64_t i = 0; i < row_tile * width; ++i) bg[i] = 0;
    multiply_rows(b, width, rows, gram, width, width, ranks, bg, width);
    for (int64_t t = 0; t < rows; ++t) {
        vf cross = {}, quad = {};
        for (int64_t j = 0; j < width; j += lanes) {
            const vf bj = load(b + t * width + j);
            cross += load(p + t * width + j) * bj;
            quad += load(bg + t * width + j) * bj;
        }
        const float squared = squares[t] + 2 * scale * sum(cross) + scale * scale * sum(quad);
        out[t] = squared > 0 ? __builtin_sqrtf(squared) : squared == squared ? 0 : squared;
    }
}

void norm_rows(const ConstMatrix* dense, const Packed4bit* packed, DType dtype, int64_t cols,
               const float* packed_a, const float* gram, const float* wide_b, int64_t ranks, float scale,
               float* scratch, float* out, int64_t begin, int64_t end) {
    const ReadRow read = dense ? (dtype == DType::f32    ? read_dense<float>
                                  : dtype == DType::bf16 ? read_dense<bf16>
                                                         : read_dense<f16>)
                               : (dtype == DType::f32    ? read_packed<float>
                                  : dtype == DType::bf16 ? read_packed<bf16>
                                                         : read_packed<f16>);
    const int64_t width = padded(ranks);
    float wide[row_tile * depth_block], squares[row_tile];
    float *p = scratch, *bg = scratch + row_tile * width;
    for (int64_t o = begin; o < end; o += row_tile) {
        const int64_t rows = end - o < row_tile ? end - o : row_tile;
        for (int64_t i = 0; i < row_tile * width; ++i) p[i] = 0;
        vf square[row_tile] = {};
        for (int64_t k0 = 0; k0 < cols; k0 += depth_block) {
            const int64_t depth = cols - k0 < depth_block ? cols - k0 : depth_block;
            for (int64_t t = 0; t < rows; ++t) {
                float* row = wide + t * depth_block;
                for (int64_t k = depth; k < padded(depth); ++k) row[k] = 0;
                read(dense, packed, o + t, k0, depth, row);
                vf part = {};  // each block's sum starts at zero: shorter chains of roundings
                for (int64_t k = 0; k < depth; k += lanes) part += load(row + k) * load(row + k);
                square[t] += part;
            }
            multiply_rows(wide, depth_block, rows, packed_a + k0 * width, width, width, depth, p, width);
        }
        for (int64_t t = 0; t < rows; ++t) squares[t] = sum(square[t]);
        finish_rows(p, squares, wide_b + o * width, gram, rows, ranks, scale, bg, out + o);
    }
}

// gram [ranks, width] = A A^T from A packed as [cols, width].
void gram_of(const float* packed_a, int64_t cols, int64_t ranks, float* gram) {
    const int64_t width = padded(ranks);
    for (int64_t i = 0; i < ranks * width; ++i) gram[i] = 0;
    float wide[row_tile * depth_block];
    for (int64_t j0 = 0; j0 < ranks; j0 += row_tile) {
        const int64_t rows = ranks - j0 < row_tile ? ranks - j0 : row_tile;
        for (int64_t k0 = 0; k0 < cols; k0 += depth_block) {
            const int64_t depth = cols - k0 < depth_block ? cols - k0 : depth_block;
            for (int64_t t = 0; t < rows; ++t)
                for (int64_t k = 0; k < depth; ++k)
                    wide[t * depth_block + k] = packed_a[(k0 + k) * width + j0 + t];
            multiply_rows(wide, depth_block, rows, packed_a + k0 * width, width, width, depth,
                          gram + j0 * width, width);
        }
    }
}

void decode_norm_rows(const Packed4bit& w, int64_t begin, int64_t end, uint16_t* out) {
    decode(w, begin * w.cols, (end - begin) * w.cols, (bf16*)out);
}

int64_t norm_width(int64_t ranks) {
    return padded(ranks);
}
void pack_norm_factors(const ConstMatrix& a, const ConstMatrix& b, float* packed_a, float* wide_b) {
    pack_factor(a, false, packed_a);
    pack_factor(b, true, wide_b);  // "transposed" with respect to [ranks, O]: rows of b as they are, padded
}

}  // namespace fastlora::FASTLORA_LEVEL
#else
#define FASTLORA_KERNELS "dora_norm.cpp"
#include "levels.h"
#include "scratch.h"
#include "tiles.h"

namespace fastlora::cpu {

#ifdef FASTLORA_TILES
static void norm_on_tiles(const ConstMatrix* dense, const Packed4bit* packed_w, int64_t rows, int64_t cols,
                          const ConstMatrix& a, const ConstMatrix& b, float scale, float* out,
                          ParallelFor run) {
    static thread_local Scratch shared;
    const int parts = tiles::shrink_parts(a.dtype);
    const int64_t ranks = a.rows, factor = tiles::shrink_factor_bytes(a, ranks, cols) / 4;
    float* space = shared.floats(factor + ranks * ranks + tiles::gram_scratch_floats(a, parts));
    auto* packed_a = (uint16_t*)space;
    float* gram = space + factor;
    tiles::pack_shrink_factor(a, false, ranks, cols, packed_a);
    tiles::gram(a, packed_a, parts, gram, gram + ranks * ranks);
    const auto decode_rows = FASTLORA_PICK(decode_norm_rows);
    const int64_t grain = 1 + (1 << 17) / (32 * cols + 1);  // 128k weights, some 10 us
    parallel(run, (rows + 31) / 32, grain, [&](int64_t begin, int64_t end) {
        static thread_local Scratch own;
        for (int64_t o = 32 * begin; o < 32 * end && o < rows; o += 32) {
            const int64_t count = rows - o < 32 ? rows - o : 32;
            ConstMatrix block{nullptr, DType::bf16, count, cols, cols};
            if (dense) {
                block.data = (const uint16_t*)dense->data + o * dense->pitch;
                block.pitch = dense->pitch;
            } else {
                auto* decoded = (uint16_t*)own.floats(16 * cols);
                decode_rows(*packed_w, o, o + count, decoded);
                block.data = decoded;
            }
            tiles::norm_rows(block, packed_a, parts, gram, b, o, scale, out + o);
        }
    });
}
#endif

static void norm(const ConstMatrix* dense, const Packed4bit* packed, DType dtype, int64_t rows, int64_t cols,
                 const ConstMatrix& a, const ConstMatrix& b, float scale, float* out, ParallelFor run) {
#ifdef FASTLORA_TILES
    if (tiles::takes(dtype, a.dtype)) return norm_on_tiles(dense, packed, rows, cols, a, b, scale, out, run);
#endif
    static thread_local Scratch shared;
    const int64_t ranks = a.rows, width = FASTLORA_PICK(norm_width)(ranks);
    float* packed_a = shared.floats((cols + rows + ranks) * width);
    float *wide_b = packed_a + cols * width, *gram = wide_b + rows * width;
    FASTLORA_PICK(pack_norm_factors)(a, b, packed_a, wide_b);
    FASTLORA_PICK(gram_of)(packed_a, cols, ranks, gram);
    const auto body = FASTLORA_PICK(norm_rows);
    const int64_t grain = 8 + (1 << 19) / (cols * width + 1) / 8 * 8;  // ~0.5 M multiply-adds, some 10 us
    parallel(run, rows, grain, [&](int64_t begin, int64_t end) {
        static thread_local Scratch own;
        body(dense, packed, dtype, cols, packed_a, gram, wide_b, ranks, scale, own.floats(16 * width), out,
             begin, end);
    });
}

void dora_norm(const ConstMatrix& w, const ConstMatrix& a, const ConstMatrix& b, float scale, float* out,
               ParallelFor run) {
    norm(&w, nullptr, w.dtype, w.rows, w.cols, a, b, scale, out, run);
}

void dora_norm_4bit(const Packed4bit& w, DType weight_dtype, const ConstMatrix& a, const ConstMatrix& b,
                    float scale, float* out, ParallelFor run) {
    norm(nullptr, &w, weight_dtype, w.rows, w.cols, a, b, scale, out, run);
}

}  // namespace fastlora::cpu
#endif
