#include "sample.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "simd.h"

namespace prism {
namespace {

constexpr int kNeighbours = 64;          // words that share an output number
constexpr int kBlock = 4 * kNeighbours;  // words of as many calls
constexpr float kLargest = 23.0f;        // above all noise
constexpr int kRounds = 10;

PRISM_INLINE double exp_of(double x) { return std::exp(x); }
using prism::exp_of;

// Four words of 32 bits for each of kNeighbours counters [first + i, step, response]: words first * 4 + 64 j + i.
PRISM_INLINE void philox(uint32_t first, uint32_t step, uint64_t response, uint64_t seed, uint32_t out[4][kNeighbours]) {
  uint32_t* c[4] = {out[0], out[1], out[2], out[3]};
  for (int i = 0; i < kNeighbours; ++i) {
    c[0][i] = first + i;
    c[1][i] = step;
    c[2][i] = static_cast<uint32_t>(response);
    c[3][i] = static_cast<uint32_t>(response >> 32);
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kRounds; ++round) {
    for (int i = 0; i < kNeighbours; ++i) {
      const uint64_t p0 = uint64_t{c[0][i]} * 0xD2511F53u, p1 = uint64_t{c[2][i]} * 0xCD9E8D57u;
      c[0][i] = static_cast<uint32_t>(p1 >> 32) ^ c[1][i] ^ k0;
      c[2][i] = static_cast<uint32_t>(p0 >> 32) ^ c[3][i] ^ k1;
      c[1][i] = static_cast<uint32_t>(p1);
      c[3][i] = static_cast<uint32_t>(p0);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

struct Split {
  float f, e;  // x = (1 + f) 2^e
};

PRISM_INLINE Split split(float x) {
  constexpr int32_t kRootHalf = 0x3F3504F3;
  const int32_t shifted = bits_as<int32_t>(x) - kRootHalf;
  return {bits_as<float>((shifted & 0x7FFFFF) + kRootHalf) - 1.0f, static_cast<float>(shifted >> 23)};
}

PRISM_INLINE float log1p_of(float f) {
  float p = -0.07634492963552475f;
  p = p * f + 0.12761574983596802f;
  p = p * f + -0.13160182535648346f;
  p = p * f + 0.14201758801937103f;
  p = p * f + -0.16623356938362122f;
  p = p * f + 0.20001226663589478f;
  p = p * f + -0.2500081956386566f;
  p = p * f + 0.3333333134651184f;
  const float square = f * f;
  return f + (square * f * p - square * 0.5f);
}

PRISM_INLINE float gumbel(uint32_t bits) {
  constexpr float kLog2 = 0.693147182464599609375f, kFar = 0.2928932309150696f;
  const bool upper = bits >> 31;
  const float x = (static_cast<float>(static_cast<int32_t>(upper ? ~bits : bits)) + 0.5f) * 2.3283064365386963e-10f;
  const Split lower = split(x);
  const bool far = x > kFar;
  const float beside = far ? 1.0f - (x + x) : -x;
  const float f = upper ? beside : lower.f, e = upper ? (far ? -1.0f : -0.0f) : lower.e;
  const float exponential = -(e * kLog2 + log1p_of(f));
  const Split again = split(exponential);
  return -(again.e * kLog2 + log1p_of(again.f));
}

// z (words,) of one row, -inf where a word is barred; block (words / kBlock,): the largest of each. Returns the first of the
// largest.
template <typename T>
PRISM_INLINE int64_t scale(const T* logits, const DrawArguments& a, T* z, T* block) {
  const T inverse = static_cast<T>(a.inverse), never = -std::numeric_limits<T>::infinity();
  for (int64_t w = 0; w < a.words; ++w) z[w] = logits[w] * inverse;
  for (int64_t i = 0; i < a.num_forbidden; ++i) z[a.forbidden[i]] = never;
  int64_t best = 0;
  for (int64_t b = 0, first = 0; first < a.words; ++b, first += kBlock) {
    const int64_t end = std::min<int64_t>(first + kBlock, a.words);
    T largest[kLanes];
    std::fill(largest, largest + kLanes, never);
    int64_t w = first;
    for (; w + kLanes <= end; w += kLanes)
      for (int i = 0; i < kLanes; ++i) largest[i] = z[w + i] > largest[i] ? z[w + i] : largest[i];
    for (; w < end; ++w) largest[0] = z[w] > largest[0] ? z[w] : largest[0];
    block[b] = *std::max_element(largest, largest + kLanes);
    if (block[b] > block[best]) best = b;
  }
  const int64_t first = best * kBlock, end = std::min<int64_t>(first + kBlock, a.words);
  const T* found = std::find(z + first, z + end, block[best]);
  return found == z + end ? first : found - z;
}

template <typename T>
PRISM_INLINE double sum_of_exp(const T* z, int64_t words, T top) {
  double total = 0;
  for (int64_t first = 0; first < words; first += kBlock) {
    const int64_t end = std::min<int64_t>(first + kBlock, words);
    T lanes[kLanes] = {};
    int64_t w = first;
    for (; w + kLanes <= end; w += kLanes)
      for (int i = 0; i < kLanes; ++i) lanes[i] += exp_of(z[w + i] - top);
    for (; w < end; ++w) lanes[0] += exp_of(z[w] - top);
    for (const T lane : lanes) total += lane;
  }
  return total;
}

// The first of the words with the largest z + noise.
template <typename T>
PRISM_INLINE int64_t winner(const T* z, const T* block, const DrawArguments& a, int64_t row, int64_t top) {
  const uint64_t response = static_cast<uint64_t>(a.response[row]);
  const uint32_t step = static_cast<uint32_t>(a.step[row]);
  alignas(64) uint32_t bits[4][kNeighbours];
  alignas(64) T score[kBlock];
  T best = -std::numeric_limits<T>::infinity();
  int64_t token = -1;
  const auto look = [&](int64_t b) {
    const int64_t first = b * kBlock, count = std::min<int64_t>(kBlock, a.words - first);
    philox(static_cast<uint32_t>(b * kNeighbours), step, response, a.seed, bits);
    const uint32_t* flat = &bits[0][0];
    for (int64_t i = 0; i < count; ++i) score[i] = z[first + i] + gumbel(flat[i]);
    T largest = -std::numeric_limits<T>::infinity();
    for (int64_t i = 0; i < count; ++i) largest = score[i] > largest ? score[i] : largest;
    const bool before = token >= 0 && first < token;
    if (largest > best || (largest == best && before)) {
      best = largest;
      token = first + (std::find(score, score + count, largest) - score);
    }
  };
  const int64_t start = top / kBlock;
  look(start);
  for (int64_t b = 0; b * kBlock < a.words; ++b)
    if (b != start && block[b] + kLargest >= best) look(b);
  return token;
}

template <typename T>
PRISM_INLINE void sample_rows(const T* logits, const DrawArguments& a, int64_t* token, float* logprob) {
  std::vector<T> z(a.words), block((a.words + kBlock - 1) / kBlock);
  for (int64_t row = 0; row < a.rows; ++row) {
    const int64_t top = scale(logits + row * a.stride, a, z.data(), block.data());
    const double total = sum_of_exp(z.data(), a.words, z[top]);
    int64_t chosen = top;
    if (!(z[top] > -std::numeric_limits<T>::infinity())) {
      chosen = a.first_allowed;
    } else if (!a.greedy) {
      chosen = winner(z.data(), block.data(), a, row, top);
      chosen = chosen < 0 ? top : chosen;
    }
    token[row] = chosen;
    logprob[row] = static_cast<float>(static_cast<double>(z[chosen]) - static_cast<double>(z[top]) - std::log(total));
  }
}

PRISM_INLINE void sample_float_in(const float* logits, const DrawArguments& a, int64_t* token, float* logprob) {
  sample_rows(logits, a, token, logprob);
}
PRISM_INLINE void sample_double_in(const double* logits, const DrawArguments& a, int64_t* token, float* logprob) {
  sample_rows(logits, a, token, logprob);
}
PRISM_WITH_AVX2(sample_float, (const float* logits, const DrawArguments& a, int64_t* token, float* logprob),
                (logits, a, token, logprob))
PRISM_WITH_AVX2(sample_double, (const double* logits, const DrawArguments& a, int64_t* token, float* logprob),
                (logits, a, token, logprob))

}  // namespace

void sample_tokens(const float* logits, const DrawArguments& arguments, int64_t* token, float* logprob) {
  sample_float(logits, arguments, token, logprob);
}
void sample_tokens(const double* logits, const DrawArguments& arguments, int64_t* token, float* logprob) {
  sample_double(logits, arguments, token, logprob);
}

}  // namespace prism
