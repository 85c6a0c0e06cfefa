// lora_backward: ds [T, R] = scale * dy [T, O] b [O, R] and db [O, R] = dy^T s [T, R]
//
// One pass over dy for both; see lora_grad.h. 16 ranks share it, 32 are two blocks, neighbours, of which the
// second finds dy in the L2 cache. From there on two passes of up to 64 ranks each take less: the tensor
// cores are then what binds.
#include "lora_grad.h"

namespace fastlora::gpu {

constexpr int64_t most_ranks = 32;

struct BackwardPlan {
    WalkPlan walk;
    int64_t db_room, ds_parts, room;

    BackwardPlan(const ConstMatrix& dy, int64_t ranks)
        : walk(dy, ranks, 1),
          db_room(walk.cut.room(dy.cols * ranks)),
          ds_parts(walk.strips),
          room(db_room + (ds_parts > 1 ? ds_parts * dy.rows * ranks : 0)) {}
};

int64_t lora_backward_room(const ConstMatrix& dy, int64_t ranks) {
    if (ranks <= most_ranks) return BackwardPlan(dy, ranks).room;
    const int64_t shrink = lora_shrink_room(dy, ranks), grad = lora_grad_room(dy, ranks);
    return shrink > grad ? shrink : grad;
}

int lora_backward(const ConstMatrix& dy, const ConstMatrix& b, const ConstMatrix& s, float scale,
                  const Matrix& ds, const Matrix& db, float* room, Stream stream) {
    const DropoutMask all{nullptr, 0, 1.0f};
    if (s.cols > most_ranks) {
        const int status = lora_shrink(dy, b, true, all, scale, ds, room, stream);
        return status ? status : lora_grad(s, dy, all, 1.0f, true, db, room, stream);
    }
    const BackwardPlan plan(dy, s.cols);
    const Sum db_sum{room, plan.walk.cut.parts, 1, db};
    const Sum ds_sum{room + plan.db_room, plan.ds_parts, scale, ds};
    const auto run = [&](auto type, auto parts) {
        using T = decltype(type);
        return launch(walk_down<T, 1, parts()>, plan.walk.grid(), dim3(walk_threads),
                      walk_shared(plan.walk, true), stream, s, dy, all, rows_on_16_bytes(dy, sizeof(T)),
                      (int)plan.walk.rank_blocks, (int)plan.walk.block_tiles, plan.walk.cut.steps * walk_rows,
                      db.dtype == DType::f32, true, db_sum, Factor(b, true), ds_sum);
    };
    const int status = with_type(dy.dtype, [&](auto type) {
        return factor_parts(b.dtype) == 1 ? run(type, std::integral_constant<int, 1>())
                                          : run(type, std::integral_constant<int, 3>());
    });
    return status ? status : add(db_sum, ds_sum, stream);
}

}  // namespace fastlora::gpu
