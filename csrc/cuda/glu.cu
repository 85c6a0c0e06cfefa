// glu_forward:  y = act(gate) * up
// glu_backward: dgate = dy * up * act'(gate), dup = dy * act(gate), product = act(gate) * up
//
// Each tensor is read or written once: 3 passes over [T, O] forward, 6 backward, the bound. A thread takes 16
// bytes of each tensor at a time, in float32 from load to store; rows on odd addresses go element by element
// through the same kernels. Forward, silu takes 23 instructions a value and the exact GELU 34, of the 37 that
// an H200 can issue while a bfloat16 value passes at 4.8 TB/s: hence a reciprocal where a division was.
#include "elementwise.h"

namespace fastlora::gpu {

struct Math {
    using V = float;
    FASTLORA_DEVICE float of(float value) { return value; }
    FASTLORA_DEVICE float one() { return 1.0f; }
    FASTLORA_DEVICE float min(float a, float b) { return a > b ? b : a; }  // NaN in a goes through
    FASTLORA_DEVICE float exp(float x) { return expf(x); }
    FASTLORA_DEVICE float erf(float x) { return erff(x); }
    FASTLORA_DEVICE float reciprocal(float x) { return gpu::reciprocal(x); }
    // value where x > 0, 0 elsewhere; NaN in x goes through, as torch's relu lets it.
    FASTLORA_DEVICE float positive(float x, float value) { return x <= 0.0f ? 0.0f : value; }
};

template <Act act>
FASTLORA_DEVICE Activated<float> activate(float x) {
    if constexpr (act == Act::silu) return silu<Math>(x);
    if constexpr (act == Act::gelu) return gelu<Math>(x);
    if constexpr (act == Act::gelu_tanh) return gelu_tanh<Math>(x);
    if constexpr (act == Act::relu) return relu<Math>(x);
    return relu2<Math>(x);
}

// 64 bytes of a thread's loads in flight forward, 48 backward.
constexpr int forward_packs = 2;

template <Act act, class T, int n>
__global__ void FASTLORA_LAUNCH_BOUNDS(elementwise_threads, elementwise_blocks)
    glu_forward_packs(ConstMatrix gate, ConstMatrix up, Matrix out) {
    const Place<n, forward_packs> place(out.cols);
    if (place.row >= out.rows) return;
    const T *gates = element<T>(gate, place.row, place.col), *ups = element<T>(up, place.row, place.col);
    T* to = element<T>(out, place.row, place.col);
    Pack<T, n> g[forward_packs], u[forward_packs];
#pragma unroll
    for (int i = 0; i < forward_packs; ++i) {
        g[i] = load_once<T, n>(gates + place.from(i));
        u[i] = load_once<T, n>(ups + place.from(i));
    }
#pragma unroll
    for (int i = 0; i < forward_packs; ++i) {
        float wide_g[n], wide_u[n];
        widen(g[i], wide_g), widen(u[i], wide_u);
        Pack<T, n> y;
#pragma unroll
        for (int k = 0; k < n; ++k) y.v[k] = from_float<T>(activate<act>(wide_g[k]).value * wide_u[k]);
        if (place.has(i)) store_pack(to + place.to(i), y);
    }
}

template <Act act, class T, int n>
__global__ void FASTLORA_LAUNCH_BOUNDS(elementwise_threads, elementwise_blocks)
    glu_backward_packs(ConstMatrix dy, ConstMatrix gate, ConstMatrix up, Matrix dgate, Matrix dup,
                       Matrix product) {
    const Place<n, 1> place(dgate.cols);
    if (place.row >= dgate.rows) return;
    const int64_t row = place.row, col = place.col + place.from(0);
    float d[n], g[n], u[n];
    const Pack<T, n> packed_d = load_once<T, n>(element<T>(dy, row, col));
    const Pack<T, n> packed_g = load_once<T, n>(element<T>(gate, row, col));
    const Pack<T, n> packed_u = load_once<T, n>(element<T>(up, row, col));
    widen(packed_d, d), widen(packed_g, g), widen(packed_u, u);
    Pack<T, n> dg, du, p;
#pragma unroll
    for (int k = 0; k < n; ++k) {
        const Activated<float> a = activate<act>(g[k]);
        dg.v[k] = from_float<T>(d[k] * u[k] * a.slope);
        du.v[k] = from_float<T>(d[k] * a.value);
        p.v[k] = from_float<T>(a.value * u[k]);
    }
    if (!place.has(0)) return;
    store_pack(element<T>(dgate, row, col), dg);
    store_pack(element<T>(dup, row, col), du);
    store_pack(element<T>(product, row, col), p);
}

// ---- launchers ---------------------------------------------------------------

template <Act act>
struct Chosen {
    static constexpr Act value = act;
};

template <class Body>
static int with_act(Act act, Body body) {
    switch (act) {
        case Act::silu:
            return body(Chosen<Act::silu>{});
        case Act::gelu:
            return body(Chosen<Act::gelu>{});
        case Act::gelu_tanh:
            return body(Chosen<Act::gelu_tanh>{});
        case Act::relu:
            return body(Chosen<Act::relu>{});
        default:
            return body(Chosen<Act::relu2>{});
    }
}

int glu_forward(const ConstMatrix& gate, const ConstMatrix& up, Act act, const Matrix& out, Stream stream) {
    return with_type(out.dtype, [&](auto type) {
        using T = decltype(type);
        return with_act(act, [&](auto chosen) {
            return with_pack<T>(out.cols, {gate, up}, {out}, [&](auto size) {
                constexpr int n = decltype(size)::value;
                return launch(glu_forward_packs<decltype(chosen)::value, T, n>,
                              elementwise_grid<n, forward_packs>(out.rows, out.cols),
                              dim3(elementwise_threads), 0, stream, gate, up, out);
            });
        });
    });
}

int glu_backward(const ConstMatrix& dy, const ConstMatrix& gate, const ConstMatrix& up, Act act,
                 const Matrix& dgate, const Matrix& dup, const Matrix& product, Stream stream) {
    return with_type(dgate.dtype, [&](auto type) {
        using T = decltype(type);
        return with_act(act, [&](auto chosen) {
            return with_pack<T>(dgate.cols, {dy, gate, up}, {dgate, dup, product}, [&](auto size) {
                constexpr int n = decltype(size)::value;
                return launch(glu_backward_packs<decltype(chosen)::value, T, n>,
                              elementwise_grid<n, 1>(dgate.rows, dgate.cols), dim3(elementwise_threads), 0,
                              stream, dy, gate, up, dgate, dup, product);
            });
        });
    });
}

}  // namespace fastlora::gpu
