// The rank-r products on AMX tiles, for bfloat16 activations (Intel Xeon from Sapphire Rapids on).
//
// A float32 factor is split into bfloat16 parts whose sum it is (3 parts hold 24 bits), and the parts'
// products meet in one float32 accumulator: as exact as float32 FMAs, and still bound by reading the
// activations. Rows, columns and ranks that fill no tile are padded with zeros in a copy.
#pragma once

#include "../kernels.h"

namespace fastlora::amx {

// Tiles exist and the kernel lets this process use them.
bool available();

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define FASTLORA_AMX 1

// Every product packs its factor once, for all threads, and then runs blocks of rows or columns. A factor has
// 1 part if it is bfloat16, else what `*_parts` says.
int shrink_parts(DType factor);
int64_t shrink_factor_bytes(const ConstMatrix& a, int64_t ranks, int64_t depth);
void pack_shrink_factor(const ConstMatrix& a, bool transposed, int64_t ranks, int64_t depth,
                        uint16_t* packed);

// out [T, R] = scale * D(x) a^T for rows [32 begin, 32 end), clipped to the last. x bfloat16.
void shrink_blocks(const ConstMatrix& x, const uint16_t* packed, int parts, int64_t ranks,
                   const DropoutMask& mask, float scale, float* out, int64_t begin, int64_t end);

int expand_parts(DType factor);
int64_t expand_factor_bytes(const ConstMatrix& b, int64_t ranks, int64_t cols);
void pack_expand_factor(const ConstMatrix& b, bool transposed, int64_t ranks, int64_t cols, uint16_t* packed);

// lora_expand for rows [32 begin, 32 end), clipped to the last. y and out bfloat16.
void expand_blocks(const ConstMatrix& y, const float* s, int64_t ranks, const uint16_t* packed, int parts,
                   const DropoutMask& mask, float scale, const float* gain, const float* offset,
                   const Matrix& out, int64_t begin, int64_t end);

// dora_norm, with A packed as for shrink: A A^T once, then up to 32 rows of a bfloat16 W at a time.
int64_t gram_scratch_floats(const ConstMatrix& a, int parts);
void gram(const ConstMatrix& a, const uint16_t* packed, int parts, float* gram, float* scratch);
void norm_rows(const ConstMatrix& w, const uint16_t* packed, int parts, const float* gram,
               const ConstMatrix& b, int64_t b_row, float scale, float* out);

int64_t grad_factor_bytes(int64_t rows, int64_t ranks);
void pack_grad_factor(const ConstMatrix& s, float scale, uint16_t* packed);

// lora_grad for columns [64 begin, 64 end), clipped to the last. x bfloat16.
void grad_blocks(const ConstMatrix& x, const uint16_t* packed, int64_t ranks, const DropoutMask& mask,
                 const Matrix& out, int64_t begin, int64_t end);

// matmul_4bit for any number of rows; x bfloat16, and blocks that do not cross a run of 32 weights.
bool matmul_4bit_takes(const Packed4bit& w);
void matmul_4bit(const ConstMatrix& x, const Packed4bit& w, bool transposed, const Matrix& out,
                 ParallelFor run);

#endif

}  // namespace fastlora::amx
