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

// Indices into sizes by bin: longest first, each into the bin with the least room that holds it (ties: filled last).
std::vector<Indices> best_fit_decreasing(const Indices& sizes, int64_t capacity) {
  std::vector<Indices> bins;
  Indices below;                          // bin -> the next bin in the stack of those with the same room, or -1
  std::map<int64_t, int64_t> top_of_room;  // room -> top of the stack
  for (int64_t item : by_descending(sizes.size(), [&](size_t i) { return sizes[i]; })) {
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
    for (int64_t tree = 0; tree < trees_.count; ++tree) {
      if (!split(tree)) {
        result.misfit = tree;
        return result;
      }
    }
    Indices sizes;
    sizes.reserve(parts_.size());
    for (const Part& part : parts_) sizes.push_back(part.tokens);
    packs_ = best_fit_decreasing(sizes, options_.capacity);
    costs_.reserve(packs_.size());
    for (const Indices& pack : packs_) costs_.push_back(cost_of(pack));
    const int64_t count = static_cast<int64_t>(packs_.size());
    const int64_t added = (options_.multiple - count % options_.multiple) % options_.multiple;
    for (int64_t i = 0; i < added; ++i) {
      if (!split_a_pack() && !(options_.split_for_multiple && split_a_tree())) add_pack({});
    }
    if (options_.cost_given || added > 0) even_out();
    write(result);
    return result;
  }

 private:
  // A root with some of its branches: pool_[begin .. end), ascending.
  struct Part {
    int64_t tree, begin, end, tokens;
    double cost;
  };

  bool is_kept(int64_t tree, int64_t branch) const {
    return trees_.kept != nullptr && trees_.kept[trees_.start[tree] + branch] != 0;
  }

  double work(int64_t length, int64_t prefix) const {
    const double n = static_cast<double>(length), p = static_cast<double>(prefix);
    return model_.token * n + model_.attention * (n * p + 0.5 * (n * (n + 1.0)));
  }

  // Appends a part; its branches are in the pool from `begin` on.
  int64_t add_part(int64_t tree, int64_t begin) {
    const int64_t root = trees_.root[tree];
    Part part{tree, begin, static_cast<int64_t>(pool_.size()), root, work(root, 0) + model_.vision[tree]};
    for (int64_t i = part.begin; i < part.end; ++i) {
      const int64_t length = trees_.branch[trees_.start[tree] + pool_[i]];
      part.tokens += length;
      part.cost += work(length, root);
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
    int64_t room = options_.capacity - trees_.root[tree];
    for (int64_t j = 0; j < count && room >= 0; ++j) room -= length[j];
    if (room >= 0) {
      const int64_t begin = static_cast<int64_t>(pool_.size());
      for (int64_t j = 0; j < count; ++j) pool_.push_back(j);
      add_part(tree, begin);
      return true;
    }
    room = options_.capacity - trees_.root[tree];
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

  // The first pack of the highest cost among those that `may` be split, or -1.
  template <typename May>
  int64_t donor(May may) const {
    int64_t best = -1;
    for (int64_t i = 0; i < static_cast<int64_t>(packs_.size()); ++i) {
      if ((best < 0 || costs_[i] > costs_[best]) && may(packs_[i])) best = i;
    }
    return best;
  }

  bool split_a_pack() {
    const int64_t from = donor([](const Indices& pack) { return pack.size() > 1; });
    if (from < 0) return false;
    const Indices pack = packs_[from];
    const Halves sides = *halves(part_costs(pack), nullptr, 0);
    set_pack(from, picked(pack, sides[0]));
    add_pack(picked(pack, sides[1]));
    return true;
  }

  Indices loose_branches(const Part& part) const {
    Indices out;
    for (int64_t i = part.begin; i < part.end; ++i) {
      if (!is_kept(part.tree, pool_[i])) out.push_back(pool_[i]);
    }
    return out;
  }

  // Called where no pack holds more than one part.
  bool split_a_tree() {
    const int64_t from =
        donor([&](const Indices& pack) { return !pack.empty() && loose_branches(parts_[pack[0]]).size() > 1; });
    if (from < 0) return false;
    const Part old = parts_[packs_[from][0]];
    const int64_t root = trees_.root[old.tree];
    const Indices loose = loose_branches(old);
    Indices kept;
    for (int64_t i = old.begin; i < old.end; ++i) {
      if (is_kept(old.tree, pool_[i])) kept.push_back(pool_[i]);
    }
    std::vector<double> alone;  // with the root, as the reference adds it
    for (int64_t branch : loose) {
      const double base = work(root, 0) + model_.vision[old.tree];
      alone.push_back(base + work(trees_.branch[trees_.start[old.tree] + branch], root));
    }
    const Halves sides = *halves(alone, nullptr, 0);
    const int64_t first = add_part(old.tree, kept, picked(loose, sides[0]));
    const int64_t second = add_part(old.tree, kept, picked(loose, sides[1]));
    set_pack(from, {first});
    add_pack({second});
    return true;
  }

  // Divides two packs anew where that lowers the larger of their costs.
  bool exchange(int64_t high, int64_t low) {
    Indices pair = packs_[high], sizes;
    pair.insert(pair.end(), packs_[low].begin(), packs_[low].end());
    for (int64_t part : pair) sizes.push_back(parts_[part].tokens);
    const auto sides = halves(part_costs(pair), &sizes, options_.capacity);
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
      bool changed = false;
      for (size_t i = 0; i < count / 2; ++i) {
        const int64_t high = order[i], low = order[count - 1 - i];
        if (costs_[high] - costs_[low] <= kAlike * costs_[high]) break;
        changed |= exchange(high, low);
      }
      if (!changed) return;
    }
  }

  // By tree, then by branches: parts of one tree differ in their branches.
  bool before(int64_t left, int64_t right) const {
    const Part &a = parts_[left], &b = parts_[right];
    if (a.tree != b.tree) return a.tree < b.tree;
    return std::lexicographical_compare(pool_.begin() + a.begin, pool_.begin() + a.end, pool_.begin() + b.begin,
                                        pool_.begin() + b.end);
  }

  void write(Packs& result) {
    for (Indices& pack : packs_) std::sort(pack.begin(), pack.end(), [&](int64_t a, int64_t b) { return before(a, b); });
    std::stable_sort(packs_.begin(), packs_.end(), [&](const Indices& a, const Indices& b) {
      if (a.empty() || b.empty()) return b.empty() && !a.empty();
      return before(a[0], b[0]);
    });
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
};

}  // namespace

Packs pack_trees(const Trees& trees, const CostModel& cost, const PackOptions& options) {
  return Packer(trees, cost, options).run();
}

}  // namespace prism
