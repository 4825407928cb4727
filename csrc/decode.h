// Attention of one new token per row over pages: the native form of shared_prompt_decode in
// kernels/prism_kernels/tree_attention/reference.py.
#pragma once

#include <cstdint>

namespace prism {

constexpr int64_t kPage = 64;  // tokens

enum class Number { kFloat, kDouble, kBrain, kHalf };

struct Decode {
  int64_t rows, heads, kv_heads, dim, pages;
  const void *q, *k, *v;    // (rows, heads, dim), (rows, kv_heads, dim) of one Number, contiguous but for their rows
  int64_t q_stride, k_stride, v_stride;  // of rows
  void *k_pages, *v_pages;  // (pages, kv_heads, kPage, dim), written
  const int32_t *prompt_page, *prompt_length, *own_page, *own_length, *group, *tile_row;
  int64_t prompts, prompt_pages, own_pages, tiles, width;  // sizes of the tables
  double scale;
  void* out;  // (rows, heads, dim), double for kDouble, else float
  // Of floats and doubles: what queries and keys are normalised and turned with first, or null.
  const void *q_weight, *k_weight;  // (dim,)
  const void *cos, *sin;            // (rows, dim)
  double eps;
};

// False where a table leads out of the pages: then nothing is written.
bool shared_prompt_decode(const Decode& decode, Number number, int64_t threads);

}  // namespace prism
