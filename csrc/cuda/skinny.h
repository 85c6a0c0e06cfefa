// The common core of the rank-r products on a GPU: numbers cut into bfloat16 parts for the tensor cores, and
// a large matrix that streams through shared memory once.
//
// A float32 is the sum of three bfloat16s, a float16 of two, exactly: each takes the next 8 bits. So a
// product of any two dtypes is a few bfloat16 products, the pairs of parts whose orders add up to less than 3
// for float32's digits, less than 2 where the result is rounded to 16 bits anyway. All of them together take
// less time than the bytes up to rank 32 or so; the range is float32's, unlike that of float16 parts.
// Infinities come out as infinities or NaN.
#pragma once

#include <type_traits>

#include "../gpu.h"

namespace fastlora::gpu {

// ---- parts ---------------------------------------------------------------

template <class T>
constexpr int parts_of = sizeof(T) == 4 ? 3
                         : is_bf16<T>   ? 1
                                        : 2;

FASTLORA_DEVICE uint32_t upper_halves(uint32_t low, uint32_t high) {
    return __byte_perm(low, high, 0x7632);
}

// Pairs of bfloat16 whose sums are (low, high), the largest first.
template <int parts>
FASTLORA_DEVICE void cut(float low, float high, uint32_t (&pairs)[parts]) {
#pragma unroll
    for (int p = 0; p < parts; ++p) {
        const uint32_t l = __float_as_uint(low), h = __float_as_uint(high);
        pairs[p] = upper_halves(l, h);
        low -= __uint_as_float(l & 0xffff0000u), high -= __uint_as_float(h & 0xffff0000u);
    }
}

// Body(p, q) for the pairs of parts whose orders add up to less than `limit`, the smallest products first.
template <int p_parts, int q_parts, int limit, class Body>
FASTLORA_DEVICE void for_parts(Body body) {
#pragma unroll
    for (int order = limit - 1; order >= 0; --order)
#pragma unroll
        for (int p = 0; p < p_parts; ++p)
            if (order - p >= 0 && order - p < q_parts) body(p, order - p);
}

// 16 bytes, or fewer, of a row as pairs of parts.
template <class T, int bytes = 16>
struct alignas(bytes) Chunk {
    static constexpr int size = bytes / sizeof(T), parts = parts_of<T>;
    uint32_t words[bytes / 4];

    static __device__ __forceinline__ Chunk load(const T* from) {
        Chunk chunk;
        *reinterpret_cast<Pack<uint32_t>*>(&chunk) = load_once(reinterpret_cast<const uint32_t*>(from));
        return chunk;
    }

    __device__ __forceinline__ void store(T* to) const { *reinterpret_cast<Chunk*>(to) = *this; }

    // The first `left` elements, to any address.
    __device__ __forceinline__ void store(T* to, int64_t left) const {
#pragma unroll
        for (int i = 0; i < size; ++i)
            if (i < left) {
                if constexpr (sizeof(T) == 4)
                    to[i] = value(i);
                else
                    to[i] = T{(uint16_t)(words[i / 2] >> i % 2 * 16)};
            }
    }

    // Zeros where a bit is 0.
    __device__ __forceinline__ void drop(uint32_t bits) {
#pragma unroll
        for (int i = 0; i < size; ++i)
            if (!(bits >> i & 1)) {
                if constexpr (sizeof(T) == 4)
                    words[i] = 0;
                else
                    words[i / 2] &= i % 2 ? 0x0000ffffu : 0xffff0000u;
            }
    }

    __device__ __forceinline__ float value(int i) const {
        if constexpr (sizeof(T) == 4)
            return __uint_as_float(words[i]);
        else
            return to_float(T{(uint16_t)(words[i / 2] >> i % 2 * 16)});
    }

    __device__ __forceinline__ void set(int pair, float low, float high) {
        if constexpr (sizeof(T) == 4)
            words[2 * pair] = __float_as_uint(low), words[2 * pair + 1] = __float_as_uint(high);
        else
            words[pair] = from_floats<T>(low, high);
    }

    // Elements 2i and 2i + 1.
    __device__ __forceinline__ void along(int i, uint32_t (&pairs)[parts]) const {
        if constexpr (is_bf16<T>)
            pairs[0] = words[i];
        else
            cut(value(2 * i), value(2 * i + 1), pairs);
    }

    // Element i, and that of the row below.
    __device__ __forceinline__ void across(const Chunk& below, int i, uint32_t (&pairs)[parts]) const {
        if constexpr (is_bf16<T>)
            pairs[0] = __byte_perm(words[i / 2], below.words[i / 2], i % 2 ? 0x7632 : 0x5410);
        else
            cut(value(i), below.value(i), pairs);
    }
};

// The first `left` elements of a chunk, from any address, and zeros. Rolled up: unrolled it costs the loops
// around it their registers, and rows off the 16-byte grid are slow anyway.
template <class T>
FASTLORA_DEVICE void copy_elements(T* to, const T* from, int left) {
#pragma unroll 1
    for (int i = 0; i < Chunk<T>::size; ++i) to[i] = i < left ? from[i] : T{};
}

// Loads from here on wait for what comes before: without it the compiler loads all operands of an unrolled
// loop first, and spills.
FASTLORA_DEVICE void one_at_a_time() {
    asm volatile("" : : : "memory");
}

// ---- reading a factor ---------------------------------------------------------------

// m[row, col .. col + n) in float32, zeros outside; `packed`: see rows_on_16_bytes, col a multiple of n.
template <class T, int n>
FASTLORA_DEVICE void read_run(const ConstMatrix& m, bool packed, int64_t row, int64_t col, float (&v)[n]) {
    constexpr int wide = Pack<T>::size < n ? Pack<T>::size : n;
    const T* from = (const T*)m.data + row * m.pitch + col;
    if (packed && row < m.rows && col + n <= m.cols) {
#pragma unroll
        for (int i = 0; i < n; i += wide) {
            const Pack<T, wide> pack = *reinterpret_cast<const Pack<T, wide>*>(from + i);
#pragma unroll
            for (int k = 0; k < wide; ++k) v[i + k] = to_float(pack.v[k]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < n; ++i) v[i] = row < m.rows && col + i < m.cols ? to_float(from[i]) : 0;
    }
}

// The factor of a product: element (rank, k) of a [R, K], or of the transpose of a [K, R].
struct Factor {
    ConstMatrix m;
    bool transposed, packed;

    Factor(const ConstMatrix& m, bool transposed)
        : m(m),
          transposed(transposed),
          packed(!transposed && rows_on_16_bytes(m, m.dtype == DType::f32 ? 4 : 2)) {}

    // n neighbours along k in float32, zeros outside. With one part the factor is bfloat16, else it is not.
    template <int parts, int n>
    __device__ __forceinline__ void read(int64_t rank, int64_t k, float (&v)[n]) const {
        if constexpr (parts == 1)
            read_as<bf16>(rank, k, v);
        else if (m.dtype == DType::f32)
            read_as<float>(rank, k, v);
        else
            read_as<f16>(rank, k, v);
    }

  private:
    template <class T, int n>
    __device__ __forceinline__ void read_as(int64_t rank, int64_t k, float (&v)[n]) const {
        if (!transposed) return read_run<T>(m, packed, rank, k, v);
#pragma unroll
        for (int i = 0; i < n; ++i)
            v[i] =
                rank < m.cols && k + i < m.rows ? to_float(((const T*)m.data)[(k + i) * m.pitch + rank]) : 0;
    }
};

constexpr int factor_parts(DType dtype) {
    return dtype == DType::bf16 ? 1 : 3;
}

// ---- a matrix in stages ---------------------------------------------------------------
// A stage is 128 segments of 128 bytes, each a piece of a row. A lane reads its chunks of 16 bytes in two
// ways, with g = lane / 4 and c = lane % 4: chunk c or c + 4 of row g, to sum over columns; or chunk g of the
// rows 2c and 2c + 1, to sum over rows. The chunks of a segment change places by its row, so that either way
// every 8 lanes meet all banks.

constexpr int segment_bytes = 128, segment_chunks = 8, stage_bytes = 128 * segment_bytes;

FASTLORA_DEVICE int chunk_at(int segment, int chunk) {
    return segment * segment_bytes + (chunk ^ (segment & 6) ^ (segment & 1) << 2) * 16;
}

// Stages of a ring. Where copies are not asynchronous there is nothing under way beyond the next one, and
// blocks have 64 KB of shared memory, where others have 99 KB or more.
constexpr int stages_of(bool plain) {
    return plain ? 2 : 4;
}

constexpr int pipeline = stages_of(FASTLORA_PLAIN);

// Bytes of the ring on the current device.
inline int64_t pipeline_bytes() {
    return stages_of(is_plain()) * stage_bytes;
}

// Stages in a ring, filled by all `threads` of the block ahead of their use: `stage_rows` rows of
// neighbouring segments, 16 of 8 segments or 128 of one.
template <class T, int stage_rows, int threads>
struct Stages {
    static constexpr int count = pipeline, bytes = count * stage_bytes, size = Chunk<T>::size;
    static constexpr int row_chunks = 128 / stage_rows * segment_chunks, cols = row_chunks * size;
    static constexpr int per_thread = stage_bytes / 16 / threads;
    static_assert(per_thread * size <= 32, "the kept bits of a stage are one word of a thread");

    const ConstMatrix& x;
    const DropoutMask& mask;
    const bool packed;
    char* const shared;
    const int64_t first;  // of the rows of this block
    const int rows;
    uint32_t kept[count - 1] = {};  // of the stages under way, oldest first: a bit per element
    int filled = 0, used = 0;

    __device__ __forceinline__ Stages(const ConstMatrix& x, const DropoutMask& mask, bool packed,
                                      char* shared, int64_t first, int rows)
        : x(x), mask(mask), packed(packed), shared(shared), first(first), rows(rows) {}

    // The i-th chunk of this thread: its row and column in the stage, and where it lies.
    struct Place {
        int row, col, at;

        __device__ __forceinline__ explicit Place(int i) {
            const int chunk = i * threads + (int)threadIdx.x;
            row = chunk / row_chunks, col = chunk % row_chunks * size;
            at = chunk_at(chunk % row_chunks / segment_chunks * stage_rows + row, chunk % segment_chunks);
        }
    };

    // Starts to fetch the stage at (row, col), with zeros beyond the last row and column. An empty one if
    // none is `wanted`: there are always count - 1 under way.
    __device__ __forceinline__ void fetch(bool wanted, int row, int col) {
        char* const stage = shared + filled * stage_bytes;
        filled = filled + 1 == count ? 0 : filled + 1;
        uint32_t bits = 0;
        if (wanted) {
#pragma unroll
            for (int i = 0; i < per_thread; ++i) {
                const Place place(i);
                const int64_t t = first + row + place.row;
                const int k = col + place.col, left = row + place.row < rows ? (int)x.cols - k : 0;
                const T* from = (const T*)x.data + t * x.pitch + k;
                if (mask.bits && left > 0)
                    bits |= (mask.bits[t * mask.pitch + k / 8] >> (k & 7) & ((1u << size) - 1)) << i * size;
                char* const to = stage + place.at;
                if (packed && left >= size)
                    copy_async(to, from);
                else if (left > 0)
                    copy_elements((T*)to, from, left);
                else
                    *reinterpret_cast<Chunk<T>*>(to) = {};
            }
        }
        commit_copies();
#pragma unroll
        for (int i = 0; i + 2 < count; ++i) kept[i] = kept[i + 1];
        kept[count - 2] = bits;
    }

    // The oldest stage, complete after the caller's next barrier.
    __device__ __forceinline__ const char* wait() {
        wait_copies<count - 2>();
        char* const stage = shared + used * stage_bytes;
        used = used + 1 == count ? 0 : used + 1;
        if (mask.bits) {
#pragma unroll
            for (int i = 0; i < per_thread; ++i) {
                auto& chunk = *reinterpret_cast<Chunk<T>*>(stage + Place(i).at);
                chunk.drop(kept[0] >> i * size);
            }
        }
        return stage;
    }
};

// ---- a sum cut into parts ---------------------------------------------------------------

// A sum of `steps` steps for each of `tiles` outputs, cut into parts for as many blocks.
struct Cut {
    int64_t parts, steps;  // of a part; the last may have fewer

    // So that `slots` blocks at once are done soonest.
    Cut(int64_t tiles, int64_t all_steps, int64_t slots) : parts(1), steps(all_steps) {
        constexpr int64_t ends = 4;  // filling the pipeline, writing the part and adding it, in steps
        int64_t least = INT64_MAX;
        for (int64_t n = 1; n <= all_steps && (n == 1 || n * tiles <= 2 * slots); ++n) {
            const int64_t each = ceil_div(all_steps, n), time = ceil_div(n * tiles, slots) * (each + ends);
            if (time < least) least = time, steps = each, parts = ceil_div(all_steps, each);
        }
    }

    // Floats of workspace for outputs of `count` values: none, where the one part is the output.
    int64_t room(int64_t count) const { return parts > 1 ? parts * count : 0; }
};

}  // namespace fastlora::gpu
