// The rank-r products of bfloat16 activations on tiles; see tiles.h. Everything but the products themselves,
// which are the engine's.
#include "tiles.h"

#ifdef FASTLORA_TILES
#include <cstring>

#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own intrinsics trip these (gcc bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "scratch.h"
#include "tile_engine.h"

// Asked on every CPU.
namespace fastlora::tiles {

static const Engine& engine() {
    return cpu::level() == 4 ? amx : dot;
}

bool takes(DType activations, DType factor) {
    return cpu::level() >= 3 && activations == DType::bf16 && (factor == DType::bf16 || engine().wide);
}

int64_t grain(int64_t block) {
    return 1 + engine().grain / (block + 1);
}

}  // namespace fastlora::tiles

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")

#include "transpose.h"

namespace fastlora::tiles {

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
static __mmask32 lanes32(int64_t count) {
    return count >= 32 ? 0xffffffffu : count <= 0 ? 0 : (1u << count) - 1;
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
    __m512i rows[16];
    if (m.dtype == DType::bf16) {
        const int64_t count = depths - k < depth ? depths - k : depth;
        for (int j = 0; j < 16; ++j)
            rows[j] = _mm512_maskz_loadu_epi16(outer + j < outers ? lanes32(count) : 0,
                                               (const uint16_t*)m.data + (outer + j) * m.pitch + k);
        transpose(rows);
        for (int i = 0; i < depth / 2; ++i) _mm512_storeu_si512(tiles + 32 * i, rows[i]);
        return;
    }
    for (int j = 0; j < 16; ++j)
        for (int i = 0; i < depth; i += 16) {
            __m512 value = outer + j < outers ? read(m, outer + j, k + i, lanes_of(depths - k - i))
                                              : _mm512_setzero_ps();
            for (int p = 0; p < parts; ++p)
                _mm256_store_si256((__m256i*)(block[p] + depth * j + i), next_part(value));
        }
    for (int p = 0; p < parts; ++p) {
        for (int j = 0; j < 16; ++j)
            rows[j] = depth == 32 ? _mm512_load_si512(block[p] + 32 * j)
                                  : _mm512_castsi256_si512(_mm256_load_si256((__m256i*)(block[p] + 16 * j)));
        transpose(rows);
        for (int i = 0; i < depth / 2; ++i) _mm512_storeu_si512(tiles + p * tile_pitch + 32 * i, rows[i]);
    }
}

int shrink_parts(DType factor) {
    return factor == DType::bf16 ? 1 : 3;
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

// 32 rows of x with dropped elements, columns past the last and rows past the last at zero.
static void copy_block(const ConstMatrix& x, int64_t t0, const DropoutMask& mask, int64_t pitch,
                       uint16_t* to) {
    for (int64_t t = 0; t < 32; ++t)
        for (int64_t k = 0; k < pitch; k += 32) {
            const int64_t count = x.cols - k;
            __mmask32 keep = t0 + t >= x.rows ? 0 : lanes32(count);
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
    const Session session(engine());
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
            engine().shrink(rows, pitch, steps, factor, parts, sums);
            const __mmask16 lanes = lanes_of(ranks - 16 * jt);
            for (int64_t t = 0; t < count; ++t)
                _mm512_mask_storeu_ps(out + (t0 + t) * ranks + 16 * jt, lanes,
                                      _mm512_mul_ps(_mm512_load_ps(sums + 16 * t), factor_scale));
        }
    }
}

// ---- expand ---------------------------------------------------------------
// A step contracts 16 ranks of s in two parts, s1 and s2 (16 bits: y keeps 8), against b1 twice; a float32 b
// adds a second tile with b2 twice. Threads share blocks of y, and each packs the strip of the factor that
// its block meets, [column tiles][rank tiles][parts][16 pairs][16 columns][2]: one copy for all threads takes
// longer to fetch from another core than to make (128 rows of 2048: 60 us for 36, two threads).

constexpr int64_t strip_rows = 256, strip_cols = 512, chunk = 256;

static void pack_strip(const ConstMatrix& b, bool transposed, int64_t ranks, int64_t col, int64_t cols,
                       int parts, int s_parts, uint16_t* packed) {
    for (int64_t ct = 0; ct < (cols + 31) / 32 * 2; ++ct)
        for (int64_t jt = 0; jt < sixteens(ranks); ++jt, packed += parts * tile_values) {
            pack_tile(b, transposed, col + 16 * ct, 16 * jt, 16, parts, packed, tile_values);
            for (int p = 0; p < parts && s_parts == 2; ++p)  // the same b meets s2
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

// What is done with the terms of one row: y + terms, rounded, where nothing else is asked for.
struct Epilogue {
    const uint16_t* y;  // or null: zeros
    uint16_t* out;
    const uint8_t* bits;  // of this row, or null
    float mask_scale;
    const float *gain, *offset;

    bool plain() const { return y && !bits && !gain && !offset; }

    // 32 columns from `col`, of which `count` exist.
    template <bool simple>
    inline __attribute__((always_inline)) __m512i value(int64_t col, int64_t count, const float* terms0,
                                                        const float* terms1) const {
        const __mmask32 lanes = simple ? 0xffffffffu : lanes32(count);
        const __m512i y32 = simple ? _mm512_loadu_si512(y + col)
                            : y    ? _mm512_maskz_loadu_epi16(lanes, y + col)
                                   : _mm512_setzero_si512();
        __m512 t0 = _mm512_load_ps(terms0), t1 = _mm512_load_ps(terms1);
        if (!simple && bits) {
            uint32_t keep = 0;
            std::memcpy(&keep, bits + col / 8, count > 16 ? 4 : 2);
            t0 = _mm512_maskz_mul_ps((__mmask16)keep, t0, _mm512_set1_ps(mask_scale));
            t1 = _mm512_maskz_mul_ps((__mmask16)(keep >> 16), t1, _mm512_set1_ps(mask_scale));
        }
        __m512 v0 = _mm512_add_ps(widen_bf16(_mm512_castsi512_si256(y32)), t0);
        __m512 v1 = _mm512_add_ps(widen_bf16(_mm512_extracti64x4_epi64(y32, 1)), t1);
        if (!simple) {
            const __mmask16 low = (__mmask16)lanes, high = (__mmask16)(lanes >> 16);
            if (gain) {
                v0 = _mm512_mul_ps(v0, _mm512_maskz_loadu_ps(low, gain + col));
                v1 = _mm512_mul_ps(v1, _mm512_maskz_loadu_ps(high, gain + col + 16));
            }
            if (offset) {
                v0 = _mm512_add_ps(v0, _mm512_maskz_loadu_ps(low, offset + col));
                v1 = _mm512_add_ps(v1, _mm512_maskz_loadu_ps(high, offset + col + 16));
            }
        }
        return (__m512i)_mm512_cvtne2ps_pbh(v1, v0);
    }
};

// `count` columns of up to 32 rows, terms [chunk / 32][2 by rows][2 by columns][16][16]. A row's columns are
// read before they are written: at a pitch of 4 KB a load waits for an earlier store to the row above, whose
// low address bits are its own. simple: a whole chunk, and a plain epilogue.
template <bool simple>
static void finish_rows(const Epilogue& first, int64_t y_pitch, int64_t out_pitch, int64_t mask_pitch,
                        int64_t rows, int64_t col, int64_t count, const float (*terms)[256]) {
    Epilogue row = first;
    for (int64_t t = 0; t < rows; ++t) {
        const float* at = terms[t / 16 * 2] + t % 16 * 16;
        __m512i values[chunk / 32];
        for (int64_t c = 0; c < chunk && (simple || c < count); c += 32)
            values[c / 32] = row.value<simple>(col + c, count - c, at + 32 * c, at + 32 * c + 256);
        for (int64_t c = 0; c < chunk && (simple || c < count); c += 32)
            if (simple)
                _mm512_storeu_si512(row.out + col + c, values[c / 32]);
            else
                _mm512_mask_storeu_epi16(row.out + col + c, lanes32(count - c), values[c / 32]);
        if (row.y) row.y += y_pitch;
        if (row.bits) row.bits += mask_pitch;
        row.out += out_pitch;
    }
}

// Rows [row, row_end) of the columns [col, col_end).
static void expand_block(const ConstMatrix& y, const float* s, const ConstMatrix& b, bool transposed,
                         const DropoutMask& mask, float scale, const float* gain, const float* offset,
                         const Matrix& out, int64_t row, int64_t row_end, int64_t col, int64_t col_end) {
    static thread_local Scratch strip, rows;
    const int parts = b.dtype == DType::bf16 ? 1 : 2, s_parts = engine().s_parts;
    const int64_t ranks = transposed ? b.rows : b.cols;
    const int64_t rank_tiles = sixteens(ranks), per_column = rank_tiles * parts * tile_values;
    uint16_t* packed = (uint16_t*)strip.floats(strip_cols / 16 * per_column / 2);
    uint16_t* rows0 = (uint16_t*)rows.floats(rank_tiles * tile_values);
    uint16_t* rows1 = rows0 + rank_tiles * tile_values;
    alignas(64) float terms[chunk / 8][256];
    pack_strip(b, transposed, ranks, col, col_end - col, parts, s_parts, packed);
    for (int64_t t0 = row; t0 < row_end; t0 += 32) {
        const int64_t count = row_end - t0 < 32 ? row_end - t0 : 32;
        const Epilogue first{y.data ? (const uint16_t*)y.data + t0 * y.pitch : nullptr,
                             (uint16_t*)out.data + t0 * out.pitch,
                             mask.bits ? mask.bits + t0 * mask.pitch : nullptr,
                             mask.scale,
                             gain,
                             offset};
        pack_rows(s + t0 * ranks, ranks, count, scale, rows0);
        pack_rows(s + (t0 + 16) * ranks, ranks, count - 16, scale, rows1);
        for (int64_t c0 = col; c0 < col_end; c0 += chunk) {
            const int64_t columns = col_end - c0 < chunk ? col_end - c0 : chunk;
            for (int64_t c = 0; c < columns; c += 32)
                engine().expand(rows0, rows1, s_parts, packed + (c0 - col + c) / 16 * per_column, per_column,
                                rank_tiles, parts, terms + c / 8);
            const auto finish = columns == chunk && first.plain() ? finish_rows<true> : finish_rows<false>;
            finish(first, y.pitch, out.pitch, mask.pitch, count, c0, columns, terms);
        }
    }
}

void expand(const ConstMatrix& y, const float* s, const ConstMatrix& b, bool transposed,
            const DropoutMask& mask, float scale, const float* gain, const float* offset, const Matrix& out,
            ParallelFor run) {
    const int64_t strips = (out.cols + strip_cols - 1) / strip_cols;
    const int64_t blocks = (out.rows + strip_rows - 1) / strip_rows * strips;
    const int64_t block_rows = out.rows < strip_rows ? out.rows : strip_rows;
    parallel(run, blocks, grain(4 * block_rows * strip_cols), [&](int64_t begin, int64_t end) {
        const Session session(engine());
        for (int64_t i = begin; i < end; ++i) {
            const int64_t row = i / strips * strip_rows, col = i % strips * strip_cols;
            expand_block(y, s, b, transposed, mask, scale, gain, offset, out, row,
                         out.rows - row < strip_rows ? out.rows : row + strip_rows, col,
                         out.cols - col < strip_cols ? out.cols : col + strip_cols);
        }
    });
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
        for (int64_t k0 = 0; k0 < w.cols; k0 += 256) {  // in blocks: shorter chains of roundings
            __m512 part = _mm512_setzero_ps();
            for (int64_t k = k0; k < k0 + 256 && k < w.cols; k += 32) {
                const __m512bh v = (__m512bh)_mm512_maskz_loadu_epi16(lanes32(w.cols - k), row + k);
                part = _mm512_dpbf16_ps(part, v, v);
            }
            square = _mm512_add_ps(square, part);
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
// s^T in two or three parts: packed [rank tiles][steps of 32 rows][parts][16 ranks][32 rows]

int grad_parts(DType out) {
    return out == DType::bf16 ? engine().s_parts : 3;
}

int64_t grad_factor_bytes(int64_t rows, int64_t ranks, int parts) {
    return 2 * pairs(rows) * sixteens(ranks) * parts * tile_values;
}

void pack_grad_factor(const ConstMatrix& s, float scale, int parts, uint16_t* packed) {
    const __m512i rows =
        _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                           _mm512_set1_epi32((int)s.pitch));
    for (int64_t jt = 0; jt < sixteens(s.cols); ++jt)
        for (int64_t step = 0; step < pairs(s.rows); ++step, packed += parts * tile_values) {
            const float* block = (const float*)s.data + 32 * step * s.pitch + 16 * jt;
            for (int64_t j = 0; j < 16; ++j)
                for (int64_t k = 0; k < 32; k += 16) {
                    const __mmask16 lanes = 16 * jt + j < s.cols ? lanes_of(s.rows - 32 * step - k) : 0;
                    __m512 value = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), lanes, rows,
                                                            block + k * s.pitch + j, 4);
                    value = _mm512_mul_ps(value, _mm512_set1_ps(scale));
                    for (int p = 0; p < parts; ++p)
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
    const __mmask32 low = lanes32(count), high = lanes32(count - 32);
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

// 16 sums in the gradient's dtype.
static inline void write_lanes(const Matrix& out, int64_t at, __mmask16 lanes, __m512 value) {
    if (out.dtype == DType::f32)
        _mm512_mask_storeu_ps((float*)out.data + at, lanes, value);
    else if (out.dtype == DType::bf16)
        _mm256_mask_storeu_epi16((uint16_t*)out.data + at, lanes, (__m256i)_mm512_cvtneps_pbh(value));
    else
        _mm256_mask_storeu_epi16((uint16_t*)out.data + at, lanes,
                                 _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// One rank tile's four tiles of sums, columns [col, col + count), to where the gradient lies.
static void write_grad(const float* sums, int64_t rank, int64_t ranks, bool transposed, const Matrix& out,
                       int64_t col, int64_t count) {
    if (!transposed) {
        for (int64_t j = 0; j < 16 && rank + j < ranks; ++j)
            for (int64_t c = 0; c < count; c += 16)
                write_lanes(out, (rank + j) * out.pitch + col + c, lanes_of(count - c),
                            _mm512_load_ps(sums + c * 16 + j * 16));
        return;
    }
    for (int64_t c = 0; c < count; c += 16) {
        __m512i rows[16];
        for (int j = 0; j < 16; ++j) rows[j] = _mm512_load_si512(sums + c * 16 + 16 * j);
        transpose(rows);
        for (int64_t i = 0; i < 16 && c + i < count; ++i)
            write_lanes(out, (col + c + i) * out.pitch + rank, lanes_of(ranks - rank), (__m512)rows[i]);
    }
}

void grad_blocks(const ConstMatrix& x, const uint16_t* packed, int parts, int64_t ranks,
                 const DropoutMask& mask, bool transposed, const Matrix& out, int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    const Session session(engine());
    // A tile load waits for stores to the same lines to leave the store buffer: so interleave several steps,
    // then multiply them.
    constexpr int64_t ahead = 2, groups = grad_columns / 64, group_tiles = 4 * tile_values;
    alignas(64) uint16_t columns[groups * ahead * group_tiles];
    const int64_t rank_tiles = sixteens(ranks), steps = pairs(x.rows);
    float* sums = scratch.floats(groups * rank_tiles * 1024);
    for (int64_t block = begin; block < end; ++block) {
        const int64_t col = block * grad_columns;
        const int64_t count = x.cols - col < grad_columns ? x.cols - col : grad_columns;
        std::memset(sums, 0, groups * rank_tiles * 4096);
        for (int64_t step = 0; step < steps; step += ahead) {
            const int64_t now = steps - step < ahead ? steps - step : ahead;
            for (int64_t i = 0; i < now; ++i)
                for (int64_t g = 0; 64 * g < count; ++g)
                    interleave(x, (step + i) * 32, col + 64 * g, mask,
                               columns + (g * ahead + i) * group_tiles);
            for (int64_t jt = 0; jt < rank_tiles; ++jt) {
                const uint16_t* factor = packed + (jt * steps + step) * parts * tile_values;
                for (int64_t g = 0; 64 * g < count; ++g)
                    engine().grad(factor, columns + g * ahead * group_tiles, now, parts,
                                  sums + (g * rank_tiles + jt) * 1024);
            }
        }
        for (int64_t g = 0; 64 * g < count; ++g)
            for (int64_t jt = 0; jt < rank_tiles; ++jt)
                write_grad(sums + (g * rank_tiles + jt) * 1024, 16 * jt, ranks, transposed, out, col + 64 * g,
                           count - 64 * g < 64 ? count - 64 * g : 64);
    }
}

}  // namespace fastlora::tiles
#pragma GCC pop_options
#endif
