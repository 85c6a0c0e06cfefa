// Sums in parts: blocks that share a sum write theirs to a workspace, and a second launch adds them.
//
// Atomic additions would save that launch and give another rounding in every run.
#pragma once

#include "../gpu.h"

namespace fastlora::gpu {

FASTLORA_DEVICE void store_value(const Matrix& out, int64_t row, int64_t col, float value) {
    const int64_t at = row * out.pitch + col;
    if (out.dtype == DType::f32)
        ((float*)out.data)[at] = value;
    else if (out.dtype == DType::bf16)
        ((bf16*)out.data)[at] = from_float<bf16>(value);
    else
        ((f16*)out.data)[at] = from_float<f16>(value);
}

constexpr int adding_threads = 256;

// out = scale * the sum of the parts, each packed like out, added in their order.
struct Sum {
    float* parts;
    int64_t count;
    double scale;  // a dropout mask's times the caller's, not rounded in between
    Matrix out;

    int64_t blocks() const { return count > 1 ? ceil_div(out.rows * out.cols, adding_threads) : 0; }
};

// Where a block stores its part: in the output itself, if it is the only one.
struct PartOf {
    Matrix to;
    double scale;

    PartOf(const Sum& sum)
        : to(sum.count > 1 ? Matrix{sum.parts, DType::f32, sum.out.rows, sum.out.cols, sum.out.cols}
                           : sum.out),
          scale(sum.count > 1 ? 1 : sum.scale) {}

    __device__ __forceinline__ void store(int64_t part, int64_t row, int64_t col, float value) const {
        store_value(to, part * to.rows + row, col, (float)(scale * value));
    }
};

FASTLORA_DEVICE void add_parts_of(const Sum& sum, int64_t block) {
    const int64_t at = block * adding_threads + threadIdx.x, values = sum.out.rows * sum.out.cols;
    if (at >= values) return;
    float value = 0;
#pragma unroll 8
    for (int64_t i = 0; i < sum.count; ++i) value += sum.parts[i * values + at];
    const int64_t row = sum.out.pitch == sum.out.cols ? 0 : at / sum.out.cols;
    store_value(sum.out, row, at - row * sum.out.cols, (float)(sum.scale * value));
}

static __global__ void __launch_bounds__(adding_threads)
    add_parts(Sum first, Sum second, unsigned first_blocks) {
    if (blockIdx.x < first_blocks)
        add_parts_of(first, blockIdx.x);
    else
        add_parts_of(second, blockIdx.x - first_blocks);
}

// The sums of one or two outputs; nothing for one that is its only part.
static inline int add(const Sum& first, const Sum& second, Stream stream) {
    const int64_t blocks = first.blocks() + second.blocks();
    if (!blocks) return 0;
    return launch(add_parts, dim3((unsigned)blocks), dim3(adding_threads), 0, stream, first, second,
                  (unsigned)first.blocks());
}

}  // namespace fastlora::gpu
