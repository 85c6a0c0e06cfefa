// dropout_mask: the bits of torch's CPU bernoulli_(keep), bit for bit, from the same mt19937 state
//
// torch draws one 64-bit number per element, its first 32-bit word on top, keeps 53 bits and compares u = v /
// 2^53 with `keep`: serially, 4.8 ns an element. Here the generator's 624 words are twisted, tempered and
// compared as vectors (their recurrence reaches back 227 words at least) and the answers packed 8 to a byte.
// Source of the recurrence: Matsumoto and Nishimura 1998; of the draw: ATen/core/MT19937RNGEngine.h and
// TransformationHelper.h.
#ifdef FASTLORA_LEVEL
namespace fastlora::FASTLORA_LEVEL {

constexpr int state_words = 624, shift_words = 397;

FASTLORA_INLINE uint32_t twisted(uint32_t upper, uint32_t lower) {
    return (((upper & 0x80000000u) | (lower & 0x7fffffffu)) >> 1) ^ ((0u - (lower & 1u)) & 0x9908b0dfu);
}

void next_state(uint32_t* s) {
    for (int j = 0; j < state_words - shift_words; ++j) s[j] = s[j + shift_words] ^ twisted(s[j], s[j + 1]);
    for (int j = state_words - shift_words; j < state_words - 1; ++j)
        s[j] = s[j + shift_words - state_words] ^ twisted(s[j], s[j + 1]);
    s[state_words - 1] = s[shift_words - 1] ^ twisted(s[state_words - 1], s[0]);
}

void temper(const uint32_t* s, int count, uint32_t* out) {
    for (int i = 0; i < count; ++i) {
        uint32_t y = s[i];
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c5680u;
        y ^= (y << 15) & 0xefc60000u;
        out[i] = y ^ (y >> 18);
    }
}

// flags[i] = 1 where the 53-bit number of words 2 i and 2 i + 1 lies below the threshold.
void compare(const uint32_t* words, int pairs, uint32_t high_limit, uint32_t low_limit, uint8_t* flags) {
    for (int i = 0; i < pairs; ++i) {
        const uint32_t high = words[2 * i] & 0x1fffffu, low = words[2 * i + 1];
        flags[i] = (high < high_limit) | ((high == high_limit) & (low < low_limit));
    }
}

// Packs a stream of flags into rows of `cols` bits, rows padded to 16 bits with zeros.
struct Packer {
    uint8_t* bits;
    int64_t cols, pitch, col = 0;
    uint32_t byte = 0;

    void put(const uint8_t* flags, int count) {
        for (int i = 0; i < count;) {
            if ((col & 7) == 0 && count - i >= 8 && cols - col >= 8) {
                uint64_t eight;
                std::memcpy(&eight, flags + i, 8);
                bits[col >> 3] = (eight * 0x0102040810204080ull) >> 56;  // gathers the low bit of each byte
                col += 8, i += 8;
            } else {
                byte |= (uint32_t)flags[i++] << (col & 7);
                if ((++col & 7) == 0 || col == cols) bits[(col - 1) >> 3] = byte, byte = 0;
            }
            if (col == cols) {
                for (int64_t rest = (cols + 7) / 8; rest < pitch; ++rest) bits[rest] = 0;
                bits += pitch, col = 0;
            }
        }
    }
};

void draw_mask(cpu::Mt19937& state, uint64_t threshold, int64_t rows, int64_t cols, int64_t pitch,
               uint8_t* bits) {
    uint32_t words[state_words + 1];
    uint8_t flags[state_words / 2 + 1];
    Packer packer{bits, cols, pitch};
    int64_t needed = rows * cols;
    int carried = 0;  // 1 when the last block ended between the two words of an element
    while (needed > 0) {
        if (state.left == 1) {  // torch twists when the next draw would bring `left` to zero
            next_state(state.words);
            state.left = state_words + 1;
            state.next = 0;
        }
        int64_t take = state.left - 1;
        if (take > 2 * needed - carried) take = 2 * needed - carried;
        temper(state.words + state.next, take, words + carried);
        state.next += take, state.left -= take;
        const int available = carried + take, pairs = available / 2;
        compare(words, pairs, threshold >> 32, (uint32_t)threshold, flags);
        packer.put(flags, pairs);
        needed -= pairs;
        carried = available & 1;
        if (carried) words[0] = words[available - 1];
    }
}

}  // namespace fastlora::FASTLORA_LEVEL
#else
#define FASTLORA_KERNELS "dropout_mask.cpp"
#include "levels.h"

namespace fastlora::cpu {

void dropout_mask(Mt19937& state, double keep, int64_t rows, int64_t cols, uint8_t* bits) {
    const double scaled = keep * 9007199254740992.0;  // 2^53: exact, a change of exponent
    const uint64_t floor = (uint64_t)scaled, threshold = floor + (scaled > (double)floor);
    FASTLORA_PICK(draw_mask)(state, threshold, rows, cols, (cols + 15) / 16 * 2, bits);
}

}  // namespace fastlora::cpu
#endif
