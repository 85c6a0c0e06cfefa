// What every file of AMX kernels shares. Included inside its target pragma.
#pragma once

#include <cstdint>

namespace fastlora::amx {

// Eight full tiles, for as long as the object lives. The state belongs to the thread, and oneDNN loads its
// own.
class Tiles {
  public:
    Tiles() {
        alignas(64) uint8_t config[64] = {1};  // palette 1
        for (int i = 0; i < 8; ++i) {
            config[16 + 2 * i] = 64;  // bytes a row
            config[48 + i] = 16;      // rows
        }
        _tile_loadconfig(config);
    }
    ~Tiles() { _tile_release(); }
};

constexpr int64_t pairs(int64_t n) {
    return (n + 31) / 32;
}  // steps of 32 along the contracted dimension
constexpr int64_t sixteens(int64_t n) {
    return (n + 15) / 16;
}  // tiles of 16 ranks or columns
constexpr int64_t tile_values = 512;

}  // namespace fastlora::amx
