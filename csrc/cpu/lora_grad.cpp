// lora_grad: out [R, I] = s [T, R]^T D(x [T, I])
//
// The gradients of the rank-r factors: dA with s = dS, and dB transposed with x = dy. Threads share the
// columns, so that no partial sums have to be added afterwards; a thread walks down its columns 128 at a
// time, widening 32 rows of them (16 KB) for all ranks.
#ifdef FASTLORA_LEVEL
#include "skinny.h"

namespace fastlora::FASTLORA_LEVEL {

constexpr int64_t grad_cols = 128, grad_rows = 32;
constexpr int grad_ranks = 8, grad_vectors = 2;

// out[ranks, vectors * lanes] += s[rows, ranks]^T x[rows, ..]
template <int ranks, int vectors>
FASTLORA_INLINE void grad_tile(const float* s, int64_t s_pitch, const float* x, int64_t rows, float* out,
                               int64_t out_pitch) {
    vf acc[ranks][vectors];
    for (int j = 0; j < ranks; ++j)
        for (int v = 0; v < vectors; ++v) acc[j][v] = vf{};
    for (int64_t t = 0; t < rows; ++t) {
        vf row[vectors];
        for (int v = 0; v < vectors; ++v) row[v] = load(x + t * grad_cols + v * lanes);
        for (int j = 0; j < ranks; ++j) {
            const vf value = splat(s[t * s_pitch + j]);
            for (int v = 0; v < vectors; ++v) acc[j][v] += value * row[v];
        }
    }
    for (int j = 0; j < ranks; ++j)
        for (int v = 0; v < vectors; ++v) {
            float* at = out + j * out_pitch + v * lanes;
            store(at, load(at) + acc[j][v]);
        }
}

template <class T>
void grad_cols_as(const ConstMatrix& s, const ConstMatrix& x, const DropoutMask& mask, float* sums,
                  const Matrix& out, int64_t begin, int64_t end) {
    const int64_t ranks = s.cols;
    float wide[grad_rows * grad_cols];
    for (int64_t c0 = begin * grad_cols; c0 < end * grad_cols && c0 < x.cols; c0 += grad_cols) {
        const int64_t cols = x.cols - c0 < grad_cols ? x.cols - c0 : grad_cols, whole = padded(cols);
        for (int64_t i = 0; i < ranks * grad_cols; ++i) sums[i] = 0;
        for (int64_t i = 0; i < grad_rows * grad_cols; ++i) wide[i] = 0;  // columns past the last stay zero
        for (int64_t t0 = 0; t0 < x.rows; t0 += grad_rows) {
            const int64_t rows = x.rows - t0 < grad_rows ? x.rows - t0 : grad_rows;
            for (int64_t t = t0; t < t0 + rows; ++t)
                widen((const T*)x.data + t * x.pitch + c0, cols,
                      mask.bits ? mask.bits + t * mask.pitch : nullptr, c0, mask.scale,
                      wide + (t - t0) * grad_cols);
            const float* block = (const float*)s.data + t0 * s.pitch;
            for (int64_t c = 0; c < whole; c += grad_vectors * lanes) {
                const bool pair = whole - c >= grad_vectors * lanes;
                int64_t j = 0;
                for (; j + grad_ranks <= ranks; j += grad_ranks)
                    if (pair)
                        grad_tile<grad_ranks, 2>(block + j, s.pitch, wide + c, rows, sums + j * grad_cols + c,
                                                 grad_cols);
                    else
                        grad_tile<grad_ranks, 1>(block + j, s.pitch, wide + c, rows, sums + j * grad_cols + c,
                                                 grad_cols);
                for (; j < ranks; ++j)
                    if (pair)
                        grad_tile<1, 2>(block + j, s.pitch, wide + c, rows, sums + j * grad_cols + c,
                                        grad_cols);
                    else
                        grad_tile<1, 1>(block + j, s.pitch, wide + c, rows, sums + j * grad_cols + c,
                                        grad_cols);
            }
        }
        for (int64_t j = 0; j < ranks; ++j)
            std::memcpy((float*)out.data + j * out.pitch + c0, sums + j * grad_cols, cols * 4);
    }
}

void grad_columns(const ConstMatrix& s, const ConstMatrix& x, const DropoutMask& mask, float* sums,
                  const Matrix& out, int64_t begin, int64_t end) {
    if (x.dtype == DType::f32) return grad_cols_as<float>(s, x, mask, sums, out, begin, end);
    if (x.dtype == DType::bf16) return grad_cols_as<bf16>(s, x, mask, sums, out, begin, end);
    grad_cols_as<f16>(s, x, mask, sums, out, begin, end);
}

int64_t grad_block() {
    return grad_cols;
}

}  // namespace fastlora::FASTLORA_LEVEL
#else
#define FASTLORA_KERNELS "lora_grad.cpp"
#include "amx.h"
#include "levels.h"
#include "scratch.h"

namespace fastlora::cpu {

void lora_grad(const ConstMatrix& s, const ConstMatrix& x, const DropoutMask& mask, const Matrix& out,
               ParallelFor run) {
#ifdef FASTLORA_AMX
    if (level() == 3 && x.dtype == DType::bf16 && x.rows) {
        static thread_local Scratch factor;
        auto* packed = (uint16_t*)factor.floats(amx::grad_factor_bytes(x.rows, s.cols) / 4);
        amx::pack_grad_factor(s, mask.bits ? mask.scale : 1.0f, packed);
        const int64_t grain = 1 + (1 << 18) / (64 * x.rows + 1);  // 256k elements of x, some 10 us
        return parallel(run, (x.cols + 63) / 64, grain, [&](int64_t begin, int64_t end) {
            amx::grad_blocks(x, packed, s.cols, mask, out, begin, end);
        });
    }
#endif
    const auto columns = FASTLORA_PICK(grad_columns);
    const int64_t block = FASTLORA_PICK(grad_block)();
    const int64_t blocks = (x.cols + block - 1) / block;
    const int64_t grain = 1 + (1 << 19) / (x.rows * block * s.cols + 1);  // ~0.5 M multiply-adds, some 10 us
    parallel(run, blocks, grain, [&](int64_t begin, int64_t end) {
        static thread_local Scratch scratch;
        columns(s, x, mask, scratch.floats(s.cols * block), out, begin, end);
    });
}

}  // namespace fastlora::cpu
#endif
