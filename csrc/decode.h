// Attention of one new token per row over pages: the native form of shared_prompt_decode in
// kernels/prism_kernels/tree_attention/reference.py.
#pragma once

#include <cstdint>

namespace prism {

constexpr int kPage = 64;  // tokens

// Tables as in kernels/prism_kernels/tree_attention/decode_layout.py.
struct DecodeTables {
  const int32_t* prompt_page;    // (prompts, prompt_pages)
  const int32_t* prompt_length;  // (prompts,)
  const int32_t* own_page;       // (rows, own_pages)
  const int32_t* own_length;     // (rows,), the new token included; 0: idle
  const int32_t* group;          // (rows,)
  int64_t prompt_pages, own_pages;
};

struct DecodeSizes {
  int64_t rows, heads, kv_heads, dim, prompts, pages;
};

// Whether tables and lengths of all rows lead to pages that there are.
bool within(const DecodeSizes& sizes, const DecodeTables& tables);

enum class Number { kFloat32, kFloat64, kBFloat16, kFloat16 };

// q (rows, heads, dim), k and v (rows, kv_heads, dim), pages (n, kv_heads, kPage, dim), out as q; all contiguous; tables are
// `within`. Appends k and v to their rows' pages. Sums are fp32 (fp64 of fp64), of a page's tokens and then of pages.
void shared_prompt_decode(Number number, const DecodeSizes& sizes, const DecodeTables& tables, const void* q, const void* k,
                          const void* v, void* k_pages, void* v_pages, double scale, void* out);

}  // namespace prism
