// dropout_pack: bit k % 8 of byte k / 8 of a row = flag k, rows padded with zeros to 16 bits
//
// Eight flags and one product make a byte, at every instruction set. For masks that dropout_mask.cpp cannot
// draw: of tensors that do not lie in the order of their rows.
#include <cstring>

#include "../kernels.h"

namespace fastlora::cpu {

void dropout_pack(const uint8_t* flags, int64_t pitch, int64_t rows, int64_t cols, uint8_t* bits,
                  ParallelFor run) {
    const int64_t bytes = (cols + 15) / 16 * 2;
    parallel(run, rows, 1 + (1 << 16) / (cols + 1), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
            for (int64_t byte = 0; byte < bytes; ++byte) {
                const int64_t count = cols - 8 * byte < 0 ? 0 : cols - 8 * byte < 8 ? cols - 8 * byte : 8;
                uint64_t eight = 0;
                std::memcpy(&eight, flags + t * pitch + 8 * byte, (size_t)count);
                bits[t * bytes + byte] = (uint8_t)(eight * 0x0102040810204080ull >> 56);
            }
    });
}

}  // namespace fastlora::cpu
