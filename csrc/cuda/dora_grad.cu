// dora_grad: dz = dy * gain, dgain = sum over rows of dy * z
//
// One pass over dy and z; bound by memory, three passes over [T, O]. A block takes 64 rows of some columns,
// 16 bytes of a row to a lane, and leaves the sums of its rows in the room, O floats per 64 rows; a second
// kernel adds these in a fixed order, so that a result does not depend on which block came first.
#include "elementwise.h"

namespace fastlora::gpu {

constexpr int grad_warps = 8, rows_per_block = 64, rows_in_flight = 4;

template <class T, int n>
__global__ void __launch_bounds__(grad_warps* warp_size)
    dora_grad_rows(ConstMatrix dy, ConstMatrix z, const float* gain, Matrix dz, float* partial) {
    constexpr int width = warp_size * n;
    __shared__ float sums[grad_warps][width];
    const int warp = (int)(threadIdx.x / warp_size);
    const int64_t first = (int64_t)blockIdx.y * width, col = first + lane() * n;
    const int64_t begin = (int64_t)blockIdx.x * rows_per_block;
    const int64_t end = begin + rows_per_block < z.rows ? begin + rows_per_block : z.rows;
    float total[n] = {};
    if (col < z.cols) {
        float factor[n];
#pragma unroll
        for (int k = 0; k < n; ++k) factor[k] = gain[col + k];
        for (int64_t row = begin + warp; row < end; row += grad_warps * rows_in_flight) {
            Pack<T, n> d[rows_in_flight], v[rows_in_flight];
#pragma unroll
            for (int i = 0; i < rows_in_flight;
                 ++i) {  // past the last row the last again: no branch, no waiting
                const int64_t from = smaller(row + i * grad_warps, end - 1);
                d[i] = load_once<T, n>(element<T>(dy, from, col));
                v[i] = load_once<T, n>(element<T>(z, from, col));
            }
#pragma unroll
            for (int i = 0; i < rows_in_flight; ++i) {
                float wide[n], other[n];
                widen(d[i], wide), widen(v[i], other);
                if (row + i * grad_warps < end) {
                    Pack<T, n> scaled;
#pragma unroll
                    for (int k = 0; k < n; ++k) {
                        total[k] += wide[k] * other[k];
                        scaled.v[k] = from_float<T>(wide[k] * factor[k]);
                    }
                    store_pack(element<T>(dz, row + i * grad_warps, col), scaled);
                }
            }
        }
    }
#pragma unroll
    for (int k = 0; k < n; ++k) sums[warp][lane() * n + k] = total[k];
    __syncthreads();
    const int mine = (int)threadIdx.x;
    if (mine < width && first + mine < z.cols) {
        float sum = 0;
        for (int w = 0; w < grad_warps; ++w) sum += sums[w][mine];
        partial[blockIdx.x * z.cols + first + mine] = sum;
    }
}

// Sums of the columns of partial [rows, cols], 32 of them to a block.
__global__ void __launch_bounds__(grad_warps* warp_size)
    dora_grad_sums(const float* partial, int64_t rows, int64_t cols, float* dgain) {
    __shared__ float sums[grad_warps][warp_size];
    const int warp = (int)(threadIdx.x / warp_size);
    const int64_t col = (int64_t)blockIdx.x * warp_size + lane();
    float sum = 0;
    if (col < cols)
#pragma unroll 4
        for (int64_t row = warp; row < rows; row += grad_warps) sum += partial[row * cols + col];
    sums[warp][lane()] = sum;
    __syncthreads();
    if (warp == 0 && col < cols) {
        for (int w = 1; w < grad_warps; ++w) sum += sums[w][lane()];
        dgain[col] = sum;
    }
}

// ---- launcher ---------------------------------------------------------------

int64_t dora_grad_room(int64_t rows, int64_t cols) {
    return ceil_div(rows, rows_per_block) * cols;
}

int dora_grad(const ConstMatrix& dy, const ConstMatrix& z, const float* gain, const Matrix& dz, float* dgain,
              float* room, Stream stream) {
    const dim3 block(grad_warps * warp_size);
    const int64_t row_blocks = ceil_div(z.rows, rows_per_block);
    const int status = !z.rows ? 0 : with_type(z.dtype, [&](auto type) {
        using T = decltype(type);
        return with_pack<T>(z.cols, {dy, z}, {dz}, [&](auto size) {
            constexpr int n = decltype(size)::value;
            const dim3 grid((unsigned)row_blocks, (unsigned)ceil_div(z.cols, warp_size * n));
            return launch(dora_grad_rows<T, n>, grid, block, 0, stream, dy, z, gain, dz, room);
        });
    });
    if (status) return status;
    return launch(dora_grad_sums, dim3((unsigned)ceil_div(z.cols, warp_size)), block, 0, stream, room,
                  row_blocks, z.cols, dgain);
}

}  // namespace fastlora::gpu
