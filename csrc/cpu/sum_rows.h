// Sums over the rows of a matrix, in an order that depends on its shape alone.
#pragma once
#include "csrc/cpu/simd.h"
#include "csrc/cpu/util.h"

namespace rk::cpu::RK_CPU_ISA {

// The sum over `count` of m's rows (from `first` on) of the vector at `column`: serial up to 64 rows, beyond
// that a sum of at most 64 such sums, and so on, so that the error grows with the depth and not with the
// number of rows.
template <class T>
vf32 sum_of_rows(const T* m, int64_t first, int64_t count, int64_t columns, int64_t column, int left) {
    vf32 sum = zero();
    if (count <= 64) {
        for (int64_t row = first; row < first + count; ++row)
            sum += load_some(m + row * columns + column, left);
        return sum;
    }
    int64_t step = 64;
    while (step * 64 < count) step *= 64;
    for (int64_t done = 0; done < count; done += step)
        sum += sum_of_rows(m, first + done, min64(step, count - done), columns, column, left);
    return sum;
}

// sums[column] = sum over rows of m, [rows, columns]
template <class T>
void sum_rows(const T* m, int64_t rows, int64_t columns, T* sums) {
    parallel_for(0, ceil_div(columns, kLanes), 1, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
            const int64_t column = block * kLanes;
            const int left = int(min64(kLanes, columns - column));
            store_some(sums + column, sum_of_rows(m, 0, rows, columns, column, left), left);
        }
    });
}

}  // namespace rk::cpu::RK_CPU_ISA
