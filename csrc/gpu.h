// CUDA and HIP in one header: storage types, 16-byte accesses, warps, the tensor cores' product and launches.
//
// A kernel written against it compiles with nvcc, with clang for HIP and, under FASTLORA_EMULATE_GPU, with
// any C++ compiler against csrc/tests/gpu_emulator.h, which runs its threads one after the other: so its
// numerics and its memory accesses are tested where there is no GPU. "Warp" means 32 neighbouring lanes
// throughout; the wavefronts of 64 of some AMD chips hold two, and nothing here assumes that two warps run
// apart.
#pragma once

#include <cstdint>

#include "kernels.h"

#if defined(FASTLORA_EMULATE_GPU)
#include "tests/gpu_emulator.h"
#elif defined(__HIP__)
#include <hip/hip_runtime.h>
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fastlora::gpu {

#define FASTLORA_DEVICE static __device__ __forceinline__

constexpr int warp_size = 32;

// Registers for `blocks` blocks of `threads` on a multiprocessor. HIP's second number is one of waves on a
// SIMD: left to the compiler.
#if defined(__HIP__)
#define FASTLORA_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads)
#else
#define FASTLORA_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#endif

// Chips before sm_80, and AMD's as far as this source goes: no bfloat16 on tensor cores, copies into shared
// memory that wait, and 64 KB of it to a block. The emulator takes their part on request.
#if defined(FASTLORA_EMULATE_PLAIN) || defined(__HIP__) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800)
#define FASTLORA_PLAIN 1
#else
#define FASTLORA_PLAIN 0
#endif

// ---- numbers ---------------------------------------------------------------

struct bf16 {
    uint16_t bits;
};

struct f16 {
    uint16_t bits;
};

template <class T>
constexpr bool is_bf16 = false;
template <>
constexpr bool is_bf16<bf16> = true;

FASTLORA_DEVICE float to_float(float v) {
    return v;
}

FASTLORA_DEVICE float to_float(bf16 v) {
    return __uint_as_float((uint32_t)v.bits << 16);
}

FASTLORA_DEVICE float to_float(f16 v) {
#if defined(FASTLORA_EMULATE_GPU)
    return emulator::half_to_float(v.bits);
#elif defined(__HIP__)
    _Float16 h;
    __builtin_memcpy(&h, &v, 2);
    return (float)h;
#else
    return __half2float(__ushort_as_half(v.bits));
#endif
}

// Round to nearest, ties to even; NaN stays NaN.
template <class T>
FASTLORA_DEVICE T from_float(float v) {
    if constexpr (sizeof(T) == 4) {
        return v;
    } else if constexpr (is_bf16<T>) {
#if defined(FASTLORA_EMULATE_GPU) || defined(__HIP__)
        const uint32_t u = __float_as_uint(v);
        return {(uint16_t)(v != v ? u >> 16 | 0x40 : (u + 0x7fff + (u >> 16 & 1)) >> 16)};
#else
        return {__bfloat16_as_ushort(__float2bfloat16_rn(v))};
#endif
    } else {
#if defined(FASTLORA_EMULATE_GPU)
        return {emulator::float_to_half(v)};
#elif defined(__HIP__)
        const _Float16 h = (_Float16)v;
        T out;
        __builtin_memcpy(&out, &h, 2);
        return out;
#else
        return {__half_as_ushort(__float2half_rn(v))};
#endif
    }
}

// Two of T as they lie in memory, each rounded like from_float.
template <class T>
FASTLORA_DEVICE uint32_t from_floats(float low, float high) {
    static_assert(sizeof(T) == 2, "bf16 or f16");
#if !defined(FASTLORA_EMULATE_GPU) && !defined(__HIP__)
    if constexpr (is_bf16<T>) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        return reinterpret_cast<const uint32_t&>(pair);
    }
#endif
    return from_float<T>(low).bits | (uint32_t)from_float<T>(high).bits << 16;
}

// 1 / v within an ulp, for v of 1 and more; below float32's normal numbers it is 0. A division takes 10
// instructions and a branch.
FASTLORA_DEVICE float reciprocal(float v) {
#if defined(FASTLORA_EMULATE_GPU)
    return v < 0x1p126f ? 1.0f / v : v - v;
#elif defined(__HIP__)
    const float r = __builtin_amdgcn_rcpf(v);
    return fmaf(r, fmaf(-v, r, 1.0f), r);
#else
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return fmaf(r, fmaf(-v, r, 1.0f), r);
#endif
}

#define FASTLORA_INLINE FASTLORA_DEVICE
#include "formulas.h"

// ---- memory ---------------------------------------------------------------

// n neighbours that are read and written at once; 16 bytes is the widest access there is.
template <class T, int n = 16 / sizeof(T)>
struct alignas(n * sizeof(T)) Pack {
    static constexpr int size = n;
    T v[n];
};

// The numbers of a pack.
template <class T, int n>
FASTLORA_DEVICE void widen(const Pack<T, n>& pack, float (&numbers)[n]) {
    if constexpr (is_bf16<T> && n % 2 == 0) {  // a shift and a mask for two, not two shifts for one
        uint32_t words[n / 2];
        __builtin_memcpy(words, &pack, sizeof pack);
#pragma unroll
        for (int k = 0; k < n; ++k)
            numbers[k] = __uint_as_float(k % 2 ? words[k / 2] & 0xffff0000u : words[k / 2] << 16);
    } else {
#pragma unroll
        for (int k = 0; k < n; ++k) numbers[k] = to_float(pack.v[k]);
    }
}

// Read once or written once: marked so that it does not push what is used again out of the caches.
template <class T, int n = Pack<T>::size>
FASTLORA_DEVICE Pack<T, n> load_once(const T* p) {
    Pack<T, n> pack;
#if !defined(FASTLORA_EMULATE_GPU) && !defined(__HIP__)
    if constexpr (sizeof pack == 16)
        *reinterpret_cast<uint4*>(&pack) = __ldcs(reinterpret_cast<const uint4*>(p));
    else if constexpr (sizeof pack == 8)
        *reinterpret_cast<uint2*>(&pack) = __ldcs(reinterpret_cast<const uint2*>(p));
    else
#endif
        pack = *reinterpret_cast<const Pack<T, n>*>(p);
    return pack;
}

template <class T>
FASTLORA_DEVICE Pack<T> load_pack(const T* p) {
    return *reinterpret_cast<const Pack<T>*>(p);
}

// To global memory. 16 bytes go as one word by request: left to itself the compiler at times cuts them up.
template <class T, int n>
FASTLORA_DEVICE void store_pack(T* p, const Pack<T, n>& pack) {
#if !defined(FASTLORA_EMULATE_GPU) && !defined(__HIP__)
    if constexpr (sizeof pack == 16) {
        const uint4 word = *reinterpret_cast<const uint4*>(&pack);
        asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                     :
                     : "l"(__cvta_generic_to_global(p)), "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w)
                     : "memory");
    } else
#endif
        *reinterpret_cast<Pack<T, n>*>(p) = pack;
}

template <class T>
FASTLORA_DEVICE const T* element(const ConstMatrix& m, int64_t row, int64_t col) {
    return (const T*)m.data + row * m.pitch + col;
}

template <class T>
FASTLORA_DEVICE T* element(const Matrix& m, int64_t row, int64_t col) {
    return (T*)m.data + row * m.pitch + col;
}

// Whether every row of a matrix starts on 16 bytes, so that its packs may be read and written.
template <class M>
bool rows_on_16_bytes(const M& m, int64_t element_bytes) {
    return reinterpret_cast<uintptr_t>(m.data) % 16 == 0 &&
           (m.rows <= 1 || m.pitch * element_bytes % 16 == 0);
}

// 16 bytes into shared memory, past the registers: a kernel has as many under way as its shared memory holds.
// Both addresses are multiples of 16. commit_copies() closes a group of this thread's copies; after
// wait_copies<n>() all but its n latest groups have arrived, for this thread: others see them after a
// barrier.
FASTLORA_DEVICE void copy_async(void* shared, const void* global) {
#if FASTLORA_PLAIN
    *(Pack<uint32_t>*)shared = *(const Pack<uint32_t>*)global;
#elif defined(FASTLORA_EMULATE_GPU)
    emulator::copy_async(shared, global);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                 :
                 : "r"((uint32_t)__cvta_generic_to_shared(shared)), "l"(global)
                 : "memory");
#endif
}

FASTLORA_DEVICE void commit_copies() {
#if FASTLORA_PLAIN
#elif defined(FASTLORA_EMULATE_GPU)
    emulator::commit_copies();
#else
    asm volatile("cp.async.commit_group;" : : : "memory");
#endif
}

template <int n>
FASTLORA_DEVICE void wait_copies() {
#if FASTLORA_PLAIN
#elif defined(FASTLORA_EMULATE_GPU)
    emulator::wait_copies(n);
#else
    asm volatile("cp.async.wait_group %0;" : : "n"(n) : "memory");
#endif
}

// The dynamic shared memory of a block, as bytes.
#if defined(FASTLORA_EMULATE_GPU)
#define FASTLORA_SHARED(name) char* const name = emulator::shared_memory.get()
#else
#define FASTLORA_SHARED(name) extern __shared__ __align__(16) char name[]
#endif

// Element k of a row is kept; see DropoutMask.
FASTLORA_DEVICE bool keeps(const uint8_t* row, int64_t k) {
    return row[k / 8] >> (k % 8) & 1;
}

// ---- warps ---------------------------------------------------------------

FASTLORA_DEVICE int lane() {
    return (int)(threadIdx.x % warp_size);
}

// The value that lane `from` passes.
template <class T>
FASTLORA_DEVICE T shuffle(T v, int from) {
#if defined(FASTLORA_EMULATE_GPU)
    return emulator::shuffle(v, from);
#elif defined(__HIP__)
    return __shfl(v, from, warp_size);
#else
    return __shfl_sync(0xffffffffu, v, from, warp_size);
#endif
}

template <class T>
FASTLORA_DEVICE T shuffle_xor(T v, int lanes) {
#if defined(FASTLORA_EMULATE_GPU)
    return emulator::shuffle(v, emulator::lane() ^ lanes);
#elif defined(__HIP__)
    return __shfl_xor(v, lanes, warp_size);
#else
    return __shfl_xor_sync(0xffffffffu, v, lanes, warp_size);
#endif
}

// The sum over the lanes of a warp, in all of them.
FASTLORA_DEVICE float warp_sum(float v) {
    for (int lanes = warp_size / 2; lanes; lanes /= 2) v += shuffle_xor(v, lanes);
    return v;
}

// ---- tensor cores ---------------------------------------------------------------

// d [16, 8] += a [16, 16] b [16, 8] over a warp, float32 sums; the fragments are PTX's mma.m16n8k16: lane l,
// with g = l / 4 and c = l % 4, holds of a the pairs of columns (2c, 2c + 1) of the rows g and g + 8, then
// (2c + 8, 2c + 9) of both; of b the pairs of rows (2c, 2c + 1) and (2c + 8, 2c + 9) of column g; of d the
// columns 2c and 2c + 1 of row g, then of row g + 8.
//
// Tensor cores cut their sums where a CPU rounds them: after n products d is too small by some n 2^-25 of it.
// What needs float32's digits starts a sum at zero every few products and adds it to the rest by itself.
//
// HIP's shapes are others, and chips before sm_80 have no bfloat16: there the same fragments meet in FMAs.
#if defined(__HIP__) || defined(FASTLORA_EMULATE_PLAIN)
constexpr bool has_mma = false;
#else
constexpr bool has_mma = true;
#endif

template <class T>
FASTLORA_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    static_assert(sizeof(T) == 2, "bf16 or f16");
#if FASTLORA_PLAIN
    const int row = lane() / 4 * 4, col = lane() % 4 * 2;
    // Rolled up: kernels have a hundred of these in a row.
#pragma unroll 1
    for (int quad = 0; quad < 4; ++quad) {
        uint32_t rows[4], cols[2][2];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            rows[i] = shuffle(a[i], row + quad);
            cols[i / 2][i % 2] = shuffle(b[i / 2], (col + i % 2) * 4 + quad);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int k = 0; k < 4; ++k)
                d[i] = fmaf(to_float(T{(uint16_t)(rows[k / 2 * 2 + i / 2] >> k % 2 * 16)}),
                            to_float(T{(uint16_t)(cols[k / 2][i % 2] >> k % 2 * 16)}), d[i]);
    }
#elif defined(FASTLORA_EMULATE_GPU)
    emulator::mma(d, a, b, [](uint16_t bits) { return to_float(T{bits}); });
#else
    if constexpr (is_bf16<T>)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
            "{%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
            "{%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// ---- launches ---------------------------------------------------------------

template <class T>
struct Same {
    using type = T;
};

// Bytes of shared memory that a block has for the asking, and how many of them may be in static arrays beside
// dynamic ones: tests/test_gpu_compile.py holds every kernel to it.
constexpr int64_t shared_unasked = 48 << 10, static_beside_dynamic = 8 << 10;

// Runs a kernel; 0 or the runtime's error code. The arguments are converted to the kernel's parameters.
template <class... P>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, int64_t shared, Stream stream,
           typename Same<P>::type... arguments) {
    [[maybe_unused]] const bool ask = shared > shared_unasked - static_beside_dynamic;
#if defined(FASTLORA_EMULATE_GPU)
    (void)stream;
    const int64_t most = ask ? emulator::shared_memory_of_block : shared_unasked - static_beside_dynamic;
    emulator::run(grid, block, shared, most, [&] { kernel(arguments...); });
    return 0;
#else
    void* pointers[] = {&arguments...};
#if defined(__HIP__)
    return (int)hipLaunchKernel((const void*)kernel, grid, block, pointers, shared, (hipStream_t)stream);
#else
    if (ask)
        if (const cudaError_t status = cudaFuncSetAttribute(
                (const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared))
            return (int)status;
    return (int)cudaLaunchKernel((const void*)kernel, grid, block, pointers, shared, (cudaStream_t)stream);
#endif
#endif
}

// Calls body(T{}) with the storage type of a dtype.
template <class Body>
int with_type(DType dtype, Body body) {
    return dtype == DType::f32 ? body(float{}) : dtype == DType::bf16 ? body(bf16{}) : body(f16{});
}

// Of the current device: launchers cut their work to fill it.
#if defined(FASTLORA_EMULATE_GPU)
inline int64_t multiprocessors() {
    return emulator::multiprocessors;
}

inline int64_t shared_memory_of_block() {
    return emulator::shared_memory_of_block;
}
#else
#if defined(__HIP__)
inline int64_t attribute(hipDeviceAttribute_t which) {
    int device = 0, value = 1;
    if (hipGetDevice(&device) == hipSuccess) (void)hipDeviceGetAttribute(&value, which, device);
    return value;
}
#define FASTLORA_ATTRIBUTE(hip, cuda) attribute(hip)
#else
inline int64_t attribute(cudaDeviceAttr which) {
    int device = 0, value = 1;
    if (cudaGetDevice(&device) == cudaSuccess) cudaDeviceGetAttribute(&value, which, device);
    return value;
}
#define FASTLORA_ATTRIBUTE(hip, cuda) attribute(cuda)
#endif

inline int64_t multiprocessors() {
    return FASTLORA_ATTRIBUTE(hipDeviceAttributeMultiprocessorCount, cudaDevAttrMultiProcessorCount);
}

inline int64_t shared_memory_of_block() {
    return FASTLORA_ATTRIBUTE(hipDeviceAttributeMaxSharedMemoryPerBlock,
                              cudaDevAttrMaxSharedMemoryPerBlockOptin);
}
#endif

// FASTLORA_PLAIN of the code that runs on the current device.
inline bool is_plain() {
#if defined(FASTLORA_EMULATE_GPU) || defined(__HIP__)
    return FASTLORA_PLAIN;
#else
    return attribute(cudaDevAttrComputeCapabilityMajor) < 8;
#endif
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

__host__ __device__ constexpr int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

}  // namespace fastlora::gpu
