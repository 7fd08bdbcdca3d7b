// Which of its implementations an op may use: process-wide, set from Python. A variant that this build has
// not, or the device at hand cannot run, or that does not take the sizes of a call, gives way to the best
// below it. Every op starts with "portable": roberta_kernels/backends raises it where recorded
// measurements say so. Plain C++.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace rk::cuda {

// In the order of preference: where a later one is set, an earlier one may run.
enum class AttentionVariant { portable, sm90 };
enum class GeluFfnVariant { portable, sm80, sm90 };

AttentionVariant attention_variant();
GeluFfnVariant gelu_ffn_variant();

// Counts a call by what ran it, which need not be what is set: tests and benchmarks that mean one variant
// see that it was that one.
enum class Direction { forward, backward };
void note_served(AttentionVariant variant, Direction direction);
void note_served(GeluFfnVariant variant, Direction direction);
// So many calls has it run in this process. Throws std::runtime_error for names that are none.
int64_t served(const std::string& op, const std::string& variant, Direction direction);

// The names of what this build has of an op, in the order of preference. Throws std::runtime_error for an
// op without variants, and so do the two below; set_variant also for a name that is not among them.
std::vector<std::string> variants_of(const std::string& op);
void set_variant(const std::string& op, const std::string& variant);
std::string get_variant(const std::string& op);

}  // namespace rk::cuda
