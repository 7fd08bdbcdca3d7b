// Registers checksum_weights: what shows edits of weights that torch does not count (through `.data`, numpy,
// another process). A weight is cut into equal parts, each with a checksum of its own, so that whoever keeps
// these can look at one part in each call and at all of the weight in as many calls as there are parts.
//
// The sum is that of XXH64's rounds: each takes eight bytes into one of four lanes, and is one to one in both,
// so that an edit within eight bytes always shows, and any other with a probability of 1 - 2^-64. It runs at
// some ten bytes a nanosecond on a core: the price of a part is reading it.
//
// A weight that was moved into a file (roberta_kernels/quantized/offloading.py) shall stay out of memory. Its
// mapping is private, so that a page which nobody wrote to is the file's still: the kernel says which are
// (/proc/self/pagemap), and only the others are read. Where it does not say, all are.
#include <fcntl.h>
#include <unistd.h>

#include <cstring>
#include <vector>

#include "csrc/cpu/dispatch.h"
#include "csrc/cpu/tensor_checks.h"

namespace rk::cpu {
namespace {

constexpr uint64_t kPrime1 = 0x9E3779B185EBCA87ull, kPrime2 = 0xC2B2AE3D27D4EB4Full;
constexpr int64_t kBytesOfTask = 1 << 16;

uint64_t rotate(uint64_t value, int bits) {
    return value << bits | value >> (64 - bits);
}

uint64_t take(uint64_t lane, uint64_t word) {
    return rotate(lane + word * kPrime2, 31) * kPrime1;
}

uint64_t word_at(const char* data, int64_t bytes = 8) {
    uint64_t word = 0;
    std::memcpy(&word, data, static_cast<size_t>(bytes));
    return word;
}

// Of `bytes` bytes, going on from the sum `from`.
uint64_t checksum(const char* data, int64_t bytes, uint64_t from) {
    uint64_t lanes[4] = {from + kPrime1, from + kPrime2, from, from - kPrime1};
    int64_t at = 0;
    for (; at + 32 <= bytes; at += 32)
        for (int i = 0; i < 4; ++i) lanes[i] = take(lanes[i], word_at(data + at + 8 * i));
    uint64_t sum = static_cast<uint64_t>(bytes);
    for (const uint64_t lane : lanes) sum = take(sum, lane);
    for (; at + 8 <= bytes; at += 8) sum = take(sum, word_at(data + at));
    if (at < bytes) sum = take(sum, word_at(data + at, bytes - at));
    return sum ^ sum >> 29;
}

// Which pages of a private mapping are no longer those of its file.
class Pagemap {
  public:
    // Opened in each call: an open one is of the process that opened it, whoever was forked from that.
    Pagemap() : file_(open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC)) {}
    ~Pagemap() {
        if (file_ >= 0) close(file_);
    }
    Pagemap(const Pagemap&) = delete;
    Pagemap& operator=(const Pagemap&) = delete;

    // Of the bytes of pages that were written to, each with the place that they stand at.
    uint64_t checksum_written(const char* data, int64_t bytes, uint64_t from) const {
        const auto start = reinterpret_cast<uintptr_t>(data), end = start + static_cast<uintptr_t>(bytes);
        constexpr int kEntries = 64;
        uint64_t entries[kEntries];
        for (uintptr_t page = start / size_, last = (end - 1) / size_; page <= last;) {
            const int64_t wanted = static_cast<int64_t>(last - page) + 1;
            const int64_t count = wanted < kEntries ? wanted : kEntries;
            const ssize_t length = count * int64_t(sizeof(uint64_t));
            const bool known = file_ >= 0 && pread(file_, entries, static_cast<size_t>(length),
                                                   static_cast<off_t>(page * sizeof(uint64_t))) == length;
            for (int64_t i = 0; i < count; ++i, ++page) {
                if (known && !written(entries[i])) continue;
                const uintptr_t first = page * size_ > start ? page * size_ : start;
                const uintptr_t stop = (page + 1) * size_ < end ? (page + 1) * size_ : end;
                from = checksum(reinterpret_cast<const char*>(first), static_cast<int64_t>(stop - first),
                                from + (first - start));
            }
        }
        return from;
    }

  private:
    static bool written(uint64_t entry) {
        const bool present = entry >> 63 & 1, swapped = entry >> 62 & 1, of_file = entry >> 61 & 1;
        return (present || swapped) && !of_file;
    }

    int file_;
    uintptr_t size_ = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
};

// weights: contiguous, of any dtype. in_file: nonzero for those whose mapping is private and of a file. parts:
// how many a weight is cut into; first: the first of `count` parts of each weight that are summed.
// -> int64 [weights, count]
Tensor checksum_weights(std::vector<Tensor> weights, std::vector<int64_t> in_file, std::vector<int64_t> first,
                        int64_t count, int64_t parts) {
    const char* op = "checksum_weights";
    const size_t size = weights.size();
    STD_TORCH_CHECK(size > 0 && in_file.size() == size && first.size() == size, op,
                    ": weights, in_file and first must be of one length, and not empty");
    STD_TORCH_CHECK(count > 0 && count <= parts, op, ": count must be from 1 to parts");
    struct Bytes {
        const char* data;
        int64_t size, element;
    };
    std::vector<Bytes> bytes;
    int64_t all = 0;
    bool files = false;
    for (size_t i = 0; i < size; ++i) {
        const Tensor& t = weights[i];
        STD_TORCH_CHECK(t.is_contiguous() && t.device().is_cpu(), op,
                        ": weights must be contiguous tensors on the CPU");
        STD_TORCH_CHECK(first[i] >= 0 && first[i] + count <= parts, op, ": there is no such part");
        const int64_t element = static_cast<int64_t>(t.element_size());
        bytes.push_back({static_cast<const char*>(t.const_data_ptr()), t.numel(), element});
        all += t.numel() * element / parts * count;
        files = files || in_file[i] != 0;
    }
    const TensorChecks checks(op, weights[0], "weights", {weights[0].scalar_type()}, "");
    Tensor out = checks.empty({static_cast<int64_t>(size), count}, ScalarType::Long);
    auto* sums = static_cast<int64_t*>(out.mutable_data_ptr());
    std::optional<Pagemap> pages;
    if (files) pages.emplace();
    const int64_t tasks = static_cast<int64_t>(size) * count;
    const int64_t grain = 1 + kBytesOfTask * tasks / (all + 1);
    parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const Bytes& weight = bytes[static_cast<size_t>(task / count)];
            const int64_t part = first[static_cast<size_t>(task / count)] + task % count;
            const int64_t start = weight.size / parts * part + weight.size % parts * part / parts;
            const int64_t next = part + 1;
            const int64_t stop = weight.size / parts * next + weight.size % parts * next / parts;
            const char* const data = weight.data + start * weight.element;
            const int64_t length = (stop - start) * weight.element;
            uint64_t sum = 0;
            if (length > 0)
                sum = in_file[static_cast<size_t>(task / count)] != 0
                          ? pages->checksum_written(data, length, 0)
                          : checksum(data, length, 0);
            sums[task] = static_cast<int64_t>(sum);
        }
    });
    return out;
}

}  // namespace
}  // namespace rk::cpu

STABLE_TORCH_LIBRARY_IMPL(roberta_kernels_cpu, CPU, m) {
    m.impl("checksum_weights", TORCH_BOX(&rk::cpu::checksum_weights));
}
