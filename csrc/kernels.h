// Every launcher of the library: raw pointers, sizes, and how to run in parallel. No torch.
//
// Promises the callers (bindings.cpp, csrc/tests) keep, so that launchers need not check them:
//   - columns are packed (stride 1); rows may have any pitch, given in elements;
//   - 4-bit weights are stored as bitsandbytes does: element i of the flattened [rows, cols] weight is the
//   high nibble of
//     byte i / 2 for even i, the low one for odd i, and belongs to block i / blocksize; blocks may straddle
//     rows;
//   - outputs overlap no input, except where a comment says "in place".
#pragma once

#include <cstdint>

namespace fastlora {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };
enum class Act : int { silu = 0, gelu = 1, gelu_tanh = 2, relu = 3, relu2 = 4 };

struct ConstMatrix {
    const void* data;
    DType dtype;
    int64_t rows, cols, pitch;
};

struct Matrix {
    void* data;
    DType dtype;
    int64_t rows, cols, pitch;
};

// One bit per element, little endian inside a byte, rows padded to whole 16-bit words: 1 keeps the element.
// Null: keep all.
struct DropoutMask {
    const uint8_t* bits;
    int64_t pitch;  // bytes per row
    float scale;    // 1 / (1 - p), applied to kept elements
};

struct Packed4bit {
    const uint8_t* packed;
    const float* absmax;          // [blocks], or null when nested
    const uint8_t* absmax_codes;  // [blocks], nested: nested_code[code] * nested_absmax[block /
                                  // nested_blocksize] + nested_offset
    const float* nested_code;     // [256]
    const float* nested_absmax;
    const float* nested_offset;  // one value
    int64_t blocksize, nested_blocksize;
    bool fp4;  // else NF4
    int64_t rows, cols;
};

// LLM.int8: int8 rows with their largest magnitude.
struct Packed8bit {
    const int8_t* values;
    const float* absmax;  // [rows]
    int64_t rows, cols, pitch;
};

// Runs body(context, begin, end) over [0, count) in pieces of at least `grain`, on torch's threads or anybody
// else's.
using ParallelFor = void (*)(int64_t count, int64_t grain,
                             void (*body)(void* context, int64_t begin, int64_t end), void* context);

template <class Body>
void parallel(ParallelFor run, int64_t count, int64_t grain, Body body) {
    run(
        count, grain,
        [](void* context, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(begin, end); }, &body);
}

namespace cpu {

// Instruction set in use: 0 portable, 1 AVX2 + FMA + F16C, 2 AVX-512 (F, BW, VL, DQ), 3 also AVX-512 BF16, 4
// also AMX. FASTLORA_CPU_LEVEL may lower it.
int level();

// out = rows [row, row + out.rows) and columns [col, col + out.cols) of the weight.
void dequant_4bit(const Packed4bit& w, int64_t row, int64_t col, const Matrix& out, ParallelFor run);

void dequant_8bit(const Packed8bit& w, int64_t row, int64_t col, const Matrix& out, ParallelFor run);

// out [T, O] = x [T, I] W^T, or x [T, O] W when transposed, accumulated in float32. On tiles (see level) for
// any number of rows; elsewhere every weight is decoded once per 4 rows of x and there is no transposed form.
bool matmul_4bit_on_tiles(DType x, const Packed4bit& w);
void matmul_4bit(const ConstMatrix& x, const Packed4bit& w, bool transposed, const Matrix& out,
                 ParallelFor run);

// out = act(gate) * up.
void glu_forward(const ConstMatrix& gate, const ConstMatrix& up, Act act, const Matrix& out, ParallelFor run);

// dgate = dy * up * act'(gate), dup = dy * act(gate), product = act(gate) * up.
void glu_backward(const ConstMatrix& dy, const ConstMatrix& gate, const ConstMatrix& up, Act act,
                  const Matrix& dgate, const Matrix& dup, const Matrix& product, ParallelFor run);

// out [T, R] f32 = scale * D(x [T, I]) a^T, a is [R, I], or [I, R] when a_transposed.
void lora_shrink(const ConstMatrix& x, const ConstMatrix& a, bool a_transposed, const DropoutMask& mask,
                 float scale, const Matrix& out, ParallelFor run);

// out [T, O] = gain * (y + scale * D(s [T, R] b^T)) + offset; b is [O, R], or [R, O] when b_transposed; gain
// and offset f32 [O] or null. out may be y: in place; y's data may be null: zeros.
void lora_expand(const ConstMatrix& y, const ConstMatrix& s, const ConstMatrix& b, bool b_transposed,
                 const DropoutMask& mask, float scale, const float* gain, const float* offset,
                 const Matrix& out, ParallelFor run);

// out [R, I], or [I, R] when transposed, = scale * s [T, R]^T D(x [T, I]): gradients of the rank-r factors.
void lora_grad(const ConstMatrix& s, const ConstMatrix& x, const DropoutMask& mask, float scale,
               bool transposed, const Matrix& out, ParallelFor run);

// ds [T, R] f32 = scale * dy [T, O] b [O, R], db [O, R] = dy^T s [T, R].
void lora_backward(const ConstMatrix& dy, const ConstMatrix& b, const ConstMatrix& s, float scale,
                   const Matrix& ds, const Matrix& db, ParallelFor run);

// out [O] = ||W_o + scale * (B A)_o|| from W dense or packed, A [R, I], B [O, R].
void dora_norm(const ConstMatrix& w, const ConstMatrix& a, const ConstMatrix& b, float scale, float* out,
               ParallelFor run);
void dora_norm_4bit(const Packed4bit& w, DType weight_dtype, const ConstMatrix& a, const ConstMatrix& b,
                    float scale, float* out, ParallelFor run);

// dz = dy * gain per column; dgain [O] = sum over rows of dy * z. f32 sums.
void dora_grad(const ConstMatrix& dy, const ConstMatrix& z, const float* gain, const Matrix& dz, float* dgain,
               ParallelFor run);

// out = D(x); out may be x.
void dropout_apply(const ConstMatrix& x, const DropoutMask& mask, const Matrix& out, ParallelFor run);

// A DropoutMask's bits [rows, ceil(cols / 16) words] from flags of a byte each, 0 or 1.
void dropout_pack(const uint8_t* flags, int64_t pitch, int64_t rows, int64_t cols, uint8_t* bits,
                  ParallelFor run);

// Bits of torch's CPU bernoulli_(keep), row by row, from an mt19937 state that is advanced in place. Serial
// by nature.
struct Mt19937 {
    uint32_t* words;  // [624]
    int32_t left;     // words still unused before the next twist, as torch counts them
    uint32_t next;    // index of the next unused word
};
void dropout_mask(Mt19937& state, double keep, int64_t rows, int64_t cols, uint8_t* bits);

}  // namespace cpu

// CUDA and HIP, with the arguments of the CPU's launchers. Asynchronous on `stream`, no allocation, no
// synchronisation: what a launcher needs room for, the caller brings. 0, or the runtime's error code.
namespace gpu {

using Stream = void*;  // cudaStream_t or hipStream_t

const char* error_text(int status);

int dequant_4bit(const Packed4bit& w, int64_t row, int64_t col, const Matrix& out, Stream stream);
int dequant_8bit(const Packed8bit& w, int64_t row, int64_t col, const Matrix& out, Stream stream);

// out = x W^T for what `takes` says: up to 16 rows of 16 bits.
bool matmul_4bit_takes(const ConstMatrix& x, const Packed4bit& w);
int matmul_4bit(const ConstMatrix& x, const Packed4bit& w, const Matrix& out, Stream stream);

int glu_forward(const ConstMatrix& gate, const ConstMatrix& up, Act act, const Matrix& out, Stream stream);
int glu_backward(const ConstMatrix& dy, const ConstMatrix& gate, const ConstMatrix& up, Act act,
                 const Matrix& dgate, const Matrix& dup, const Matrix& product, Stream stream);

// `room`: as many floats as <op>_room says, for sums in parts.
int64_t lora_shrink_room(const ConstMatrix& x, int64_t ranks);
int lora_shrink(const ConstMatrix& x, const ConstMatrix& a, bool a_transposed, const DropoutMask& mask,
                float scale, const Matrix& out, float* room, Stream stream);

// s may have any pitch.
int lora_expand(const ConstMatrix& y, const ConstMatrix& s, const ConstMatrix& b, bool b_transposed,
                const DropoutMask& mask, float scale, const float* gain, const float* offset,
                const Matrix& out, Stream stream);

int64_t lora_grad_room(const ConstMatrix& x, int64_t ranks);
int lora_grad(const ConstMatrix& s, const ConstMatrix& x, const DropoutMask& mask, float scale,
              bool transposed, const Matrix& out, float* room, Stream stream);

int64_t lora_backward_room(const ConstMatrix& dy, int64_t ranks);
int lora_backward(const ConstMatrix& dy, const ConstMatrix& b, const ConstMatrix& s, float scale,
                  const Matrix& ds, const Matrix& db, float* room, Stream stream);

int64_t dora_norm_room(int64_t rows, int64_t cols);
int64_t dora_norm_4bit_room(int64_t rows, int64_t cols);
int dora_norm(const ConstMatrix& w, const ConstMatrix& a, const ConstMatrix& b, float scale, float* out,
              float* room, Stream stream);
int dora_norm_4bit(const Packed4bit& w, DType weight_dtype, const ConstMatrix& a, const ConstMatrix& b,
                   float scale, float* out, float* room, Stream stream);

int64_t dora_grad_room(int64_t rows, int64_t cols);
int dora_grad(const ConstMatrix& dy, const ConstMatrix& z, const float* gain, const Matrix& dz, float* dgain,
              float* room, Stream stream);

int dropout_apply(const ConstMatrix& x, const DropoutMask& mask, const Matrix& out, Stream stream);
int dropout_pack(const uint8_t* flags, int64_t pitch, int64_t rows, int64_t cols, uint8_t* bits,
                 Stream stream);

}  // namespace gpu
}  // namespace fastlora
