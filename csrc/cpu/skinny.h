// Products with one side of rank r, in float32: the common core of lora_shrink, lora_expand, lora_grad and
// dora_norm. Included per level.
//
// Rows of x are widened to float32 a block at a time (mask applied on the way) and meet the factor, packed as
// [K, ranks] with ranks padded to whole vectors. Register tiles of 8 rows x 2 vectors keep both FMA ports
// busy: at r = 16 the product is bound by arithmetic in float32, by reading x once otherwise.

namespace fastlora::FASTLORA_LEVEL {

// Columns of x in flight, and the longest chain of float32 additions: at 256 the error is 2.5e-7, at 64 half
// of that, as small as the vendor's.
constexpr int64_t depth_block = 64;
constexpr int row_tile = 8;
constexpr int64_t padded(int64_t n) {
    return (n + lanes - 1) / lanes * lanes;
}

// packed[k * padded(r) + j] = a[j, k]: the factor as [K, ranks], zeros in the padding.
template <class T>
FASTLORA_INLINE void pack_factor_as(const ConstMatrix& a, bool transposed, float* packed) {
    const int64_t ranks = transposed ? a.cols : a.rows, depth = transposed ? a.rows : a.cols,
                  width = padded(ranks);
    const T* data = (const T*)a.data;
    if (transposed) {
        for (int64_t k = 0; k < depth; ++k)
            for (int64_t j = 0; j < width; j += lanes)
                store(packed + k * width + j, ranks - j >= lanes ? load(data + k * a.pitch + j)
                                              : ranks > j        ? load(data + k * a.pitch + j, ranks - j)
                                                                 : vf{});
        return;
    }
    // In blocks of `lanes` columns: rows are read as vectors, columns written whole.
    for (int64_t k0 = 0; k0 < depth; k0 += lanes) {
        const int64_t count = depth - k0 < lanes ? depth - k0 : lanes;
        for (int64_t j0 = 0; j0 < width; j0 += lanes) {
            float block[lanes][lanes] = {};
            for (int64_t j = j0; j < j0 + lanes && j < ranks; ++j)
                store(block[j - j0], load(data + j * a.pitch + k0, count));
            for (int64_t k = 0; k < count; ++k)
                for (int64_t j = 0; j < lanes; ++j) packed[(k0 + k) * width + j0 + j] = block[j][k];
        }
    }
}

// out[i] = x[i] in float32, masked and scaled when bits are given; at = column of x[0], a multiple of 16 when
// masked.
template <class T>
FASTLORA_INLINE void widen(const T* x, int64_t count, const uint8_t* bits, int64_t at, float scale,
                           float* out) {
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) {
        vf v = load(x + i);
        if (bits) v = v * mask_scale(bits, at + i, scale);
        store(out + i, v);
    }
    if (i < count) {
        vf v = load(x + i, count - i);
        if (bits) v = v * mask_scale(bits, at + i, scale);
        store(out + i, v, count - i);
    }
}

// out [rows, vectors * lanes] += x [rows, depth] packed [depth, ..]: one register tile.
template <int rows, int vectors>
FASTLORA_INLINE void tile(const float* x, int64_t x_pitch, const float* packed, int64_t packed_pitch,
                          int64_t depth, float* out, int64_t out_pitch) {
    vf acc[rows][vectors];
    for (int t = 0; t < rows; ++t)
        for (int v = 0; v < vectors; ++v) acc[t][v] = vf{};
    for (int64_t k = 0; k < depth; ++k) {
        vf p[vectors];
        for (int v = 0; v < vectors; ++v) p[v] = load(packed + k * packed_pitch + v * lanes);
        for (int t = 0; t < rows; ++t) {
            const vf value = splat(x[t * x_pitch + k]);
            for (int v = 0; v < vectors; ++v) acc[t][v] += value * p[v];
        }
    }
    for (int t = 0; t < rows; ++t)  // each block's sum starts at zero: shorter chains of roundings
        for (int v = 0; v < vectors; ++v) {
            float* at = out + t * out_pitch + v * lanes;
            store(at, load(at) + acc[t][v]);
        }
}

// out [rows, columns] += x [rows, depth] packed [depth, columns]; rows <= row_tile, all float32, columns in
// whole vectors. Not inlined: one copy a level keeps the build short, and a call costs nothing beside 256
// steps of a tile.
__attribute__((noinline, unused)) static void multiply_rows(const float* x, int64_t x_pitch, int64_t rows,
                                                            const float* packed, int64_t packed_pitch,
                                                            int64_t columns, int64_t depth, float* out,
                                                            int64_t out_pitch) {
    for (int64_t j = 0; j < columns; j += 2 * lanes) {
        const bool pair = columns - j >= 2 * lanes;
        if (rows == row_tile && pair)
            tile<row_tile, 2>(x, x_pitch, packed + j, packed_pitch, depth, out + j, out_pitch);
        else if (rows == row_tile)
            tile<row_tile, 1>(x, x_pitch, packed + j, packed_pitch, depth, out + j, out_pitch);
        else
            for (int64_t t = 0; t < rows; ++t)
                if (pair)
                    tile<1, 2>(x + t * x_pitch, 0, packed + j, packed_pitch, depth, out + t * out_pitch + j,
                               0);
                else
                    tile<1, 1>(x + t * x_pitch, 0, packed + j, packed_pitch, depth, out + t * out_pitch + j,
                               0);
    }
}

__attribute__((noinline, unused)) static void pack_factor(const ConstMatrix& a, bool transposed,
                                                          float* packed) {
    if (a.dtype == DType::f32) return pack_factor_as<float>(a, transposed, packed);
    if (a.dtype == DType::bf16) return pack_factor_as<bf16>(a, transposed, packed);
    pack_factor_as<f16>(a, transposed, packed);
}

}  // namespace fastlora::FASTLORA_LEVEL
