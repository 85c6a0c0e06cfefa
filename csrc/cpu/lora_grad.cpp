// lora_grad: out [R, I] = scale * s [T, R]^T D(x [T, I]), or its transpose
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

// Sums [ranks, grad_cols] of columns [c0, c0 + cols) to where the gradient lies, rounded once.
template <class T>
FASTLORA_INLINE void write_as(const float* sums, int64_t ranks, float scale, bool transposed,
                              const Matrix& out, int64_t c0, int64_t cols) {
    T* to = (T*)out.data;
    if (!transposed) {
        for (int64_t j = 0; j < ranks; ++j)
            for (int64_t c = 0; c < cols; c += lanes) {
                const vf value = splat(scale) * load(sums + j * grad_cols + c);
                T* at = to + j * out.pitch + c0 + c;
                if (cols - c >= lanes)
                    store(at, value);
                else
                    store(at, value, cols - c);
            }
        return;
    }
    for (int64_t c = 0; c < cols; ++c)
        for (int64_t j = 0; j < ranks; j += lanes) {
            float row[lanes] = {};
            for (int64_t i = 0; i < lanes && j + i < ranks; ++i) row[i] = sums[(j + i) * grad_cols + c];
            T* at = to + (c0 + c) * out.pitch + j;
            if (ranks - j >= lanes)
                store(at, splat(scale) * load(row));
            else
                store(at, splat(scale) * load(row), ranks - j);
        }
}

void write_sums(const float* sums, int64_t ranks, float scale, bool transposed, const Matrix& out, int64_t c0,
                int64_t cols) {
    if (out.dtype == DType::f32) return write_as<float>(sums, ranks, scale, transposed, out, c0, cols);
    if (out.dtype == DType::bf16) return write_as<bf16>(sums, ranks, scale, transposed, out, c0, cols);
    write_as<f16>(sums, ranks, scale, transposed, out, c0, cols);
}

template <class T>
void grad_cols_as(const ConstMatrix& s, const ConstMatrix& x, const DropoutMask& mask, float scale,
                  bool transposed, float* sums, const Matrix& out, int64_t begin, int64_t end) {
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
        write_sums(sums, ranks, scale, transposed, out, c0, cols);
    }
}

void grad_columns(const ConstMatrix& s, const ConstMatrix& x, const DropoutMask& mask, float scale,
                  bool transposed, float* sums, const Matrix& out, int64_t begin, int64_t end) {
    if (x.dtype == DType::f32)
        return grad_cols_as<float>(s, x, mask, scale, transposed, sums, out, begin, end);
    if (x.dtype == DType::bf16)
        return grad_cols_as<bf16>(s, x, mask, scale, transposed, sums, out, begin, end);
    grad_cols_as<f16>(s, x, mask, scale, transposed, sums, out, begin, end);
}

int64_t grad_block() {
    return grad_cols;
}

}  // namespace fastlora::FASTLORA_LEVEL
#else
#define FASTLORA_KERNELS "lora_grad.cpp"
#include "levels.h"
#include "scratch.h"
#include "tiles.h"

namespace fastlora::cpu {

void lora_grad(const ConstMatrix& s, const ConstMatrix& x, const DropoutMask& mask, float scale,
               bool transposed, const Matrix& out, ParallelFor run) {
#ifdef FASTLORA_TILES
    if (x.rows && tiles::takes(x.dtype, out.dtype)) {
        static thread_local Scratch factor;
        const int parts = tiles::grad_parts(out.dtype);
        auto* packed = (uint16_t*)factor.floats(tiles::grad_factor_bytes(x.rows, s.cols, parts) / 4);
        tiles::pack_grad_factor(s, mask.bits ? scale * mask.scale : scale, parts, packed);
        const int64_t blocks = (x.cols + tiles::grad_columns - 1) / tiles::grad_columns;
        return parallel(run, blocks, tiles::grain(tiles::grad_columns * x.rows),
                        [&](int64_t begin, int64_t end) {
                            tiles::grad_blocks(x, packed, parts, s.cols, mask, transposed, out, begin, end);
                        });
    }
#endif
    const auto columns = FASTLORA_PICK(grad_columns);
    const int64_t block = FASTLORA_PICK(grad_block)();
    const int64_t blocks = (x.cols + block - 1) / block;
    const int64_t grain = 1 + (1 << 19) / (x.rows * block * s.cols + 1);  // ~0.5 M multiply-adds, some 10 us
    parallel(run, blocks, grain, [&](int64_t begin, int64_t end) {
        static thread_local Scratch scratch;
        columns(s, x, mask, scale, transposed, scratch.floats(s.cols * block), out, begin, end);
    });
}

}  // namespace fastlora::cpu
#endif
