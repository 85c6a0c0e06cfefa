// Vectors of one level: FASTLORA_LANES floats, loads and stores that convert, exp and erf. Included by
// levels.h, once per level and therefore without a guard.

namespace fastlora::FASTLORA_LEVEL {

#define FASTLORA_INLINE static inline __attribute__((always_inline))
constexpr int lanes = FASTLORA_LANES;
typedef float vf __attribute__((vector_size(4 * FASTLORA_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * FASTLORA_LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * FASTLORA_LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * FASTLORA_LANES)));
typedef int8_t vb __attribute__((vector_size(FASTLORA_LANES)));

FASTLORA_INLINE vf splat(float value) {
    return value - vf{};
}

// ---- load and store ---------------------------------------------------------------

FASTLORA_INLINE vf load(const float* p) {
    vf v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

FASTLORA_INLINE vf load(const bf16* p) {
    vh h;
    std::memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, vu) << 16);
}

FASTLORA_INLINE float half_to_float(uint16_t h) {
    // Shift the magnitude into place and rescale by 2^112: subnormals come out right without a branch.
    union {
        uint32_t u;
        float f;
    } magnitude{(h & 0x7fffu) << 13}, rescale{0x77800000u};
    magnitude.f *= rescale.f;
    if ((h & 0x7c00u) == 0x7c00u) magnitude.u |= 0x7f800000u;
    magnitude.u |= (h & 0x8000u) << 16;
    return magnitude.f;
}

FASTLORA_INLINE uint16_t float_to_half(float f) {
    union {
        float f;
        uint32_t u;
    } v{f};
    const uint32_t sign = (v.u >> 16) & 0x8000u;
    v.u &= 0x7fffffffu;
    if (v.u > 0x7f800000u) return sign | 0x7e00u;
    if (v.u >= 0x47800000u) return sign | 0x7c00u;
    if (v.u < 0x38800000u) {  // subnormal: let the float adder round at the right place
        v.f += 0.5f;
        return sign | (v.u - 0x3f000000u);
    }
    v.u += 0xc8000fffu + ((v.u >> 13) & 1);
    return sign | (v.u >> 13);
}

FASTLORA_INLINE vf load(const f16* p) {
#if defined(FASTLORA_AVX512)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(FASTLORA_AVX2)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    vf v;
    for (int i = 0; i < lanes; ++i) v[i] = half_to_float(p[i].bits);
    return v;
#endif
}

FASTLORA_INLINE vf load(const int8_t* p) {
    vb b;
    std::memcpy(&b, p, sizeof b);
    return __builtin_convertvector(__builtin_convertvector(b, vi), vf);
}

FASTLORA_INLINE void store(float* p, vf v) {
    std::memcpy(p, &v, sizeof v);
}

// Round to nearest, ties to even; NaN stays NaN.
FASTLORA_INLINE vh to_bf16(vf v) {
    const vu u = (vu)v;
    const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const vu quiet = (u >> 16) | 0x40u;
    return __builtin_convertvector((vu)(v != v ? (vi)quiet : (vi)rounded), vh);
}

FASTLORA_INLINE void store(bf16* p, vf v) {
    const vh h = to_bf16(v);
    std::memcpy(p, &h, sizeof h);
}

FASTLORA_INLINE vh to_f16(vf v) {
#if defined(FASTLORA_AVX512)
    return (vh)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(FASTLORA_AVX2)
    return (vh)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    vh h;
    for (int i = 0; i < lanes; ++i) h[i] = float_to_half(v[i]);
    return h;
#endif
}

FASTLORA_INLINE void store(f16* p, vf v) {
    const vh h = to_f16(v);
    std::memcpy(p, &h, sizeof h);
}

// The first n < lanes elements; the rest of the vector is zero.
template <class T>
FASTLORA_INLINE vf load(const T* p, int64_t n) {
    T buffer[lanes] = {};
    std::memcpy(buffer, p, n * sizeof(T));
    return load(buffer);
}

template <class T>
FASTLORA_INLINE void store(T* p, vf v, int64_t n) {
    T buffer[lanes];
    store(buffer, v);
    std::memcpy(p, buffer, n * sizeof(T));
}

// Elements of a bit mask starting at element `at` of a row, as 0 or `scale`. `at` is a multiple of lanes, or
// the bits that follow are not looked at.
FASTLORA_INLINE vf mask_scale(const uint8_t* bits, int64_t at, float scale) {
    vi lane;
    for (int i = 0; i < lanes; ++i) lane[i] = 1 << i;
#if FASTLORA_LANES == 16
    uint16_t word;
    std::memcpy(&word, bits + (at >> 3), 2);
#elif FASTLORA_LANES == 8
    const int32_t word = bits[at >> 3];
#else
    const int32_t word = bits[at >> 3] >> (at & 7);
#endif
    const vi keep = ((int32_t)word & lane) != 0;
    return (vf)((vi)splat(scale) & keep);
}

FASTLORA_INLINE float sum(vf v) {
    float total = 0;
    for (int i = 0; i < lanes; ++i) total += v[i];
    return total;
}

// ---- exp and erf ---------------------------------------------------------------

// e^x = 2^n e^r, |r| <= ln(2) / 2, with a degree-6 polynomial for e^r: within 1 ulp of float32.
FASTLORA_INLINE vf vexp(vf x) {
    const vf low = splat(-87.33654f), high = splat(88.72283f);
    const vi overflow = x > high, underflow = x < low;
    vf c = x < low ? low : x;
    c = c > high ? high : c;
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    const vf shifted = c * splat(1.44269504f) + magic;
    const vi n = (vi)shifted - (vi)magic;
    const vf nf = shifted - magic;
    vf r = c - nf * splat(0.693359375f);  // ln 2 in two parts, the first with few bits
    r = r + nf * splat(2.12194440e-4f);
    vf p = splat(1.0f / 720);
    p = p * r + splat(1.0f / 120);
    p = p * r + splat(1.0f / 24);
    p = p * r + splat(1.0f / 6);
    p = p * r + splat(0.5f);
    p = p * r * r + r + splat(1.0f);
    const vi half = n >> 1;  // two factors: 2^128 itself is not a float
    const vf e = p * (vf)((half + 127) << 23) * (vf)((n - half + 127) << 23);
    const vf infinity = (vf)(vi{} + 0x7f800000);
    const vf bounded = (vf)(((vi)infinity & overflow) | ((vi)e & ~overflow & ~underflow));
    return x != x ? x : bounded;
}

// erf(x) = 1 - P(t) e^(-x^2), t = 1 / (1 + x / 2): the Chebyshev form of erfc in Press et al., Numerical
// Recipes 6.2, 1.2e-7 relative, for x >= 1; an odd polynomial below, where 1 - erfc would cancel.
FASTLORA_INLINE vf verf(vf x) {
    const vf a = (vf)((vi)x & 0x7fffffff);
    const vf x2 = x * x;
    vf s = splat(7.87587506e-5f);  // Chebyshev fit of erf(x) / x in x^2 on [0, 1], 1.3e-9 relative
    s = s * x2 + splat(-8.01686429e-4f);
    s = s * x2 + splat(5.18908742e-3f);
    s = s * x2 + splat(-2.6854212e-2f);
    s = s * x2 + splat(1.12835947e-1f);
    s = s * x2 + splat(-3.76126267e-1f);
    s = s * x2 + splat(1.12837917f);
    const vf near = s * x;
    const vf t = splat(1.0f) / (splat(1.0f) + splat(0.5f) * a);
    vf q = splat(0.17087277f);
    q = q * t + splat(-0.82215223f);
    q = q * t + splat(1.48851587f);
    q = q * t + splat(-1.13520398f);
    q = q * t + splat(0.27886807f);
    q = q * t + splat(-0.18628806f);
    q = q * t + splat(0.09678418f);
    q = q * t + splat(0.37409196f);
    q = q * t + splat(1.00002368f);
    q = q * t + splat(-1.26551223f);
    const vf far = splat(1.0f) - t * vexp(q - a * a);
    const vf signed_far = (vf)((vi)far | ((vi)x & (vi)(vu{} + 0x80000000u)));
    return a < splat(1.0f) ? near : signed_far;
}

struct Math {
    using V = vf;
    FASTLORA_INLINE vf of(float value) { return splat(value); }
    FASTLORA_INLINE vf one() { return splat(1.0f); }
    FASTLORA_INLINE vf min(vf a, vf b) { return a > b ? b : a; }  // NaN in a goes through
    FASTLORA_INLINE vf exp(vf x) { return vexp(x); }
    FASTLORA_INLINE vf erf(vf x) { return verf(x); }
    FASTLORA_INLINE vf reciprocal(vf x) { return splat(1.0f) / x; }
    // value where x > 0, 0 elsewhere; NaN in x goes through, as torch's relu lets it.
    FASTLORA_INLINE vf positive(vf x, vf value) { return x <= vf{} ? vf{} : value; }
};

}  // namespace fastlora::FASTLORA_LEVEL
