// The host module: loops over data that no tensor library is needed for. numpy in, numpy out, no torch.
//
// pyfastlora/host.py builds it, separately from the kernels, and holds a Python version of every function
// here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#define FASTLORA_X86 1
#endif

namespace py = pybind11;

namespace {

#ifdef FASTLORA_X86
enum Register { EAX, EBX, ECX, EDX };

struct Feature {
    const char* name;  // as in Linux's /proc/cpuinfo
    uint32_t leaf, subleaf;
    Register reg;
    int bit;
    uint64_t state;  // bits of XCR0: registers that the operating system must save, or the feature traps
};

constexpr uint64_t ymm = 0x6, zmm = 0xe6, tile = 0x60000;

constexpr Feature features[] = {
    {"avx2", 7, 0, EBX, 5, ymm},
    {"fma", 1, 0, ECX, 12, ymm},
    {"f16c", 1, 0, ECX, 29, ymm},
    {"avx_vnni", 7, 1, EAX, 4, ymm},
    {"avx512f", 7, 0, EBX, 16, zmm},
    {"avx512bw", 7, 0, EBX, 30, zmm},
    {"avx512vl", 7, 0, EBX, 31, zmm},
    {"avx512dq", 7, 0, EBX, 17, zmm},
    {"avx512_bf16", 7, 1, EAX, 5, zmm},
    {"avx512_vnni", 7, 0, ECX, 11, zmm},
    {"avx512_fp16", 7, 0, EDX, 23, zmm},
    {"amx_tile", 7, 0, EDX, 24, zmm | tile},
    {"amx_bf16", 7, 0, EDX, 22, zmm | tile},
    {"amx_int8", 7, 0, EDX, 25, zmm | tile},
};

uint64_t enabled_state() {
    uint32_t r[4];
    const bool osxsave = __get_cpuid(1, &r[EAX], &r[EBX], &r[ECX], &r[EDX]) && (r[ECX] >> 27 & 1);
    if (!osxsave) return 0;
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));  // the intrinsic would need -mxsave
    return static_cast<uint64_t>(high) << 32 | low;
}
#endif

py::dict cpu_features() {
    py::dict found;
#ifdef FASTLORA_X86
    const uint64_t enabled = enabled_state();
    for (const Feature& f : features) {
        uint32_t r[4] = {};
        const bool known = __get_cpuid_count(f.leaf, f.subleaf, &r[EAX], &r[EBX], &r[ECX], &r[EDX]);
        found[f.name] = known && (r[f.reg] >> f.bit & 1) && (enabled & f.state) == f.state;
    }
#endif
    return found;
}

// ---- packing ---------------------------------------------------------------

// A set of numbers below a bound, with its least member from a number on: 64 to a word, words above words.
class Numbers {
  public:
    explicit Numbers(int64_t bound) {
        do {
            bound = (bound + 63) / 64;
            levels_.emplace_back(static_cast<size_t>(bound), 0);
        } while (bound > 1);
    }
    void insert(int64_t n) {
        for (auto& level : levels_) {
            level[static_cast<size_t>(n >> 6)] |= uint64_t{1} << (n & 63);
            n >>= 6;
        }
    }
    void erase(int64_t n) {
        for (auto& level : levels_) {
            uint64_t& word = level[static_cast<size_t>(n >> 6)];
            word &= ~(uint64_t{1} << (n & 63));
            if (word) return;
            n >>= 6;
        }
    }
    // -1: there is none.
    int64_t from(int64_t n) const {
        for (size_t level = 0; level < levels_.size(); ++level, n = (n >> 6) + 1) {
            if (n >> 6 >= static_cast<int64_t>(levels_[level].size())) return -1;
            const uint64_t word = levels_[level][static_cast<size_t>(n >> 6)] >> (n & 63);
            if (!word) continue;
            n += __builtin_ctzll(word);
            while (level-- > 0) n = n << 6 | __builtin_ctzll(levels_[level][static_cast<size_t>(n)]);
            return n;
        }
        return -1;
    }

  private:
    std::vector<std::vector<uint64_t>> levels_;
};

struct Row {
    int32_t before;     // the row that came to the same room before it; -1: none
    int32_t documents;  // in the row so far
};

// The row of each sample: best-fit decreasing, as pyfastlora/host.py defines it. A row with room is linked to
// the others with as much. 32 bits a number: a million samples wait for memory, not for sums.
void best_fit_rows(const int64_t* lengths, int64_t count, int64_t capacity, int64_t most, int64_t* rows) {
    const auto size = static_cast<size_t>(capacity);
    std::vector<int32_t> ends(size + 2, 0), order(static_cast<size_t>(count)), latest(size + 1, -1);
    for (int64_t i = 0; i < count; ++i) ++ends[static_cast<size_t>(capacity - lengths[i]) + 1];
    for (size_t f = 1; f < ends.size(); ++f) ends[f] += ends[f - 1];
    for (int64_t i = 0; i < count; ++i)
        order[static_cast<size_t>(ends[static_cast<size_t>(capacity - lengths[i])]++)] =
            static_cast<int32_t>(i);
    std::vector<Row> made;
    Numbers rooms(capacity + 1);
    int32_t at = 0;
    for (int64_t length = capacity; length > 0; --length) {
        for (const int32_t end = ends[static_cast<size_t>(capacity - length)]; at < end; ++at) {
            int64_t room = rooms.from(length);
            auto row = static_cast<int32_t>(made.size());
            if (room < 0) {
                room = capacity;
                made.push_back({-1, 0});
            } else {
                row = latest[static_cast<size_t>(room)];
                latest[static_cast<size_t>(room)] = made[static_cast<size_t>(row)].before;
                if (latest[static_cast<size_t>(room)] < 0) rooms.erase(room);
            }
            rows[order[static_cast<size_t>(at)]] = row;
            room -= length;
            Row& own = made[static_cast<size_t>(row)];
            if (room == 0 || ++own.documents == most) continue;
            own.before = latest[static_cast<size_t>(room)];
            latest[static_cast<size_t>(room)] = row;
            rooms.insert(room);
        }
    }
}

using Lengths = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

py::array_t<int64_t> best_fit(const Lengths& lengths, int64_t capacity, int64_t most) {
    if (lengths.size() > std::numeric_limits<int32_t>::max())
        throw py::value_error("best_fit: " + std::to_string(lengths.size()) + " samples; at most 2^31 - 1");
    py::array_t<int64_t> rows(lengths.size());
    const int64_t* in = lengths.data();
    int64_t* out = rows.mutable_data();
    const py::gil_scoped_release unlocked;
    best_fit_rows(in, lengths.size(), capacity, most, out);
    return rows;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
    m.doc() = "Data-side loops of pyfastlora; use them through pyfastlora.host.";
    m.def("cpu_features", &cpu_features,
          "x86 instruction sets by their /proc/cpuinfo names; empty elsewhere.");
    m.def("best_fit", &best_fit, py::arg("lengths"), py::arg("capacity"), py::arg("most"),
          "The row of each sample, best-fit decreasing; lengths from 1 to capacity.");
}
