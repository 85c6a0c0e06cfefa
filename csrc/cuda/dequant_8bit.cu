// dequant_8bit: out = values * absmax[row] / 127, a range of rows and columns
//
// 3 bytes a weight (1 read, 2 written): bound by memory. A thread makes 8 neighbouring weights, one 8-byte
// read and one 16-byte write, so that both are packed across a warp, and has four such reads in flight.
#include "elementwise.h"

namespace fastlora::gpu {

constexpr int runs_in_flight = 4;

template <class T, int n>
__global__ void FASTLORA_LAUNCH_BOUNDS(elementwise_threads, elementwise_blocks)
    dequant_8bit_runs(Packed8bit w, int64_t row0, int64_t col0, Matrix out) {
    constexpr int wide = n < Pack<T>::size ? n : Pack<T>::size;
    const Place<n, runs_in_flight> place(out.cols);
    if (place.row >= out.rows) return;
    const int8_t* from = w.values + (row0 + place.row) * w.pitch + col0 + place.col;
    T* to = element<T>(out, place.row, place.col);
    const float absmax = w.absmax[row0 + place.row];
    Pack<int8_t, n> values[runs_in_flight];
#pragma unroll
    for (int i = 0; i < runs_in_flight; ++i) values[i] = load_once<int8_t, n>(from + place.from(i));
#pragma unroll
    for (int i = 0; i < runs_in_flight; ++i)
        if (place.has(i))
#pragma unroll
            for (int p = 0; p < n; p += wide) {
                Pack<T, wide> pack;
#pragma unroll
                for (int k = 0; k < wide; ++k)  // from the left, as bitsandbytes: each product is rounded
                    pack.v[k] = from_float<T>((float)values[i].v[p + k] * absmax * (1.0f / 127));
                store_pack(to + place.to(i) + p, pack);
            }
}

// ---- launcher ---------------------------------------------------------------

int dequant_8bit(const Packed8bit& w, int64_t row, int64_t col, const Matrix& out, Stream stream) {
    constexpr int run = 8;
    const bool in_runs =
        out.cols % run == 0 && col % run == 0 && w.pitch % run == 0 && (uintptr_t)w.values % run == 0;
    return with_type(out.dtype, [&](auto type) {
        using T = decltype(type);
        const auto start = [&](auto size) {
            constexpr int n = decltype(size)::value;
            return launch(dequant_8bit_runs<T, n>, elementwise_grid<n, runs_in_flight>(out.rows, out.cols),
                          dim3(elementwise_threads), 0, stream, w, row, col, out);
        };
        return in_runs && rows_on_16_bytes(out, sizeof(T)) ? start(Size<run>{}) : start(Size<1>{});
    });
}

}  // namespace fastlora::gpu
