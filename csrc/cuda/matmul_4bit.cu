// matmul_4bit: out [T, O] = x [T, I] W^T from packed weights, for up to 16 rows of x
//
// Bound by reading the codes, 0.52 bytes a weight; the dense copy that a GEMM needs costs eight times that. A
// block makes 16 columns of out at a time: its warps take turns along I, 16 rows of 128 codes each, 1 KB,
// with the next KB on its way, and their sums meet in shared memory. The tensor cores have W on the left,
// because its rows are many, and x's few rows for their 8 columns.
//
// Decoding is the work: one look-up per byte gives both its codes. The table's 256 entries lie in shared
// memory 16 times, so that no two lanes of a half-warp meet the same bank; that and 6 instructions per byte
// come to some 80 % of an H200's memory rate, and more than that of any other chip.
#include <type_traits>

#include "decode_4bit.h"

namespace fastlora::gpu {

constexpr int threads = 256, warps = threads / warp_size, tile_rows = 16, run = 32, depth = 8 * run;

// Both codes of every byte, the even weight's first, once per two lanes of a warp.
struct CodePairs {
    static constexpr int copies = warp_size / 2;
    Pack<float, 2> values[256][copies];

    // By all threads of the block; a barrier must follow. A thread writes one entry, from another copy on
    // than its neighbours.
    __device__ void load(bool fp4) {
        const float nf4_codes[16] = {FASTLORA_NF4_VALUES}, fp4_codes[16] = {FASTLORA_FP4_VALUES};
        Pack<float, 2> entry{};
#pragma unroll
        for (unsigned code = 0; code < 16; ++code) {
            const float value = fp4 ? fp4_codes[code] : nf4_codes[code];
            if (threadIdx.x >> 4 == code) entry.v[0] = value;
            if ((threadIdx.x & 15) == code) entry.v[1] = value;
        }
#pragma unroll
        for (int i = 0; i < copies; ++i) values[threadIdx.x][(i + threadIdx.x) % copies] = entry;
    }

    __device__ __forceinline__ Pack<float, 2> operator[](uint32_t byte) const {
        return values[byte][lane() % copies];
    }
};
static_assert(threads == 256, "a thread per entry");

// 32 neighbouring weights of one row and block, as they lie in memory.
struct Run {
    Pack<uint32_t> codes;
    float absmax;  // of the block, or nested: of the nested block
    uint32_t code;

    __device__ __forceinline__ void read(const Packed4bit& w, BlockShifts shifts, int64_t row, int k) {
        codes = {}, absmax = 0, code = 0;
        if (k >= w.cols) return;
        const int64_t weight = (row < w.rows ? row : w.rows - 1) * w.cols + k;
        codes = load_once(reinterpret_cast<const uint32_t*>(w.packed + weight / 2));
        absmax = w.absmax ? w.absmax[weight >> shifts.block] : w.nested_absmax[weight >> shifts.nested];
        code = w.absmax ? 0 : w.absmax_codes[weight >> shifts.block];
    }

    __device__ __forceinline__ float scale(const Packed4bit& w, const float* nested_code,
                                           float offset) const {
        return w.absmax ? absmax : nested_scale(nested_code[code], absmax, offset);
    }

    __device__ __forceinline__ uint32_t byte(int i) const { return codes.v[i / 4] >> i % 4 * 8 & 255; }
};

// blockIdx.x = the first of this block's tiles of 16 columns of out. eights: of rows of x.
template <class T, int eights>
__global__ void FASTLORA_LAUNCH_BOUNDS(threads, 2)
    few_rows(ConstMatrix x, Packed4bit w, BlockShifts shifts, Matrix out) {
    __shared__ CodePairs pairs;
    __shared__ float nested_code[256], sums[warps][eights * 8][tile_rows];
    const int warp = threadIdx.x / warp_size, g = lane() / 4, c = lane() % 4;
    const int tiles = (int)ceil_div(w.rows, tile_rows);

    Run runs[2][2];  // of this lane: two along I, in two rows; read again as soon as they are used up
    const auto fetch = [&](int i, int tile, int k) {
#pragma unroll
        for (int h = 0; h < 2; ++h)
            runs[i][h].read(w, shifts, (int64_t)tile * tile_rows + h * 8 + g, k + (i * 4 + c) * run);
    };
    fetch(0, blockIdx.x, warp * depth);
    fetch(1, blockIdx.x, warp * depth);
    const float offset = w.absmax ? 0 : *w.nested_offset;
    if (!w.absmax) nested_code[threadIdx.x] = w.nested_code[threadIdx.x];
    pairs.load(w.fp4);
    __syncthreads();

    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        float d[eights][4] = {};
        for (int k = warp * depth; k < w.cols; k += warps * depth) {
            const bool same = k + warps * depth < w.cols;
            const int next = same ? tile : tile + (int)gridDim.x,
                      next_k = same ? k + warps * depth : warp * depth;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float scales[2];
#pragma unroll
                for (int h = 0; h < 2; ++h) scales[h] = runs[i][h].scale(w, nested_code, offset);
#pragma unroll
                for (int quarter = 0; quarter < 4; ++quarter) {
                    const int col = k + (i * 4 + c) * run + quarter * 8;
                    Pack<uint32_t> b[eights]{};
#pragma unroll
                    for (int n = 0; n < eights; ++n)
                        if (n * 8 + g < x.rows && col < x.cols)
                            b[n] =
                                load_pack(reinterpret_cast<const uint32_t*>(element<T>(x, n * 8 + g, col)));
#pragma unroll
                    for (int step = 0; step < 2; ++step) {
                        uint32_t a[4];
#pragma unroll
                        for (int j = 0; j < 4; ++j) {
                            const auto pair = pairs[runs[i][j % 2].byte(quarter * 4 + step * 2 + j / 2)];
                            a[j] = from_floats<T>(pair.v[0] * scales[j % 2], pair.v[1] * scales[j % 2]);
                        }
#pragma unroll
                        for (int n = 0; n < eights; ++n) {
                            const uint32_t words[2] = {b[n].v[2 * step], b[n].v[2 * step + 1]};
                            mma<T>(d[n], a, words);
                        }
                    }
                }
                if (next < tiles) fetch(i, next, next_k);
            }
        }
#pragma unroll
        for (int n = 0; n < eights; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[warp][n * 8 + 2 * c + i % 2][i / 2 * 8 + g] = d[n][i];
        __syncthreads();
        for (int i = threadIdx.x; i < eights * 8 * tile_rows; i += threads) {
            const int t = i / tile_rows, o = i % tile_rows;
            float sum = 0;
#pragma unroll
            for (int part = 0; part < warps; ++part) sum += sums[part][t][o];
            if (t < out.rows && (int64_t)tile * tile_rows + o < out.cols)
                *element<T>(out, t, (int64_t)tile * tile_rows + o) = from_float<T>(sum);
        }
        __syncthreads();
    }
}

// ---- launcher ---------------------------------------------------------------

bool matmul_4bit_takes(const ConstMatrix& x, const Packed4bit& w) {
    return x.rows <= 16 && x.dtype != DType::f32 && rows_on_16_bytes(x, 2) && w.cols % run == 0 &&
           (uintptr_t)w.packed % 16 == 0 && w.blocksize % run == 0 && BlockShifts::fit(w);
}

int matmul_4bit(const ConstMatrix& x, const Packed4bit& w, const Matrix& out, Stream stream) {
    const auto start = [&](auto type, auto eights) {
        using T = decltype(type);
        const int64_t tiles = ceil_div(w.rows, tile_rows), most = 2 * multiprocessors();
        return launch(few_rows<T, eights()>, dim3((unsigned)(tiles < most ? tiles : most)), dim3(threads), 0,
                      stream, x, w, BlockShifts(w), out);
    };
    const auto rows = [&](auto type) {
        return x.rows <= 8 ? start(type, std::integral_constant<int, 1>())
                           : start(type, std::integral_constant<int, 2>());
    };
    return x.dtype == DType::bf16 ? rows(bf16{}) : rows(f16{});
}

}  // namespace fastlora::gpu
