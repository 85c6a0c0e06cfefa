// matmul_4bit: out [T, O] = x [T, I] W^T from packed weights, for the few rows of a decoding step
//
// Bound by reading and decoding W: half a byte and one look-up per weight. A row of W is decoded 256 elements
// at a time into x's dtype, as a dense copy would hold it, and meets 4 rows of x while in L1. Many rows
// belong to a GEMM.
#ifdef FASTLORA_LEVEL
#include "decode_4bit.h"

namespace fastlora::FASTLORA_LEVEL {

constexpr int64_t chunk = 256;

template <class T>
void matmul_rows_as(const float* x, int64_t tokens, const Packed4bit& w, const Matrix& out, int64_t begin,
                    int64_t end) {
    alignas(64) T decoded[chunk];
    alignas(64) float wide[chunk];
    for (int64_t o = begin; o < end; ++o) {
        for (int64_t t0 = 0; t0 < tokens; t0 += 4) {
            const int64_t rows = tokens - t0 < 4 ? tokens - t0 : 4;
            vf acc[4] = {};
            for (int64_t k0 = 0; k0 < w.cols; k0 += chunk) {
                const int64_t depth = w.cols - k0 < chunk ? w.cols - k0 : chunk;
                decode(w, o * w.cols + k0, depth, decoded);
                for (int64_t k = 0; k < depth; k += lanes)
                    store(wide + k, depth - k >= lanes ? load(decoded + k) : load(decoded + k, depth - k));
                for (int64_t t = 0; t < rows; ++t) {
                    const float* row = x + (t0 + t) * w.cols + k0;
                    vf part = {};  // a chunk's own sum: shorter chains of roundings
                    int64_t k = 0;
                    for (; k + lanes <= depth; k += lanes) part += load(wide + k) * load(row + k);
                    if (k < depth) part += load(wide + k, depth - k) * load(row + k, depth - k);
                    acc[t] += part;
                }
            }
            for (int64_t t = 0; t < rows; ++t)
                store((T*)out.data + (t0 + t) * out.pitch + o, splat(sum(acc[t])), 1);
        }
    }
}

template <class T>
void widen_rows(const ConstMatrix& x, float* wide) {
    for (int64_t t = 0; t < x.rows; ++t) {
        const T* row = (const T*)x.data + t * x.pitch;
        for (int64_t k = 0; k < x.cols; k += lanes)
            if (x.cols - k >= lanes)
                store(wide + t * x.cols + k, load(row + k));
            else
                store(wide + t * x.cols + k, load(row + k, x.cols - k), x.cols - k);
    }
}

void widen_x(const ConstMatrix& x, float* wide) {
    if (x.dtype == DType::f32) return widen_rows<float>(x, wide);
    if (x.dtype == DType::bf16) return widen_rows<bf16>(x, wide);
    widen_rows<f16>(x, wide);
}

void matmul_rows(const float* x, int64_t tokens, const Packed4bit& w, const Matrix& out, int64_t begin,
                 int64_t end) {
    if (out.dtype == DType::f32) return matmul_rows_as<float>(x, tokens, w, out, begin, end);
    if (out.dtype == DType::bf16) return matmul_rows_as<bf16>(x, tokens, w, out, begin, end);
    matmul_rows_as<f16>(x, tokens, w, out, begin, end);
}

}  // namespace fastlora::FASTLORA_LEVEL
#else
#define FASTLORA_KERNELS "matmul_4bit.cpp"
#include "levels.h"
#include "scratch.h"
#include "tiles.h"

namespace fastlora::cpu {

bool matmul_4bit_on_tiles(DType x, const Packed4bit& w) {
#ifdef FASTLORA_TILES
    return tiles::matmul_4bit_takes(x, w);
#else
    return false;
#endif
}

void matmul_4bit(const ConstMatrix& x, const Packed4bit& w, bool transposed, const Matrix& out,
                 ParallelFor run) {
#ifdef FASTLORA_TILES
    if (transposed || (x.rows > 4 && matmul_4bit_on_tiles(x.dtype, w)))
        return tiles::matmul_4bit(x, w, transposed, out, run);
#endif
    static thread_local Scratch scratch;
    float* wide = scratch.floats(x.rows * x.cols);
    FASTLORA_PICK(widen_x)(x, wide);
    const auto rows = FASTLORA_PICK(matmul_rows);
    const int64_t grain = 1 + (1 << 16) / (w.cols * x.rows + 1);  // 64k products, some 5 us
    parallel(run, w.rows, grain, [&](int64_t begin, int64_t end) { rows(wide, x.rows, w, out, begin, end); });
}

}  // namespace fastlora::cpu
#endif
