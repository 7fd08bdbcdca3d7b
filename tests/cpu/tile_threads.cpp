// What dispatch.cpp does with torch's threads, with threads that live for one call.
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <thread>
#include <vector>

#include "csrc/cpu/dispatch.h"

namespace rk::cpu {
namespace {
int threads = 1, parts = 3;
}

int num_threads() {
    return threads;
}
int float32_parts() {
    return parts;
}
void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                  void* context) {
    const int64_t most = (end - begin + std::max<int64_t>(grain, 1) - 1) / std::max<int64_t>(grain, 1);
    const int64_t count = std::min<int64_t>(threads, most);
    std::vector<std::thread> started;
    const auto part = [&](int64_t i) { return begin + (end - begin) * i / count; };
    for (int64_t i = 1; i < count; ++i) started.emplace_back(body, part(i), part(i + 1), context);
    if (count > 0) body(begin, part(1), context);
    for (std::thread& thread : started) thread.join();
}

}  // namespace rk::cpu

extern "C" {
void set_threads(int count) {
    rk::cpu::threads = count;
}
void set_parts(int count) {
    rk::cpu::parts = count;
}
// As dispatch.cpp asks for AMX.
int request_tiles() {
    return static_cast<int>(syscall(SYS_arch_prctl, 0x1023, 18));
}
}
