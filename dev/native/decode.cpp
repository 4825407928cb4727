// shared_prompt_decode: tables that lead out of the pages are refused and nothing is written; else it is the softmax's mean.
#include "decode.h"

#include <cmath>

#include "input.h"

namespace {

using prism::kPage;

struct Tables {
  int64_t rows, kv_heads, repeat, dim, pages, prompts, prompt_pages, own_pages, width, tiles;
  std::vector<int32_t> prompt_page, prompt_length, own_page, own_length, group, tile_row;
};

std::vector<int32_t> entries(Input& in, int64_t count, int64_t bound, bool damaged) {
  std::vector<int32_t> made(count);
  for (int32_t& entry : made) {
    entry = static_cast<int32_t>(in.below(bound));
    if (damaged && in.byte() % 16 == 0) entry = in.flag() ? -1 - in.byte() : static_cast<int32_t>(in.bits());
  }
  return made;
}

Tables tables_of(Input& in, bool damaged) {
  Tables t;
  t.rows = 1 + in.below(4), t.kv_heads = 1 + in.below(2), t.repeat = 1 + in.below(3), t.dim = 2 * (1 + in.below(20));
  t.pages = 1 + in.below(4), t.prompts = 1 + in.below(2), t.prompt_pages = 1 + in.below(2), t.own_pages = 1 + in.below(2);
  t.width = 1, t.tiles = t.rows;
  t.prompt_page = entries(in, t.prompts * t.prompt_pages, t.pages, damaged);
  t.prompt_length = entries(in, t.prompts, t.prompt_pages * kPage + 1, damaged);
  t.own_page = entries(in, t.rows * t.own_pages, t.pages, damaged);
  t.own_length = entries(in, t.rows, t.own_pages * kPage + 1, damaged);
  t.group = entries(in, t.rows, t.prompts, damaged);
  t.tile_row = entries(in, t.tiles, t.rows, damaged);
  if (!damaged) for (int64_t row = 0; row < t.rows; ++row) t.tile_row[row] = static_cast<int32_t>(row);
  return t;
}

bool leads_out(const Tables& t) {
  const auto any = [](const std::vector<int32_t>& values, int64_t low, int64_t high) {
    for (int32_t value : values) if (value < low || value >= high) return true;
    return false;
  };
  return any(t.prompt_page, 0, t.pages) || any(t.own_page, 0, t.pages) || any(t.group, 0, t.prompts) ||
         any(t.prompt_length, 0, t.prompt_pages * kPage + 1) || any(t.own_length, 0, t.own_pages * kPage + 1) ||
         any(t.tile_row, -1, t.rows);
}

// One row under one head, after the new tokens are in their pages.
template <typename T>
std::vector<double> mean_of(const Tables& t, int64_t row, int64_t head, const T* query, const std::vector<T>& keys,
                            const std::vector<T>& values, double scale) {
  std::vector<std::pair<double, const T*>> scored;
  const auto over = [&](const int32_t* table, int64_t length) {
    for (int64_t i = 0; i < length; ++i) {
      const int64_t at = ((table[i / kPage] * t.kv_heads + head) * kPage + i % kPage) * t.dim;
      double score = 0;
      for (int64_t d = 0; d < t.dim; ++d) score += static_cast<double>(query[d]) * keys[at + d] * scale;
      scored.emplace_back(score, values.data() + at);
    }
  };
  over(t.prompt_page.data() + t.group[row] * t.prompt_pages, t.prompt_length[t.group[row]]);
  over(t.own_page.data() + row * t.own_pages, t.own_length[row]);
  double top = -INFINITY, total = 0;
  for (const auto& [score, value] : scored) top = std::fmax(top, score);
  std::vector<double> mean(t.dim, 0.0);
  for (const auto& [score, value] : scored) {
    const double weight = std::exp(score - top);
    total += weight;
    for (int64_t d = 0; d < t.dim; ++d) mean[d] += weight * value[d];
  }
  for (double& x : mean) x /= total;
  return mean;
}

template <typename T>
void run(Input& in, const Tables& t, bool damaged, prism::Number number) {
  const int64_t heads = t.kv_heads * t.repeat;
  const auto filled = [&](int64_t count) {
    std::vector<T> made(count);
    uint32_t state = static_cast<uint32_t>(in.bits()) | 1;
    for (T& x : made) state = state * 1664525u + 1013904223u, x = static_cast<T>(static_cast<int>(state >> 24) - 128) / 64;
    return made;
  };
  const std::vector<T> q = filled(t.rows * heads * t.dim), k = filled(t.rows * t.kv_heads * t.dim),
                       v = filled(t.rows * t.kv_heads * t.dim);
  std::vector<T> keys = filled(t.pages * t.kv_heads * kPage * t.dim), values = filled(keys.size());
  const std::vector<T> keys_before = keys, values_before = values;
  std::vector<T> out(t.rows * heads * t.dim, T{7});
  const prism::Decode decode{t.rows, heads, t.kv_heads, t.dim, t.pages, q.data(), k.data(), v.data(), heads * t.dim,
                             t.kv_heads * t.dim, t.kv_heads * t.dim, keys.data(), values.data(), t.prompt_page.data(),
                             t.prompt_length.data(), t.own_page.data(), t.own_length.data(), t.group.data(),
                             t.tile_row.data(), t.prompts, t.prompt_pages, t.own_pages, t.tiles, t.width, 0.25,
                             out.data(), nullptr, nullptr, nullptr, nullptr, 0.0};
  const bool done = prism::shared_prompt_decode(decode, number, 1);
  HOLDS(done == !leads_out(t));
  if (!done) {
    HOLDS(keys == keys_before && values == values_before && out == std::vector<T>(out.size(), T{7}));
    return;
  }
  if (damaged) return;  // a row may stand in several tiles
  const double near = sizeof(T) == 8 ? 1e-12 : 2e-5;  // rounding of sums of 192 products of at most 4
  for (int64_t row = 0; row < t.rows; ++row) {
    for (int64_t head = 0; head < heads; ++head) {
      const T* got = out.data() + (row * heads + head) * t.dim;
      if (t.own_length[row] == 0) {
        for (int64_t d = 0; d < t.dim; ++d) HOLDS(got[d] == 0);
        continue;
      }
      const auto mean = mean_of<T>(t, row, head / t.repeat, q.data() + (row * heads + head) * t.dim, keys, values, 0.25);
      for (int64_t d = 0; d < t.dim; ++d) HOLDS(std::fabs(got[d] - mean[d]) <= near * 16);
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in(data, size);
  const bool damaged = in.flag(), wide = in.flag();
  const Tables t = tables_of(in, damaged);
  wide ? run<double>(in, t, damaged, prism::Number::kDouble) : run<float>(in, t, damaged, prism::Number::kFloat);
  return 0;
}
