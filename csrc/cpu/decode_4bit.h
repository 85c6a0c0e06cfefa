// Decoding of bitsandbytes' 4-bit blocks, shared by every kernel that reads packed weights. Included per
// level.
//
// value = code[nibble] * absmax[block], in float32, rounded once to the output type: bit-equal to
// bitsandbytes at every level. A block has one scale and 16 codes, so its 16 possible values are rounded once
// into a table (16-bit types) and the elements become table look-ups.

namespace fastlora::FASTLORA_LEVEL {

#include "../formulas.h"

static const float nf4_values[16] = {FASTLORA_NF4_VALUES};
static const float fp4_values[16] = {FASTLORA_FP4_VALUES};

// Keeps a * b + c from becoming one fused operation: the result must be what torch's two operations give.
FASTLORA_INLINE float rounded(float value) {
#if defined(__x86_64__)
    asm("" : "+x"(value));
#elif defined(__aarch64__)
    asm("" : "+w"(value));
#endif
    return value;
}

FASTLORA_INLINE float block_absmax(const Packed4bit& w, int64_t block) {
    if (w.absmax) return w.absmax[block];
    const float scaled =
        rounded(w.nested_code[w.absmax_codes[block]] * w.nested_absmax[block / w.nested_blocksize]);
    return scaled + *w.nested_offset;
}

template <class T>
struct Table {
    T values[16];
};

template <class T>
FASTLORA_INLINE Table<T> block_table(const float* codes, float absmax) {
    Table<T> table;
    for (int i = 0; i < 16; i += lanes) store(table.values + i, load(codes + i) * splat(absmax));
    return table;
}

// Elements [at, at + count) of the flattened weight, all of one block.
template <class T>
FASTLORA_INLINE void decode_run(const uint8_t* packed, int64_t at, int64_t count, const Table<T>& table,
                                T* out) {
    int64_t i = 0;
    if ((at & 1) && count > 0) out[i++] = table.values[packed[at >> 1] & 15];
    const uint8_t* bytes = packed + ((at + i) >> 1);
    int64_t pairs = (count - i) >> 1;
#if defined(FASTLORA_AVX512)
    if constexpr (sizeof(T) == 2) {
        // vpermw looks at 5 bits of each index: with the table stored twice, the fifth may be anything.
        const __m256i once = _mm256_loadu_si256((const __m256i*)table.values);
        const __m512i twice = _mm512_broadcast_i64x4(once);
        for (; pairs >= 16; pairs -= 16, bytes += 16, i += 32) {
            const __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)bytes));
            const __m512i index = _mm512_or_si512(_mm512_srli_epi32(b, 4), _mm512_slli_epi32(b, 16));
            _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(index, twice));
        }
    } else {
        const __m512 values = _mm512_loadu_ps((const float*)table.values);
        for (; pairs >= 8; pairs -= 8, bytes += 8, i += 16) {
            const __m512i b = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)bytes));
            const __m512i index = _mm512_or_si512(_mm512_srli_epi64(b, 4), _mm512_slli_epi64(b, 32));
            _mm512_storeu_ps((float*)(out + i), _mm512_permutexvar_ps(index, values));
        }
    }
#elif defined(FASTLORA_AVX2)
    const __m128i nibble = _mm_set1_epi8(15);
    if constexpr (sizeof(T) == 2) {
        const __m128i v0 = _mm_loadu_si128((const __m128i*)table.values);
        const __m128i v1 = _mm_loadu_si128((const __m128i*)table.values + 1);
        const __m128i byte = _mm_set1_epi16(255);
        const __m128i low = _mm_packus_epi16(_mm_and_si128(v0, byte), _mm_and_si128(v1, byte));
        const __m128i high = _mm_packus_epi16(_mm_srli_epi16(v0, 8), _mm_srli_epi16(v1, 8));
        for (; pairs >= 16; pairs -= 16, bytes += 16, i += 32) {
            const __m128i b = _mm_loadu_si128((const __m128i*)bytes);
            const __m128i even = _mm_and_si128(_mm_srli_epi16(b, 4), nibble), odd = _mm_and_si128(b, nibble);
            const __m128i first = _mm_unpacklo_epi8(even, odd), second = _mm_unpackhi_epi8(even, odd);
            const __m128i l0 = _mm_shuffle_epi8(low, first), h0 = _mm_shuffle_epi8(high, first);
            const __m128i l1 = _mm_shuffle_epi8(low, second), h1 = _mm_shuffle_epi8(high, second);
            __m128i* o = (__m128i*)(out + i);
            _mm_storeu_si128(o, _mm_unpacklo_epi8(l0, h0));
            _mm_storeu_si128(o + 1, _mm_unpackhi_epi8(l0, h0));
            _mm_storeu_si128(o + 2, _mm_unpacklo_epi8(l1, h1));
            _mm_storeu_si128(o + 3, _mm_unpackhi_epi8(l1, h1));
        }
    } else {
        const __m256 v0 = _mm256_loadu_ps((const float*)table.values);
        const __m256 v1 = _mm256_loadu_ps((const float*)table.values + 8);
        for (; pairs >= 4; pairs -= 4, bytes += 4, i += 8) {
            int32_t four;
            std::memcpy(&four, bytes, 4);
            const __m128i b = _mm_cvtsi32_si128(four);
            const __m128i even = _mm_and_si128(_mm_srli_epi16(b, 4), nibble), odd = _mm_and_si128(b, nibble);
            const __m256i index = _mm256_cvtepu8_epi32(_mm_unpacklo_epi8(even, odd));
            const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // sign bit: index >= 8
            const __m256 values = _mm256_blendv_ps(_mm256_permutevar8x32_ps(v0, index),
                                                   _mm256_permutevar8x32_ps(v1, index), upper);
            _mm256_storeu_ps((float*)(out + i), values);
        }
    }
#endif
    for (; pairs > 0; --pairs, ++bytes, i += 2) {
        out[i] = table.values[*bytes >> 4];
        out[i + 1] = table.values[*bytes & 15];
    }
    if (i < count) out[i] = table.values[*bytes >> 4];
}

// Elements [at, at + count) of the flattened weight, over as many blocks as they span.
template <class T>
FASTLORA_INLINE void decode(const Packed4bit& w, int64_t at, int64_t count, T* out) {
    const float* codes = w.fp4 ? fp4_values : nf4_values;
    while (count > 0) {
        const int64_t block = at / w.blocksize;
        const int64_t rest = (block + 1) * w.blocksize - at, run = count < rest ? count : rest;
        decode_run(w.packed, at, run, block_table<T>(codes, block_absmax(w, block)), out);
        at += run, out += run, count -= run;
    }
}

}  // namespace fastlora::FASTLORA_LEVEL
