#include "decode.h"

#include <vector>

#include "norms.h"

namespace prism {
namespace {

struct Brain {  // bfloat16
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

PRISM_INLINE float wide(float x) { return x; }
PRISM_INLINE double wide(double x) { return x; }
PRISM_INLINE float wide(Brain x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof(y));
  return y;
}
PRISM_INLINE float wide(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = static_cast<uint32_t>(x.bits & 0x7FFF);
  uint32_t bits = rest << 13;  // as a float of an exponent that is 112 too small
  float y;
  std::memcpy(&y, &bits, sizeof(y));
  y *= 0x1p112f;
  std::memcpy(&bits, &y, sizeof(y));
  bits = (rest >= 0x7C00 ? 0x7F800000 | (rest << 13) : bits) | sign;
  std::memcpy(&y, &bits, sizeof(y));
  return y;
}

// {sum_of(x[0]), ..., sum_of(x[7])}, to the bit: each of its steps on two vectors at a time, lanes where one
// instruction of AVX leaves them.
template <typename T>
PRISM_INLINE Vector<T> sums_of(const Vector<T>* x) {
  using V = Vector<T>;
  V quarter[4], half[2];
  for (int j = 0; j < 4; ++j)
    quarter[j] = lanes_of<0, 1, 2, 3, 8, 9, 10, 11>(x[j], x[j + 4]) + lanes_of<4, 5, 6, 7, 12, 13, 14, 15>(x[j], x[j + 4]);
  for (int j = 0; j < 2; ++j) {
    const V a = quarter[2 * j], b = quarter[2 * j + 1];
    half[j] = lanes_of<0, 1, 8, 9, 4, 5, 12, 13>(a, b) + lanes_of<2, 3, 10, 11, 6, 7, 14, 15>(a, b);
  }
  return lanes_of<0, 2, 8, 10, 4, 6, 12, 14>(half[0], half[1]) + lanes_of<1, 3, 9, 11, 5, 7, 13, 15>(half[0], half[1]);
}

// The dot products of a query with eight keys, which follow each other.
template <typename T>
PRISM_INLINE Vector<T> dots(const T* query, const T* keys, int64_t dim) {
  using V = Vector<T>;
  V sum[kLanes] = {};
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    const V part = load<V>(query + d);
    for (int j = 0; j < kLanes; ++j) sum[j] += part * load<V>(keys + j * dim + d);
  }
  V total = sums_of<T>(sum);
  for (; d < dim; ++d)
    for (int j = 0; j < kLanes; ++j) total[j] += query[d] * keys[j * dim + d];
  return total;
}

// to += sum over tokens of weight * value, `kVectors` vectors of the head at a time.
template <typename T, int kVectors>
PRISM_INLINE void add_values(T* to, const T* weight, const T* values, int64_t tokens, int64_t dim) {
  using V = Vector<T>;
  V sum[kVectors];
  for (int j = 0; j < kVectors; ++j) sum[j] = load<V>(to + j * kLanes);
  for (int64_t t = 0; t < tokens; ++t)
    for (int j = 0; j < kVectors; ++j) sum[j] += load<V>(values + t * dim + j * kLanes) * weight[t];
  for (int j = 0; j < kVectors; ++j) store(to + j * kLanes, sum[j]);
}

// One query's softmax so far, over the tokens of the pages that it has met.
template <typename T>
struct State {
  const T* query;  // (dim,), scaled
  T top, total;
  T* out;  // (dim,), not yet divided by total
};

template <typename T>
PRISM_INLINE void attend(State<T>& state, const T* keys, const T* values, int64_t tokens, int64_t dim) {
  using V = Vector<T>;
  constexpr T kNever = -std::numeric_limits<T>::infinity();
  T weight[kPage];
  const int64_t padded = (tokens + kLanes - 1) / kLanes * kLanes;
  for (int64_t t = 0; t < padded; t += kLanes) store(weight + t, dots(state.query, keys + t * dim, dim));
  for (int64_t t = tokens; t < padded; ++t) weight[t] = kNever;  // a page holds anything there
  V high = filled<T>(kNever);
  for (int64_t t = 0; t < padded; t += kLanes) {
    const V x = load<V>(weight + t);
    high = x > high ? x : high;
  }
  const T top = largest_of<T>(high);
  if (state.total == 0) {  // nothing yet to shrink
    state.top = top;
  } else if (top > state.top) {
    const T shrink = exp_of(V{} + (state.top - top))[0];
    state.total *= shrink;
    for (int64_t d = 0; d < dim; ++d) state.out[d] *= shrink;
    state.top = top;
  }
  V sum = V{};
  for (int64_t t = 0; t < padded; t += kLanes) {
    const V p = exp_of(load<V>(weight + t) - state.top);
    store(weight + t, p);
    sum += p;
  }
  state.total += sum_of<T>(sum);
  int64_t d = 0;
  for (; d + 4 * kLanes <= dim; d += 4 * kLanes) add_values<T, 4>(state.out + d, weight, values + d, tokens, dim);
  for (; d + kLanes <= dim; d += kLanes) add_values<T, 1>(state.out + d, weight, values + d, tokens, dim);
  for (; d < dim; ++d)
    for (int64_t t = 0; t < tokens; ++t) state.out[d] += weight[t] * values[t * dim + d];
}

// Tokens of one page and head as T.
template <typename T, typename In>
PRISM_INLINE const T* page_as(const void* pages, int64_t page, int64_t tokens, const Decode& decode, int64_t head,
                              T* room) {
  const In* from = static_cast<const In*>(pages) + (page * decode.kv_heads + head) * kPage * decode.dim;
  if constexpr (std::is_same_v<T, In>) return from;
  for (int64_t i = 0; i < tokens * decode.dim; ++i) room[i] = wide(from[i]);
  return room;
}

template <typename T>
PRISM_INLINE void turned(const Decode& decode, const T* from, const void* weight, int64_t row, T* to) {
  const auto of = [](const void* table) __attribute__((always_inline)) { return static_cast<const T*>(table); };
  norm_and_turn(from, of(weight), of(decode.cos) + row * decode.dim, of(decode.sin) + row * decode.dim, decode.dim,
                static_cast<T>(decode.eps), to);
}

// The rows of one tile under one key-value head: their prompt's pages once for all, then each row's own.
template <typename T, typename In>
PRISM_INLINE void attend_tile(const Decode& decode, int64_t tile, int64_t head) {
  const int64_t dim = decode.dim, repeat = decode.heads / decode.kv_heads;
  const int32_t* members = decode.tile_row + tile * decode.width;
  std::vector<T> queries(decode.width * repeat * dim), room(2 * kPage * dim);
  std::vector<State<T>> states;
  std::vector<int64_t> rows;
  T* const out = static_cast<T*>(decode.out);
  for (int64_t i = 0; i < decode.width; ++i) {
    if (members[i] < 0) continue;
    const int64_t row = members[i];
    for (int64_t j = 0; j < repeat; ++j) {
      const int64_t at = (row * decode.heads + head * repeat + j) * dim;
      for (int64_t d = 0; d < dim; ++d) out[at + d] = 0;
      if (decode.own_length[row] == 0) continue;
      T* query = queries.data() + static_cast<int64_t>(states.size()) * dim;
      const In* from = static_cast<const In*>(decode.q) + row * decode.q_stride + (head * repeat + j) * dim;
      if constexpr (std::is_same_v<T, In>) {
        if (decode.q_weight != nullptr) {
          turned(decode, from, decode.q_weight, row, query);
          from = query;
        }
      }
      for (int64_t d = 0; d < dim; ++d) query[d] = wide(from[d]) * static_cast<T>(decode.scale);
      states.push_back({query, -std::numeric_limits<T>::infinity(), T{0}, out + at});
    }
    if (decode.own_length[row] > 0) rows.push_back(row);
  }
  if (rows.empty()) return;
  const auto over = [&](const int32_t* table, int64_t length, State<T>* first, int64_t count) __attribute__((always_inline)) {
    for (int64_t begin = 0; begin < length; begin += kPage) {
      const int64_t tokens = length - begin < kPage ? length - begin : kPage, page = table[begin / kPage];
      const T* keys = page_as<T, In>(decode.k_pages, page, tokens, decode, head, room.data());
      const T* values = page_as<T, In>(decode.v_pages, page, tokens, decode, head, room.data() + kPage * dim);
      for (int64_t i = 0; i < count; ++i) attend(first[i], keys, values, tokens, dim);
    }
  };
  const int64_t group = decode.group[rows[0]], count = static_cast<int64_t>(rows.size());
  over(decode.prompt_page + group * decode.prompt_pages, decode.prompt_length[group], states.data(), count * repeat);
  for (int64_t i = 0; i < count; ++i)
    over(decode.own_page + rows[i] * decode.own_pages, decode.own_length[rows[i]], &states[i * repeat], repeat);
  for (State<T>& state : states) {
    const T share = T{1} / state.total;
    for (int64_t d = 0; d < dim; ++d) state.out[d] *= share;
  }
}

PRISM_BY_CPU void tile_of_floats(const Decode& d, int64_t t, int64_t h) { attend_tile<float, float>(d, t, h); }
PRISM_BY_CPU void tile_of_doubles(const Decode& d, int64_t t, int64_t h) { attend_tile<double, double>(d, t, h); }
PRISM_BY_CPU void tile_of_brains(const Decode& d, int64_t t, int64_t h) { attend_tile<float, Brain>(d, t, h); }
PRISM_BY_CPU void tile_of_halves(const Decode& d, int64_t t, int64_t h) { attend_tile<float, Half>(d, t, h); }

bool within(const int32_t* values, int64_t count, int64_t low, int64_t high) {
  bool fine = true;
  for (int64_t i = 0; i < count; ++i) fine &= (values[i] >= low) & (values[i] < high);
  return fine;
}

bool fits(const Decode& d) {
  return within(d.prompt_page, d.prompts * d.prompt_pages, 0, d.pages) &&
         within(d.own_page, d.rows * d.own_pages, 0, d.pages) &&
         within(d.prompt_length, d.prompts, 0, d.prompt_pages * kPage + 1) &&
         within(d.own_length, d.rows, 0, d.own_pages * kPage + 1) && within(d.group, d.rows, 0, d.prompts) &&
         within(d.tile_row, d.tiles * d.width, -1, d.rows);
}

// The new tokens' keys and values to their places.
template <typename T>
PRISM_INLINE void append(const Decode& d) {
  for (int64_t row = 0; row < d.rows; ++row) {
    const int64_t last = d.own_length[row] - 1;
    if (last < 0) continue;
    const int64_t page = d.own_page[row * d.own_pages + last / kPage];
    for (int64_t head = 0; head < d.kv_heads; ++head) {
      const int64_t to = ((page * d.kv_heads + head) * kPage + last % kPage) * d.dim;
      const T* key = static_cast<const T*>(d.k) + row * d.k_stride + head * d.dim;
      const T* value = static_cast<const T*>(d.v) + row * d.v_stride + head * d.dim;
      std::memcpy(static_cast<T*>(d.v_pages) + to, value, d.dim * sizeof(T));
      if constexpr (std::is_floating_point_v<T>) {
        if (d.k_weight != nullptr) {
          turned(d, key, d.k_weight, row, static_cast<T*>(d.k_pages) + to);
          continue;
        }
      }
      std::memcpy(static_cast<T*>(d.k_pages) + to, key, d.dim * sizeof(T));
    }
  }
}

PRISM_BY_CPU void append_floats(const Decode& d) { append<float>(d); }
PRISM_BY_CPU void append_doubles(const Decode& d) { append<double>(d); }

void append_all(const Decode& d, Number number) {
  switch (number) {
    case Number::kFloat: return append_floats(d);
    case Number::kDouble: return append_doubles(d);
    default: return append<uint16_t>(d);
  }
}

}  // namespace

bool shared_prompt_decode(const Decode& decode, Number number, int64_t threads) {
  if (!fits(decode)) return false;
  append_all(decode, number);
  for_each(decode.tiles * decode.kv_heads, threads, [&](int64_t unit) {
    const int64_t tile = unit / decode.kv_heads, head = unit % decode.kv_heads;
    switch (number) {
      case Number::kFloat: return tile_of_floats(decode, tile, head);
      case Number::kDouble: return tile_of_doubles(decode, tile, head);
      case Number::kBrain: return tile_of_brains(decode, tile, head);
      case Number::kHalf: return tile_of_halves(decode, tile, head);
    }
  });
  return true;
}

}  // namespace prism
