// lora_backward: ds [T, R] = scale * dy [T, O] b, db [O, R] = dy^T s [T, R]
//
// One call for two passes over dy: threads share rows for the first and columns for the second, so that
// neither has partial sums to add. What it saves is a caller's way here, 20 us of Python between two cold
// calls.
#include "../kernels.h"

namespace fastlora::cpu {

void lora_backward(const ConstMatrix& dy, const ConstMatrix& b, const ConstMatrix& s, float scale,
                   const Matrix& ds, const Matrix& db, ParallelFor run) {
    const DropoutMask keep_all{nullptr, 0, 1.0f};
    lora_shrink(dy, b, true, keep_all, scale, ds, run);
    lora_grad(s, dy, keep_all, 1.0f, true, db, run);
}

}  // namespace fastlora::cpu
