// Trees into packs of a fixed capacity: the native form of kernels/prism_kernels/packing/reference.py.
#pragma once

#include <cstdint>
#include <vector>

namespace prism {

// Tree i has root length root[i] and branch lengths branch[start[i] .. start[i + 1]), all >= 0.
struct Trees {
  int64_t count;
  const int64_t* root;
  const int64_t* branch;
  const int64_t* start;
  const uint8_t* kept;  // per branch: every part of its tree must hold it; may be null
};

struct CostModel {
  double token;
  double attention;
  double predicted;  // per token of a branch, besides `token`
  const double* vision;  // per tree
};

struct PackOptions {
  int64_t capacity;
  int64_t multiple;         // the number of packs is a multiple of it
  bool split_for_multiple;  // where that adds packs, trees that fit are split too, to fill them evenly
  bool cost_given;          // packs are evened out by cost
};

// Pack i holds parts pack_start[i] .. pack_start[i + 1); part j is tree[j] with branches branch_start[j] ..
struct Packs {
  std::vector<int64_t> pack_start{0};
  std::vector<int64_t> tree;
  std::vector<int64_t> branch_start{0};
  std::vector<int64_t> branch;
  int64_t misfit = -1;  // the first tree that cannot be split to fit; then there are no packs
};

Packs pack_trees(const Trees& trees, const CostModel& cost, const PackOptions& options);

}  // namespace prism
