// A thread's own float32 workspace: grows, is reused, never shrinks. Fresh memory would cost a page fault per
// 4 KB.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace fastlora {

class Scratch {
  public:
    ~Scratch() { std::free(data_); }
    float* floats(int64_t count) {
        if (count > capacity_) {
            std::free(data_);
            capacity_ = count;
            data_ = static_cast<float*>(std::aligned_alloc(64, (size_t)(count * 4 + 63) / 64 * 64));
            if (!data_) throw std::bad_alloc();
        }
        return data_;
    }

  private:
    float* data_ = nullptr;
    int64_t capacity_ = 0;
};

}  // namespace fastlora
