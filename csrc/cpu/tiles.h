// The rank-r products of bfloat16 activations on tiles: where the CPU multiplies bfloat16 itself, with AMX
// (Intel Xeon from Sapphire Rapids on) or AVX-512 BF16 (AMD from Zen 4, Intel from Cooper Lake on).
//
// A float32 factor is split into bfloat16 parts whose sum it is (3 parts hold 24 bits), and the parts'
// products meet in one float32 accumulator: as exact as float32 FMAs, and on AMX still bound by reading the
// activations. Rows, columns and ranks that fill no tile are padded with zeros in a copy.
#pragma once

#include "../kernels.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define FASTLORA_TILES 1

namespace fastlora::tiles {

// AMX exists and the kernel lets this process use it.
bool amx_available();

// Whether tiles are faster than float32 FMAs here, for a factor or a gradient of this dtype.
bool takes(DType activations, DType factor);

// Blocks of this many activations that a thread should have at least.
int64_t grain(int64_t block);

// shrink and grad pack their factor once, for all threads, and then run blocks of rows or columns. A factor
// has 1 part if it is bfloat16, else what `*_parts` says.
int shrink_parts(DType factor);
int64_t shrink_factor_bytes(const ConstMatrix& a, int64_t ranks, int64_t depth);
void pack_shrink_factor(const ConstMatrix& a, bool transposed, int64_t ranks, int64_t depth,
                        uint16_t* packed);

// out [T, R] = scale * D(x) a^T for rows [32 begin, 32 end), clipped to the last. x bfloat16.
void shrink_blocks(const ConstMatrix& x, const uint16_t* packed, int parts, int64_t ranks,
                   const DropoutMask& mask, float scale, float* out, int64_t begin, int64_t end);

// lora_expand; y and out bfloat16.
void expand(const ConstMatrix& y, const float* s, const ConstMatrix& b, bool transposed,
            const DropoutMask& mask, float scale, const float* gain, const float* offset, const Matrix& out,
            ParallelFor run);

// dora_norm, with A packed as for shrink: A A^T once, then up to 32 rows of a bfloat16 W at a time.
int64_t gram_scratch_floats(const ConstMatrix& a, int parts);
void gram(const ConstMatrix& a, const uint16_t* packed, int parts, float* gram, float* scratch);
void norm_rows(const ConstMatrix& w, const uint16_t* packed, int parts, const float* gram,
               const ConstMatrix& b, int64_t b_row, float scale, float* out);

// The gradient keeps 8 bits of a bfloat16 output, and as many as its sums have of any other.
int grad_parts(DType out);
int64_t grad_factor_bytes(int64_t rows, int64_t ranks, int parts);
void pack_grad_factor(const ConstMatrix& s, float scale, int parts, uint16_t* packed);

constexpr int64_t grad_columns = 128;

// lora_grad for columns [grad_columns * begin, grad_columns * end) of x, clipped to the last. x bfloat16; the
// scale is in the factor.
void grad_blocks(const ConstMatrix& x, const uint16_t* packed, int parts, int64_t ranks,
                 const DropoutMask& mask, bool transposed, const Matrix& out, int64_t begin, int64_t end);

// matmul_4bit on AMX, for any number of rows; x bfloat16, and blocks that do not cross a run of 32 weights.
bool matmul_4bit_takes(DType x, const Packed4bit& w);
void matmul_4bit(const ConstMatrix& x, const Packed4bit& w, bool transposed, const Matrix& out,
                 ParallelFor run);

}  // namespace fastlora::tiles
#endif
