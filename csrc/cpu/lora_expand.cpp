// lora_expand: y [T, O] += D(scale * (s [T, R] b^T + bias)), in place
//
// One read and one write of y: bound by these, or by the 2 T O R flops from about r = 16 on. The product is added to y in
// float32 and rounded once.
#ifdef FASTLORA_LEVEL
#include "skinny.h"

namespace fastlora::FASTLORA_LEVEL {

constexpr int expand_vectors = 4;

// y[rows, vectors * lanes] of one register tile; the last vector holds `tail` elements.
template <class T, int rows, int vectors>
FASTLORA_INLINE void expand_tile(const float* s, int64_t ranks, const float* packed, int64_t width, const float* bias,
                                 const DropoutMask& mask, int64_t t0, int64_t col, float scale, T* y, int64_t pitch,
                                 int64_t tail) {
    vf acc[rows][vectors];
    for (int v = 0; v < vectors; ++v) {
        const vf start = !bias ? vf{} : v == vectors - 1 ? load(bias + col + v * lanes, tail) : load(bias + col + v * lanes);
        for (int t = 0; t < rows; ++t) acc[t][v] = start;
    }
    for (int64_t j = 0; j < ranks; ++j) {
        vf p[vectors];
        for (int v = 0; v < vectors; ++v) p[v] = load(packed + j * width + col + v * lanes);
        for (int t = 0; t < rows; ++t) {
            const vf value = splat(s[t * ranks + j]);
            for (int v = 0; v < vectors; ++v) acc[t][v] += value * p[v];
        }
    }
    for (int t = 0; t < rows; ++t) {
        for (int v = 0; v < vectors; ++v) {
            T* at = y + t * pitch + col + v * lanes;
            vf term = splat(scale) * acc[t][v];
            if (mask.bits) term = term * mask_scale(mask.bits + (t0 + t) * mask.pitch, col + v * lanes, mask.scale);
            if (v == vectors - 1 && tail < lanes)
                store(at, load(at, tail) + term, tail);
            else
                store(at, load(at) + term);
        }
    }
}

template <class T, int rows>
FASTLORA_INLINE void expand_block(const float* s, int64_t ranks, const float* packed, int64_t width, const float* bias,
                                  const DropoutMask& mask, int64_t t0, float scale, T* y, int64_t pitch, int64_t cols) {
    constexpr int64_t step = expand_vectors * lanes;
    int64_t col = 0;
    for (; col + step <= cols; col += step)
        expand_tile<T, rows, expand_vectors>(s, ranks, packed, width, bias, mask, t0, col, scale, y, pitch, lanes);
    for (; col < cols; col += lanes)
        expand_tile<T, rows, 1>(s, ranks, packed, width, bias, mask, t0, col, scale, y, pitch,
                                cols - col < lanes ? cols - col : lanes);
}

template <class T>
void expand_rows_as(const float* s, int64_t ranks, const float* packed, int64_t width, const float* bias,
                    const DropoutMask& mask, float scale, const Matrix& y, int64_t begin, int64_t end) {
    constexpr int rows = 6;  // 6 x 4 accumulators, 4 factor vectors, one broadcast: 29 of 32 registers
    int64_t t = begin;
    for (; t + rows <= end; t += rows)
        expand_block<T, rows>(s + t * ranks, ranks, packed, width, bias, mask, t, scale, (T*)y.data + t * y.pitch,
                              y.pitch, y.cols);
    for (; t < end; ++t)
        expand_block<T, 1>(s + t * ranks, ranks, packed, width, bias, mask, t, scale, (T*)y.data + t * y.pitch, y.pitch,
                           y.cols);
}

void expand_rows(const float* s, int64_t ranks, const float* packed, int64_t width, const float* bias,
                 const DropoutMask& mask, float scale, const Matrix& y, int64_t begin, int64_t end) {
    if (y.dtype == DType::f32)
        return expand_rows_as<float>(s, ranks, packed, width, bias, mask, scale, y, begin, end);
    if (y.dtype == DType::bf16)
        return expand_rows_as<bf16>(s, ranks, packed, width, bias, mask, scale, y, begin, end);
    expand_rows_as<f16>(s, ranks, packed, width, bias, mask, scale, y, begin, end);
}

void pack_expand_factor(const ConstMatrix& b, bool transposed, float* packed) { pack_factor(b, transposed, packed); }
int64_t expand_width(int64_t cols) { return padded(cols); }

}  // namespace fastlora::FASTLORA_LEVEL
#else
#define FASTLORA_KERNELS "lora_expand.cpp"
#include "levels.h"
#include "scratch.h"

namespace fastlora::cpu {

void lora_expand(const ConstMatrix& s, const ConstMatrix& b, bool b_transposed, const float* bias,
                 const DropoutMask& mask, float scale, const Matrix& y, ParallelFor run) {
    static thread_local Scratch scratch;
    const auto rows = FASTLORA_PICK(expand_rows);
    const int64_t width = FASTLORA_PICK(expand_width)(y.cols);
    float* packed = scratch.floats(s.cols * width);
    FASTLORA_PICK(pack_expand_factor)(b, b_transposed, packed);
    const int64_t grain = 6 + (1 << 19) / (y.cols * (s.cols + 4) + 1) / 6 * 6;  // ~0.5 M multiply-adds, some 10 us
    parallel(run, y.rows, grain, [&](int64_t begin, int64_t end) {
        rows((const float*)s.data, s.cols, packed, width, bias, mask, scale, y, begin, end);
    });
}

}  // namespace fastlora::cpu
#endif
