// lora_grad: out [R, I] = scale * s [T, R]^T D(x [T, I]), or its transpose
//
// Bound by reading x once; see lora_grad.h. Up to 64 ranks share a pass, more are more blocks, neighbours, to
// which x comes from the L2 cache.
#include "lora_grad.h"

namespace fastlora::gpu {

constexpr int most_tiles = 4;

int64_t lora_grad_room(const ConstMatrix& x, int64_t ranks) {
    return WalkPlan(x, ranks, most_tiles).cut.room(ranks * x.cols);
}

int lora_grad(const ConstMatrix& s, const ConstMatrix& x, const DropoutMask& mask, float scale,
              bool transposed, const Matrix& out, float* room, Stream stream) {
    const WalkPlan plan(x, s.cols, most_tiles);
    const Sum sum{room, plan.cut.parts, mask.bits ? (double)scale * mask.scale : scale, out};
    const int status = with_type(x.dtype, [&](auto type) {
        using T = decltype(type);
        return launch(walk_down<T, most_tiles, 0>, plan.grid(), dim3(walk_threads), walk_shared(plan, false),
                      stream, s, x, mask, rows_on_16_bytes(x, sizeof(T)), (int)plan.rank_blocks,
                      (int)plan.block_tiles, plan.cut.steps * walk_rows, out.dtype == DType::f32, transposed,
                      sum, Factor(x, false), sum);
    });
    return status ? status : add(sum, {}, stream);
}

}  // namespace fastlora::gpu
