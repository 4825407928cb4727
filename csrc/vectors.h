// What the numeric loops share: versions by CPU, vectors of eight, their exponential, threads.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

// Compiled twice, for AVX2 and for any x86-64; which one runs is found when the library is loaded. No fused
// multiply-add (-ffp-contract=off), so both round alike. What such a function calls must be inlined into it.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define PRISM_BY_CPU __attribute__((target_clones("avx2", "default")))
#else
#define PRISM_BY_CPU
#endif
#define PRISM_INLINE inline __attribute__((always_inline))

namespace prism {

// Eight numbers, as two registers of a CPU without AVX2: what compilers make of loops differs, this does not.
constexpr int kLanes = 8;
using Floats = float __attribute__((vector_size(32)));
using Ints = int32_t __attribute__((vector_size(32)));
using Words = uint32_t __attribute__((vector_size(32)));
using Doubles = double __attribute__((vector_size(64)));

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = Floats;
};
template <>
struct VectorOf<double> {
  using type = Doubles;
};
template <typename T>
using Vector = typename VectorOf<T>::type;

template <typename V, typename T>
PRISM_INLINE V load(const T* from) {
  V x;
  std::memcpy(&x, from, sizeof(V));
  return x;
}

template <typename V, typename T>
PRISM_INLINE void store(T* to, V x) {
  std::memcpy(to, &x, sizeof(V));
}

template <typename T>
PRISM_INLINE Vector<T> filled(T value) {
  return Vector<T>{} + value;
}

// Lanes of two vectors, the second's counted on from the first's.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define PRISM_SHUFFLE 1
#endif
#endif
template <int... kLane, typename V>
PRISM_INLINE V lanes_of(V a, V b) {
#ifdef PRISM_SHUFFLE
  return __builtin_shufflevector(a, b, kLane...);
#else
  return V{(kLane < kLanes ? a[kLane % kLanes] : b[kLane % kLanes])...};
#endif
}

template <typename T>
PRISM_INLINE T largest_of(Vector<T> x) {
  T top = x[0];
  for (int j = 1; j < kLanes; ++j) top = x[j] > top ? x[j] : top;
  return top;
}

template <typename T>
PRISM_INLINE T sum_of(Vector<T> x) {
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

// exp(x) for x <= 0 to 2e-7 of itself, 0 below -87; NaN stays NaN. x = n log 2 + r, |r| <= log(2) / 2, Taylor to r^7.
PRISM_INLINE Floats exp_of(Floats x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: the last bits of a sum with it are a rounded integer
  const Floats shifted = x * 1.44269504f + kRound;
  const Floats n = shifted - kRound;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  const Floats scaled = (Floats)((Ints)p + ((Ints)shifted << 23));
  return x < -87.0f ? Floats{} : (x == x ? scaled : x);
}

PRISM_INLINE Doubles exp_of(Doubles x) {
  Doubles y;
  for (int j = 0; j < kLanes; ++j) y[j] = __builtin_exp(x[j]);
  return y;
}

// run(i) for i in [0, count), on as many threads as asked for; this one is among them. Which thread takes which i does
// not matter to the result.
template <typename Run>
void for_each(int64_t count, int64_t threads, const Run& run) {
  threads = threads < count ? threads : count;
  const auto share = [&](int64_t first) {
    for (int64_t i = first; i < count; i += threads) run(i);
  };
  std::vector<std::thread> others;
  for (int64_t t = 1; t < threads; ++t) others.emplace_back(share, t);
  if (count > 0) share(0);
  for (std::thread& other : others) other.join();
}

}  // namespace prism
