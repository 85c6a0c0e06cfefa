// The rank-r products on AMX tiles; see amx.h.
//
// A tile is 16 rows of 64 bytes. One instruction adds a [16, 32] bfloat16 tile times a [32, 16] one, the
// latter with pairs of rows interleaved, to a [16, 16] float32 tile, in 16 cycles: what vector FMAs need 256
// for.
#include "amx.h"

#include <cstring>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#include <sys/syscall.h>
#include <unistd.h>
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own intrinsics trip these (gcc bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "scratch.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")

#include "amx_tiles.h"

namespace fastlora::amx {

bool available() {
    static const bool yes = [] {
        __builtin_cpu_init();
        if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512dq")) return false;
        unsigned a, b, c, d;
        asm volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
        if (!(d >> 22 & 1) || !(d >> 24 & 1)) return false;  // amx-bf16, amx-tile
        constexpr long request_permission = 0x1023,
                       tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
        return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    }();
    return yes;
}

// ---- packing ---------------------------------------------------------------

static inline __m512 widen_bf16(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// 16 values of a row as float32, those outside `lanes` as zeros.
static inline __m512 read(const ConstMatrix& m, int64_t row, int64_t col, __mmask16 lanes) {
    const int64_t at = row * m.pitch + col;
    if (m.dtype == DType::f32) return _mm512_maskz_loadu_ps(lanes, (const float*)m.data + at);
    const __m256i bits = _mm256_maskz_loadu_epi16(lanes, (const uint16_t*)m.data + at);
    return m.dtype == DType::bf16 ? widen_bf16(bits) : _mm512_cvtph_ps(bits);
}

// The next bfloat16 part of value, which keeps the rest. An infinity or NaN has one part.
static inline __m256i next_part(__m512& value) {
    const __m256i part = (__m256i)_mm512_cvtneps_pbh(value);
    const __mmask16 finite = ~_mm512_fpclass_ps_mask(value, 0x81 | 0x18);
    value = _mm512_maskz_sub_ps(finite, value, widen_bf16(part));
    return part;
}

static __mmask16 lanes_of(int64_t count) {
    return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1;
}

// The [16 outer, depth] block of factor m at (outer, k) as `parts` tiles of [depth / 2][16][2]; depth is 16
// or 32, m is [outers, depths], or [depths, outers] when transposed.
static void pack_tile(const ConstMatrix& m, bool transposed, int64_t outer, int64_t k, int depth, int parts,
                      uint16_t* tiles, int64_t tile_pitch) {
    alignas(64) uint16_t block[3][512];
    const int64_t outers = transposed ? m.cols : m.rows, depths = transposed ? m.rows : m.cols;
    if (transposed) {  // rows are k: interleave pairs of them
        const __mmask16 lanes = lanes_of(outers - outer);
        for (int i = 0; i < depth; ++i) {
            __m512 value = k + i < depths ? read(m, k + i, outer, lanes) : _mm512_setzero_ps();
            for (int p = 0; p < parts; ++p)
                _mm256_store_si256((__m256i*)(block[p] + 16 * i), next_part(value));
        }
        for (int p = 0; p < parts; ++p)
            for (int i = 0; i < depth; i += 2) {
                const __m512i even = _mm512_cvtepu16_epi32(_mm256_load_si256((__m256i*)(block[p] + 16 * i)));
                const __m512i odd =
                    _mm512_cvtepu16_epi32(_mm256_load_si256((__m256i*)(block[p] + 16 * i + 16)));
                _mm512_storeu_si512(tiles + p * tile_pitch + 16 * i,
                                    _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
            }
        return;
    }
    for (int j = 0; j < 16; ++j)
        for (int i = 0; i < depth; i += 16) {
            __m512 value = outer + j < outers ? read(m, outer + j, k + i, lanes_of(depths - k - i))
                                              : _mm512_setzero_ps();
            for (int p = 0; p < parts; ++p)
                _mm256_store_si256((__m256i*)(block[p] + depth * j + i), next_part(value));
        }
    const __m512i rows = _mm512_mullo_epi32(
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(depth / 2));
    for (int p = 0; p < parts; ++p)
        for (int i = 0; i < depth; i += 2)
            _mm512_storeu_si512(tiles + p * tile_pitch + 16 * i,
                                _mm512_i32gather_epi32(rows, block[p] + i, 4));
}

int shrink_parts(DType factor) {
    return factor == DType::bf16 ? 1 : 3;
}
int expand_parts(DType factor) {
    return factor == DType::bf16 ? 1 : 2;
}

// ---- shrink ---------------------------------------------------------------
// packed [rank tiles][steps][parts][16 pairs of k][16 ranks][2]

int64_t shrink_factor_bytes(const ConstMatrix& a, int64_t ranks, int64_t depth) {
    return 2 * sixteens(ranks) * pairs(depth) * shrink_parts(a.dtype) * tile_values;
}

void pack_shrink_factor(const ConstMatrix& a, bool transposed, int64_t ranks, int64_t depth,
                        uint16_t* packed) {
    const int parts = shrink_parts(a.dtype);
    for (int64_t jt = 0; jt < sixteens(ranks); ++jt)
        for (int64_t step = 0; step < pairs(depth); ++step, packed += parts * tile_values)
            pack_tile(a, transposed, 16 * jt, 32 * step, 32, parts, packed, tile_values);
}

template <int parts>
static void shrink_block(const uint16_t* x, int64_t pitch, int64_t steps, const uint16_t* packed,
                         float* sums) {
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t step = 0; step < steps; ++step) {
        const uint16_t* tiles = packed + step * parts * tile_values;
        _tile_loadd(2, x + step * 32, pitch * 2);
        _tile_loadd(3, x + 16 * pitch + step * 32, pitch * 2);
        _tile_loadd(4, tiles, 64);
        _tile_dpbf16ps(0, 2, 4);
        _tile_dpbf16ps(1, 3, 4);
        if constexpr (parts > 1) {
            _tile_loadd(5, tiles + tile_values, 64);
            _tile_loadd(6, tiles + 2 * tile_values, 64);
            _tile_dpbf16ps(0, 2, 5);
            _tile_dpbf16ps(1, 3, 5);
            _tile_dpbf16ps(0, 2, 6);
            _tile_dpbf16ps(1, 3, 6);
        }
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
}

// 32 rows of x with dropped elements, columns past the last and rows past the last at zero.
static void copy_block(const ConstMatrix& x, int64_t t0, const DropoutMask& mask, int64_t pitch,
                       uint16_t* to) {
    for (int64_t t = 0; t < 32; ++t)
        for (int64_t k = 0; k < pitch; k += 32) {
            const int64_t count = x.cols - k;
            __mmask32 keep = t0 + t >= x.rows ? 0 : count >= 32 ? 0xffffffffu : (1u << count) - 1;
            if (mask.bits && keep) {
                uint32_t bits = 0;
                std::memcpy(&bits, mask.bits + (t0 + t) * mask.pitch + k / 8, count > 16 ? 4 : 2);
                keep &= bits;
            }
            const uint16_t* from = (const uint16_t*)x.data + (t0 + t) * x.pitch + k;
            _mm512_storeu_si512(to + t * pitch + k, _mm512_maskz_loadu_epi16(keep, from));
        }
}

void shrink_blocks(const ConstMatrix& x, const uint16_t* packed, int parts, int64_t ranks,
                   const DropoutMask& mask, float scale, float* out, int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    const Tiles tiles;
    alignas(64) float sums[512];
    const int64_t steps = pairs(x.cols);
    const __m512 factor_scale = _mm512_set1_ps(mask.bits ? scale * mask.scale : scale);
    for (int64_t block = begin; block < end; ++block) {
        const int64_t t0 = block * 32, count = x.rows - t0 < 32 ? x.rows - t0 : 32;
        const uint16_t* rows = (const uint16_t*)x.data + t0 * x.pitch;
        int64_t pitch = x.pitch;
        if (mask.bits || count < 32 || x.cols % 32) {
            pitch = steps * 32;
            uint16_t* copy = (uint16_t*)scratch.floats(16 * pitch);
            copy_block(x, t0, mask, pitch, copy);
            rows = copy;
        }
        for (int64_t jt = 0; jt < sixteens(ranks); ++jt) {
            const uint16_t* factor = packed + jt * steps * parts * tile_values;
            if (parts == 1)
                shrink_block<1>(rows, pitch, steps, factor, sums);
            else
                shrink_block<3>(rows, pitch, steps, factor, sums);
            const __mmask16 lanes = lanes_of(ranks - 16 * jt);
            for (int64_t t = 0; t < count; ++t)
                _mm512_mask_storeu_ps(out + (t0 + t) * ranks + 16 * jt, lanes,
                                      _mm512_mul_ps(_mm512_load_ps(sums + 16 * t), factor_scale));
        }
    }
}

// ---- expand ---------------------------------------------------------------
// A step contracts 16 ranks of s in two parts, s1 and s2 (16 bits: y keeps 8), against b1 twice; a float32 b
// adds a second tile with b2 twice.   packed [column tiles][rank tiles][parts][16 pairs][16 columns][2]

int64_t expand_factor_bytes(const ConstMatrix& b, int64_t ranks, int64_t cols) {
    return 2 * (sixteens(cols) + 1) / 2 * 2 * sixteens(ranks) * expand_parts(b.dtype) * tile_values;
}

void pack_expand_factor(const ConstMatrix& b, bool transposed, int64_t ranks, int64_t cols,
                        uint16_t* packed) {
    const int parts = expand_parts(b.dtype);
    for (int64_t ct = 0; ct < (sixteens(cols) + 1) / 2 * 2; ++ct)
        for (int64_t jt = 0; jt < sixteens(ranks); ++jt, packed += parts * tile_values) {
            pack_tile(b, transposed, 16 * ct, 16 * jt, 16, parts, packed, tile_values);
            for (int p = 0; p < parts; ++p)  // the same b meets s2
                std::memcpy(packed + p * tile_values + tile_values / 2, packed + p * tile_values,
                            tile_values);
        }
}

// [rank tiles][16 rows][s1 of 16 ranks, s2 of 16 ranks]
static void pack_rows(const float* s, int64_t ranks, int64_t rows, float scale, uint16_t* packed) {
    for (int64_t jt = 0; jt < sixteens(ranks); ++jt)
        for (int64_t t = 0; t < 16; ++t) {
            const __mmask16 lanes = t < rows ? lanes_of(ranks - 16 * jt) : 0;
            __m512 value =
                _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, s + t * ranks + 16 * jt), _mm512_set1_ps(scale));
            uint16_t* at = packed + jt * tile_values + 32 * t;
            for (int p = 0; p < 2; ++p) _mm256_storeu_si256((__m256i*)(at + 16 * p), next_part(value));
        }
}

struct Epilogue {
    const uint16_t* y;
    uint16_t* out;
    const uint8_t* bits;  // of this row, or null
    float mask_scale;
    const float *gain, *offset;

    // 32 columns from `col` of one row, `terms` being the adapter's part.
    inline __attribute__((always_inline)) void write(int64_t col, int64_t count, const float* terms0,
                                                     const float* terms1) const {
        const __mmask32 lanes = count >= 32 ? 0xffffffffu : (1u << count) - 1;
        const __mmask16 low = (__mmask16)lanes, high = (__mmask16)(lanes >> 16);
        const __m512i y32 = _mm512_maskz_loadu_epi16(lanes, y + col);
        __m512 t0 = _mm512_load_ps(terms0), t1 = _mm512_load_ps(terms1);
        if (bits) {
            uint32_t keep = 0;
            std::memcpy(&keep, bits + col / 8, count > 16 ? 4 : 2);
            t0 = _mm512_maskz_mul_ps((__mmask16)keep, t0, _mm512_set1_ps(mask_scale));
            t1 = _mm512_maskz_mul_ps((__mmask16)(keep >> 16), t1, _mm512_set1_ps(mask_scale));
        }
        __m512 v0 = _mm512_add_ps(widen_bf16(_mm512_castsi512_si256(y32)), t0);
        __m512 v1 = _mm512_add_ps(widen_bf16(_mm512_extracti64x4_epi64(y32, 1)), t1);
        if (gain) {
            v0 = _mm512_mul_ps(v0, _mm512_maskz_loadu_ps(low, gain + col));
            v1 = _mm512_mul_ps(v1, _mm512_maskz_loadu_ps(high, gain + col + 16));
        }
        if (offset) {
            v0 = _mm512_add_ps(v0, _mm512_maskz_loadu_ps(low, offset + col));
            v1 = _mm512_add_ps(v1, _mm512_maskz_loadu_ps(high, offset + col + 16));
        }
        _mm512_mask_storeu_epi16(out + col, lanes, (__m512i)_mm512_cvtne2ps_pbh(v1, v0));
    }
};

void expand_blocks(const ConstMatrix& y, const float* s, int64_t ranks, const uint16_t* packed, int parts,
                   const DropoutMask& mask, float scale, const float* gain, const float* offset,
                   const Matrix& out, int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    const Tiles tiles;
    const int64_t rank_tiles = sixteens(ranks), per_column = rank_tiles * parts * tile_values;
    uint16_t* rows0 = (uint16_t*)scratch.floats(rank_tiles * tile_values);
    uint16_t* rows1 = rows0 + rank_tiles * tile_values;
    alignas(64) float terms[4][256];
    for (int64_t block = begin; block < end; ++block) {
        const int64_t t0 = block * 32, count = y.rows - t0 < 32 ? y.rows - t0 : 32;
        pack_rows(s + t0 * ranks, ranks, count, scale, rows0);
        pack_rows(s + (t0 + 16) * ranks, ranks, count - 16, scale, rows1);
        for (int64_t col = 0; col < out.cols; col += 32) {
            const uint16_t* left = packed + col / 16 * per_column;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t jt = 0; jt < rank_tiles; ++jt) {
                _tile_loadd(4, rows0 + jt * tile_values, 64);
                _tile_loadd(5, rows1 + jt * tile_values, 64);
                for (int p = 0; p < parts; ++p) {
                    const uint16_t* tile = left + (jt * parts + p) * tile_values;
                    _tile_loadd(6, tile, 64);
                    _tile_loadd(7, tile + per_column, 64);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_dpbf16ps(1, 4, 7);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                }
            }
            _tile_stored(0, terms[0], 64);
            _tile_stored(1, terms[1], 64);
            _tile_stored(2, terms[2], 64);
            _tile_stored(3, terms[3], 64);
            for (int64_t t = 0; t < count; ++t) {
                const Epilogue row{(const uint16_t*)y.data + (t0 + t) * y.pitch,
                                   (uint16_t*)out.data + (t0 + t) * out.pitch,
                                   mask.bits ? mask.bits + (t0 + t) * mask.pitch : nullptr,
                                   mask.scale,
                                   gain,
                                   offset};
                row.write(col, out.cols - col, terms[t / 16 * 2] + t % 16 * 16,
                          terms[t / 16 * 2 + 1] + t % 16 * 16);
            }
        }
    }
}

// ---- dora_norm ---------------------------------------------------------------

// gram [ranks, ranks] = A A^T, with the rows of A split like its packed form.
void gram(const ConstMatrix& a, const uint16_t* packed, int parts, float* gram, float* scratch) {
    const int64_t ranks = a.rows, pitch = pairs(a.cols) * 32;
    uint16_t* rows = (uint16_t*)scratch;
    float* sum = scratch + parts * ranks * pitch / 2;
    for (int64_t j = 0; j < ranks; ++j)
        for (int64_t k = 0; k < pitch; k += 16) {
            __m512 value = read(a, j, k, lanes_of(a.cols - k));
            for (int p = 0; p < parts; ++p)
                _mm256_storeu_si256((__m256i*)(rows + (p * ranks + j) * pitch + k), next_part(value));
        }
    std::memset(gram, 0, ranks * ranks * 4);
    for (int p = 0; p < parts; ++p) {
        const ConstMatrix part{rows + p * ranks * pitch, DType::bf16, ranks, pitch, pitch};
        shrink_blocks(part, packed, parts, ranks, DropoutMask{nullptr, 0, 1.0f}, 1.0f, sum, 0,
                      (ranks + 31) / 32);
        for (int64_t i = 0; i < ranks * ranks; ++i) gram[i] += sum[i];
    }
}

int64_t gram_scratch_floats(const ConstMatrix& a, int parts) {
    return parts * a.rows * pairs(a.cols) * 16 + a.rows * a.rows;
}

void norm_rows(const ConstMatrix& w, const uint16_t* packed, int parts, const float* gram,
               const ConstMatrix& b, int64_t b_row, float scale, float* out) {
    static thread_local Scratch scratch;
    const int64_t ranks = b.cols;
    float* p = scratch.floats(32 * ranks);
    shrink_blocks(w, packed, parts, ranks, DropoutMask{nullptr, 0, 1.0f}, 1.0f, p, 0, (w.rows + 31) / 32);
    for (int64_t t = 0; t < w.rows; ++t) {
        const uint16_t* row = (const uint16_t*)w.data + t * w.pitch;
        __m512 square = _mm512_setzero_ps();
        for (int64_t k = 0; k < w.cols; k += 32) {
            const __mmask32 lanes = w.cols - k >= 32 ? 0xffffffffu : (1u << (w.cols - k)) - 1;
            const __m512bh v = (__m512bh)_mm512_maskz_loadu_epi16(lanes, row + k);
            square = _mm512_dpbf16_ps(square, v, v);
        }
        __m512 cross = _mm512_setzero_ps(), quad = _mm512_setzero_ps();
        for (int64_t j = 0; j < ranks; j += 16) {
            const __mmask16 lanes = lanes_of(ranks - j);
            const __m512 bj = read(b, b_row + t, j, lanes);
            __m512 bg = _mm512_setzero_ps();
            for (int64_t i = 0; i < ranks; ++i) {
                const __m512 bi = _mm512_broadcastss_ps(_mm512_castps512_ps128(read(b, b_row + t, i, 1)));
                bg = _mm512_fmadd_ps(bi, _mm512_maskz_loadu_ps(lanes, gram + i * ranks + j), bg);
            }
            cross = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(lanes, p + t * ranks + j), bj, cross);
            quad = _mm512_fmadd_ps(bg, bj, quad);
        }
        const float squared = _mm512_reduce_add_ps(square) + 2 * scale * _mm512_reduce_add_ps(cross) +
                              scale * scale * _mm512_reduce_add_ps(quad);
        out[t] = squared > 0 ? __builtin_sqrtf(squared) : squared == squared ? 0 : squared;
    }
}

// ---- grad ---------------------------------------------------------------
// s^T in three parts: packed [steps of 32 rows][rank tiles][3 parts][16 ranks][32 rows]

int64_t grad_factor_bytes(int64_t rows, int64_t ranks) {
    return 2 * pairs(rows) * sixteens(ranks) * 3 * tile_values;
}

void pack_grad_factor(const ConstMatrix& s, float scale, uint16_t* packed) {
    const __m512i rows =
        _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                           _mm512_set1_epi32((int)s.pitch));
    for (int64_t step = 0; step < pairs(s.rows); ++step)
        for (int64_t jt = 0; jt < sixteens(s.cols); ++jt, packed += 3 * tile_values) {
            const float* block = (const float*)s.data + 32 * step * s.pitch + 16 * jt;
            for (int64_t j = 0; j < 16; ++j)
                for (int64_t k = 0; k < 32; k += 16) {
                    const __mmask16 lanes = 16 * jt + j < s.cols ? lanes_of(s.rows - 32 * step - k) : 0;
                    __m512 value = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), lanes, rows,
                                                            block + k * s.pitch + j, 4);
                    value = _mm512_mul_ps(value, _mm512_set1_ps(scale));
                    for (int p = 0; p < 3; ++p)
                        _mm256_storeu_si256((__m256i*)(packed + p * tile_values + 32 * j + k),
                                            next_part(value));
                }
        }
}

// 32 rows of 64 columns as four tiles of interleaved row pairs; masked elements and rows past the last are
// zero.
static void interleave(const ConstMatrix& x, int64_t t0, int64_t col, const DropoutMask& mask,
                       uint16_t* tiles) {
    const int64_t count = x.cols - col < 64 ? x.cols - col : 64;
    const __mmask32 low = count >= 32 ? 0xffffffffu : (1u << count) - 1;
    const __mmask32 high = count >= 64 ? 0xffffffffu : count > 32 ? (1u << (count - 32)) - 1 : 0;
    // From two rows a, b: 16-bit lanes a0 b0 a1 b1 ..; lanes 32 and up choose the second row.
    static const struct Index {
        alignas(64) uint16_t lower[32], upper[32];
        Index() {
            for (int i = 0; i < 32; ++i) {
                lower[i] = i / 2 + (i % 2 ? 32 : 0);
                upper[i] = 16 + i / 2 + (i % 2 ? 32 : 0);
            }
        }
    } index;
    const __m512i lower = _mm512_load_si512(index.lower), upper = _mm512_load_si512(index.upper);
    for (int64_t pair = 0; pair < 16; ++pair) {
        __m512i left[2], right[2];
        for (int r = 0; r < 2; ++r) {
            const int64_t t = t0 + 2 * pair + r;
            __mmask32 keep_low = low, keep_high = high;
            if (t >= x.rows) keep_low = keep_high = 0;
            if (mask.bits && t < x.rows) {
                uint64_t keep = 0;
                std::memcpy(&keep, mask.bits + t * mask.pitch + col / 8, (count + 7) / 8);
                keep_low &= (__mmask32)keep, keep_high &= (__mmask32)(keep >> 32);
            }
            const uint16_t* row = (const uint16_t*)x.data + t * x.pitch + col;
            left[r] = _mm512_maskz_loadu_epi16(keep_low, row);
            right[r] = _mm512_maskz_loadu_epi16(keep_high, row + 32);
        }
        uint16_t* at = tiles + pair * 32;
        _mm512_store_si512(at, _mm512_permutex2var_epi16(left[0], lower, left[1]));
        _mm512_store_si512(at + tile_values, _mm512_permutex2var_epi16(left[0], upper, left[1]));
        _mm512_store_si512(at + 2 * tile_values, _mm512_permutex2var_epi16(right[0], lower, right[1]));
        _mm512_store_si512(at + 3 * tile_values, _mm512_permutex2var_epi16(right[0], upper, right[1]));
    }
}

void grad_blocks(const ConstMatrix& x, const uint16_t* packed, int64_t ranks, const DropoutMask& mask,
                 const Matrix& out, int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    const Tiles tiles;
    const int64_t rank_tiles = sixteens(ranks), steps = pairs(x.rows);
    alignas(64) uint16_t columns[4 * tile_values];
    float* sums = scratch.floats(rank_tiles * 1024);
    for (int64_t block = begin; block < end; ++block) {
        const int64_t col = block * 64, count = x.cols - col < 64 ? x.cols - col : 64;
        std::memset(sums, 0, rank_tiles * 4096);
        for (int64_t step = 0; step < steps; ++step) {
            interleave(x, step * 32, col, mask, columns);
            for (int64_t jt = 0; jt < rank_tiles; ++jt) {
                const uint16_t* factor = packed + (step * rank_tiles + jt) * 3 * tile_values;
                float* sum = sums + jt * 1024;
                _tile_loadd(0, sum, 64);
                _tile_loadd(1, sum + 256, 64);
                _tile_loadd(2, sum + 512, 64);
                _tile_loadd(3, sum + 768, 64);
                for (int p = 0; p < 3; ++p) {
                    _tile_loadd(4, factor + p * tile_values, 64);
                    _tile_loadd(5, columns, 64);
                    _tile_dpbf16ps(0, 4, 5);
                    _tile_loadd(6, columns + tile_values, 64);
                    _tile_dpbf16ps(1, 4, 6);
                    _tile_loadd(7, columns + 2 * tile_values, 64);
                    _tile_dpbf16ps(2, 4, 7);
                    _tile_loadd(5, columns + 3 * tile_values, 64);
                    _tile_dpbf16ps(3, 4, 5);
                }
                _tile_stored(0, sum, 64);
                _tile_stored(1, sum + 256, 64);
                _tile_stored(2, sum + 512, 64);
                _tile_stored(3, sum + 768, 64);
            }
        }
        for (int64_t j = 0; j < ranks; ++j) {
            float* to = (float*)out.data + j * out.pitch + col;
            const float* from = sums + j / 16 * 1024 + j % 16 * 16;
            for (int64_t c = 0; c < count; ++c) to[c] = from[c / 16 * 256 + c % 16];
        }
    }
}

}  // namespace fastlora::amx
#pragma GCC pop_options
#else
namespace fastlora::amx {

bool available() {
    return false;
}

}  // namespace fastlora::amx
#endif
