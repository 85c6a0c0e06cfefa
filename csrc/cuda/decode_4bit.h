// Decoding of bitsandbytes' 4-bit blocks, shared by every GPU kernel that reads packed weights.
//
// value = code[nibble] * absmax[block], in float32, rounded once to the output type: bit-equal to
// bitsandbytes.
#pragma once

#include "../gpu.h"

namespace fastlora::gpu {

// The 16 codes, once per lane: lanes that look up different codes then meet different banks.
struct Codes {
    float values[16][warp_size];

    // By all threads of the block, whole warps; ends with a barrier.
    __device__ void load(bool fp4) {
        const float nf4_codes[16] = {FASTLORA_NF4_VALUES}, fp4_codes[16] = {FASTLORA_FP4_VALUES};
        for (unsigned mine = threadIdx.x / warp_size; mine < 16; mine += blockDim.x / warp_size) {
            float value = 0;
#pragma unroll
            for (unsigned code = 0; code < 16; ++code)  // an index would put the arrays into local memory
                if (code == mine) value = fp4 ? fp4_codes[code] : nf4_codes[code];
            values[mine][lane()] = value;
        }
        __syncthreads();
    }

    __device__ float operator[](uint32_t code) const { return values[code][lane()]; }
};

// The same without shared memory: each lane holds a code, and a shuffle looks one up. For whole warps.
struct LaneCodes {
    float mine;

    __device__ explicit LaneCodes(bool fp4) {
        static const float values[2][16] = {{FASTLORA_NF4_VALUES}, {FASTLORA_FP4_VALUES}};
        mine = values[fp4][lane() % 16];
    }

    // Of the low four bits. The fifth picks one of two lanes that hold the same; no others count.
    __device__ float operator[](uint32_t code) const { return shuffle(mine, (int)code); }
};

// Two roundings, like bitsandbytes: a fused multiply-add would differ in the last bit. HIP's __fmul_rn and
// __fadd_rn are plain operators of their header, which clang contracts; there the pragma says what is meant.
FASTLORA_DEVICE float nested_scale(float code, float absmax, float offset) {
#if defined(__HIP__)
#pragma clang fp contract(off)
    const float product = code * absmax;
    return product + offset;
#else
    return __fadd_rn(__fmul_rn(code, absmax), offset);
#endif
}

// The scale of a block, which lies in the nested block `nested`.
FASTLORA_DEVICE float scale_of(const Packed4bit& w, int64_t block, int64_t nested) {
    if (w.absmax) return w.absmax[block];
    return nested_scale(w.nested_code[w.absmax_codes[block]], w.nested_absmax[nested], *w.nested_offset);
}

// Shifts in place of divisions, where the block sizes are powers of two (bitsandbytes' always are).
struct BlockShifts {
    int block, nested;

    static bool fit(const Packed4bit& w) {
        return !(w.blocksize & (w.blocksize - 1)) && !(w.nested_blocksize & (w.nested_blocksize - 1));
    }

    explicit BlockShifts(const Packed4bit& w)
        : block(__builtin_ctzll(w.blocksize)), nested(block + __builtin_ctzll(w.nested_blocksize)) {}
};

FASTLORA_DEVICE float scale_at(const Packed4bit& w, BlockShifts shifts, int64_t weight) {
    return scale_of(w, weight >> shifts.block, weight >> shifts.nested);
}

// The scales of n weights, whose look-ups are under way together.
template <int n>
FASTLORA_DEVICE void scales_at(const Packed4bit& w, BlockShifts shifts, const int64_t (&weights)[n],
                               float (&scales)[n]) {
    if (w.absmax) {
#pragma unroll
        for (int i = 0; i < n; ++i) scales[i] = w.absmax[weights[i] >> shifts.block];
        return;
    }
    float codes[n], absmax[n];
#pragma unroll
    for (int i = 0; i < n; ++i) {
        codes[i] = w.nested_code[w.absmax_codes[weights[i] >> shifts.block]];
        absmax[i] = w.nested_absmax[weights[i] >> shifts.nested];
    }
#pragma unroll
    for (int i = 0; i < n; ++i) scales[i] = nested_scale(codes[i], absmax[i], *w.nested_offset);
}

}  // namespace fastlora::gpu
