// Items onto ranks of equal load: the native form of kernels/prism_kernels/packing/reference_balance.py.
#pragma once

#include <cstdint>
#include <vector>

namespace prism {

// costs (count,), finite and >= 0 -> item indices per rank, ascending.
std::vector<std::vector<int64_t>> balance(const double* costs, int64_t count, int64_t num_ranks, bool equal_count);

}  // namespace prism
