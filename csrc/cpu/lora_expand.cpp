// lora_expand: out [T, O] = gain * (y + scale * D(s [T, R] b^T)) + offset
//
// One read and one write per element of y: bound by these, or by the 2 T O R flops from about r = 16 on.
// Everything between is float32 and rounded once, DoRA's gain and the biases included.
#ifdef FASTLORA_LEVEL
#include "skinny.h"

namespace fastlora::FASTLORA_LEVEL {

constexpr int expand_vectors = 4;

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

// Rows [t0, t0 + rows) and columns [col, col + vectors * lanes) in registers; the last vector holds `tail`
// elements.
template <class T, int rows, int vectors>
FASTLORA_INLINE void expand_tile(const Expand& e, int64_t t0, int64_t col, int64_t tail) {
    vf acc[rows][vectors] = {};
    for (int64_t j = 0; j < e.ranks; ++j) {
        vf p[vectors];
        for (int v = 0; v < vectors; ++v) p[v] = load(e.packed + j * e.width + col + v * lanes);
        for (int t = 0; t < rows; ++t) {
            const vf value = splat(e.s[(t0 + t) * e.ranks + j]);
            for (int v = 0; v < vectors; ++v) acc[t][v] += value * p[v];
        }
    }
    for (int t = 0; t < rows; ++t) {
        for (int v = 0; v < vectors; ++v) {
            const int64_t c = col + v * lanes;
            const bool whole = v < vectors - 1 || tail == lanes;
            const T* from = (const T*)e.y.data + (t0 + t) * e.y.pitch + c;
            T* to = (T*)e.out.data + (t0 + t) * e.out.pitch + c;
            vf term = splat(e.scale) * acc[t][v];
            if (e.mask.bits) term = term * mask_scale(e.mask.bits + (t0 + t) * e.mask.pitch, c, e.mask.scale);
            vf value = (whole ? load(from) : load(from, tail)) + term;
            if (e.gain) value = value * (whole ? load(e.gain + c) : load(e.gain + c, tail));
            if (e.offset) value = value + (whole ? load(e.offset + c) : load(e.offset + c, tail));
            if (whole)
                store(to, value);
            else
                store(to, value, tail);
        }
    }
}

template <class T, int rows>
FASTLORA_INLINE void expand_block(const Expand& e, int64_t t0) {
    constexpr int64_t step = expand_vectors * lanes;
    int64_t col = 0;
    for (; col + step <= e.out.cols; col += step) expand_tile<T, rows, expand_vectors>(e, t0, col, lanes);
    for (; col < e.out.cols; col += lanes)
        expand_tile<T, rows, 1>(e, t0, col, e.out.cols - col < lanes ? e.out.cols - col : lanes);
}

template <class T>
void expand_rows_as(const Expand& e, int64_t begin, int64_t end) {
    constexpr int rows = 6;  // 6 x 4 accumulators, 4 factor vectors, one broadcast: 29 of 32 registers
    int64_t t = begin;
    for (; t + rows <= end; t += rows) expand_block<T, rows>(e, t);
    for (; t < end; ++t) expand_block<T, 1>(e, t);
}

void expand_rows(const ConstMatrix& y, const float* s, int64_t ranks, const float* packed, int64_t width,
                 const DropoutMask& mask, float scale, const float* gain, const float* offset,
                 const Matrix& out, int64_t begin, int64_t end) {
    const Expand e{y, s, ranks, packed, width, mask, scale, gain, offset, out};
    if (y.dtype == DType::f32) return expand_rows_as<float>(e, begin, end);
    if (y.dtype == DType::bf16) return expand_rows_as<bf16>(e, begin, end);
    expand_rows_as<f16>(e, begin, end);
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
#include "amx.h"
#include "levels.h"
#include "scratch.h"

namespace fastlora::cpu {

void lora_expand(const ConstMatrix& y, const ConstMatrix& s, const ConstMatrix& b, bool b_transposed,
                 const DropoutMask& mask, float scale, const float* gain, const float* offset,
                 const Matrix& out, ParallelFor run) {
    static thread_local Scratch scratch;
#ifdef FASTLORA_AMX
    if (level() == 3 && y.dtype == DType::bf16) {
        auto* packed = (uint16_t*)scratch.floats(amx::expand_factor_bytes(b, s.cols, y.cols) / 4);
        amx::pack_expand_factor(b, b_transposed, s.cols, y.cols, packed);
        const int parts = amx::expand_parts(b.dtype);
        const int64_t grain = 1 + (1 << 17) / (32 * y.cols + 1);  // 128k elements of y, some 10 us
        return parallel(run, (y.rows + 31) / 32, grain, [&](int64_t begin, int64_t end) {
            amx::expand_blocks(y, (const float*)s.data, s.cols, packed, parts, mask, scale, gain, offset, out,
                               begin, end);
        });
    }
#endif
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
