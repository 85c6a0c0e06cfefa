// dequant_4bit: out = code[nibble] * absmax[block], a range of rows and columns, nested scales folded in
//
// 2.52 bytes a weight (0.5 read, 2 written, 1/64 of scales): bound by memory, as long as a weight takes no
// more than the 17 instructions that an H200 can issue meanwhile; these are 9. A thread makes runs of 8
// neighbouring weights, one 4-byte read and one 16-byte write each, so that both are packed across a warp.
#include "decode_4bit.h"
#include "elementwise.h"

namespace fastlora::gpu {

constexpr int threads = 256, run = 8, runs_in_flight = 4;

// Runs that start on a 4-byte word of the codes and lie in one block; rows of out on 16 bytes.
template <class T>
__global__ void FASTLORA_LAUNCH_BOUNDS(elementwise_threads, elementwise_blocks)
    dequant_runs(Packed4bit w, BlockShifts shifts, int64_t row0, int64_t col0, Matrix out) {
    const Place<run, runs_in_flight> place(out.cols);
    if (place.row >= out.rows) return;
    const LaneCodes codes(w.fp4);
    const int64_t first = (row0 + place.row) * w.cols + col0 + place.col;
    T* to = element<T>(out, place.row, place.col);
    int64_t weights[runs_in_flight];
    uint32_t nibbles[runs_in_flight];
    float scales[runs_in_flight];
#pragma unroll
    for (int i = 0; i < runs_in_flight; ++i) {
        weights[i] = first + place.from(i);
        nibbles[i] = *reinterpret_cast<const uint32_t*>(w.packed + weights[i] / 2);
    }
    scales_at(w, shifts, weights, scales);
#pragma unroll
    for (int i = 0; i < runs_in_flight; ++i) {
        Pack<T> packs[run / Pack<T>::size];
#pragma unroll
        for (int k = 0; k < run; ++k)
            packs[k / Pack<T>::size].v[k % Pack<T>::size] =
                from_float<T>(codes[nibbles[i] >> (k / 2 * 8 + (k % 2 ? 0 : 4))] * scales[i]);
        if (place.has(i))
#pragma unroll
            for (int p = 0; p < run / Pack<T>::size; ++p)
                store_pack(to + place.to(i) + p * Pack<T>::size, packs[p]);
    }
}

// Any range and layout, a weight per thread.
template <class T>
__global__ void __launch_bounds__(threads)
    dequant_each(Packed4bit w, int64_t row, int64_t col, Matrix out, int64_t count) {
    __shared__ Codes codes;
    codes.load(w.fp4);
    const int64_t at = (int64_t)blockIdx.x * threads + threadIdx.x;
    if (at >= count) return;
    const int64_t r = at / out.cols, c = at - r * out.cols, weight = (row + r) * w.cols + col + c;
    const int64_t block = weight / w.blocksize;
    const uint32_t byte = w.packed[weight / 2], code = weight % 2 ? byte & 15 : byte >> 4;
    ((T*)out.data)[r * out.pitch + c] =
        from_float<T>(codes[code] * scale_of(w, block, block / w.nested_blocksize));
}

// ---- launcher ---------------------------------------------------------------

int dequant_4bit(const Packed4bit& w, int64_t row, int64_t col, const Matrix& out, Stream stream) {
    return with_type(out.dtype, [&](auto type) {
        using T = decltype(type);
        const int64_t count = out.rows * out.cols;
        const bool in_runs = w.cols % run == 0 && col % run == 0 && out.cols % run == 0 &&
                             w.blocksize % run == 0 && BlockShifts::fit(w) && (uintptr_t)w.packed % 4 == 0 &&
                             rows_on_16_bytes(out, sizeof(T));
        if (in_runs)
            return launch(dequant_runs<T>, elementwise_grid<run, runs_in_flight>(out.rows, out.cols),
                          dim3(elementwise_threads), 0, stream, w, BlockShifts(w), row, col, out);
        return launch(dequant_each<T>, dim3((unsigned)ceil_div(count, threads)), dim3(threads), 0, stream, w,
                      row, col, out, count);
    });
}

}  // namespace fastlora::gpu
