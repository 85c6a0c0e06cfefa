// glu_forward:  y = act(gate) * up
// glu_backward: dgate = dy * up * act'(gate), dup = dy * act(gate), product = act(gate) * up
//
// Each tensor is read or written once (3 passes forward, 6 backward), everything between is float32 in
// registers. The backward gives the product again because the gradient of the next projection's factor needs
// it and nobody kept it. Levels differ in the last bit, through fused multiply-adds.
#ifdef FASTLORA_LEVEL
namespace fastlora::FASTLORA_LEVEL {

#include "../formulas.h"

template <Act act>
FASTLORA_INLINE Activated<vf> activate(vf x) {
    if constexpr (act == Act::silu) return silu<Math>(x);
    if constexpr (act == Act::gelu) return gelu<Math>(x);
    if constexpr (act == Act::gelu_tanh) return gelu_tanh<Math>(x);
    if constexpr (act == Act::relu) return relu<Math>(x);
    return relu2<Math>(x);
}

constexpr int64_t strip = 512;  // elements in flight: up to six float32 strips of 2 KB stay in L1

// The activations work on float32 strips padded to whole vectors; one copy of them serves every dtype.
template <Act act>
void forward_strip(const float* gate, const float* up, float* y, int64_t count) {
    for (int64_t i = 0; i < count; i += lanes)
        store(y + i, activate<act>(load(gate + i)).value * load(up + i));
}

template <Act act>
void backward_strip(const float* dy, const float* gate, const float* up, float* dgate, float* dup,
                    float* product, int64_t count) {
    for (int64_t i = 0; i < count; i += lanes) {
        const vf d = load(dy + i), u = load(up + i);
        const Activated<vf> a = activate<act>(load(gate + i));
        store(dgate + i, d * u * a.slope);
        store(dup + i, d * a.value);
        store(product + i, a.value * u);
    }
}

template <class T>
FASTLORA_INLINE void widen_strip(const T* from, int64_t count, float* to) {
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) store(to + i, load(from + i));
    if (i < count) store(to + i, load(from + i, count - i));
}

template <class T>
FASTLORA_INLINE void narrow_strip(const float* from, int64_t count, T* to) {
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) store(to + i, load(from + i));
    if (i < count) store(to + i, load(from + i), count - i);
}

template <class T>
void forward_rows(const ConstMatrix& gate, const ConstMatrix& up, Act act, const Matrix& out, int64_t begin,
                  int64_t end) {
    constexpr decltype(&forward_strip<Act::silu>) strips[] = {
        forward_strip<Act::silu>, forward_strip<Act::gelu>, forward_strip<Act::gelu_tanh>,
        forward_strip<Act::relu>, forward_strip<Act::relu2>};
    float g[strip], u[strip], y[strip];
    for (int64_t t = begin; t < end; ++t)
        for (int64_t i = 0; i < out.cols; i += strip) {
            const int64_t n = out.cols - i < strip ? out.cols - i : strip;
            widen_strip((const T*)gate.data + t * gate.pitch + i, n, g);
            widen_strip((const T*)up.data + t * up.pitch + i, n, u);
            strips[(int)act](g, u, y, n);
            narrow_strip(y, n, (T*)out.data + t * out.pitch + i);
        }
}

template <class T>
void backward_rows(const ConstMatrix& dy, const ConstMatrix& gate, const ConstMatrix& up, Act act,
                   const Matrix& dgate, const Matrix& dup, const Matrix& product, int64_t begin,
                   int64_t end) {
    constexpr decltype(&backward_strip<Act::silu>) strips[] = {
        backward_strip<Act::silu>, backward_strip<Act::gelu>, backward_strip<Act::gelu_tanh>,
        backward_strip<Act::relu>, backward_strip<Act::relu2>};
    float d[strip], g[strip], u[strip], dg[strip], du[strip], p[strip];
    for (int64_t t = begin; t < end; ++t)
        for (int64_t i = 0; i < dgate.cols; i += strip) {
            const int64_t n = dgate.cols - i < strip ? dgate.cols - i : strip;
            widen_strip((const T*)dy.data + t * dy.pitch + i, n, d);
            widen_strip((const T*)gate.data + t * gate.pitch + i, n, g);
            widen_strip((const T*)up.data + t * up.pitch + i, n, u);
            strips[(int)act](d, g, u, dg, du, p, n);
            narrow_strip(dg, n, (T*)dgate.data + t * dgate.pitch + i);
            narrow_strip(du, n, (T*)dup.data + t * dup.pitch + i);
            narrow_strip(p, n, (T*)product.data + t * product.pitch + i);
        }
}

void glu_forward_rows(const ConstMatrix& gate, const ConstMatrix& up, Act act, const Matrix& out,
                      int64_t begin, int64_t end) {
    if (gate.dtype == DType::f32) return forward_rows<float>(gate, up, act, out, begin, end);
    if (gate.dtype == DType::bf16) return forward_rows<bf16>(gate, up, act, out, begin, end);
    forward_rows<f16>(gate, up, act, out, begin, end);
}

void glu_backward_rows(const ConstMatrix& dy, const ConstMatrix& gate, const ConstMatrix& up, Act act,
                       const Matrix& dgate, const Matrix& dup, const Matrix& product, int64_t begin,
                       int64_t end) {
    if (gate.dtype == DType::f32)
        return backward_rows<float>(dy, gate, up, act, dgate, dup, product, begin, end);
    if (gate.dtype == DType::bf16)
        return backward_rows<bf16>(dy, gate, up, act, dgate, dup, product, begin, end);
    backward_rows<f16>(dy, gate, up, act, dgate, dup, product, begin, end);
}

}  // namespace fastlora::FASTLORA_LEVEL
#else
#define FASTLORA_KERNELS "glu.cpp"
#include "levels.h"

namespace fastlora::cpu {

static int64_t grain(int64_t cols) {
    return 1 + (1 << 14) / (cols + 1);
}  // 16k elements, some 10 us

void glu_forward(const ConstMatrix& gate, const ConstMatrix& up, Act act, const Matrix& out,
                 ParallelFor run) {
    const auto rows = FASTLORA_PICK(glu_forward_rows);
    parallel(run, out.rows, grain(out.cols),
             [&](int64_t begin, int64_t end) { rows(gate, up, act, out, begin, end); });
}

void glu_backward(const ConstMatrix& dy, const ConstMatrix& gate, const ConstMatrix& up, Act act,
                  const Matrix& dgate, const Matrix& dup, const Matrix& product, ParallelFor run) {
    const auto rows = FASTLORA_PICK(glu_backward_rows);
    parallel(run, dgate.rows, grain(dgate.cols),
             [&](int64_t begin, int64_t end) { rows(dy, gate, up, act, dgate, dup, product, begin, end); });
}

}  // namespace fastlora::cpu
#endif
