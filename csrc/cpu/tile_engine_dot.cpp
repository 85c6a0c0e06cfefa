// Tiles on AVX-512 BF16 (AMD from Zen 4, Intel from Cooper Lake on): one instruction adds the products of 16
// pairs of bfloat16, twice what a float32 FMA does. 16 sums stay in registers; an element pair of the left
// tile is broadcast from L1 and meets one row of the right one.
#include "tiles.h"

#ifdef FASTLORA_TILES
#include <cstring>
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own intrinsics trip these (gcc bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "tile_engine.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")

namespace fastlora::tiles {

#define FASTLORA_INLINE static inline __attribute__((always_inline))

// A 16 x 16 block of the result, one register a row.
struct Sums {
    __m512 row[16];
};

FASTLORA_INLINE void zero(Sums& sums) {
    for (int t = 0; t < 16; ++t) sums.row[t] = _mm512_setzero_ps();
}
FASTLORA_INLINE void add(Sums& sums, const float* from) {
    for (int t = 0; t < 16; ++t) sums.row[t] = _mm512_add_ps(sums.row[t], _mm512_load_ps(from + 16 * t));
}
FASTLORA_INLINE void store(const Sums& sums, float* to) {
    for (int t = 0; t < 16; ++t) _mm512_store_ps(to + 16 * t, sums.row[t]);
}

// sums += the first 2 * count columns of a left tile times as many rows of a right one.
FASTLORA_INLINE void multiply(Sums& sums, const uint16_t* left, const uint16_t* right, int count = 16) {
    for (int pair = 0; pair < count; ++pair) {
        const __m512bh row = (__m512bh)_mm512_loadu_si512(right + 32 * pair);
        for (int t = 0; t < 16; ++t) {
            int32_t two;
            std::memcpy(&two, left + 32 * t + 2 * pair, 4);
            sums.row[t] = _mm512_dpbf16_ps(sums.row[t], (__m512bh)_mm512_set1_epi32(two), row);
        }
    }
}

static void shrink(const uint16_t* x, int64_t pitch, int64_t steps, const uint16_t* factor, int parts,
                   float* sums) {
    constexpr int64_t block_steps = 8;  // sums over 256 elements, then their sum: shorter chains of roundings
    // Rows a multiple of 4 KB apart share their places in L1, fewer than there are rows: walk down a copy.
    alignas(64) uint16_t left[tile_values];
    if (steps == 0) std::memset(sums, 0, 512 * sizeof(float));
    for (int half = 0; half < 2; ++half, x += 16 * pitch, sums += 256)
        for (int64_t step0 = 0; step0 < steps; step0 += block_steps) {
            Sums block;
            zero(block);
            for (int64_t step = step0; step < step0 + block_steps && step < steps; ++step) {
                for (int t = 0; t < 16; ++t)
                    _mm512_store_si512(left + 32 * t, _mm512_loadu_si512(x + t * pitch + 32 * step));
                for (int p = 0; p < parts; ++p)
                    multiply(block, left, factor + (step * parts + p) * tile_values);
            }
            if (step0) add(block, sums);
            store(block, sums);
        }
}

static void expand(const uint16_t* rows0, const uint16_t* rows1, int s_parts, const uint16_t* factor,
                   int64_t per_column, int64_t rank_tiles, int parts, float (*terms)[256]) {
    for (int half = 0; half < 2; ++half)
        for (int column = 0; column < 2; ++column) {
            const uint16_t *left = half ? rows1 : rows0, *right = factor + column * per_column;
            Sums block;
            zero(block);
            for (int64_t jt = 0; jt < rank_tiles; ++jt)
                for (int p = 0; p < parts; ++p)
                    multiply(block, left + jt * tile_values, right + (jt * parts + p) * tile_values,
                             8 * s_parts);
            store(block, terms[2 * half + column]);
        }
}

static void grad(const uint16_t* factor, const uint16_t* columns, int64_t steps, int parts, float* sums) {
    for (int64_t column = 0; column < 4; ++column, sums += 256) {
        Sums block;
        zero(block);
        for (int64_t step = 0; step < steps; ++step)
            for (int p = 0; p < parts; ++p)
                multiply(block, factor + (step * parts + p) * tile_values,
                         columns + (4 * step + column) * tile_values);
        add(block, sums);
        store(block, sums);
    }
}

static void nothing() {}

const Engine dot{false, 2, 1 << 16, nothing, nothing, shrink, expand, grad};

}  // namespace fastlora::tiles
#pragma GCC pop_options
#endif
