// Who multiplies the tiles: AMX, or AVX-512 BF16's pairwise dot products.
//
// A left tile is 16 rows of 32 bfloat16, a right one 16 pairs of rows, interleaved, of 16 columns; their
// product is 16 x 16 in float32. What is done to make tiles and with their products is in tiles.cpp, once.
#pragma once

#include <cstdint>

namespace fastlora::tiles {

constexpr int64_t pairs(int64_t n) {
    return (n + 31) / 32;
}  // steps of 32 along the contracted dimension
constexpr int64_t sixteens(int64_t n) {
    return (n + 15) / 16;
}  // tiles of 16 ranks or columns
constexpr int64_t tile_values = 512;

struct Engine {
    // Whether a float32 factor is worth its two or three parts: not where a part costs what half a float32
    // FMA does.
    bool wide;
    // Parts of a float32 s where its partner keeps 8 bits: one has PEFT's rounding, two have 16 bits.
    int s_parts;
    // Elements of the activations worth a thread's start, some 10 us.
    int64_t grain;
    // Around the products of a thread.
    void (*enter)();
    void (*leave)();
    // sums [2][16][16] = x [32 rows] times the factor's tiles [steps][parts].
    void (*shrink)(const uint16_t* x, int64_t pitch, int64_t steps, const uint16_t* factor, int parts,
                   float* sums);
    // terms [2 by rows][2 by columns][16][16] = the rows' tiles [rank tiles], twice 16 rows, times two
    // columns' [rank tiles][parts], per_column apart. A row has 16 ranks, or with two s_parts these and what
    // they leave.
    void (*expand)(const uint16_t* rows0, const uint16_t* rows1, int s_parts, const uint16_t* factor,
                   int64_t per_column, int64_t rank_tiles, int parts, float (*terms)[256]);
    // sums [4][16 ranks][16 columns] += the factor's tiles [steps][parts] times [steps][4] tiles of columns.
    void (*grad)(const uint16_t* factor, const uint16_t* columns, int64_t steps, int parts, float* sums);
};

extern const Engine amx, dot;

class Session {
  public:
    explicit Session(const Engine& engine) : engine_(engine) { engine_.enter(); }
    ~Session() { engine_.leave(); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;

  private:
    const Engine& engine_;
};

}  // namespace fastlora::tiles
