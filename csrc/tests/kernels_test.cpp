// Every launcher on awkward shapes against its formula in double, without torch: built for the sanitizers.
//
// The Python tests judge accuracy; this program is there for what they cannot see, reads and writes out of
// bounds. FASTLORA_CPU_LEVEL selects the instruction set. Exits with 1 when a result is wrong.
#include <algorithm>
#include <random>

#include "support.h"

namespace fastlora::test {
namespace {

struct Shape {
    int64_t rows, cols, ranks, pad;
};
constexpr Shape shapes[] = {{0, 8, 4, 0},     {1, 1, 1, 0},    {3, 17, 5, 3},    {7, 64, 16, 0},
                            {13, 131, 72, 1}, {37, 300, 8, 5}, {2, 1111, 70, 3}, {40, 160, 20, 4}};
constexpr DType dtypes[] = {DType::f32, DType::bf16, DType::f16};
const DropoutMask keep_all = {nullptr, 0, 1.0f};

const float codes_nf4[16] = {-1.0f,
                             -0.6961928009986877f,
                             -0.5250730514526367f,
                             -0.39491748809814453f,
                             -0.28444138169288635f,
                             -0.18477343022823334f,
                             -0.09105003625154495f,
                             0.0f,
                             0.07958029955625534f,
                             0.16093020141124725f,
                             0.24611230194568634f,
                             0.33791524171829224f,
                             0.44070982933044434f,
                             0.5626170039176941f,
                             0.7229568362236023f,
                             1.0f};
const float codes_fp4[16] = {0.0f,       0.0625f / 12, 8.0f / 12,  1.0f,          4.0f / 12,  6.0f / 12,
                             2.0f / 12,  3.0f / 12,    -0.0f,      -0.0625f / 12, -8.0f / 12, -1.0f,
                             -4.0f / 12, -6.0f / 12,   -2.0f / 12, -3.0f / 12};

// A packed weight on exactly sized arrays, and its value as a double.
struct Packed {
    Packed(int64_t rows, int64_t cols, int64_t blocksize, bool nested, bool fp4, Numbers& numbers) {
        const int64_t blocks = (rows * cols + blocksize - 1) / blocksize, outer = (blocks + 3) / 4;
        for (int64_t i = 0; i < (rows * cols + 1) / 2; ++i) bytes.push_back(numbers.byte());
        for (int64_t i = 0; i < blocks; ++i) {
            absmax.push_back(1 + numbers.next() / 4);
            codes.push_back(numbers.byte());
        }
        for (int64_t i = 0; i < 256; ++i) nested_code.push_back(numbers.next());
        for (int64_t i = 0; i < outer; ++i) nested_absmax.push_back(numbers.next());
        for (auto* vector : {&absmax, &nested_code, &nested_absmax, &offset}) vector->shrink_to_fit();
        bytes.shrink_to_fit(), codes.shrink_to_fit();
        weight = {bytes.data(),
                  nested ? nullptr : absmax.data(),
                  codes.data(),
                  nested_code.data(),
                  nested_absmax.data(),
                  offset.data(),
                  blocksize,
                  4,
                  fp4,
                  rows,
                  cols};
    }
    double operator()(int64_t n, int64_t k) const {
        const int64_t i = n * weight.cols + k, block = i / weight.blocksize;
        const int code = bytes[static_cast<size_t>(i / 2)] >> (i % 2 ? 0 : 4) & 15;
        const double scale = weight.absmax
                                 ? absmax[static_cast<size_t>(block)]
                                 : static_cast<double>(nested_code[codes[static_cast<size_t>(block)]]) *
                                           nested_absmax[static_cast<size_t>(block / 4)] +
                                       offset[0];
        return (weight.fp4 ? codes_fp4 : codes_nf4)[code] * scale;
    }
    std::vector<uint8_t> bytes, codes;
    std::vector<float> absmax, nested_code, nested_absmax, offset{0.25f};
    Packed4bit weight;
};

// Random bits, rows of whole 16-bit words.
struct Mask {
    Mask(int64_t rows, int64_t cols, Numbers& numbers) : pitch((cols + 15) / 16 * 2) {
        for (int64_t i = 0; i < rows * pitch; ++i) bits.push_back(numbers.byte());
        bits.shrink_to_fit();
    }
    double operator()(int64_t t, int64_t i) const {
        return bits[static_cast<size_t>(t * pitch + i / 8)] >> (i % 8) & 1 ? 2 : 0;
    }
    operator DropoutMask() const { return {bits.data(), pitch, 2.0f}; }
    int64_t pitch;
    std::vector<uint8_t> bits;
};

double sum(int64_t count, const std::function<double(int64_t)>& term) {
    double total = 0;
    for (int64_t i = 0; i < count; ++i) total += term(i);
    return total;
}

void test_4bit(Shape s, DType dtype, Numbers& numbers) {
    for (const bool nested : {false, true})
        for (const bool fp4 : {false, true}) {
            const Packed w(s.rows + 2, s.cols, 64, nested, fp4, numbers);
            const int64_t row = std::min<int64_t>(1, s.rows), col = s.cols / 3;
            const Block part(dtype, s.rows, s.cols - col, s.pad);
            cpu::dequant_4bit(w.weight, row, col, part, on_threads);
            expect_close("dequant_4bit", part, [&](int64_t n, int64_t k) { return w(row + n, col + k); });

            const Block x = std::move(Block(dtype, s.rows, s.cols, s.pad).fill(numbers));
            const Block y(dtype, s.rows, w.weight.rows, s.pad);
            cpu::matmul_4bit(x, w.weight, false, y, on_threads);
            expect_close("matmul_4bit", y, [&](int64_t t, int64_t n) {
                return sum(s.cols, [&](int64_t k) { return x(t, k) * w(n, k); });
            });
            if (!cpu::matmul_4bit_on_tiles(dtype, w.weight)) continue;
            const Block dx(dtype, s.rows, s.cols, s.pad);
            cpu::matmul_4bit(y, w.weight, true, dx, on_threads);
            expect_close("matmul_4bit transposed", dx, [&](int64_t t, int64_t k) {
                return sum(w.weight.rows, [&](int64_t n) { return y(t, n) * w(n, k); });
            });
        }
}

void test_8bit(Shape s, DType dtype) {
    Numbers numbers;
    const int64_t rows = s.rows + 2, pitch = s.cols + s.pad, row = std::min<int64_t>(1, s.rows),
                  col = s.cols / 3;
    std::vector<int8_t> values;
    std::vector<float> absmax;
    for (int64_t i = 0; i < rows * pitch - s.pad; ++i) values.push_back(static_cast<int8_t>(numbers.byte()));
    for (int64_t i = 0; i < rows; ++i) absmax.push_back(1 + numbers.next() / 4);
    values.shrink_to_fit(), absmax.shrink_to_fit();
    const Packed8bit w{values.data(), absmax.data(), rows, s.cols, pitch};
    const Block part(dtype, s.rows, s.cols - col, s.pad);
    cpu::dequant_8bit(w, row, col, part, on_threads);
    expect_close("dequant_8bit", part, [&](int64_t n, int64_t k) {
        const auto at = static_cast<size_t>((row + n) * pitch + col + k);
        return values[at] * static_cast<double>(absmax[static_cast<size_t>(row + n)]) / 127;
    });
}

double activation(Act act, double x) {
    switch (act) {
        case Act::silu:
            return x / (1 + std::exp(-x));
        case Act::gelu:
            return x * std::erfc(-x / std::sqrt(2.0)) / 2;
        case Act::gelu_tanh:
            return x / 2 * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
        case Act::relu:
            return std::max(x, 0.0);
        case Act::relu2:
            return std::max(x, 0.0) * std::max(x, 0.0);
    }
    return NAN;
}

double slope(Act act, double x) {
    if (act == Act::relu) return x > 0;
    const double h = 1e-5;  // its error, h^2, is far below a float32's
    return (activation(act, x + h) - activation(act, x - h)) / (2 * h);
}

void test_glu(Shape s, DType dtype, Numbers& numbers) {
    const Block gate = std::move(Block(dtype, s.rows, s.cols, s.pad).fill(numbers));
    const Block up = std::move(Block(dtype, s.rows, s.cols, 0).fill(numbers));
    const Block dy = std::move(Block(dtype, s.rows, s.cols, 2).fill(numbers));
    for (const Act act : {Act::silu, Act::gelu, Act::gelu_tanh, Act::relu, Act::relu2}) {
        const auto product = [&](int64_t t, int64_t i) { return activation(act, gate(t, i)) * up(t, i); };
        const Block y(dtype, s.rows, s.cols, s.pad), again(dtype, s.rows, s.cols, 1);
        const Block dgate(dtype, s.rows, s.cols, s.pad), dup(dtype, s.rows, s.cols, 0);
        cpu::glu_forward(gate, up, act, y, on_threads);
        cpu::glu_backward(dy, gate, up, act, dgate, dup, again, on_threads);
        expect_close("glu_forward", y, product);
        expect_close("glu_backward product", again, product);
        expect_close("glu_backward dgate", dgate,
                     [&](int64_t t, int64_t i) { return dy(t, i) * up(t, i) * slope(act, gate(t, i)); });
        expect_close("glu_backward dup", dup,
                     [&](int64_t t, int64_t i) { return dy(t, i) * activation(act, gate(t, i)); });
    }
}

void test_lora(Shape s, DType dtype, Numbers& numbers) {
    const Block x = std::move(Block(dtype, s.rows, s.cols, s.pad).fill(numbers));
    const Mask mask(s.rows, s.cols, numbers);
    for (const bool dropped : {false, true}) {
        const DropoutMask drop = dropped ? static_cast<DropoutMask>(mask) : keep_all;
        const auto keep = [&](int64_t t, int64_t i) { return dropped ? mask(t, i) : 1; };
        for (const bool transposed : {false, true}) {
            const int64_t R = s.ranks, I = s.cols;
            const Block a =
                std::move((transposed ? Block(dtype, I, R, 1) : Block(dtype, R, I, 1)).fill(numbers));
            const auto at = [&](int64_t r, int64_t i) { return transposed ? a(i, r) : a(r, i); };
            const Block shrunk(DType::f32, s.rows, R, 0);
            cpu::lora_shrink(x, a, transposed, drop, 0.5f, shrunk, on_threads);
            expect_close("lora_shrink", shrunk, [&](int64_t t, int64_t r) {
                return 0.5 * sum(I, [&](int64_t i) { return keep(t, i) * x(t, i) * at(r, i); });
            });

            // The same factor, expanding from its ranks to its columns: b[o, r] is at(r, o).
            const Block small = std::move(Block(DType::f32, s.rows, R, 0).fill(numbers));
            const Block gain = std::move(Block(DType::f32, 1, I, 0).fill(numbers));
            const Block offset = std::move(Block(DType::f32, 1, I, 0).fill(numbers));
            const Block y(dtype, s.rows, I, s.pad);
            cpu::lora_expand(x, small, a, !transposed, drop, 0.5f, gain.floats(), offset.floats(), y,
                             on_threads);
            expect_close("lora_expand", y, [&](int64_t t, int64_t o) {
                const double added = sum(R, [&](int64_t r) { return small(t, r) * at(r, o); });
                return gain(0, o) * (x(t, o) + 0.5 * keep(t, o) * added) + offset(0, o);
            });
            const ConstMatrix zeros{nullptr, dtype, s.rows, I, I};
            cpu::lora_expand(zeros, small, a, !transposed, keep_all, 0.5f, nullptr, nullptr, y, on_threads);
            expect_close("lora_expand onto nothing", y, [&](int64_t t, int64_t o) {
                return 0.5 * sum(R, [&](int64_t r) { return small(t, r) * at(r, o); });
            });
        }
        const Block small = std::move(Block(DType::f32, s.rows, s.ranks, 0).fill(numbers));
        const auto grad = [&](int64_t r, int64_t i) {
            return sum(s.rows, [&](int64_t t) { return 0.5 * small(t, r) * keep(t, i) * x(t, i); });
        };
        for (DType to : {DType::f32, dtype}) {
            const Block da(to, s.ranks, s.cols, 1), db(to, s.cols, s.ranks, 3);
            cpu::lora_grad(small, x, drop, 0.5f, false, da, on_threads);
            expect_close("lora_grad", da, grad);
            cpu::lora_grad(small, x, drop, 0.5f, true, db, on_threads);
            expect_close("lora_grad", db, [&](int64_t i, int64_t r) { return grad(r, i); });
        }
    }
    const Block kept(dtype, s.rows, s.cols, s.pad);
    cpu::dropout_apply(x, mask, kept, on_threads);
    expect_close("dropout_apply", kept, [&](int64_t t, int64_t i) { return mask(t, i) * x(t, i); });
}

void test_lora_backward(Shape s, DType dtype) {
    Numbers numbers;
    const Block dy = std::move(Block(dtype, s.rows, s.cols, s.pad).fill(numbers));
    const Block b = std::move(Block(dtype, s.cols, s.ranks, 1).fill(numbers));
    const Block left = std::move(Block(DType::f32, s.rows, s.ranks, 2).fill(numbers));
    const Block ds(DType::f32, s.rows, s.ranks, 0), db(dtype, s.cols, s.ranks, 1);
    cpu::lora_backward(dy, b, left, 0.5f, ds, db, on_threads);
    expect_close("lora_backward, ds", ds, [&](int64_t t, int64_t r) {
        return 0.5 * sum(s.cols, [&](int64_t o) { return dy(t, o) * b(o, r); });
    });
    expect_close("lora_backward, db", db, [&](int64_t o, int64_t r) {
        return sum(s.rows, [&](int64_t t) { return dy(t, o) * left(t, r); });
    });
}

void test_dora(Shape s, DType dtype, Numbers& numbers) {
    const Block w = std::move(Block(dtype, s.rows, s.cols, s.pad).fill(numbers));
    const Block a = std::move(Block(dtype, s.ranks, s.cols, s.pad).fill(numbers));
    const Block b = std::move(Block(dtype, s.rows, s.ranks, s.pad).fill(numbers));
    const auto norm = [&](int64_t o, const std::function<double(int64_t)>& base) {
        return std::sqrt(sum(s.cols, [&](int64_t i) {
            const double v = base(i) + 0.5 * sum(s.ranks, [&](int64_t r) { return b(o, r) * a(r, i); });
            return v * v;
        }));
    };
    const Block dense(DType::f32, 1, s.rows, 0), packed(DType::f32, 1, s.rows, 0);
    cpu::dora_norm(w, a, b, 0.5f, dense.floats(), on_threads);
    expect_close("dora_norm", dense,
                 [&](int64_t, int64_t o) { return norm(o, [&](int64_t i) { return w(o, i); }); });
    const Packed q(s.rows, s.cols, 64, true, false, numbers);
    cpu::dora_norm_4bit(q.weight, DType::f32, a, b, 0.5f, packed.floats(), on_threads);
    expect_close("dora_norm_4bit", packed,
                 [&](int64_t, int64_t o) { return norm(o, [&](int64_t i) { return q(o, i); }); });

    const Block dy = std::move(Block(dtype, s.rows, s.cols, s.pad).fill(numbers));
    const Block gain = std::move(Block(DType::f32, 1, s.cols, 0).fill(numbers));
    const Block dz(dtype, s.rows, s.cols, s.pad), dgain(DType::f32, 1, s.cols, 0);
    cpu::dora_grad(dy, w, gain.floats(), dz, dgain.floats(), on_threads);
    expect_close("dora_grad dz", dz, [&](int64_t t, int64_t i) { return dy(t, i) * gain(0, i); });
    expect_close("dora_grad dgain", dgain, [&](int64_t, int64_t i) {
        return sum(s.rows, [&](int64_t t) { return dy(t, i) * w(t, i); });
    });
}

// Bits drawn row after row from one generator, continued over calls, against the standard library's
// generator.
void test_dropout_mask() {
    std::vector<uint32_t> words(624);
    words[0] = 5489;
    for (uint32_t i = 1; i < 624; ++i) words[i] = 1812433253u * (words[i - 1] ^ words[i - 1] >> 30) + i;
    cpu::Mt19937 state = {words.data(), 1, 0};
    std::mt19937 standard(5489);
    for (const Shape s : shapes) {
        const int64_t pitch = (s.cols + 15) / 16 * 2;
        std::vector<uint8_t> bits(static_cast<size_t>(s.rows * pitch));
        bits.shrink_to_fit();
        cpu::dropout_mask(state, 0.7, s.rows, s.cols, bits.data());
        for (int64_t t = 0; t < s.rows; ++t)
            for (int64_t i = 0; i < s.cols; ++i) {
                const uint64_t high = standard(), low = standard();
                const double u =
                    static_cast<double>((high << 32 | low) & ((1ull << 53) - 1)) / 9007199254740992.0;
                const bool kept = bits[static_cast<size_t>(t * pitch + i / 8)] >> (i % 8) & 1;
                if (kept != (u < 0.7)) return expect("dropout_mask: a bit is not the generator's", false);
            }
    }
}

// Flags a byte each, rows apart, to rows of bits padded with zeros.
void test_dropout_pack(Shape s, Numbers& numbers) {
    const int64_t from = s.cols + s.pad, pitch = (s.cols + 15) / 16 * 2;
    std::vector<uint8_t> flags, bits(static_cast<size_t>(s.rows * pitch), 0xff);
    for (int64_t i = 0; i < s.rows * from - s.pad; ++i) flags.push_back(numbers.byte() & 1);
    flags.shrink_to_fit(), bits.shrink_to_fit();
    cpu::dropout_pack(flags.data(), from, s.rows, s.cols, bits.data(), on_threads);
    for (int64_t t = 0; t < s.rows; ++t)
        for (int64_t i = 0; i < 8 * pitch; ++i) {
            const int wanted = i < s.cols ? flags[static_cast<size_t>(t * from + i)] : 0;
            if ((bits[static_cast<size_t>(t * pitch + i / 8)] >> (i % 8) & 1) != wanted)
                return expect("dropout_pack: a bit is not the flag's", false);
        }
}

}  // namespace
}  // namespace fastlora::test

int main() {
    using namespace fastlora::test;
    Numbers numbers;
    for (const Shape s : shapes)
        for (const fastlora::DType dtype : dtypes) {
            test_4bit(s, dtype, numbers);
            test_8bit(s, dtype);
            test_glu(s, dtype, numbers);
            test_lora(s, dtype, numbers);
            test_lora_backward(s, dtype);
            test_dora(s, dtype, numbers);
        }
    for (const Shape s : shapes) test_dropout_pack(s, numbers);
    test_dropout_mask();
    std::printf("level %d: %d wrong results\n", fastlora::cpu::level(), failures);
    return failures ? 1 : 0;
}
