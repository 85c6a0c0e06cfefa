// The host module: loops over data that no tensor library is needed for. numpy in, numpy out, no torch.
//
// pyfastlora/host.py builds it, separately from the kernels, and holds a Python version of every function
// here.
#include <pybind11/pybind11.h>

#include <cstdint>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#define FASTLORA_X86 1
#endif

namespace py = pybind11;

namespace {

#ifdef FASTLORA_X86
enum Register { EAX, EBX, ECX, EDX };

struct Feature {
    const char* name;  // as in Linux's /proc/cpuinfo
    uint32_t leaf, subleaf;
    Register reg;
    int bit;
    uint64_t state;  // bits of XCR0: registers that the operating system must save, or the feature traps
};

constexpr uint64_t ymm = 0x6, zmm = 0xe6, tile = 0x60000;

constexpr Feature features[] = {
    {"avx2", 7, 0, EBX, 5, ymm},
    {"fma", 1, 0, ECX, 12, ymm},
    {"f16c", 1, 0, ECX, 29, ymm},
    {"avx_vnni", 7, 1, EAX, 4, ymm},
    {"avx512f", 7, 0, EBX, 16, zmm},
    {"avx512bw", 7, 0, EBX, 30, zmm},
    {"avx512vl", 7, 0, EBX, 31, zmm},
    {"avx512dq", 7, 0, EBX, 17, zmm},
    {"avx512_bf16", 7, 1, EAX, 5, zmm},
    {"avx512_vnni", 7, 0, ECX, 11, zmm},
    {"avx512_fp16", 7, 0, EDX, 23, zmm},
    {"amx_tile", 7, 0, EDX, 24, zmm | tile},
    {"amx_bf16", 7, 0, EDX, 22, zmm | tile},
    {"amx_int8", 7, 0, EDX, 25, zmm | tile},
};

uint64_t enabled_state() {
    uint32_t r[4];
    const bool osxsave = __get_cpuid(1, &r[EAX], &r[EBX], &r[ECX], &r[EDX]) && (r[ECX] >> 27 & 1);
    if (!osxsave) return 0;
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));  // the intrinsic would need -mxsave
    return static_cast<uint64_t>(high) << 32 | low;
}
#endif

py::dict cpu_features() {
    py::dict found;
#ifdef FASTLORA_X86
    const uint64_t enabled = enabled_state();
    for (const Feature& f : features) {
        uint32_t r[4] = {};
        const bool known = __get_cpuid_count(f.leaf, f.subleaf, &r[EAX], &r[EBX], &r[ECX], &r[EDX]);
        found[f.name] = known && (r[f.reg] >> f.bit & 1) && (enabled & f.state) == f.state;
    }
#endif
    return found;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
    m.doc() = "Data-side loops of pyfastlora; use them through pyfastlora.host.";
    m.def("cpu_features", &cpu_features,
          "x86 instruction sets by their /proc/cpuinfo names; empty elsewhere.");
}
