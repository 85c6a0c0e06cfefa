// dropout_pack: bit k % 8 of byte k / 8 of a row = flag k, rows padded with zeros to 16 bits
//
// Bound by memory: a byte in and a bit out for each element. A thread takes 16 flags of a row at a time.
#include "elementwise.h"

namespace fastlora::gpu {

constexpr int word = 16, words_in_flight = 4;

// Four flags, a byte each, as the low four bits: every product of a flag and a power of two but the wanted
// ones lies below bit 24 or beyond bit 31.
FASTLORA_DEVICE uint32_t gather(uint32_t flags) {
    return flags * 0x01020408u >> 24;
}

// whole: rows are made of whole words, on 16 bytes.
template <bool whole>
__global__ void FASTLORA_LAUNCH_BOUNDS(elementwise_threads, elementwise_blocks)
    dropout_pack_words(const uint8_t* flags, int64_t pitch, int64_t rows, int64_t cols, uint8_t* bits) {
    const int64_t bytes = ceil_div(cols, word) * 2;
    const Place<word, words_in_flight> place(bytes * 8);
    if (place.row >= rows) return;
    flags += place.row * pitch + place.col, bits += place.row * bytes + place.col / 8;
    Pack<uint32_t> quads[words_in_flight];
#pragma unroll
    for (int i = 0; i < words_in_flight; ++i)
        if constexpr (whole) {
            quads[i] = load_once(reinterpret_cast<const uint32_t*>(flags + place.from(i)));
        } else {
            quads[i] = {};
            for (int k = 0; k < word && place.col + place.from(i) + k < cols; ++k)
                quads[i].v[k / 4] |= (uint32_t)flags[place.from(i) + k] << k % 4 * 8;
        }
#pragma unroll
    for (int i = 0; i < words_in_flight; ++i)
        if (place.has(i))
#pragma unroll
            for (int half = 0; half < 2; ++half)
                bits[place.to(i) / 8 + half] =
                    (uint8_t)(gather(quads[i].v[2 * half]) | gather(quads[i].v[2 * half + 1]) << 4);
}

// ---- launcher ---------------------------------------------------------------

int dropout_pack(const uint8_t* flags, int64_t pitch, int64_t rows, int64_t cols, uint8_t* bits,
                 Stream stream) {
    const bool whole = cols % word == 0 && (uintptr_t)flags % 16 == 0 && (rows <= 1 || pitch % 16 == 0);
    return launch(whole ? dropout_pack_words<true> : dropout_pack_words<false>,
                  elementwise_grid<word, words_in_flight>(rows, cols), dim3(elementwise_threads), 0, stream,
                  flags, pitch, rows, cols, bits);
}

}  // namespace fastlora::gpu
