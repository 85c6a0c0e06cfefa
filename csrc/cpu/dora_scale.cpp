// dora_scale_forward:  out = z * g + bias          per column
// dora_scale_backward: dz = dy * g, dg = sum over rows of dy * z
//
// The magnitude's part of DoRA. Bound by memory: two passes forward, three backward; the sums stay in float32.
#ifdef FASTLORA_LEVEL
namespace fastlora::FASTLORA_LEVEL {

template <class T>
void scale_rows_as(const ConstMatrix& z, const float* g, const float* bias, const Matrix& out, int64_t begin,
                   int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
        const T* from = (const T*)z.data + t * z.pitch;
        T* to = (T*)out.data + t * out.pitch;
        int64_t i = 0;
        for (; i + lanes <= z.cols; i += lanes) {
            const vf scaled = load(from + i) * load(g + i);
            store(to + i, bias ? scaled + load(bias + i) : scaled);
        }
        if (const int64_t n = z.cols - i; n > 0) {
            const vf scaled = load(from + i, n) * load(g + i, n);
            store(to + i, bias ? scaled + load(bias + i, n) : scaled, n);
        }
    }
}

constexpr int64_t dora_cols = 128;

template <class T>
void unscale_columns_as(const ConstMatrix& dy, const ConstMatrix& z, const float* g, const Matrix& dz, float* dg,
                        int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
        const int64_t c0 = block * dora_cols, cols = z.cols - c0 < dora_cols ? z.cols - c0 : dora_cols;
        float sums[dora_cols] = {};
        for (int64_t t = 0; t < z.rows; ++t) {
            const T *dy_row = (const T*)dy.data + t * dy.pitch + c0, *z_row = (const T*)z.data + t * z.pitch + c0;
            T* dz_row = (T*)dz.data + t * dz.pitch + c0;
            int64_t i = 0;
            for (; i + lanes <= cols; i += lanes) {
                const vf d = load(dy_row + i);
                store(sums + i, load(sums + i) + d * load(z_row + i));
                store(dz_row + i, d * load(g + c0 + i));
            }
            if (const int64_t n = cols - i; n > 0) {
                const vf d = load(dy_row + i, n);
                store(sums + i, load(sums + i, n) + d * load(z_row + i, n), n);
                store(dz_row + i, d * load(g + c0 + i, n), n);
            }
        }
        std::memcpy(dg + c0, sums, cols * 4);
    }
}

void scale_rows(const ConstMatrix& z, const float* g, const float* bias, const Matrix& out, int64_t begin,
                int64_t end) {
    if (z.dtype == DType::f32) return scale_rows_as<float>(z, g, bias, out, begin, end);
    if (z.dtype == DType::bf16) return scale_rows_as<bf16>(z, g, bias, out, begin, end);
    scale_rows_as<f16>(z, g, bias, out, begin, end);
}

void unscale_columns(const ConstMatrix& dy, const ConstMatrix& z, const float* g, const Matrix& dz, float* dg,
                     int64_t begin, int64_t end) {
    if (z.dtype == DType::f32) return unscale_columns_as<float>(dy, z, g, dz, dg, begin, end);
    if (z.dtype == DType::bf16) return unscale_columns_as<bf16>(dy, z, g, dz, dg, begin, end);
    unscale_columns_as<f16>(dy, z, g, dz, dg, begin, end);
}

int64_t unscale_block() { return dora_cols; }

}  // namespace fastlora::FASTLORA_LEVEL
#else
#define FASTLORA_KERNELS "dora_scale.cpp"
#include "levels.h"

namespace fastlora::cpu {

void dora_scale_forward(const ConstMatrix& z, const float* g, const float* bias, const Matrix& out, ParallelFor run) {
    const auto rows = FASTLORA_PICK(scale_rows);
    const int64_t grain = 1 + (1 << 16) / (z.cols + 1);  // 64k elements, some 5 us
    parallel(run, z.rows, grain, [&](int64_t begin, int64_t end) { rows(z, g, bias, out, begin, end); });
}

void dora_scale_backward(const ConstMatrix& dy, const ConstMatrix& z, const float* g, const Matrix& dz, float* dg,
                         ParallelFor run) {
    const auto columns = FASTLORA_PICK(unscale_columns);
    const int64_t block = FASTLORA_PICK(unscale_block)();
    const int64_t grain = 1 + (1 << 15) / (z.rows * block + 1);  // 32k elements, some 5 us
    parallel(run, (z.cols + block - 1) / block, grain,
             [&](int64_t begin, int64_t end) { columns(dy, z, g, dz, dg, begin, end); });
}

}  // namespace fastlora::cpu
#endif
