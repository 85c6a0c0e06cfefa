// dropout_apply: out = D(x), kept elements times 1 / (1 - p)
//
// Only where a dropped-out copy cannot be avoided: the second base product of DoRA with dropout. Bound by
// memory.
#ifdef FASTLORA_LEVEL
namespace fastlora::FASTLORA_LEVEL {

template <class T>
void apply_rows_as(const ConstMatrix& x, const DropoutMask& mask, const Matrix& out, int64_t begin,
                   int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
        const T* from = (const T*)x.data + t * x.pitch;
        T* to = (T*)out.data + t * out.pitch;
        const uint8_t* bits = mask.bits + t * mask.pitch;
        int64_t i = 0;
        for (; i + lanes <= x.cols; i += lanes)
            store(to + i, load(from + i) * mask_scale(bits, i, mask.scale));
        if (const int64_t n = x.cols - i; n > 0)
            store(to + i, load(from + i, n) * mask_scale(bits, i, mask.scale), n);
    }
}

void apply_rows(const ConstMatrix& x, const DropoutMask& mask, const Matrix& out, int64_t begin,
                int64_t end) {
    if (x.dtype == DType::f32) return apply_rows_as<float>(x, mask, out, begin, end);
    if (x.dtype == DType::bf16) return apply_rows_as<bf16>(x, mask, out, begin, end);
    apply_rows_as<f16>(x, mask, out, begin, end);
}

}  // namespace fastlora::FASTLORA_LEVEL
#else
#define FASTLORA_KERNELS "dropout_apply.cpp"
#include "levels.h"

namespace fastlora::cpu {

void dropout_apply(const ConstMatrix& x, const DropoutMask& mask, const Matrix& out, ParallelFor run) {
    const auto rows = FASTLORA_PICK(apply_rows);
    const int64_t grain = 1 + (1 << 16) / (x.cols + 1);  // 64k elements, some 5 us
    parallel(run, x.rows, grain, [&](int64_t begin, int64_t end) { rows(x, mask, out, begin, end); });
}

}  // namespace fastlora::cpu
#endif
