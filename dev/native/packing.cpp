// pack_trees: no pack over its capacity, every branch in one part, those kept together in all, a tree refused where it cannot fit.
#include "packing.h"

#include <algorithm>

#include "input.h"

namespace {

using Wide = __int128;  // no sum of lengths overflows

struct Problem {
  std::vector<int64_t> root, branch, start{0};
  std::vector<uint8_t> kept;
  std::vector<double> vision;
  prism::PackOptions options;
  double token, attention, predicted;
  bool together;
};

Problem problem_of(Input& in) {
  Problem p;
  const int64_t trees = in.below(40);
  p.options.capacity = 1 + std::min<int64_t>(in.length(), (int64_t{1} << 40) - 1);
  p.options.multiple = 1 + in.below(in.flag() ? 4 : 70);
  p.options.split_for_multiple = in.flag();
  p.options.cost_given = in.flag();
  p.together = in.flag();
  p.token = in.flag() ? 1.0 : in.byte() * 1e300;
  p.attention = in.flag() ? 0.0 : in.byte() / 256.0;
  p.predicted = in.flag() ? 0.0 : in.byte() / 4.0;
  for (int64_t tree = 0; tree < trees; ++tree) {
    p.root.push_back(in.length());
    p.vision.push_back(in.flag() ? 0.0 : in.byte() * 1e3);
    for (int64_t j = in.below(6); j > 0; --j) {
      p.branch.push_back(in.length());
      p.kept.push_back(p.together && in.byte() % 4 == 0);
    }
    p.start.push_back(static_cast<int64_t>(p.branch.size()));
  }
  return p;
}

// Whether the tree fits: whole, or each of its loose branches beside the root and those kept together.
bool fits(const Problem& p, int64_t tree) {
  Wide whole = p.root[tree], least = p.root[tree];
  int64_t longest = -1;
  for (int64_t j = p.start[tree]; j < p.start[tree + 1]; ++j) {
    whole += p.branch[j];
    if (p.kept[j]) least += p.branch[j];
    else longest = std::max(longest, p.branch[j]);
  }
  return whole <= p.options.capacity || (longest >= 0 && least + longest <= p.options.capacity);
}

void check(const Problem& p, const prism::Packs& packs) {
  const int64_t count = static_cast<int64_t>(packs.pack_start.size()) - 1;
  HOLDS(count % p.options.multiple == 0);
  HOLDS(packs.pack_start.back() == static_cast<int64_t>(packs.tree.size()));
  std::vector<int64_t> seen(p.branch.size(), 0), parts(p.root.size(), 0);
  for (int64_t i = 0; i < count; ++i) {
    Wide tokens = 0;
    for (int64_t j = packs.pack_start[i]; j < packs.pack_start[i + 1]; ++j) {
      const int64_t tree = packs.tree[j];
      HOLDS(0 <= tree && tree < static_cast<int64_t>(p.root.size()));
      ++parts[tree];
      tokens += p.root[tree];
      int64_t before = -1;
      for (int64_t k = packs.branch_start[j]; k < packs.branch_start[j + 1]; ++k) {
        const int64_t at = p.start[tree] + packs.branch[k];
        HOLDS(packs.branch[k] > before && at < p.start[tree + 1]);
        before = packs.branch[k];
        tokens += p.branch[at];
        ++seen[at];
      }
    }
    HOLDS(tokens <= p.options.capacity);
  }
  for (size_t tree = 0; tree < p.root.size(); ++tree) {
    HOLDS(parts[tree] >= 1);
    if (p.start[tree] == p.start[tree + 1]) HOLDS(parts[tree] == 1);
    for (int64_t j = p.start[tree]; j < p.start[tree + 1]; ++j) HOLDS(seen[j] == (p.kept[j] ? parts[tree] : 1));
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in(data, size);
  const Problem p = problem_of(in);
  const prism::Packs packs = prism::pack_trees(
      {static_cast<int64_t>(p.root.size()), p.root.data(), p.branch.data(), p.start.data(),
       p.together ? p.kept.data() : nullptr},
      {p.token, p.attention, p.predicted, p.vision.data()}, p.options);
  int64_t misfit = -1;
  for (int64_t tree = static_cast<int64_t>(p.root.size()) - 1; tree >= 0; --tree) misfit = fits(p, tree) ? misfit : tree;
  HOLDS(packs.misfit == misfit);
  if (misfit < 0) check(p, packs);
  return 0;
}
