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

template <class T, Act act>
void forward_rows(const ConstMatrix& gate, const ConstMatrix& up, const Matrix& out, int64_t begin,
                  int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
        const T *g = (const T*)gate.data + t * gate.pitch, *u = (const T*)up.data + t * up.pitch;
        T* y = (T*)out.data + t * out.pitch;
        for (int64_t i = 0; i < out.cols; i += lanes) {
            const int64_t n = out.cols - i;
            const bool whole = n >= lanes;
            const vf gv = whole ? load(g + i) : load(g + i, n), uv = whole ? load(u + i) : load(u + i, n);
            const vf value = activate<act>(gv).value * uv;
            if (whole)
                store(y + i, value);
            else
                store(y + i, value, n);
        }
    }
}

template <class T, Act act>
void backward_rows(const ConstMatrix& dy, const ConstMatrix& gate, const ConstMatrix& up, const Matrix& dgate,
                   const Matrix& dup, const Matrix& product, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
        const T *g = (const T*)gate.data + t * gate.pitch, *u = (const T*)up.data + t * up.pitch,
                *d = (const T*)dy.data + t * dy.pitch;
        T *dg = (T*)dgate.data + t * dgate.pitch, *du = (T*)dup.data + t * dup.pitch,
          *p = (T*)product.data + t * product.pitch;
        for (int64_t i = 0; i < dgate.cols; i += lanes) {
            const int64_t n = dgate.cols - i;
            const bool whole = n >= lanes;
            const vf gv = whole ? load(g + i) : load(g + i, n), uv = whole ? load(u + i) : load(u + i, n);
            const vf dv = whole ? load(d + i) : load(d + i, n);
            const Activated<vf> a = activate<act>(gv);
            if (whole) {
                store(dg + i, dv * uv * a.slope);
                store(du + i, dv * a.value);
                store(p + i, a.value * uv);
            } else {
                store(dg + i, dv * uv * a.slope, n);
                store(du + i, dv * a.value, n);
                store(p + i, a.value * uv, n);
            }
        }
    }
}

// f.template operator()<T, act>() for the pair that is named at run time.
template <class T, class F>
void by_act(Act act, const F& f) {
    switch (act) {
        case Act::silu:
            return f.template run<T, Act::silu>();
        case Act::gelu:
            return f.template run<T, Act::gelu>();
        case Act::gelu_tanh:
            return f.template run<T, Act::gelu_tanh>();
        case Act::relu:
            return f.template run<T, Act::relu>();
        case Act::relu2:
            return f.template run<T, Act::relu2>();
    }
}

template <class F>
void by_dtype_and_act(DType dtype, Act act, const F& f) {
    if (dtype == DType::f32) return by_act<float>(act, f);
    if (dtype == DType::bf16) return by_act<bf16>(act, f);
    by_act<f16>(act, f);
}

struct Forward {
    const ConstMatrix &gate, &up;
    const Matrix& out;
    int64_t begin, end;
    template <class T, Act act>
    void run() const {
        forward_rows<T, act>(gate, up, out, begin, end);
    }
};

struct Backward {
    const ConstMatrix &dy, &gate, &up;
    const Matrix &dgate, &dup, &product;
    int64_t begin, end;
    template <class T, Act act>
    void run() const {
        backward_rows<T, act>(dy, gate, up, dgate, dup, product, begin, end);
    }
};

void glu_forward_rows(const ConstMatrix& gate, const ConstMatrix& up, Act act, const Matrix& out,
                      int64_t begin, int64_t end) {
    by_dtype_and_act(gate.dtype, act, Forward{gate, up, out, begin, end});
}

void glu_backward_rows(const ConstMatrix& dy, const ConstMatrix& gate, const ConstMatrix& up, Act act,
                       const Matrix& dgate, const Matrix& dup, const Matrix& product, int64_t begin,
                       int64_t end) {
    by_dtype_and_act(gate.dtype, act, Backward{dy, gate, up, dgate, dup, product, begin, end});
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
