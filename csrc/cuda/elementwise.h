// Elementwise kernels: which elements of a [rows, cols] matrix a thread takes.
//
// A block takes part of one row, so that nothing is divided and rows start where the whole block agrees; a
// thread in_flight packs of n columns each, a block apart, so that a warp's accesses are packed. Every pack
// is read, those past the end where the last one is, and only writing is conditional: a branch around a load
// makes the compiler wait for it before the next one.
#pragma once

#include <initializer_list>

#include "../gpu.h"

namespace fastlora::gpu {

constexpr int elementwise_threads = 128;
constexpr int elementwise_blocks =
    8;  // 64 registers: to save more, ptxas would put arithmetic between the loads

// Rows in two dimensions of the grid: neither reaches beyond 65535.
template <int n, int in_flight>
dim3 elementwise_grid(int64_t rows, int64_t cols) {
    const int64_t layers = ceil_div(rows, 65535);
    return dim3((unsigned)ceil_div(cols, elementwise_threads * in_flight * n),
                (unsigned)ceil_div(rows, layers), (unsigned)layers);
}

template <int n, int in_flight>
struct Place {
    int64_t row, col;  // the block's first
    int count;         // the block's columns

    __device__ explicit Place(int64_t cols) : row((int64_t)blockIdx.z * gridDim.y + blockIdx.y) {
        constexpr int most = elementwise_threads * in_flight * n;
        col = (int64_t)blockIdx.x * most;
        count = (int)smaller(cols - col, most);
    }

    // Where pack i is written, if it is there, and where it is read; in columns from `col` on.
    __device__ int to(int i) const { return (i * elementwise_threads + (int)threadIdx.x) * n; }
    __device__ bool has(int i) const { return to(i) < count; }
    __device__ int from(int i) const { return has(i) ? to(i) : count - n; }
};

template <int n>
struct Size {
    static constexpr int value = n;
};

// Calls body(Size<n>{}) with 16 bytes of columns at a time where every row of the matrices starts on 16 bytes
// and ends with a whole pack, else with one column.
template <class T, class Body>
int with_pack(int64_t cols, std::initializer_list<ConstMatrix> inputs, std::initializer_list<Matrix> outputs,
              Body body) {
    bool whole = cols % Pack<T>::size == 0;
    for (const ConstMatrix& m : inputs) whole = whole && rows_on_16_bytes(m, sizeof(T));
    for (const Matrix& m : outputs) whole = whole && rows_on_16_bytes(m, sizeof(T));
    return whole ? body(Size<Pack<T>::size>{}) : body(Size<1>{});
}

}  // namespace fastlora::gpu
