// Products of bfloat16 activations with a 4-bit weight on AMX tiles: y = x W^T and dx = dy W.
//
// The weight is decoded straight into tiles, at most 256 columns of the result by 2048 contracted elements at
// a time (a megabyte, half an L2), and never exists dense: memory delivers half a byte per weight where a
// dense product reads two. A tile of W with a row of 32 inputs is what one look-up instruction makes, so for
// x W^T the weight is the left operand, giving y^T, and x is transposed once while it is packed; for dy W
// rows of W are interleaved in pairs as the right one. 32 x 32 results live in four tiles; activations are
// walked 32 rows and 512 contracted elements (32 KB) at a time.
#include "tiles.h"

#ifdef FASTLORA_TILES
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own intrinsics trip these (gcc bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <cstring>

#include "../formulas.h"
#include "scratch.h"
#include "tile_engine.h"

// Asked on every CPU.
namespace fastlora::tiles {

bool matmul_4bit_takes(DType x, const Packed4bit& w) {
    const bool powers =
        !(w.blocksize & (w.blocksize - 1)) && !(w.nested_blocksize & (w.nested_blocksize - 1));
    return cpu::level() == 4 && x == DType::bf16 && w.cols % 32 == 0 && w.blocksize % 32 == 0 && powers;
}

}  // namespace fastlora::tiles

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")
#include "transpose.h"

namespace fastlora::tiles {

static const float nf4_codes[16] = {FASTLORA_NF4_VALUES};
static const float fp4_codes[16] = {FASTLORA_FP4_VALUES};
constexpr int64_t walk_steps = 16;    // contracted elements walked at a time, in steps of 32
constexpr int64_t decode_steps = 64;  // and decoded at a time
constexpr int64_t column_chunk = 256;
constexpr int64_t row_chunk =
    2048;  // rows whose sums wait for the next decoded part: 2 MB of them at 256 columns

// ---- activations ---------------------------------------------------------------
// packed [tiles of 16 rows][steps][16][32]: as they are, or transposed in dwords for the right operand

static void pack_activations(const ConstMatrix& x, bool right, int64_t tile, uint16_t* packed) {
    const int64_t steps = pairs(x.cols);
    for (int64_t step = 0; step < steps; ++step) {
        const int64_t left = x.cols - 32 * step;
        const __mmask32 lanes = left >= 32 ? 0xffffffffu : (1u << left) - 1;
        __m512i rows[16];
        for (int64_t t = 0; t < 16; ++t) {
            const __mmask32 keep = 16 * tile + t < x.rows ? lanes : 0;
            rows[t] = _mm512_maskz_loadu_epi16(
                keep, (const uint16_t*)x.data + (16 * tile + t) * x.pitch + 32 * step);
        }
        if (right) transpose(rows);
        for (int64_t t = 0; t < 16; ++t) _mm512_store_si512(packed + (step * 16 + t) * 32, rows[t]);
    }
}

// ---- the weight ---------------------------------------------------------------

// Walks the blocks of a weight: the 16 values of each, twice, as bfloat16 (vpermw looks at five bits of an
// index and the fifth may be anything).
class Blocks {
  public:
    explicit Blocks(const Packed4bit& w)
        : w_(w),
          codes_(_mm512_loadu_ps(w.fp4 ? fp4_codes : nf4_codes)),
          shift_(__builtin_ctzll(w.blocksize)),
          nested_shift_(__builtin_ctzll(w.nested_blocksize)) {}

    // 32 weights from flat position `at`, a multiple of 32.
    inline __attribute__((always_inline)) __m512i decode(int64_t at) {
        if (at >> shift_ != block_) enter(at >> shift_);
        const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(w_.packed + at / 2)));
        const __m512i index = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
        return _mm512_permutexvar_epi16(index, values_);
    }

  private:
    inline __attribute__((always_inline)) void enter(int64_t block) {
        block_ = block;
        float absmax;
        if (w_.absmax) {
            absmax = w_.absmax[block];
        } else {
            // Two operations, as in torch: a barrier keeps them from becoming one fused multiply-add.
            float scaled = w_.nested_code[w_.absmax_codes[block]] * w_.nested_absmax[block >> nested_shift_];
            asm("" : "+x"(scaled));
            absmax = scaled + *w_.nested_offset;
        }
        values_ = _mm512_broadcast_i64x4(
            (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(codes_, _mm512_set1_ps(absmax))));
    }

    const Packed4bit& w_;
    const __m512 codes_;
    const int shift_, nested_shift_;
    int64_t block_ = -1;
    __m512i values_ = _mm512_setzero_si512();
};

// Rows [row, row + 16) and inputs [32 step, 32 (step + steps)) of W as left tiles [steps][16][32], zeros past
// the last row.
static void decode_left(Blocks& blocks, const Packed4bit& w, int64_t row, int64_t step, int64_t steps,
                        uint16_t* tiles) {
    for (int64_t r = 0; r < 16; ++r)
        for (int64_t i = 0; i < steps; ++i)
            _mm512_store_si512(tiles + (i * 16 + r) * 32,
                               row + r < w.rows ? blocks.decode((row + r) * w.cols + 32 * (step + i))
                                                : _mm512_setzero_si512());
}

// Columns [col, col + columns) of rows [32 step, 32 (step + steps)) as right tiles [columns / 16][steps][16
// pairs][16][2].
static void decode_right(Blocks& blocks, const Packed4bit& w, int64_t col, int64_t columns, int64_t step,
                         int64_t steps, uint16_t* tiles) {
    const __m512i lower = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39,
                                           7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));
    __m512i even[column_chunk / 32];
    for (int64_t pair = 0; pair < 16 * steps; ++pair) {
        const int64_t o = 32 * step + 2 * pair;
        for (int64_t c = 0; c < columns; c += 32)
            even[c / 32] = o < w.rows ? blocks.decode(o * w.cols + col + c) : _mm512_setzero_si512();
        for (int64_t c = 0; c < columns; c += 32) {
            const __m512i odd =
                o + 1 < w.rows ? blocks.decode((o + 1) * w.cols + col + c) : _mm512_setzero_si512();
            uint16_t* to = tiles + c / 16 * steps * tile_values + pair * 32;
            _mm512_store_si512(to, _mm512_permutex2var_epi16(even[c / 32], lower, odd));
            _mm512_store_si512(to + steps * tile_values, _mm512_permutex2var_epi16(even[c / 32], upper, odd));
        }
    }
}

// ---- the product ---------------------------------------------------------------

// sums [4 tiles] += left tiles (l, l + left_next) times right tiles (r, r + right_next) over `steps`
// consecutive steps.
static inline void multiply(const uint16_t* l, int64_t left_next, const uint16_t* r, int64_t right_next,
                            int64_t steps, bool first, float* sums) {
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + 256, 64);
        _tile_loadd(2, sums + 512, 64);
        _tile_loadd(3, sums + 768, 64);
    }
    for (int64_t step = 0; step < steps; ++step) {
        _tile_loadd(4, l + step * tile_values, 64);
        _tile_loadd(6, r + step * tile_values, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, r + right_next + step * tile_values, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, l + left_next + step * tile_values, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
}

// 32 x 32 results to out; `across`: the sums are [columns, rows].
static void write(const float* sums, bool across, int64_t row, int64_t col, const Matrix& out) {
    const int64_t count = out.cols - col;
    const __mmask32 lanes = count >= 32 ? 0xffffffffu : (1u << count) - 1;
    for (int64_t half = 0; half < 2; ++half) {  // 16 rows of out
        __m512i left[16], right[16];
        const float* first = sums + (across ? 256 : 512) * half;
        const float* second = first + (across ? 512 : 256);
        for (int i = 0; i < 16; ++i) {
            left[i] = _mm512_load_si512(first + 16 * i);
            right[i] = _mm512_load_si512(second + 16 * i);
        }
        if (across) {
            transpose(left);
            transpose(right);
        }
        for (int64_t t = 0; t < 16 && row + 16 * half + t < out.rows; ++t)
            _mm512_mask_storeu_epi16((uint16_t*)out.data + (row + 16 * half + t) * out.pitch + col, lanes,
                                     (__m512i)_mm512_cvtne2ps_pbh((__m512)right[t], (__m512)left[t]));
    }
}

// One chunk of columns [c0, c0 + columns) of out, for all rows.
static void multiply_chunk(const Packed4bit& w, bool transposed, const uint16_t* activations, int64_t steps,
                           int64_t c0, int64_t columns, uint16_t* weight, float* sums, const Matrix& out) {
    Blocks blocks(w);
    const int64_t tile_row = steps * tile_values;
    for (int64_t r0 = 0; r0 < out.rows; r0 += row_chunk) {
        const int64_t r1 = out.rows - r0 < row_chunk ? out.rows : r0 + row_chunk;
        for (int64_t d0 = 0; d0 < steps; d0 += decode_steps) {
            const int64_t decoded = steps - d0 < decode_steps ? steps - d0 : decode_steps,
                          next = decoded * tile_values;
            if (transposed)
                decode_right(blocks, w, c0, columns, d0, decoded, weight);
            else
                for (int64_t c = 0; c < columns; c += 16)
                    decode_left(blocks, w, c0 + c, d0, decoded, weight + c / 16 * next);
            for (int64_t row = r0; row < r1; row += 32) {
                float* row_sums = sums + (row - r0) * columns;
                for (int64_t step = 0; step < decoded; step += walk_steps) {
                    const int64_t now = decoded - step < walk_steps ? decoded - step : walk_steps;
                    const uint16_t* a = activations + row / 16 * tile_row + (d0 + step) * tile_values;
                    const bool first = d0 + step == 0;
                    for (int64_t c = 0; c < columns; c += 32) {
                        const uint16_t* b = weight + c / 16 * next + step * tile_values;
                        if (transposed)
                            multiply(a, tile_row, b, next, now, first, row_sums + 32 * c);
                        else
                            multiply(b, next, a, tile_row, now, first, row_sums + 32 * c);
                    }
                }
            }
        }
        for (int64_t row = r0; row < r1; row += 32)
            for (int64_t c = 0; c < columns; c += 32)
                write(sums + (row - r0) * columns + 32 * c, !transposed, row, c0 + c, out);
    }
}

void matmul_4bit(const ConstMatrix& x, const Packed4bit& w, bool transposed, const Matrix& out,
                 ParallelFor run) {
    static thread_local Scratch shared;
    const int64_t steps = pairs(x.cols), row_tiles = (x.rows + 31) / 32 * 2, tile_row = steps * tile_values;
    auto* activations = (uint16_t*)shared.floats(row_tiles * tile_row / 2);
    parallel(run, row_tiles, 1 + 128 / steps, [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile)
            pack_activations(x, !transposed, tile, activations + tile * tile_row);
    });
    const int64_t eighth =
        (out.cols + 255) / 256 * 32;  // enough chunks for eight threads, unless they got narrow
    const int64_t chunk = eighth < 64 ? 64 : eighth > column_chunk ? column_chunk : eighth;
    parallel(run, (out.cols + chunk - 1) / chunk, 1, [&](int64_t begin, int64_t end) {
        static thread_local Scratch own;
        const Session session(amx);
        const int64_t rows = x.rows < row_chunk ? (x.rows + 31) / 32 * 32 : row_chunk;
        auto* weight = (uint16_t*)own.floats(chunk / 16 * decode_steps * tile_values / 2 + rows * chunk);
        float* sums = (float*)(weight + chunk / 16 * decode_steps * tile_values);
        for (int64_t c0 = begin * chunk; c0 < end * chunk && c0 < out.cols; c0 += chunk) {
            const int64_t columns = out.cols - c0 < chunk ? (out.cols - c0 + 31) / 32 * 32 : chunk;
            multiply_chunk(w, transposed, activations, steps, c0, columns, weight, sums, out);
        }
    });
}

}  // namespace fastlora::tiles
#pragma GCC pop_options
#endif
