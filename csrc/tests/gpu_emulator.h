// A GPU for testing kernels where there is none: what csrc/gpu.h needs of CUDA, in plain C++.
//
// A block's threads are fibers on one host thread, run in turn and switched at barriers, shuffles and mma;
// its blocks run one after the other. A kernel therefore computes exactly what it would on a device, and
// under AddressSanitizer every access outside an array is an error. Turns are taken in an order that changes,
// so that threads which lack a barrier between them compute wrong numbers here too, most likely. A barrier
// that some thread of the block never reaches, a shuffle that a lane misses, or a launch that no GPU takes
// ends the program with a message.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time: its threads share it
#define threadIdx (::fastlora::emulator::current->thread)
#define blockIdx (::fastlora::emulator::block_index)
#define blockDim (::fastlora::emulator::block_size)
#define gridDim (::fastlora::emulator::grid_size)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace fastlora::emulator {

struct Barrier {
    unsigned arrived = 0, generation = 0;
};

struct Warp {
    Barrier barrier;
    unsigned alive = 0;
    uint64_t slots[32];
    float a[16][16], b[8][16];  // operands of mma, b by columns
};

struct Copy {
    void* to;
    const void* from;
    unsigned group;
};

struct Fiber {
    ucontext_t context;
    std::vector<Copy> copies;  // under way: they arrive when they are waited for
    unsigned groups;
    std::unique_ptr<char[]> stack;
    dim3 thread;
    unsigned index;
    bool done;
    const Barrier* barrier;  // where it waits, for *count to arrive, or null
    const unsigned* count;
    unsigned generation;

    bool can_go_on() const {
        return !done && (!barrier || barrier->generation != generation || barrier->arrived == *count);
    }
};

constexpr size_t stack_bytes = 256 << 10;  // instrumented frames are large
constexpr int multiprocessors = 4;
#if defined(FASTLORA_EMULATE_PLAIN)
constexpr int shared_memory_of_block = 64 << 10;
#else
constexpr int shared_memory_of_block = 99 << 10;  // the least since sm_80
#endif

inline thread_local Fiber* current;
inline thread_local dim3 block_index, block_size, grid_size;
inline thread_local unsigned alive;
inline thread_local bool progressed;
inline thread_local uint32_t random_state;
inline thread_local Barrier block_barrier;
inline thread_local std::vector<Warp> warps;
inline thread_local std::unique_ptr<char[]> shared_memory;
inline thread_local ucontext_t scheduler;
inline thread_local const std::function<void()>* body;

inline void yield() {
    Fiber* self = current;
    swapcontext(&self->context, &scheduler);
    current = self;
}

inline void wait(Barrier& barrier, const unsigned& count) {
    Fiber* self = current;
    self->barrier = &barrier, self->count = &count, self->generation = barrier.generation;
    ++barrier.arrived;
    while (barrier.generation == self->generation) {
        if (barrier.arrived == count) {
            barrier.arrived = 0, ++barrier.generation;
            progressed = true;
        } else {
            yield();
        }
    }
    self->barrier = nullptr;
}

inline int lane() {
    return (int)(current->index % 32);
}

inline Warp& warp() {
    return warps[current->index / 32];
}

inline void enter() {
    (*body)();
    current->done = true;
    --alive, --warp().alive;
    progressed = true;
    swapcontext(&current->context, &scheduler);
}

// The same sequence for every launch.
inline unsigned random_number() {
    random_state = random_state * 1664525 + 1013904223;
    return random_state >> 8;
}

inline void shuffle_turns(std::vector<unsigned>& turns) {
    for (size_t i = turns.size(); i > 1; --i) std::swap(turns[i - 1], turns[random_number() % i]);
}

inline void run_block(std::vector<Fiber>& fibers) {
    std::vector<unsigned> turns(fibers.size());
    for (unsigned i = 0; i < turns.size(); ++i) turns[i] = i;
    alive = (unsigned)fibers.size();
    block_barrier = {};
    warps.assign((fibers.size() + 31) / 32, Warp{});
    for (Fiber& fiber : fibers) {
        fiber.done = false, fiber.barrier = nullptr;
        fiber.copies.clear(), fiber.groups = 0;
        ++warps[fiber.index / 32].alive;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = stack_bytes;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
    }
    while (alive) {
        progressed = false;
        shuffle_turns(turns);
        for (const unsigned turn : turns)
            if (fibers[turn].can_go_on()) {
                current = &fibers[turn];
                swapcontext(&scheduler, &current->context);
            }
        if (!progressed) {
            std::fprintf(stderr, "gpu_emulator: block (%u, %u, %u) waits for threads that never arrive\n",
                         block_index.x, block_index.y, block_index.z);
            std::abort();
        }
    }
}

// most_shared: of the dynamic shared memory.
inline void check_launch(dim3 grid, dim3 block, int64_t shared, int64_t most_shared) {
    const char* wrong = nullptr;
    if (!grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z)
        wrong = "an empty grid or block";
    else if (grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535)
        wrong = "more blocks than a grid may have";
    else if ((uint64_t)block.x * block.y * block.z > 1024)
        wrong = "more than 1024 threads";
    else if (shared > most_shared)
        wrong = "more shared memory than was asked for, or than there is";
    if (!wrong) return;
    std::fprintf(
        stderr, "gpu_emulator: %s: grid (%u, %u, %u), block (%u, %u, %u), %lld bytes, at most %lld\n", wrong,
        grid.x, grid.y, grid.z, block.x, block.y, block.z, (long long)shared, (long long)most_shared);
    std::abort();
}

inline void run(dim3 grid, dim3 block, int64_t shared, int64_t most_shared,
                const std::function<void()>& kernel) {
    check_launch(grid, block, shared, most_shared);
    static std::mutex one_device;
    const std::lock_guard<std::mutex> lock(one_device);  // __shared__ arrays are static
    static std::vector<Fiber> fibers;
    fibers.resize((size_t)block.x * block.y * block.z);
    for (unsigned i = 0; i < fibers.size(); ++i) {
        fibers[i].index = i;
        fibers[i].thread = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
        if (!fibers[i].stack) fibers[i].stack.reset(new char[stack_bytes]);
    }
    grid_size = grid, block_size = block, body = &kernel, random_state = 1;
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                block_index = dim3(x, y, z);
                shared_memory.reset(new char[shared ? shared : 1]);  // exactly, and never zeroed
                run_block(fibers);
            }
}

// The value that lane `from` of the warp passes here at the same time.
template <class T>
T shuffle(T value, int from) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "one slot");
    Warp& group = warp();
    std::memcpy(&group.slots[lane()], &value, sizeof value);
    wait(group.barrier, group.alive);
    std::memcpy(&value, &group.slots[from & 31], sizeof value);
    wait(group.barrier, group.alive);
    return value;
}

// See gpu.h: 16 bytes, which arrive at once or, as often, not before they are waited for.
inline void copy_async(void* to, const void* from) {
    if (random_number() % 2)
        std::memcpy(to, from, 16);
    else
        current->copies.push_back({to, from, current->groups});
}

inline void commit_copies() {
    ++current->groups;
}

inline void wait_copies(unsigned may_be_missing) {
    std::vector<Copy>& copies = current->copies;
    size_t done = 0;
    for (; done < copies.size() && copies[done].group + may_be_missing < current->groups; ++done)
        std::memcpy(copies[done].to, copies[done].from, 16);
    copies.erase(copies.begin(), copies.begin() + done);
}

// sum + a[0] b[0] + .. + a[7] b[7], exactly, then cut to float32: 8 products at a time is the A100's step,
// the H100's is 16 (Fasi et al. 2021, Numerical behavior of NVIDIA tensor cores). A double holds the exact
// sum of all but wildly different products.
inline float cut_sum(float sum, const float* a, const float* b) {
    double exact = sum;
    for (int k = 0; k < 8; ++k) exact += (double)a[k] * b[k];
    const float nearest = (float)exact;
    return std::fabs((double)nearest) > std::fabs(exact) ? std::nextafter(nearest, 0.0f) : nearest;
}

// See gpu.h: to_float reads one element of the fragments.
template <class ToFloat>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], ToFloat to_float) {
    Warp& group = warp();
    for (int word = 0; word < 4; ++word)
        for (int half = 0; half < 2; ++half) {
            const int row = lane() / 4 + word % 2 * 8, k = word / 2 * 8 + lane() % 4 * 2 + half;
            group.a[row][k] = to_float((uint16_t)(a[word] >> 16 * half));
            if (word < 2)
                group.b[lane() / 4][word * 8 + lane() % 4 * 2 + half] =
                    to_float((uint16_t)(b[word] >> 16 * half));
        }
    wait(group.barrier, group.alive);
    for (int i = 0; i < 4; ++i) {
        const float *row = group.a[lane() / 4 + i / 2 * 8], *col = group.b[lane() % 4 * 2 + i % 2];
        d[i] = cut_sum(cut_sum(d[i], row, col), row + 8, col + 8);
    }
    wait(group.barrier, group.alive);
}

inline float half_to_float(uint16_t h) {
    const float magnitude = std::ldexp((float)((h & 0x3ff) | (h & 0x7c00 ? 0x400 : 0)),
                                       ((h >> 10 & 31) ? (h >> 10 & 31) : 1) - 25);
    const float value = (h & 0x7c00) != 0x7c00 ? magnitude : h & 0x3ff ? NAN : INFINITY;
    return h & 0x8000 ? -value : value;
}

inline uint16_t float_to_half(float f) {
    const uint16_t sign = std::signbit(f) ? 0x8000 : 0;
    f = std::fabs(f);
    if (f != f) return sign | 0x7e00;
    if (f >= 65520.0f) return sign | 0x7c00;
    int exponent;
    std::frexp(f, &exponent);
    exponent = f == 0 || exponent < -13 ? -13 : exponent;         // zero and the subnormals share one step
    const long steps = std::lrint(std::ldexp(f, 11 - exponent));  // to nearest, ties to even
    return (uint16_t)(sign | (steps + ((long)(exponent + 13) << 10)));
}

}  // namespace fastlora::emulator

inline void __syncthreads() {
    fastlora::emulator::wait(fastlora::emulator::block_barrier, fastlora::emulator::alive);
}

inline void __syncwarp() {
    fastlora::emulator::wait(fastlora::emulator::warp().barrier, fastlora::emulator::warp().alive);
}

// Each nibble of `selector`, from the lowest, picks a byte of y:x.
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
    const uint64_t bytes = (uint64_t)y << 32 | x;
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i) out |= (uint32_t)(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
    return out;
}

inline float __uint_as_float(uint32_t u) {
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}

inline uint32_t __float_as_uint(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    return u;
}

// Each rounds by itself: the compiler may not contract them.
inline float __fmul_rn(float a, float b) {
    volatile float product = a * b;
    return product;
}

inline float __fadd_rn(float a, float b) {
    volatile float sum = a + b;
    return sum;
}
