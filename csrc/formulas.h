// Maths shared by every backend: the 4-bit tables, the activations of the GLU and their derivatives.
//
// No include guard below the tables: on a CPU this file is included inside the namespace of each instruction
// set, so that vectors wider than the baseline are not split. M supplies the arithmetic: V, of(constant),
// one, min, exp, erf, reciprocal and positive.

#ifndef FASTLORA_FORMULAS_TABLES
#define FASTLORA_FORMULAS_TABLES
// Quantiles of N(0, 1) scaled to [-1, 1] (Dettmers et al. 2023, appendix E; the same float32 values as
// bitsandbytes).
#define FASTLORA_NF4_VALUES                                                                             \
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,    \
        -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, \
        0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f,          \
        0.7229568362236023f, 1.0f
// Sign, two exponent bits, one mantissa bit; divided by the largest magnitude, 12, in float32.
#define FASTLORA_FP4_VALUES                                                                                \
    0.0f, 0.0625f / 12, 8.0f / 12, 1.0f, 4.0f / 12, 6.0f / 12, 2.0f / 12, 3.0f / 12, -0.0f, -0.0625f / 12, \
        -8.0f / 12, -1.0f, -4.0f / 12, -6.0f / 12, -2.0f / 12, -3.0f / 12
#endif

#ifndef FASTLORA_INLINE
#define FASTLORA_INLINE inline
#endif

// value = act(x), slope = act'(x)
template <class V>
struct Activated {
    V value, slope;
};

// s = sigmoid(x) and 1 - s as e^-x s: subtracting would leave no digits of it where s is nearly 1.
template <class V>
struct Sigmoid {
    V s, complement;
};

template <class M>
FASTLORA_INLINE Sigmoid<typename M::V> sigmoid(typename M::V x) {
    const typename M::V e = M::exp(M::min(-x, M::of(88.0f)));  // finite: infinity times 0 is not 1
    const typename M::V s = M::reciprocal(M::one() + e);
    return {s, e * s};
}

template <class M>
FASTLORA_INLINE Activated<typename M::V> silu(typename M::V x) {
    const Sigmoid<typename M::V> g = sigmoid<M>(x);
    return {x * g.s, g.s * (M::one() + x * g.complement)};
}

// x Phi(x): the exact GELU, through erf.
template <class M>
FASTLORA_INLINE Activated<typename M::V> gelu(typename M::V x) {
    const typename M::V cdf = M::of(0.5f) * (M::one() + M::erf(x * M::of(0.70710678118654752f)));
    const typename M::V pdf = M::of(0.39894228040143268f) * M::exp(M::of(-0.5f) * x * x);
    return {x * cdf, cdf + x * pdf};
}

// 0.5 x (1 + tanh(u)), u = sqrt(2/pi) (x + 0.044715 x^3), written with sigmoid(2u) = (1 + tanh u) / 2.
template <class M>
FASTLORA_INLINE Activated<typename M::V> gelu_tanh(typename M::V x) {
    const typename M::V k = M::of(1.5957691216057308f), c = M::of(0.044715f), x2 = x * x;
    const Sigmoid<typename M::V> g = sigmoid<M>(k * x * (M::one() + c * x2));
    const typename M::V du = k * (M::one() + M::of(3.0f) * c * x2);
    return {x * g.s, g.s + x * g.s * g.complement * du};
}

template <class M>
FASTLORA_INLINE Activated<typename M::V> relu(typename M::V x) {
    return {M::positive(x, x), M::positive(x, M::one())};
}

template <class M>
FASTLORA_INLINE Activated<typename M::V> relu2(typename M::V x) {
    const typename M::V r = M::positive(x, x);
    return {r * r, r + r};
}
