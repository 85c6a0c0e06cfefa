// dequant_8bit: out = values * absmax[row] / 127, for a rectangle of the weight
//
// Bound by the bytes written, two or four for one read: callers pass a buffer they reuse. Levels agree bit
// for bit: each of the two products is rounded.
#ifdef FASTLORA_LEVEL
namespace fastlora::FASTLORA_LEVEL {

template <class T>
void dequant_8bit_as(const Packed8bit& w, int64_t row, int64_t col, const Matrix& out, int64_t begin,
                     int64_t end) {
    const vf reciprocal = splat(1.0f / 127);  // from the left, as bitsandbytes
    for (int64_t t = begin; t < end; ++t) {
        const int8_t* from = w.values + (row + t) * w.pitch + col;
        T* to = (T*)out.data + t * out.pitch;
        const vf absmax = splat(w.absmax[row + t]);
        int64_t i = 0;
        for (; i + lanes <= out.cols; i += lanes) store(to + i, load(from + i) * absmax * reciprocal);
        if (const int64_t n = out.cols - i; n > 0) store(to + i, load(from + i, n) * absmax * reciprocal, n);
    }
}

void dequant_8bit_rows(const Packed8bit& w, int64_t row, int64_t col, const Matrix& out, int64_t begin,
                       int64_t end) {
    if (out.dtype == DType::f32) return dequant_8bit_as<float>(w, row, col, out, begin, end);
    if (out.dtype == DType::bf16) return dequant_8bit_as<bf16>(w, row, col, out, begin, end);
    dequant_8bit_as<f16>(w, row, col, out, begin, end);
}

}  // namespace fastlora::FASTLORA_LEVEL
#else
#define FASTLORA_KERNELS "dequant_8bit.cpp"
#include "levels.h"

namespace fastlora::cpu {

void dequant_8bit(const Packed8bit& w, int64_t row, int64_t col, const Matrix& out, ParallelFor run) {
    const auto rows = FASTLORA_PICK(dequant_8bit_rows);
    const int64_t grain = 1 + (1 << 16) / (out.cols + 1);  // 64k weights, some 5 us
    parallel(run, out.rows, grain, [&](int64_t begin, int64_t end) { rows(w, row, col, out, begin, end); });
}

}  // namespace fastlora::cpu
#endif
