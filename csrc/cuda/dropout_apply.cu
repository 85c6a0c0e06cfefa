// dropout_apply: out = D(x), kept elements times 1 / (1 - p)
//
// Bound by memory: x once in, once out, and a bit of mask for each element. The bits of a pack lie in one
// byte.
#include "elementwise.h"

namespace fastlora::gpu {

constexpr int dropout_packs = 4;

template <class T, int n>
__global__ void FASTLORA_LAUNCH_BOUNDS(elementwise_threads, elementwise_blocks)
    dropout_apply_packs(ConstMatrix x, DropoutMask mask, Matrix out) {
    const Place<n, dropout_packs> place(x.cols);
    if (place.row >= x.rows) return;
    const T* from = element<T>(x, place.row, place.col);
    const uint8_t* bits = mask.bits + place.row * mask.pitch + place.col / 8;
    T* to = element<T>(out, place.row, place.col);
    Pack<T, n> pack[dropout_packs];
    uint32_t keep[dropout_packs];
#pragma unroll
    for (int i = 0; i < dropout_packs; ++i) {
        pack[i] = load_once<T, n>(from + place.from(i));
        keep[i] = bits[place.from(i) / 8];
    }
#pragma unroll
    for (int i = 0; i < dropout_packs; ++i) {
        float wide[n];
        widen(pack[i], wide);
#pragma unroll
        for (int k = 0; k < n; ++k)  // a product also where dropped: torch lets NaN through
            pack[i].v[k] =
                from_float<T>(wide[k] * (keep[i] >> (place.from(i) + k) % 8 & 1 ? mask.scale : 0.0f));
        if (place.has(i)) store_pack(to + place.to(i), pack[i]);
    }
}

// ---- launcher ---------------------------------------------------------------

int dropout_apply(const ConstMatrix& x, const DropoutMask& mask, const Matrix& out, Stream stream) {
    return with_type(x.dtype, [&](auto type) {
        using T = decltype(type);
        return with_pack<T>(x.cols, {x}, {out}, [&](auto size) {
            constexpr int n = decltype(size)::value;
            return launch(dropout_apply_packs<T, n>, elementwise_grid<n, dropout_packs>(x.rows, x.cols),
                          dim3(elementwise_threads), 0, stream, x, mask, out);
        });
    });
}

}  // namespace fastlora::gpu
