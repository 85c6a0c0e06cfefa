// The instruction set the kernels use on this CPU.
#include <cstdlib>
#include <cstring>

#include "../kernels.h"
#include "tiles.h"

namespace fastlora::cpu {

static int detect() {
    int best = 0;
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = 1;
    if (best == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        best = 2;
#ifdef FASTLORA_TILES
    if (best == 2 && __builtin_cpu_supports("avx512bf16")) best = tiles::amx_available() ? 4 : 3;
#endif
#endif
    const char* wanted = std::getenv("FASTLORA_CPU_LEVEL");
    const int cap = !wanted                               ? best
                    : !std::strcmp(wanted, "portable")    ? 0
                    : !std::strcmp(wanted, "avx2")        ? 1
                    : !std::strcmp(wanted, "avx512")      ? 2
                    : !std::strcmp(wanted, "avx512_bf16") ? 3
                                                          : best;
    return cap < best ? cap : best;
}

int level() {
    static const int chosen = detect();
    return chosen;
}

}  // namespace fastlora::cpu
