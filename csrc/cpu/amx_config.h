// What every file of AMX kernels shares. Included inside its target pragma.
#pragma once

#include <cstdint>

namespace fastlora::tiles {

// Eight full tiles, until they are released. The state belongs to the thread, and oneDNN loads its own.
static inline void configure_tiles() {
    alignas(64) uint8_t config[64] = {1};  // palette 1
    for (int i = 0; i < 8; ++i) {
        config[16 + 2 * i] = 64;  // bytes a row
        config[48 + i] = 16;      // rows
    }
    _tile_loadconfig(config);
}
static inline void release_tiles() {
    _tile_release();
}

}  // namespace fastlora::tiles
