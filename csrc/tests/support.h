// What the test program needs: matrices on exactly sized heap blocks, numbers in double, threads, a verdict.
//
// A block ends with the last element, so that under AddressSanitizer any read or write past it aborts. Rows
// are farther apart than their columns; what lies between holds a sentinel that must survive.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "../kernels.h"

namespace fastlora::test {

// Small multiples of 1/64: exact in float32, bfloat16 and float16, so that inputs are the same in all three.
class Numbers {
  public:
    float next() {
        state_ = state_ * 6364136223846793005u + 1442695040888963407u;
        return static_cast<float>(static_cast<int64_t>(state_ >> 33) % 257 - 128) / 64;
    }
    uint8_t byte() { return static_cast<uint8_t>(static_cast<int>(next() * 64) + 128); }

  private:
    uint64_t state_ = 1;
};

inline int64_t size_of(DType dtype) {
    return dtype == DType::f32 ? 4 : 2;
}

inline void encode(float value, DType dtype, uint8_t* to) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (dtype == DType::f32) {
        std::memcpy(to, &bits, 4);
        return;
    }
    const uint32_t exponent = bits >> 23 & 255;
    const uint32_t half =
        exponent ? (bits >> 16 & 0x8000) | (exponent - 112) << 10 | (bits >> 13 & 0x3ff) : 0;
    const uint16_t narrow = static_cast<uint16_t>(dtype == DType::bf16 ? bits >> 16 : half);
    std::memcpy(to, &narrow, 2);
}

inline double decode(const uint8_t* from, DType dtype) {
    uint32_t bits = 0;
    std::memcpy(&bits, from, static_cast<size_t>(size_of(dtype)));
    if (dtype == DType::f16) {
        const int exponent = static_cast<int>(bits >> 10 & 31), mantissa = static_cast<int>(bits & 1023);
        const double size = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
        return bits & 0x8000 ? -size : size;
    }
    if (dtype == DType::bf16) bits <<= 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

class Block {
  public:
    // `pad` elements lie between rows; the data starts `pad` elements into the allocation, which misaligns
    // it.
    Block(DType dtype, int64_t rows, int64_t cols, int64_t pad)
        : dtype_(dtype), rows_(rows), cols_(cols), pitch_(cols + pad), start_(pad) {
        count_ = start_ + (rows ? (rows - 1) * pitch_ + cols : 0);
        bytes_.reset(new uint8_t[static_cast<size_t>(count_ * size_of(dtype))]);
        std::memset(bytes_.get(), sentinel, static_cast<size_t>(count_ * size_of(dtype)));
    }
    Block& fill(Numbers& numbers) {
        for (int64_t t = 0; t < rows_; ++t)
            for (int64_t i = 0; i < cols_; ++i) encode(numbers.next(), dtype_, place(t, i));
        return *this;
    }
    double operator()(int64_t t, int64_t i) const { return decode(place(t, i), dtype_); }
    bool padding_intact() const {
        for (int64_t i = 0; i < count_; ++i) {
            const bool is_data = i >= start_ && (i - start_) % pitch_ < cols_;
            for (int64_t b = 0; !is_data && b < size_of(dtype_); ++b)
                if (bytes_[static_cast<size_t>(i * size_of(dtype_) + b)] != sentinel) return false;
        }
        return true;
    }
    operator ConstMatrix() const { return {place(0, 0), dtype_, rows_, cols_, pitch_}; }
    operator Matrix() const { return {place(0, 0), dtype_, rows_, cols_, pitch_}; }
    float* floats() const { return reinterpret_cast<float*>(place(0, 0)); }
    DType dtype() const { return dtype_; }
    int64_t rows() const { return rows_; }
    int64_t cols() const { return cols_; }

  private:
    static constexpr int sentinel = 0x5a;
    uint8_t* place(int64_t t, int64_t i) const {
        return bytes_.get() + (start_ + t * pitch_ + i) * size_of(dtype_);
    }
    DType dtype_;
    int64_t rows_, cols_, pitch_, start_, count_;
    std::unique_ptr<uint8_t[]> bytes_;
};

// Three threads whatever the grain asks for, so that pieces meet in odd places.
inline void on_threads(int64_t count, int64_t, void (*body)(void*, int64_t, int64_t), void* context) {
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < 3; ++i)
        if (count * i / 3 < count * (i + 1) / 3)
            threads.emplace_back(body, context, count * i / 3, count * (i + 1) / 3);
    for (std::thread& thread : threads) thread.join();
}

inline int failures = 0;

// ||got - wanted|| <= bound * ||wanted||, with the bound of the dtype: a rounding, and a little for the sums.
inline void expect_close(const char* what, const Block& got,
                         const std::function<double(int64_t, int64_t)>& wanted) {
    const double bound = got.dtype() == DType::f32 ? 2e-6 : got.dtype() == DType::f16 ? 1e-3 : 8e-3;
    double error = 0, size = 0;
    for (int64_t t = 0; t < got.rows(); ++t)
        for (int64_t i = 0; i < got.cols(); ++i) {
            const double exact = wanted(t, i), difference = got(t, i) - exact;
            error += difference * difference, size += exact * exact;
        }
    if (std::sqrt(error) <= bound * std::sqrt(size) && got.padding_intact()) return;
    ++failures;
    std::printf("%s, dtype %d, [%lld, %lld]: error %.3g of %.3g, padding %s\n", what,
                static_cast<int>(got.dtype()), static_cast<long long>(got.rows()),
                static_cast<long long>(got.cols()), std::sqrt(error), std::sqrt(size),
                got.padding_intact() ? "intact" : "overwritten");
}

inline void expect(const char* what, bool holds) {
    if (holds) return;
    ++failures;
    std::printf("%s\n", what);
}

}  // namespace fastlora::test
