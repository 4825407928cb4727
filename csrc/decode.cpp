#include "decode.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "simd.h"

namespace prism {
namespace {

PRISM_INLINE double exp_of(double x) { return std::exp(x); }
using prism::exp_of;

// A query's attention so far: numerator (dim,), denominator, and the largest score, relative to which both are.
template <typename Wide>
struct Running {
  Wide* sum;
  Wide total, largest;
};

template <typename Stored, typename Wide>
PRISM_INLINE Wide dot(const Wide* q, const Stored* key, int64_t dim) {
  Wide lanes[kLanes] = {};
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes)
    for (int i = 0; i < kLanes; ++i) lanes[i] += q[d + i] * widen(key[d + i]);
  for (; d < dim; ++d) lanes[d % kLanes] += q[d] * widen(key[d]);
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

// `count` tokens of a page: keys and values (kPage, dim). fresh (dim,): room for their weighted sum.
template <typename Stored, typename Wide>
PRISM_INLINE void visit(const Wide* q, const Stored* keys, const Stored* values, int64_t count, int64_t dim, Wide* fresh,
                        Running<Wide>& run) {
  Wide score[kPage], largest = run.largest, total = 0;
  for (int64_t t = 0; t < count; ++t) {
    score[t] = dot(q, keys + t * dim, dim);
    largest = score[t] > largest || score[t] != score[t] ? score[t] : largest;
  }
  for (int64_t t = 0; t < count; ++t) score[t] = exp_of(score[t] - largest);
  std::fill(fresh, fresh + dim, Wide(0));
  for (int64_t t = 0; t < count; ++t) {
    const Wide weight = score[t];
    const Stored* value = values + t * dim;
    total += weight;
    for (int64_t d = 0; d < dim; ++d) fresh[d] += weight * widen(value[d]);
  }
  const Wide kept = run.total > 0 || run.total != run.total ? exp_of(run.largest - largest) : Wide(0);
  for (int64_t d = 0; d < dim; ++d) run.sum[d] = run.sum[d] * kept + fresh[d];
  run.total = run.total * kept + total;
  run.largest = largest;
}

template <typename Stored>
using WideOf = decltype(widen(Stored{}));

template <typename Stored>
PRISM_INLINE void decode_in(const DecodeSizes& sizes, const DecodeTables& tables, const Stored* q, const Stored* k,
                            const Stored* v, Stored* k_pages, Stored* v_pages, double scale, Stored* out) {
  using Wide = WideOf<Stored>;
  const int64_t dim = sizes.dim, repeat = sizes.heads / sizes.kv_heads, of_head = kPage * dim;
  std::vector<Wide> room(dim * 3);
  Wide *query = room.data(), *sum = query + dim, *fresh = sum + dim;
  for (int64_t row = 0; row < sizes.rows; ++row) {
    const int64_t own = tables.own_length[row], prompt = tables.prompt_length[tables.group[row]];
    const int32_t* own_page = tables.own_page + row * tables.own_pages;
    const int32_t* prompt_page = tables.prompt_page + tables.group[row] * tables.prompt_pages;
    if (own == 0) {
      std::fill_n(out + row * sizes.heads * dim, sizes.heads * dim, Stored{});
      continue;
    }
    for (int64_t head = 0; head < sizes.kv_heads; ++head) {
      const int64_t from = (row * sizes.kv_heads + head) * dim;
      const int64_t place = (own_page[(own - 1) / kPage] * sizes.kv_heads + head) * of_head + (own - 1) % kPage * dim;
      std::copy_n(k + from, dim, k_pages + place);
      std::copy_n(v + from, dim, v_pages + place);
      for (int64_t turn = 0; turn < repeat; ++turn) {
        const int64_t at = (row * sizes.heads + head * repeat + turn) * dim;
        for (int64_t d = 0; d < dim; ++d) query[d] = widen(q[at + d]) * static_cast<Wide>(scale);
        std::fill(sum, sum + dim, Wide(0));
        Running<Wide> run{sum, Wide(0), -std::numeric_limits<Wide>::infinity()};
        for (int part = 0; part < 2; ++part) {
          const int64_t length = part ? own : prompt;
          for (int64_t first = 0; first < length; first += kPage) {
            const int64_t page = (part ? own_page : prompt_page)[first / kPage];
            const int64_t offset = (page * sizes.kv_heads + head) * of_head;
            visit(query, k_pages + offset, v_pages + offset, std::min<int64_t>(kPage, length - first), dim, fresh, run);
          }
        }
        const Wide inverse = 1 / run.total;
        for (int64_t d = 0; d < dim; ++d) narrow(sum[d] * inverse, out + at + d);
      }
    }
  }
}

#define PRISM_DECODE(name, Stored)                                                                                       \
  PRISM_INLINE void name##_in(const DecodeSizes& s, const DecodeTables& t, const Stored* q, const Stored* k,             \
                              const Stored* v, Stored* kp, Stored* vp, double scale, Stored* out) {                      \
    decode_in<Stored>(s, t, q, k, v, kp, vp, scale, out);                                                                \
  }                                                                                                                      \
  PRISM_WITH_AVX2(name,                                                                                                  \
                  (const DecodeSizes& s, const DecodeTables& t, const Stored* q, const Stored* k, const Stored* v,       \
                   Stored* kp, Stored* vp, double scale, Stored* out),                                                   \
                  (s, t, q, k, v, kp, vp, scale, out))

PRISM_DECODE(decode_float, float)
PRISM_DECODE(decode_double, double)
PRISM_DECODE(decode_bfloat16, BFloat16)
PRISM_DECODE(decode_half, Half)

bool inside(const int32_t* page, int64_t count, int32_t length, int64_t pages) {
  if (length < 0 || length > count * kPage) return false;
  return std::all_of(page, page + (length + kPage - 1) / kPage, [&](int32_t p) { return p >= 0 && p < pages; });
}

}  // namespace

bool within(const DecodeSizes& sizes, const DecodeTables& t) {
  for (int64_t g = 0; g < sizes.prompts; ++g)
    if (!inside(t.prompt_page + g * t.prompt_pages, t.prompt_pages, t.prompt_length[g], sizes.pages)) return false;
  for (int64_t row = 0; row < sizes.rows; ++row) {
    if (t.group[row] < 0 || t.group[row] >= sizes.prompts) return false;
    if (!inside(t.own_page + row * t.own_pages, t.own_pages, t.own_length[row], sizes.pages)) return false;
  }
  return true;
}

void shared_prompt_decode(Number number, const DecodeSizes& sizes, const DecodeTables& tables, const void* q, const void* k,
                          const void* v, void* k_pages, void* v_pages, double scale, void* out) {
  const auto run = [&](auto function, auto like) {
    using T = decltype(like);
    function(sizes, tables, static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v),
             static_cast<T*>(k_pages), static_cast<T*>(v_pages), scale, static_cast<T*>(out));
  };
  switch (number) {
    case Number::kFloat32: return run(decode_float, float{});
    case Number::kFloat64: return run(decode_double, double{});
    case Number::kBFloat16: return run(decode_bfloat16, BFloat16{});
    case Number::kFloat16: return run(decode_half, Half{});
  }
}

}  // namespace prism
