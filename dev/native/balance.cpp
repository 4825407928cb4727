// balance: every item on one rank, equal counts where asked for, no rank above the mean by more than one item.
#include "balance.h"

#include <algorithm>

#include "input.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in(data, size);
  const int64_t ranks = 1 + in.below(12), count = in.below(60);
  const bool equal_count = in.flag();
  const int scale = in.byte();
  std::vector<double> costs;
  double total = 0, largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    double cost = in.length() % (int64_t{1} << 40);
    if (scale > 200) cost *= scale > 228 ? 1e280 : 5e-324;
    costs.push_back(cost);
    total += cost;
    largest = std::max(largest, cost);
  }
  const auto dealt = prism::balance(costs.data(), count, ranks, equal_count);
  HOLDS(static_cast<int64_t>(dealt.size()) == ranks);
  std::vector<int> seen(count, 0);
  size_t fewest = count, most = 0;
  for (const auto& rank : dealt) {
    double load = 0;
    for (size_t i = 0; i < rank.size(); ++i) {
      HOLDS(0 <= rank[i] && rank[i] < count && (i == 0 || rank[i - 1] < rank[i]));
      ++seen[rank[i]];
      load += costs[rank[i]];
    }
    fewest = std::min(fewest, rank.size()), most = std::max(most, rank.size());
    if (!equal_count) HOLDS(load <= (total / ranks + largest) * (1 + 1e-9));
  }
  HOLDS(std::all_of(seen.begin(), seen.end(), [](int times) { return times == 1; }));
  if (equal_count) HOLDS(most - fewest <= 1);
  return 0;
}
