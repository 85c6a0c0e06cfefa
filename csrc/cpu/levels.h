// Compiles one kernel file once per instruction set and picks the set at run time.
//
// A kernel file F.cpp has two halves: under FASTLORA_LEVEL its kernels, written once against vec.h; else its
// launchers, preceded by `#define FASTLORA_KERNELS "F.cpp"` and this header. The pragmas give every function
// of the first half the target of its level. Global -mavx512* flags would not do: they let wide encodings
// into code that must run on any CPU. For the same reason the kernels call no inline function of the standard
// library: the linker keeps one copy of such a function, of any level.
#include <cstdint>
#include <cstring>

#include "../kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTLORA_X86 1
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own intrinsics trip these (gcc bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

namespace fastlora {
struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};
}  // namespace fastlora

#define FASTLORA_LEVEL portable
#define FASTLORA_LANES 4
#include "vec.h"
#include FASTLORA_KERNELS
#undef FASTLORA_LEVEL
#undef FASTLORA_LANES

#ifdef FASTLORA_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define FASTLORA_LEVEL avx2
#define FASTLORA_LANES 8
#define FASTLORA_AVX2 1
#include "vec.h"
#include FASTLORA_KERNELS
#undef FASTLORA_LEVEL
#undef FASTLORA_LANES
#undef FASTLORA_AVX2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#define FASTLORA_LEVEL avx512
#define FASTLORA_LANES 16
#define FASTLORA_AVX512 1
#include "vec.h"
#include FASTLORA_KERNELS
#undef FASTLORA_LEVEL
#undef FASTLORA_LANES
#undef FASTLORA_AVX512
#pragma GCC pop_options

#define FASTLORA_PICK(function)                                     \
    (::fastlora::cpu::level() >= 2   ? ::fastlora::avx512::function \
     : ::fastlora::cpu::level() == 1 ? ::fastlora::avx2::function   \
                                     : ::fastlora::portable::function)
#else
#define FASTLORA_PICK(function) (::fastlora::portable::function)
#endif
