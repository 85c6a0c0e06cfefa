// dora_grad: dz = dy * gain, dgain = sum over rows of dy * z
//
// The magnitude's part of DoRA's backward, one pass over dy and z. Threads share the columns, so that no
// partial sums have to be added afterwards. Bound by memory: three passes over [T, O].
#ifdef FASTLORA_LEVEL
namespace fastlora::FASTLORA_LEVEL {

constexpr int64_t dora_cols = 128;

template <class T>
void dora_columns_as(const ConstMatrix& dy, const ConstMatrix& z, const float* gain, const Matrix& dz,
                     float* dgain, int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
        const int64_t c0 = block * dora_cols, cols = z.cols - c0 < dora_cols ? z.cols - c0 : dora_cols;
        // In two steps: added one by one, 300 rows already lose twice what torch's sum does.
        float total[dora_cols] = {}, sums[dora_cols] = {};
        for (int64_t t = 0; t < z.rows; ++t) {
            const T *dy_row = (const T*)dy.data + t * dy.pitch + c0,
                    *z_row = (const T*)z.data + t * z.pitch + c0;
            T* dz_row = (T*)dz.data + t * dz.pitch + c0;
            int64_t i = 0;
            for (; i + lanes <= cols; i += lanes) {
                const vf d = load(dy_row + i);
                store(sums + i, load(sums + i) + d * load(z_row + i));
                store(dz_row + i, d * load(gain + c0 + i));
            }
            if (const int64_t n = cols - i; n > 0) {
                const vf d = load(dy_row + i, n);
                store(sums + i, load(sums + i, n) + d * load(z_row + i, n), n);
                store(dz_row + i, d * load(gain + c0 + i, n), n);
            }
            if (t % 64 == 63 || t + 1 == z.rows)
                for (int64_t c = 0; c < dora_cols; ++c) total[c] += sums[c], sums[c] = 0;
        }
        std::memcpy(dgain + c0, total, cols * 4);
    }
}

void dora_columns(const ConstMatrix& dy, const ConstMatrix& z, const float* gain, const Matrix& dz,
                  float* dgain, int64_t begin, int64_t end) {
    if (z.dtype == DType::f32) return dora_columns_as<float>(dy, z, gain, dz, dgain, begin, end);
    if (z.dtype == DType::bf16) return dora_columns_as<bf16>(dy, z, gain, dz, dgain, begin, end);
    dora_columns_as<f16>(dy, z, gain, dz, dgain, begin, end);
}

int64_t dora_block() {
    return dora_cols;
}

}  // namespace fastlora::FASTLORA_LEVEL
#else
#define FASTLORA_KERNELS "dora_grad.cpp"
#include "levels.h"

namespace fastlora::cpu {

void dora_grad(const ConstMatrix& dy, const ConstMatrix& z, const float* gain, const Matrix& dz, float* dgain,
               ParallelFor run) {
    const auto columns = FASTLORA_PICK(dora_columns);
    const int64_t block = FASTLORA_PICK(dora_block)();
    const int64_t grain = 1 + (1 << 15) / (z.rows * block + 1);  // 32k elements, some 5 us
    parallel(run, (z.cols + block - 1) / block, grain,
             [&](int64_t begin, int64_t end) { columns(dy, z, gain, dz, dgain, begin, end); });
}

}  // namespace fastlora::cpu
#endif
