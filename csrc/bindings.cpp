// Tensors to launchers: the only file that sees torch, through its stable ABI (2.11), so that one binary
// serves every later torch and every Python. Per op: dtype, shape and layout checks, then the launcher.
// Schemas come last.
//
// Compiled twice: as it stands it defines the ops and registers the CPU's kernels; with FASTLORA_GPU it
// becomes the other library, which registers the GPU's for tensors on "cuda" (NVIDIA's and AMD's). With
// FASTLORA_EMULATE_GPU, for tests, CPU tensors go to the GPU's launchers; see gpu.h.
//
// Dimensions, devices and meaning are checked by the Python functions (pyfastlora/ops), with sentences for
// users; the checks here keep a wrong call from touching memory it must not.
#if defined(FASTLORA_GPU)
#include <torch/csrc/stable/accelerator.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstring>
#include <optional>
#include <ostream>

#include "kernels.h"

#if defined(FASTLORA_GPU)
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace {

using fastlora::ConstMatrix;
using fastlora::DropoutMask;
using fastlora::DType;
using fastlora::Matrix;
using fastlora::Packed4bit;
using fastlora::Packed8bit;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// ---- where a launcher runs ---------------------------------------------------------------

[[maybe_unused]] void run_on_torch_threads(int64_t count, int64_t grain,
                                           void (*body)(void*, int64_t, int64_t), void* context) {
    torch::stable::parallel_for(0, count, grain,
                                [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

// FASTLORA_RUN(op, tensor, arguments): the launcher of `op` for the device of `tensor`. FASTLORA_RUN_IN_ROOM
// gives a GPU's launcher the workspace that op_room(sizes) asks for; a CPU's has its own.
#define FASTLORA_RUN_CPU(op, tensor, ...) fastlora::cpu::op(__VA_ARGS__, run_on_torch_threads)
#if defined(FASTLORA_GPU) || defined(FASTLORA_EMULATE_GPU)
void check_launch(const char* op, int status) {
    STD_TORCH_CHECK(status == 0, op, ": the kernel did not start: ", fastlora::gpu::error_text(status));
}

#if defined(FASTLORA_GPU)
// The tensor's own device is current for as long as this lives, with the stream that torch uses on it.
struct OnDeviceOf {
    torch::stable::accelerator::DeviceGuard guard;
    void* stream = nullptr;

    explicit OnDeviceOf(const Tensor& t) : guard(t.get_device_index()) {
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    }
};
#else
struct OnDeviceOf {
    void* stream = nullptr;

    explicit OnDeviceOf(const Tensor&) {}
};
#endif

Tensor floats_beside(const Tensor& t, int64_t count) {
    return torch::stable::new_empty(t, {&count, 1}, ScalarType::Float);
}

constexpr bool on_gpu = true;

#define FASTLORA_RUN(op, tensor, ...) \
    check_launch(#op, fastlora::gpu::op(__VA_ARGS__, OnDeviceOf(tensor).stream))
#define FASTLORA_RUN_IN_ROOM(op, tensor, sizes, ...)                                                       \
    do {                                                                                                   \
        const OnDeviceOf device(tensor);                                                                   \
        const Tensor room = floats_beside(tensor, fastlora::gpu::op##_room sizes);                         \
        check_launch(#op, fastlora::gpu::op(__VA_ARGS__, (float*)room.mutable_data_ptr(), device.stream)); \
    } while (0)
#else
constexpr bool on_gpu = false;

#define FASTLORA_RUN FASTLORA_RUN_CPU
#define FASTLORA_RUN_IN_ROOM(op, tensor, sizes, ...) FASTLORA_RUN_CPU(op, tensor, __VA_ARGS__)
#endif

// ---- checks and conversions ---------------------------------------------------------------

// A call of an op, and the tensor whose device it runs on.
struct Call {
    const char* name;
    const Tensor& on;
};

std::ostream& operator<<(std::ostream& to, const Call& op) {
    return to << op.name;
}

DType float_dtype(const Call& op, const char* name, const Tensor& t) {
    const ScalarType type = t.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op,
                    ": ", name, " must be float32, bfloat16 or float16");
    return type == ScalarType::Float ? DType::f32 : type == ScalarType::BFloat16 ? DType::bf16 : DType::f16;
}

// The launcher runs where one tensor is; a pointer from elsewhere, another GPU included, would crash the
// program.
void on_device(const Call& op, const char* name, const Tensor& t) {
#if defined(FASTLORA_GPU)
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == op.on.get_device_index(), op, ": ", name,
                    " must be on the GPU with the other tensors");
#else
    STD_TORCH_CHECK(t.is_cpu(), op, ": ", name, " must be on the CPU with the other tensors");
#endif
}

void packed_columns(const Call& op, const char* name, const Tensor& t) {
    on_device(op, name, t);
    STD_TORCH_CHECK(t.dim() == 2, op, ": ", name, " must have two dimensions; it has ", t.dim());
    STD_TORCH_CHECK(t.size(1) <= 1 || t.stride(1) == 1, op, ": the columns of ", name,
                    " must be packed; their stride is ", t.stride(1));
}

ConstMatrix input(const Call& op, const char* name, const Tensor& t) {
    packed_columns(op, name, t);
    return {t.const_data_ptr(), float_dtype(op, name, t), t.size(0), t.size(1), t.stride(0)};
}

Matrix output(const Call& op, const char* name, const Tensor& t) {
    packed_columns(op, name, t);
    return {t.mutable_data_ptr(), float_dtype(op, name, t), t.size(0), t.size(1), t.stride(0)};
}

void same_shape(const Call& op, const Tensor& a, const Tensor& b) {
    STD_TORCH_CHECK(a.size(0) == b.size(0) && a.size(1) == b.size(1) && a.scalar_type() == b.scalar_type(),
                    op, ": the tensors must agree in shape and dtype");
}

// A packed vector of `count` elements of one type.
const void* vector(const Call& op, const char* name, const Tensor& t, ScalarType type, int64_t count) {
    on_device(op, name, t);
    STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous() && t.numel() >= count, op, ": ", name,
                    " must be contiguous, of the right dtype and hold ", count, " elements; it holds ",
                    t.numel());
    return t.const_data_ptr();
}

const float* floats(const Call& op, const char* name, const Tensor& t, int64_t count) {
    return static_cast<const float*>(vector(op, name, t, ScalarType::Float, count));
}

const float* maybe_floats(const Call& op, const char* name, const MaybeTensor& t, int64_t count) {
    return t ? floats(op, name, *t, count) : nullptr;
}

DropoutMask mask(const Call& op, const MaybeTensor& bits, double scale, int64_t rows, int64_t cols) {
    if (!bits) return {nullptr, 0, 1.0f};
    const int64_t pitch = (cols + 15) / 16 * 2;
    return {static_cast<const uint8_t*>(vector(op, "mask", *bits, ScalarType::Byte, rows * pitch)), pitch,
            (float)scale};
}

Packed4bit packed_4bit(const Call& op, const Tensor& packed, const Tensor& absmax,
                       const MaybeTensor& nested_code, const MaybeTensor& nested_absmax,
                       const MaybeTensor& nested_offset, int64_t blocksize, int64_t nested_blocksize,
                       bool fp4, int64_t rows, int64_t cols) {
    STD_TORCH_CHECK(blocksize > 0 && nested_blocksize > 0 && rows >= 0 && cols >= 0, op,
                    ": sizes must be positive");
    const int64_t count = rows * cols, blocks = (count + blocksize - 1) / blocksize;
    STD_TORCH_CHECK(nested_code.has_value() == nested_absmax.has_value() &&
                        nested_code.has_value() == nested_offset.has_value(),
                    op, ": nested_code, nested_absmax and nested_offset come together");
    Packed4bit w{};
    w.packed = static_cast<const uint8_t*>(vector(op, "packed", packed, ScalarType::Byte, (count + 1) / 2));
    if (nested_code) {
        w.absmax_codes = static_cast<const uint8_t*>(vector(op, "absmax", absmax, ScalarType::Byte, blocks));
        w.nested_code = floats(op, "nested_code", *nested_code, 256);
        w.nested_absmax =
            floats(op, "nested_absmax", *nested_absmax, (blocks + nested_blocksize - 1) / nested_blocksize);
        w.nested_offset = floats(op, "nested_offset", *nested_offset, 1);
    } else {
        w.absmax = floats(op, "absmax", absmax, blocks);
    }
    w.blocksize = blocksize, w.nested_blocksize = nested_blocksize;
    w.fp4 = fp4, w.rows = rows, w.cols = cols;
    return w;
}

fastlora::Act activation(const Call& op, int64_t act) {
    STD_TORCH_CHECK(act >= 0 && act <= 4, op, ": act must be 0 to 4; got ", act);
    return static_cast<fastlora::Act>(act);
}

// ---- ops ---------------------------------------------------------------

void dequant_4bit(const Tensor packed, const Tensor absmax, const MaybeTensor nested_code,
                  const MaybeTensor nested_absmax, const MaybeTensor nested_offset, int64_t blocksize,
                  int64_t nested_blocksize, bool fp4, int64_t rows, int64_t cols, int64_t row, int64_t col,
                  const Tensor out) {
    const Call op{"dequant_4bit", packed};
    const Packed4bit w = packed_4bit(op, packed, absmax, nested_code, nested_absmax, nested_offset, blocksize,
                                     nested_blocksize, fp4, rows, cols);
    const Matrix o = output(op, "out", out);
    STD_TORCH_CHECK(row >= 0 && col >= 0 && row + o.rows <= rows && col + o.cols <= cols, op,
                    ": out does not lie inside the weight");
    if (o.rows && o.cols) FASTLORA_RUN(dequant_4bit, packed, w, row, col, o);
}

void dequant_8bit(const Tensor values, const Tensor absmax, int64_t row, int64_t col, const Tensor out) {
    const Call op{"dequant_8bit", values};
    packed_columns(op, "values", values);
    STD_TORCH_CHECK(values.scalar_type() == ScalarType::Char, op, ": values must be int8");
    const Packed8bit w{static_cast<const int8_t*>(values.const_data_ptr()),
                       floats(op, "absmax", absmax, values.size(0)), values.size(0), values.size(1),
                       values.stride(0)};
    const Matrix o = output(op, "out", out);
    STD_TORCH_CHECK(row >= 0 && col >= 0 && row + o.rows <= w.rows && col + o.cols <= w.cols, op,
                    ": out does not lie inside the weight");
    if (o.rows && o.cols) FASTLORA_RUN(dequant_8bit, values, w, row, col, o);
}

void matmul_4bit(const Tensor x, const Tensor packed, const Tensor absmax, const MaybeTensor nested_code,
                 const MaybeTensor nested_absmax, const MaybeTensor nested_offset, int64_t blocksize,
                 int64_t nested_blocksize, bool fp4, bool transposed, const Tensor out) {
    const Call op{"matmul_4bit", x};
    const ConstMatrix in = input(op, "x", x);
    const Matrix o = output(op, "out", out);
    STD_TORCH_CHECK(in.rows == o.rows && in.dtype == o.dtype, op, ": x and out must agree in rows and dtype");
    const int64_t rows = transposed ? in.cols : o.cols, cols = transposed ? o.cols : in.cols;
    const Packed4bit w = packed_4bit(op, packed, absmax, nested_code, nested_absmax, nested_offset, blocksize,
                                     nested_blocksize, fp4, rows, cols);
#if defined(FASTLORA_GPU) || defined(FASTLORA_EMULATE_GPU)
    STD_TORCH_CHECK(!transposed && fastlora::gpu::matmul_4bit_takes(in, w), op,
                    ": a GPU takes up to 16 rows of x, bfloat16 or float16, not transposed, with columns and "
                    "blocks in multiples of 32, on 16 bytes");
    if (o.rows && o.cols) FASTLORA_RUN(matmul_4bit, x, in, w, o);
#else
    STD_TORCH_CHECK(!transposed || fastlora::cpu::matmul_4bit_on_tiles(in.dtype, w), op,
                    ": the transposed product needs AMX tiles, bfloat16 and columns in multiples of 32");
    if (o.rows && o.cols) FASTLORA_RUN(matmul_4bit, x, in, w, transposed, o);
#endif
}

void glu_forward(const Tensor gate, const Tensor up, int64_t act, const Tensor out) {
    const Call op{"glu_forward", gate};
    same_shape(op, gate, up), same_shape(op, gate, out);
    const Matrix o = output(op, "out", out);
    const ConstMatrix g = input(op, "gate", gate), u = input(op, "up", up);
    if (o.rows && o.cols) FASTLORA_RUN(glu_forward, gate, g, u, activation(op, act), o);
}

void glu_backward(const Tensor dy, const Tensor gate, const Tensor up, int64_t act, const Tensor dgate,
                  const Tensor dup, const Tensor product) {
    const Call op{"glu_backward", gate};
    for (const Tensor* t : {&dy, &up, &dgate, &dup, &product}) same_shape(op, gate, *t);
    const Matrix dg = output(op, "dgate", dgate), du = output(op, "dup", dup),
                 p = output(op, "product", product);
    const ConstMatrix d = input(op, "dy", dy), g = input(op, "gate", gate), u = input(op, "up", up);
    if (dg.rows && dg.cols) FASTLORA_RUN(glu_backward, gate, d, g, u, activation(op, act), dg, du, p);
}

void lora_shrink(const Tensor x, const Tensor a, bool a_transposed, const MaybeTensor bits, double mask_scale,
                 double scale, const Tensor out) {
    const Call op{"lora_shrink", x};
    const ConstMatrix in = input(op, "x", x), factor = input(op, "a", a);
    const Matrix o = output(op, "out", out);
    STD_TORCH_CHECK(o.dtype == DType::f32 && out.is_contiguous() && o.rows == in.rows, op,
                    ": out must be a packed float32 [T, R]");
    STD_TORCH_CHECK((a_transposed ? factor.rows : factor.cols) == in.cols &&
                        (a_transposed ? factor.cols : factor.rows) == o.cols,
                    op, ": a does not fit x and out");
    const DropoutMask m = mask(op, bits, mask_scale, in.rows, in.cols);
    if (o.rows && o.cols)
        FASTLORA_RUN_IN_ROOM(lora_shrink, x, (in, o.cols), in, factor, a_transposed, m, (float)scale, o);
}

void lora_expand(const MaybeTensor y, const Tensor s, const Tensor b, bool b_transposed,
                 const MaybeTensor bits, double mask_scale, double scale, const MaybeTensor gain,
                 const MaybeTensor offset, const Tensor out) {
    const Call op{"lora_expand", out};
    const ConstMatrix in = input(op, "s", s), factor = input(op, "b", b);
    const Matrix o = output(op, "out", out);
    if (y) same_shape(op, *y, out);
    const ConstMatrix from = y ? input(op, "y", *y) : ConstMatrix{nullptr, o.dtype, o.rows, o.cols, o.cols};
    STD_TORCH_CHECK(in.dtype == DType::f32 && (on_gpu || s.is_contiguous()) && o.rows == in.rows, op,
                    ": s must be a float32 [T, R], packed on a CPU");
    STD_TORCH_CHECK((b_transposed ? factor.rows : factor.cols) == in.cols &&
                        (b_transposed ? factor.cols : factor.rows) == o.cols,
                    op, ": b does not fit s and y");
    const DropoutMask m = mask(op, bits, mask_scale, o.rows, o.cols);
    if (o.rows && o.cols)
        FASTLORA_RUN(lora_expand, out, from, in, factor, b_transposed, m, (float)scale,
                     maybe_floats(op, "gain", gain, o.cols), maybe_floats(op, "offset", offset, o.cols), o);
}

void lora_grad(const Tensor s, const Tensor x, const MaybeTensor bits, double mask_scale, double scale,
               bool transposed, const Tensor out) {
    const Call op{"lora_grad", x};
    const ConstMatrix factor = input(op, "s", s), in = input(op, "x", x);
    const Matrix o = output(op, "out", out);
    STD_TORCH_CHECK(factor.dtype == DType::f32 && factor.rows == in.rows &&
                        (transposed ? o.cols : o.rows) == factor.cols &&
                        (transposed ? o.rows : o.cols) == in.cols,
                    op, ": s must be float32 [T, R], x [T, I] and out [R, I], or [I, R] when transposed");
    const DropoutMask m = mask(op, bits, mask_scale, in.rows, in.cols);
    if (o.rows && o.cols)
        FASTLORA_RUN_IN_ROOM(lora_grad, x, (in, factor.cols), factor, in, m, (float)scale, transposed, o);
}

void lora_backward(const Tensor dy, const Tensor b, const Tensor s, double scale, const Tensor ds,
                   const Tensor db) {
    const Call op{"lora_backward", dy};
    const ConstMatrix in = input(op, "dy", dy), fb = input(op, "b", b), fs = input(op, "s", s);
    const Matrix to_s = output(op, "ds", ds), to_b = output(op, "db", db);
    STD_TORCH_CHECK(fs.dtype == DType::f32 && to_s.dtype == DType::f32 && ds.is_contiguous(), op,
                    ": s and ds must be float32, ds packed");
    STD_TORCH_CHECK(fb.rows == in.cols && fs.rows == in.rows && fs.cols == fb.cols && to_s.rows == fs.rows &&
                        to_s.cols == fs.cols && to_b.rows == fb.rows && to_b.cols == fb.cols,
                    op, ": dy [T, O], b and db [O, R], s and ds [T, R] must fit");
    if (to_b.rows && to_b.cols)
        FASTLORA_RUN_IN_ROOM(lora_backward, dy, (in, fs.cols), in, fb, fs, (float)scale, to_s, to_b);
}

void check_factors(const Call& op, const ConstMatrix& a, const ConstMatrix& b, int64_t rows, int64_t cols) {
    STD_TORCH_CHECK(a.cols == cols && b.rows == rows && a.rows == b.cols, op,
                    ": a [R, I] and b [O, R] do not fit the weight [", rows, ", ", cols, "]");
}

float* norms(const Call& op, const Tensor& out, int64_t rows) {
    floats(op, "out", out, rows);
    return static_cast<float*>(out.mutable_data_ptr());
}

void dora_norm(const Tensor w, const Tensor a, const Tensor b, double scale, const Tensor out) {
    const Call op{"dora_norm", w};
    const ConstMatrix weight = input(op, "w", w), fa = input(op, "a", a), fb = input(op, "b", b);
    check_factors(op, fa, fb, weight.rows, weight.cols);
    if (weight.rows)
        FASTLORA_RUN_IN_ROOM(dora_norm, w, (weight.rows, weight.cols), weight, fa, fb, (float)scale,
                             norms(op, out, weight.rows));
}

void dora_norm_4bit(const Tensor packed, const Tensor absmax, const MaybeTensor nested_code,
                    const MaybeTensor nested_absmax, const MaybeTensor nested_offset, int64_t blocksize,
                    int64_t nested_blocksize, bool fp4, int64_t dtype, const Tensor a, const Tensor b,
                    double scale, const Tensor out) {
    const Call op{"dora_norm_4bit", packed};
    const ConstMatrix fa = input(op, "a", a), fb = input(op, "b", b);
    STD_TORCH_CHECK(dtype >= 0 && dtype <= 2, op, ": dtype must be 0 (float32), 1 (bfloat16) or 2 (float16)");
    const Packed4bit w = packed_4bit(op, packed, absmax, nested_code, nested_absmax, nested_offset, blocksize,
                                     nested_blocksize, fp4, fb.rows, fa.cols);
    check_factors(op, fa, fb, w.rows, w.cols);
    if (w.rows)
        FASTLORA_RUN_IN_ROOM(dora_norm_4bit, packed, (w.rows, w.cols), w, static_cast<DType>(dtype), fa, fb,
                             (float)scale, norms(op, out, w.rows));
}

void dora_grad(const Tensor dy, const Tensor z, const Tensor gain, const Tensor dz, const Tensor dgain) {
    const Call op{"dora_grad", dy};
    same_shape(op, dy, z), same_shape(op, dy, dz);
    const ConstMatrix d = input(op, "dy", dy), in = input(op, "z", z);
    if (in.cols)
        FASTLORA_RUN_IN_ROOM(dora_grad, dy, (in.rows, in.cols), d, in, floats(op, "gain", gain, in.cols),
                             output(op, "dz", dz), norms(op, dgain, in.cols));
}

void dropout_apply(const Tensor x, const Tensor bits, double mask_scale, const Tensor out) {
    const Call op{"dropout_apply", x};
    same_shape(op, x, out);
    const ConstMatrix in = input(op, "x", x);
    const DropoutMask m = mask(op, bits, mask_scale, in.rows, in.cols);
    if (in.rows && in.cols) FASTLORA_RUN(dropout_apply, x, in, m, output(op, "out", out));
}

void dropout_pack(const Tensor keep, const Tensor bits) {
    const Call op{"dropout_pack", keep};
    packed_columns(op, "keep", keep);
    STD_TORCH_CHECK(keep.scalar_type() == ScalarType::Bool, op, ": keep must be bool");
    const int64_t rows = keep.size(0), cols = keep.size(1);
    vector(op, "bits", bits, ScalarType::Byte, rows * ((cols + 15) / 16 * 2));
    if (rows && cols)
        FASTLORA_RUN(dropout_pack, keep, static_cast<const uint8_t*>(keep.const_data_ptr()), keep.stride(0),
                     rows, cols, static_cast<uint8_t*>(bits.mutable_data_ptr()));
}

#if !defined(FASTLORA_GPU)
int64_t cpu_level() {
    return fastlora::cpu::level();
}

// torch.get_rng_state() of a CPU generator: seed (8 bytes), left (4), seeded (4), next (8), then 624 words, 8
// bytes each.
constexpr int64_t left_at = 8, next_at = 16, words_at = 24, word_count = 624;

void dropout_mask(const Tensor state, double keep, int64_t rows, int64_t cols, const Tensor bits) {
    const Call op{"dropout_mask", state};
    STD_TORCH_CHECK(rows >= 0 && cols >= 0 && keep >= 0 && keep <= 1, op, ": keep must be in [0, 1]");
    vector(op, "state", state, ScalarType::Byte, words_at + 8 * word_count);
    vector(op, "bits", bits, ScalarType::Byte, rows * ((cols + 15) / 16 * 2));
    auto* bytes = static_cast<uint8_t*>(state.mutable_data_ptr());
    uint32_t words[word_count];
    for (int64_t i = 0; i < word_count; ++i) std::memcpy(words + i, bytes + words_at + 8 * i, 4);
    fastlora::cpu::Mt19937 generator{words, 0, 0};
    std::memcpy(&generator.left, bytes + left_at, 4);
    std::memcpy(&generator.next, bytes + next_at, 4);
    STD_TORCH_CHECK(generator.left >= 1 && generator.left + (int64_t)generator.next <= word_count + 1, op,
                    ": state is not that of a torch CPU generator");
    fastlora::cpu::dropout_mask(generator, keep, rows, cols, static_cast<uint8_t*>(bits.mutable_data_ptr()));
    for (int64_t i = 0; i < word_count; ++i) std::memcpy(bytes + words_at + 8 * i, words + i, 4);
    std::memcpy(bytes + left_at, &generator.left, 4);
    std::memcpy(bytes + next_at, &generator.next, 4);
}
#endif

}  // namespace

#if defined(FASTLORA_GPU)
STABLE_TORCH_LIBRARY_IMPL(pyfastlora, CUDA, m) {
    m.impl("dequant_4bit", TORCH_BOX(&dequant_4bit));
    m.impl("matmul_4bit", TORCH_BOX(&matmul_4bit));
    m.impl("lora_shrink", TORCH_BOX(&lora_shrink));
    m.impl("lora_expand", TORCH_BOX(&lora_expand));
    m.impl("lora_grad", TORCH_BOX(&lora_grad));
    m.impl("lora_backward", TORCH_BOX(&lora_backward));
    m.impl("dequant_8bit", TORCH_BOX(&dequant_8bit));
    m.impl("glu_forward", TORCH_BOX(&glu_forward));
    m.impl("glu_backward", TORCH_BOX(&glu_backward));
    m.impl("dora_norm", TORCH_BOX(&dora_norm));
    m.impl("dora_norm_4bit", TORCH_BOX(&dora_norm_4bit));
    m.impl("dora_grad", TORCH_BOX(&dora_grad));
    m.impl("dropout_apply", TORCH_BOX(&dropout_apply));
    m.impl("dropout_pack", TORCH_BOX(&dropout_pack));
}
#else
// ---- schemas ---------------------------------------------------------------

#define FASTLORA_PACKED_4BIT                                                                            \
    "Tensor packed, Tensor absmax, Tensor? nested_code, Tensor? nested_absmax, Tensor? nested_offset, " \
    "int blocksize, int nested_blocksize, bool fp4, "

STABLE_TORCH_LIBRARY(pyfastlora, m) {
    m.def("cpu_level() -> int");
    m.def("dequant_4bit(" FASTLORA_PACKED_4BIT "int rows, int cols, int row, int col, Tensor(a!) out) -> ()");
    m.def("dequant_8bit(Tensor values, Tensor absmax, int row, int col, Tensor(a!) out) -> ()");
    m.def("matmul_4bit(Tensor x, " FASTLORA_PACKED_4BIT "bool transposed, Tensor(a!) out) -> ()");
    m.def("glu_forward(Tensor gate, Tensor up, int act, Tensor(a!) out) -> ()");
    m.def(
        "glu_backward(Tensor dy, Tensor gate, Tensor up, int act, Tensor(a!) dgate, Tensor(b!) dup, "
        "Tensor(c!) product) -> ()");
    m.def(
        "lora_shrink(Tensor x, Tensor a, bool a_transposed, Tensor? mask, float mask_scale, float scale, "
        "Tensor(a!) out) -> ()");
    m.def(
        "lora_expand(Tensor? y, Tensor s, Tensor b, bool b_transposed, Tensor? mask, float mask_scale, float "
        "scale, "
        "Tensor? gain, Tensor? offset, Tensor(a!) out) -> ()");
    m.def(
        "lora_grad(Tensor s, Tensor x, Tensor? mask, float mask_scale, float scale, bool transposed, "
        "Tensor(a!) out) -> ()");
    m.def("lora_backward(Tensor dy, Tensor b, Tensor s, float scale, Tensor(a!) ds, Tensor(b!) db) -> ()");
    m.def("dora_norm(Tensor w, Tensor a, Tensor b, float scale, Tensor(a!) out) -> ()");
    m.def("dora_norm_4bit(" FASTLORA_PACKED_4BIT
          "int dtype, Tensor a, Tensor b, float scale, Tensor(a!) out) -> ()");
    m.def("dora_grad(Tensor dy, Tensor z, Tensor gain, Tensor(a!) dz, Tensor(b!) dgain) -> ()");
    m.def("dropout_apply(Tensor x, Tensor mask, float mask_scale, Tensor(a!) out) -> ()");
    m.def("dropout_pack(Tensor keep, Tensor(a!) bits) -> ()");
    m.def("dropout_mask(Tensor(a!) state, float keep, int rows, int cols, Tensor(b!) bits) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pyfastlora, CompositeExplicitAutograd, m) {
    m.impl("cpu_level", TORCH_BOX(&cpu_level));
}

STABLE_TORCH_LIBRARY_IMPL(pyfastlora, CPU, m) {
    m.impl("dequant_4bit", TORCH_BOX(&dequant_4bit));
    m.impl("dequant_8bit", TORCH_BOX(&dequant_8bit));
    m.impl("matmul_4bit", TORCH_BOX(&matmul_4bit));
    m.impl("glu_forward", TORCH_BOX(&glu_forward));
    m.impl("glu_backward", TORCH_BOX(&glu_backward));
    m.impl("lora_shrink", TORCH_BOX(&lora_shrink));
    m.impl("lora_expand", TORCH_BOX(&lora_expand));
    m.impl("lora_grad", TORCH_BOX(&lora_grad));
    m.impl("lora_backward", TORCH_BOX(&lora_backward));
    m.impl("dora_norm", TORCH_BOX(&dora_norm));
    m.impl("dora_norm_4bit", TORCH_BOX(&dora_norm_4bit));
    m.impl("dora_grad", TORCH_BOX(&dora_grad));
    m.impl("dropout_apply", TORCH_BOX(&dropout_apply));
    m.impl("dropout_pack", TORCH_BOX(&dropout_pack));
    m.impl("dropout_mask", TORCH_BOX(&dropout_mask));
}
#endif
