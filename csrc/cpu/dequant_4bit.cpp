// dequant_4bit: out[n, k] = code[nibble] * absmax[block], for a rectangle of the weight.
//
// Bound by the bytes written: half a byte read for two or four written. The look-ups (decode_4bit.h) run at
// about two cycles for 32 16-bit elements, so the output should stay in a cache: callers pass a buffer they
// reuse.
#ifdef FASTLORA_LEVEL
#include "decode_4bit.h"

namespace fastlora::FASTLORA_LEVEL {

template <class T>
void dequant_rows(const Packed4bit& w, int64_t row, int64_t col, const Matrix& out, int64_t begin,
                  int64_t end) {
    for (int64_t n = begin; n < end; ++n)
        decode(w, (row + n) * w.cols + col, out.cols, (T*)out.data + n * out.pitch);
}

void dequant_4bit_rows(const Packed4bit& w, int64_t row, int64_t col, const Matrix& out, int64_t begin,
                       int64_t end) {
    if (out.dtype == DType::f32) return dequant_rows<float>(w, row, col, out, begin, end);
    if (out.dtype == DType::bf16) return dequant_rows<bf16>(w, row, col, out, begin, end);
    dequant_rows<f16>(w, row, col, out, begin, end);
}

}  // namespace fastlora::FASTLORA_LEVEL
#else
#define FASTLORA_KERNELS "dequant_4bit.cpp"
#include "levels.h"

namespace fastlora::cpu {

void dequant_4bit(const Packed4bit& w, int64_t row, int64_t col, const Matrix& out, ParallelFor run) {
    const auto rows = FASTLORA_PICK(dequant_4bit_rows);
    const int64_t grain =
        1 + (1 << 16) / (out.cols + 1);  // a thread is worth waking for 64k elements, some 5 us
    parallel(run, out.rows, grain, [&](int64_t begin, int64_t end) { rows(w, row, col, out, begin, end); });
}

}  // namespace fastlora::cpu
#endif
