// lora_expand: out [T, O] = gain * (y + scale * D(s [T, R] b^T)) + offset
//
// One read and one write per element of y: bound by these, or by the 2 T O R flops from about r = 16 on.
// Everything between is float32 and rounded once, DoRA's gain and the biases included.
#ifdef FASTLORA_LEVEL
#include "skinny.h"

namespace fastlora::FASTLORA_LEVEL {

constexpr int64_t strip = 256;  // columns in flight: 8 rows of their float32 terms are 8 KB

struct Expand {
    const ConstMatrix& y;
    const float* s;
    int64_t ranks;
    const float* packed;
    int64_t width;
    const DropoutMask& mask;
    float scale;
    const float *gain, *offset;
    const Matrix& out;
};

// Columns [col, col + count) of row t, given s b^T there.
template <class T>
FASTLORA_INLINE void finish_row(const Expand& e, int64_t t, int64_t col, int64_t count, const float* terms) {
    const T* from = e.y.data ? (const T*)e.y.data + t * e.y.pitch + col : nullptr;
    T* to = (T*)e.out.data + t * e.out.pitch + col;
    for (int64_t i = 0; i < count; i += lanes) {
        const int64_t n = count - i;
        const bool whole = n >= lanes;
        vf term = splat(e.scale) * load(terms + i);
        if (e.mask.bits) term = term * mask_scale(e.mask.bits + t * e.mask.pitch, col + i, e.mask.scale);
        vf value = term;
        if (from) value = (whole ? load(from + i) : load(from + i, n)) + term;
        if (e.gain) value = value * (whole ? load(e.gain + col + i) : load(e.gain + col + i, n));
        if (e.offset) value = value + (whole ? load(e.offset + col + i) : load(e.offset + col + i, n));
        if (whole)
            store(to + i, value);
        else
            store(to + i, value, n);
    }
}

void expand_rows(const ConstMatrix& y, const float* s, int64_t ranks, const float* packed, int64_t width,
                 const DropoutMask& mask, float scale, const float* gain, const float* offset,
                 const Matrix& out, int64_t begin, int64_t end) {
    const Expand e{y, s, ranks, packed, width, mask, scale, gain, offset, out};
    float terms[row_tile * strip];
    for (int64_t t0 = begin; t0 < end; t0 += row_tile) {
        const int64_t rows = end - t0 < row_tile ? end - t0 : row_tile;
        for (int64_t col = 0; col < out.cols; col += strip) {
            const int64_t count = out.cols - col < strip ? out.cols - col : strip;
            std::memset(terms, 0, sizeof terms);
            multiply_rows(s + t0 * ranks, ranks, rows, packed + col, width, padded(count), ranks, terms,
                          strip);
            for (int64_t t = 0; t < rows; ++t) {
                const float* row = terms + t * strip;
                if (y.dtype == DType::f32)
                    finish_row<float>(e, t0 + t, col, count, row);
                else if (y.dtype == DType::bf16)
                    finish_row<bf16>(e, t0 + t, col, count, row);
                else
                    finish_row<f16>(e, t0 + t, col, count, row);
            }
        }
    }
}

void pack_expand_factor(const ConstMatrix& b, bool transposed, float* packed) {
    pack_factor(b, transposed, packed);
}
int64_t expand_width(int64_t cols) {
    return padded(cols);
}

}  // namespace fastlora::FASTLORA_LEVEL
#else
#define FASTLORA_KERNELS "lora_expand.cpp"
#include "levels.h"
#include "scratch.h"
#include "tiles.h"

namespace fastlora::cpu {

void lora_expand(const ConstMatrix& y, const ConstMatrix& s, const ConstMatrix& b, bool b_transposed,
                 const DropoutMask& mask, float scale, const float* gain, const float* offset,
                 const Matrix& out, ParallelFor run) {
#ifdef FASTLORA_TILES
    if (tiles::takes(y.dtype, b.dtype))
        return tiles::expand(y, (const float*)s.data, b, b_transposed, mask, scale, gain, offset, out, run);
#endif
    static thread_local Scratch scratch;
    const auto rows = FASTLORA_PICK(expand_rows);
    const int64_t width = FASTLORA_PICK(expand_width)(y.cols);
    float* packed = scratch.floats(s.cols * width);
    FASTLORA_PICK(pack_expand_factor)(b, b_transposed, packed);
    const int64_t grain =
        6 + (1 << 19) / (y.cols * (s.cols + 4) + 1) / 6 * 6;  // ~0.5 M multiply-adds, some 10 us
    parallel(run, y.rows, grain, [&](int64_t begin, int64_t end) {
        rows(y, (const float*)s.data, s.cols, packed, width, mask, scale, gain, offset, out, begin, end);
    });
}

}  // namespace fastlora::cpu
#endif
