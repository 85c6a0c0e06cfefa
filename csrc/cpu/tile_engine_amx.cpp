// Tiles on AMX (Intel Xeon from Sapphire Rapids on): one instruction multiplies two tiles, in 16 cycles.
#include "tiles.h"

#ifdef FASTLORA_TILES
#include <sys/syscall.h>
#include <unistd.h>
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own intrinsics trip these (gcc bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "tile_engine.h"

#pragma GCC push_options
#pragma GCC target("avx512f,amx-tile,amx-bf16")

#include "amx_config.h"

namespace fastlora::tiles {

bool amx_available() {
    static const bool yes = [] {
        unsigned a, b, c, d;
        asm volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
        if (!(d >> 22 & 1) || !(d >> 24 & 1)) return false;  // amx-bf16, amx-tile
        constexpr long request_permission = 0x1023,
                       tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
        return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    }();
    return yes;
}

template <int parts>
static void shrink_in(const uint16_t* x, int64_t pitch, int64_t steps, const uint16_t* factor, float* sums) {
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t step = 0; step < steps; ++step) {
        const uint16_t* tiles = factor + step * parts * tile_values;
        _tile_loadd(2, x + step * 32, pitch * 2);
        _tile_loadd(3, x + 16 * pitch + step * 32, pitch * 2);
        _tile_loadd(4, tiles, 64);
        _tile_dpbf16ps(0, 2, 4);
        _tile_dpbf16ps(1, 3, 4);
        if constexpr (parts > 1) {
            _tile_loadd(5, tiles + tile_values, 64);
            _tile_loadd(6, tiles + 2 * tile_values, 64);
            _tile_dpbf16ps(0, 2, 5);
            _tile_dpbf16ps(1, 3, 5);
            _tile_dpbf16ps(0, 2, 6);
            _tile_dpbf16ps(1, 3, 6);
        }
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
}

static void shrink(const uint16_t* x, int64_t pitch, int64_t steps, const uint16_t* factor, int parts,
                   float* sums) {
    if (parts == 1) return shrink_in<1>(x, pitch, steps, factor, sums);
    shrink_in<3>(x, pitch, steps, factor, sums);
}

// An instruction contracts 32 elements whatever a row has: ranks in one part would leave half of them zero.
static void expand(const uint16_t* rows0, const uint16_t* rows1, int, const uint16_t* factor,
                   int64_t per_column, int64_t rank_tiles, int parts, float (*terms)[256]) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t jt = 0; jt < rank_tiles; ++jt) {
        _tile_loadd(4, rows0 + jt * tile_values, 64);
        _tile_loadd(5, rows1 + jt * tile_values, 64);
        for (int p = 0; p < parts; ++p) {
            const uint16_t* tile = factor + (jt * parts + p) * tile_values;
            _tile_loadd(6, tile, 64);
            _tile_loadd(7, tile + per_column, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, terms[0], 64);
    _tile_stored(1, terms[1], 64);
    _tile_stored(2, terms[2], 64);
    _tile_stored(3, terms[3], 64);
}

static void grad(const uint16_t* factor, const uint16_t* columns, int64_t steps, int parts, float* sums) {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + 256, 64);
    _tile_loadd(2, sums + 512, 64);
    _tile_loadd(3, sums + 768, 64);
    for (int64_t step = 0; step < steps; ++step, columns += 4 * tile_values)
        for (int p = 0; p < parts; ++p, factor += tile_values) {
            _tile_loadd(4, factor, 64);
            _tile_loadd(5, columns, 64);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, columns + tile_values, 64);
            _tile_dpbf16ps(1, 4, 6);
            _tile_loadd(7, columns + 2 * tile_values, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_loadd(5, columns + 3 * tile_values, 64);
            _tile_dpbf16ps(3, 4, 5);
        }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
}

const Engine amx{true, 2, 1 << 18, configure_tiles, release_tiles, shrink, expand, grad};

}  // namespace fastlora::tiles
#pragma GCC pop_options
#endif
