#include "balance.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <optional>
#include <queue>
#include <utility>

// Every sum of doubles runs in the reference's order, so that all choices equal the reference's.

namespace prism {
namespace {

constexpr double kNear = 1e-4;
constexpr int64_t kMaxExchanges = 64;

using Indices = std::vector<int64_t>;
using Item = std::pair<double, int64_t>;  // (cost, index)
using Row = std::vector<Item>;            // a rank's items, ascending

std::vector<Row> to_the_lightest(const Row& longest_first, int64_t num_ranks) {
  std::vector<Row> ranks(num_ranks);
  std::priority_queue<Item, std::vector<Item>, std::greater<Item>> lightest;  // (load, rank)
  for (int64_t rank = 0; rank < num_ranks; ++rank) lightest.emplace(0.0, rank);
  for (const Item& item : longest_first) {
    auto [load, rank] = lightest.top();
    lightest.pop();
    ranks[rank].push_back(item);
    lightest.emplace(load + item.first, rank);
  }
  return ranks;
}

Indices by_load(const std::vector<double>& loads) {
  Indices order(loads.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return loads[a] < loads[b]; });
  return order;
}

std::vector<Row> deal_in_rounds(const Row& longest_first, int64_t num_ranks) {
  std::vector<Row> ranks(num_ranks);
  std::vector<double> loads(num_ranks, 0.0);
  for (size_t begin = 0; begin < longest_first.size(); begin += num_ranks) {
    const Indices order = by_load(loads);
    const size_t end = std::min(longest_first.size(), begin + static_cast<size_t>(num_ranks));
    for (size_t i = begin; i < end; ++i) {
      const int64_t rank = order[i - begin];
      ranks[rank].push_back(longest_first[i]);
      loads[rank] += longest_first[i].first;
    }
  }
  return ranks;
}

struct Exchange {
  Item given;
  std::optional<Item> taken;
  double difference;
};

std::optional<Exchange> best_exchange(const Row& heavy, const Row& light, double heavy_load, double light_load,
                                      bool may_move) {
  const double half = 0.5 * (heavy_load - light_load);
  std::optional<Exchange> best;
  double miss = 0.0;
  for (const Item& given : heavy) {
    auto consider = [&](const Item* taken) {
      const double difference = given.first - (taken ? taken->first : 0.0);
      if (!(heavy_load - difference < heavy_load && light_load + difference < heavy_load)) return;
      if (best && !(std::abs(difference - half) < miss)) return;
      miss = std::abs(difference - half);
      best = Exchange{given, taken ? std::optional<Item>(*taken) : std::nullopt, difference};
    };
    const auto at = std::lower_bound(light.begin(), light.end(), Item{given.first - half, -1});
    if (at != light.begin()) consider(&*(at - 1));
    if (at != light.end()) consider(&*at);
    if (may_move) consider(nullptr);
  }
  return best;
}

void move_item(Row& from, Row& to, const Item& item) {
  from.erase(std::lower_bound(from.begin(), from.end(), item));
  to.insert(std::upper_bound(to.begin(), to.end(), item), item);
}

double sum(const Row& row) {
  double total = 0.0;
  for (const Item& item : row) total += item.first;
  return total;
}

void exchange(std::vector<Row>& rows, bool equal_count) {
  const int64_t num_ranks = static_cast<int64_t>(rows.size());
  std::vector<double> loads;
  double total = 0.0;
  for (Row& row : rows) {
    std::sort(row.begin(), row.end());
    loads.push_back(sum(row));
    total += loads.back();
  }
  const double mean = total / static_cast<double>(num_ranks);
  for (int64_t step = 0; step < kMaxExchanges * num_ranks; ++step) {
    const int64_t heavy = std::max_element(loads.begin(), loads.end()) - loads.begin();
    if (loads[heavy] - mean <= kNear * mean) return;
    std::optional<Exchange> best;
    int64_t partner = heavy;
    for (int64_t light : by_load(loads)) {
      if (loads[light] >= loads[heavy]) break;
      const bool may_move = !equal_count || rows[heavy].size() > rows[light].size();
      best = best_exchange(rows[heavy], rows[light], loads[heavy], loads[light], may_move);
      partner = light;
      if (best) break;
    }
    if (!best) return;
    move_item(rows[heavy], rows[partner], best->given);
    if (best->taken) move_item(rows[partner], rows[heavy], *best->taken);
    loads[heavy] -= best->difference;
    loads[partner] += best->difference;
  }
}

}  // namespace

std::vector<Indices> balance(const double* costs, int64_t count, int64_t num_ranks, bool equal_count) {
  Row longest_first(count);
  for (int64_t i = 0; i < count; ++i) longest_first[i] = {costs[i], i};
  std::sort(longest_first.begin(), longest_first.end(),
            [](const Item& a, const Item& b) { return a.first > b.first || (a.first == b.first && a.second < b.second); });
  std::vector<Row> rows = equal_count ? deal_in_rounds(longest_first, num_ranks)
                                      : to_the_lightest(longest_first, num_ranks);
  if (num_ranks > 1) exchange(rows, equal_count);
  std::vector<Indices> ranks;
  ranks.reserve(rows.size());
  for (const Row& row : rows) {
    Indices& rank = ranks.emplace_back();
    for (const Item& item : row) rank.push_back(item.second);
    std::sort(rank.begin(), rank.end());
  }
  return ranks;
}

}  // namespace prism
