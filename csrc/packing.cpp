#include "packing.h"

#include <algorithm>
#include <array>
#include <map>
#include <numeric>
#include <optional>
#include <utility>

// Every sum of doubles runs in the reference's order, and the build forbids fused multiply-add, so that costs, and with
// them all choices, equal the reference's to the last bit.

namespace prism {
namespace {

constexpr int kMaxRounds = 16;
constexpr int64_t kRare = 16;
constexpr double kAlike = 1e-3;

using Indices = std::vector<int64_t>;
using Halves = std::array<Indices, 2>;

// Indices 0 .. n - 1 by descending key, ties by index.
template <typename Key>
Indices by_descending(size_t n, Key key) {
  using Value = decltype(key(size_t{0}));
  std::vector<std::pair<Value, int64_t>> keyed(n);
  for (size_t i = 0; i < n; ++i) keyed[i] = {key(i), static_cast<int64_t>(i)};
  std::sort(keyed.begin(), keyed.end(),
            [](const auto& a, const auto& b) { return a.first > b.first || (a.first == b.first && a.second < b.second); });
  Indices order(n);
  for (size_t i = 0; i < n; ++i) order[i] = keyed[i].second;
  return order;
}

// The same for sizes in [0, capacity]: counted where that is cheaper than comparing.
Indices longest_first(const Indices& sizes, int64_t capacity) {
  const int64_t count = static_cast<int64_t>(sizes.size());
  if (capacity > 4 * count) return by_descending(sizes.size(), [&](size_t i) { return sizes[i]; });
  Indices place(capacity + 1, 0);  // how many have a size, then where the next of them goes
  for (int64_t size : sizes) ++place[size];
  for (int64_t size = capacity, before = 0; size >= 0; --size) before += std::exchange(place[size], before);
  Indices order(count);
  for (int64_t i = 0; i < count; ++i) order[place[sizes[i]]++] = i;
  return order;
}

// Indices into sizes by bin: longest first, each into the bin with the least room that holds it (ties: filled last).
std::vector<Indices> best_fit_decreasing(const Indices& sizes, int64_t capacity) {
  std::vector<Indices> bins;
  Indices below;                          // bin -> the next bin in the stack of those with the same room, or -1
  std::map<int64_t, int64_t> top_of_room;  // room -> top of the stack
  for (int64_t item : longest_first(sizes, capacity)) {
    int64_t room = capacity, bin = static_cast<int64_t>(bins.size());
    auto found = top_of_room.lower_bound(sizes[item]);
    if (found == top_of_room.end()) {
      bins.emplace_back();
      below.push_back(-1);
    } else {
      room = found->first;
      bin = found->second;
      if (below[bin] < 0) top_of_room.erase(found);
      else found->second = below[bin];
    }
    bins[bin].push_back(item);
    auto [place, fresh] = top_of_room.try_emplace(room - sizes[item], -1);
    below[bin] = place->second;
    place->second = bin;
  }
  return bins;
}

// Two sets of indices of nearly equal cost; nothing where an item has room on neither side.
std::optional<Halves> halves(const std::vector<double>& costs, const Indices* sizes, int64_t capacity) {
  Halves sides;
  double load[2] = {0.0, 0.0};
  int64_t used[2] = {0, 0};
  for (int64_t i : by_descending(costs.size(), [&](size_t j) { return costs[j]; })) {
    int side = load[1] < load[0] || (load[1] == load[0] && sides[1].size() < sides[0].size());
    if (sizes) {
      if (used[side] + (*sizes)[i] > capacity) side = 1 - side;
      if (used[side] + (*sizes)[i] > capacity) return std::nullopt;
      used[side] += (*sizes)[i];
    }
    sides[side].push_back(i);
    load[side] += costs[i];
  }
  return sides;
}

Indices picked(const Indices& values, const Indices& which) {
  Indices out;
  out.reserve(which.size());
  for (int64_t i : which) out.push_back(values[i]);
  return out;
}

class Packer {
 public:
  Packer(const Trees& trees, const CostModel& cost, const PackOptions& options)
      : trees_(trees), model_(cost), options_(options) {}

  Packs run() {
    Packs result;
    result.misfit = fill(options_.capacity);
    if (result.misfit >= 0) return result;
    const size_t multiple = options_.multiple, count = (packs_.size() + multiple - 1) / multiple * multiple;
    const bool added = count > packs_.size();
    if (added && options_.split_for_multiple) fill(least_capacity(count));
    costs_.reserve(count);
    for (const Indices& pack : packs_) costs_.push_back(cost_of(pack));
    while (packs_.size() < count) {
      if (!split_a_pack()) add_pack({});
    }
    if (options_.cost_given || added) even_out();
    sort_packs();
    write(result);
    return result;
  }

 private:
  // A root with some of its branches: pool_[begin .. end), ascending.
  struct Part {
    int64_t tree, begin, end, tokens;
    double cost;
  };

  // Parts and packs of at most `limit` tokens. -> the first tree that does not fit, or -1.
  int64_t fill(int64_t limit) {
    limit_ = limit;
    pool_.clear();
    parts_.clear();
    parts_.reserve(trees_.count);
    for (int64_t tree = 0; tree < trees_.count; ++tree) {
      if (!split(tree)) return tree;
    }
    Indices sizes;
    sizes.reserve(parts_.size());
    for (const Part& part : parts_) sizes.push_back(part.tokens);
    packs_ = best_fit_decreasing(sizes, limit);
    return -1;
  }

  // The least limit with which `count` packs are enough, by bisection.
  int64_t least_capacity(size_t count) {
    int64_t low = 1, high = limit_;
    for (int64_t tree = 0; tree < trees_.count; ++tree) {
      int64_t least = trees_.root[tree], longest = 0;
      for (int64_t j = 0; j < trees_.start[tree + 1] - trees_.start[tree]; ++j) {
        const int64_t length = trees_.branch[trees_.start[tree] + j];
        if (is_kept(tree, j)) least += length;
        else longest = std::max(longest, length);
      }
      low = std::max(low, least + longest);
    }
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      fill(middle);
      if (packs_.size() <= count) high = middle;
      else low = middle + 1;
    }
    return high;
  }

  bool is_kept(int64_t tree, int64_t branch) const {
    return trees_.kept != nullptr && trees_.kept[trees_.start[tree] + branch] != 0;
  }

  double work(double token, int64_t length, int64_t prefix) const {
    const double n = static_cast<double>(length), p = static_cast<double>(prefix);
    return token * n + model_.attention * (n * p + 0.5 * (n * (n + 1.0)));
  }

  // Appends a part; its branches are in the pool from `begin` on.
  int64_t add_part(int64_t tree, int64_t begin) {
    const int64_t root = trees_.root[tree];
    Part part{tree, begin, static_cast<int64_t>(pool_.size()), root,
              work(model_.token, root, 0) + model_.vision[tree]};
    for (int64_t i = part.begin; i < part.end; ++i) {
      const int64_t length = trees_.branch[trees_.start[tree] + pool_[i]];
      part.tokens += length;
      part.cost += work(model_.token + model_.predicted, length, root);
    }
    parts_.push_back(part);
    return static_cast<int64_t>(parts_.size()) - 1;
  }

  int64_t add_part(int64_t tree, const Indices& kept, const Indices& loose) {
    const int64_t begin = static_cast<int64_t>(pool_.size());
    pool_.insert(pool_.end(), kept.begin(), kept.end());
    pool_.insert(pool_.end(), loose.begin(), loose.end());
    std::sort(pool_.begin() + begin, pool_.end());
    return add_part(tree, begin);
  }

  // Adds the parts of a tree: one where it fits. False where a branch does not fit beside the root and the kept ones.
  bool split(int64_t tree) {
    const int64_t first = trees_.start[tree], count = trees_.start[tree + 1] - first;
    const int64_t* length = trees_.branch + first;
    // subtracted one by one, stopping below zero: no sum of lengths from outside can overflow
    int64_t room = limit_ - trees_.root[tree];
    for (int64_t j = 0; j < count && room >= 0; ++j) room -= length[j];
    if (room >= 0) {
      const int64_t begin = static_cast<int64_t>(pool_.size());
      for (int64_t j = 0; j < count; ++j) pool_.push_back(j);
      add_part(tree, begin);
      return true;
    }
    room = limit_ - trees_.root[tree];
    Indices kept, loose, sizes;
    for (int64_t j = 0; j < count; ++j) {
      if (is_kept(tree, j)) {
        kept.push_back(j);
        if (room >= 0) room -= length[j];
      } else {
        loose.push_back(j);
        sizes.push_back(length[j]);
      }
    }
    if (loose.empty() || room < *std::max_element(sizes.begin(), sizes.end())) return false;
    for (const Indices& members : best_fit_decreasing(sizes, room)) add_part(tree, kept, picked(loose, members));
    return true;
  }

  double cost_of(const Indices& pack) const {
    double total = 0.0;
    for (int64_t part : pack) total += parts_[part].cost;
    return total;
  }

  void set_pack(int64_t pack, Indices parts) {
    packs_[pack] = std::move(parts);
    costs_[pack] = cost_of(packs_[pack]);
  }

  void add_pack(Indices parts) {
    packs_.push_back(std::move(parts));
    costs_.push_back(cost_of(packs_.back()));
  }

  std::vector<double> part_costs(const Indices& parts) const {
    std::vector<double> out;
    out.reserve(parts.size());
    for (int64_t part : parts) out.push_back(parts_[part].cost);
    return out;
  }

  // Splits the costliest pack of two parts or more; false where there is none.
  bool split_a_pack() {
    int64_t from = -1;
    for (int64_t i = 0; i < static_cast<int64_t>(packs_.size()); ++i) {
      if (packs_[i].size() > 1 && (from < 0 || costs_[i] > costs_[from])) from = i;
    }
    if (from < 0) return false;
    const Indices pack = packs_[from];
    const Halves sides = *halves(part_costs(pack), nullptr, 0);
    set_pack(from, picked(pack, sides[0]));
    add_pack(picked(pack, sides[1]));
    return true;
  }

  // Divides two packs anew where that lowers the larger of their costs.
  bool exchange(int64_t high, int64_t low) {
    Indices pair = packs_[high], sizes;
    pair.insert(pair.end(), packs_[low].begin(), packs_[low].end());
    for (int64_t part : pair) sizes.push_back(parts_[part].tokens);
    const auto sides = halves(part_costs(pair), &sizes, limit_);
    if (!sides) return false;
    Indices first = picked(pair, (*sides)[0]), second = picked(pair, (*sides)[1]);
    if (std::max(cost_of(first), cost_of(second)) >= costs_[high]) return false;
    set_pack(high, std::move(first));
    set_pack(low, std::move(second));
    return true;
  }

  void even_out() {
    const size_t count = packs_.size();
    for (int round = 0; round < kMaxRounds; ++round) {
      const Indices order = by_descending(count, [&](size_t i) { return costs_[i]; });
      int64_t changes = 0;
      for (size_t i = 0; i < count / 2; ++i) {
        const int64_t high = order[i], low = order[count - 1 - i];
        if (costs_[high] - costs_[low] <= kAlike * costs_[high]) break;
        changes += exchange(high, low);
      }
      if (changes <= static_cast<int64_t>(count) / kRare) return;
    }
  }

  // By tree, then by branches: parts of one tree differ in their branches.
  bool before(int64_t left, int64_t right) const {
    const Part &a = parts_[left], &b = parts_[right];
    if (a.tree != b.tree) return a.tree < b.tree;
    return std::lexicographical_compare(pool_.begin() + a.begin, pool_.begin() + a.end, pool_.begin() + b.begin,
                                        pool_.begin() + b.end);
  }

  // Runs of packs of similar cost; inside a run, and among runs, by first tree; empty packs last.
  void sort_packs() {
    for (Indices& pack : packs_) std::sort(pack.begin(), pack.end(), [&](int64_t a, int64_t b) { return before(a, b); });
    std::vector<Indices> sorted;
    sorted.reserve(packs_.size());
    const size_t count = packs_.size(), run = options_.cost_given ? options_.multiple : std::max<size_t>(1, count);
    Indices order(count);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      if (packs_[a].empty() != packs_[b].empty()) return packs_[b].empty();
      return costs_[a] > costs_[b];
    });
    auto earlier = [&](int64_t a, int64_t b) {
      if (packs_[a].empty() || packs_[b].empty()) return packs_[b].empty() && !packs_[a].empty();
      return before(packs_[a][0], packs_[b][0]);
    };
    Indices runs;  // where each begins
    for (size_t begin = 0; begin < count; begin += run) {
      std::stable_sort(order.begin() + begin, order.begin() + std::min(count, begin + run), earlier);
      runs.push_back(begin);
    }
    std::sort(runs.begin(), runs.end(), [&](int64_t a, int64_t b) {
      const bool a_last = packs_[order[a + run - 1]].empty(), b_last = packs_[order[b + run - 1]].empty();
      return a_last != b_last ? b_last : earlier(order[a], order[b]);
    });
    for (int64_t begin : runs) {
      for (size_t i = begin; i < std::min(count, begin + run); ++i) sorted.push_back(std::move(packs_[order[i]]));
    }
    packs_ = std::move(sorted);
  }

  void write(Packs& result) {
    result.tree.reserve(parts_.size());
    result.branch_start.reserve(parts_.size() + 1);
    result.branch.reserve(pool_.size());
    for (const Indices& pack : packs_) {
      for (int64_t i : pack) {
        const Part& part = parts_[i];
        result.tree.push_back(part.tree);
        result.branch.insert(result.branch.end(), pool_.begin() + part.begin, pool_.begin() + part.end);
        result.branch_start.push_back(static_cast<int64_t>(result.branch.size()));
      }
      result.pack_start.push_back(static_cast<int64_t>(result.tree.size()));
    }
  }

  const Trees& trees_;
  const CostModel& model_;
  const PackOptions& options_;
  Indices pool_;
  std::vector<Part> parts_;
  std::vector<Indices> packs_;  // of indices into parts_
  std::vector<double> costs_;   // of packs_
  int64_t limit_ = 0;           // tokens that a pack may hold
};

}  // namespace

Packs pack_trees(const Trees& trees, const CostModel& cost, const PackOptions& options) {
  return Packer(trees, cost, options).run();
}

}  // namespace prism
