// Loops that compilers turn into vectors, and number formats of 16 bits. Sums have an order of their own (kLanes partial
// sums), and products are not fused into them, so that every processor gives the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__GNUC__)
#define PRISM_INLINE inline __attribute__((always_inline))
#else
#define PRISM_INLINE inline
#endif

// A function for AVX2 beside the one for any x86-64; the processor is asked once. `name(...)` calls `name##_on<...>`.
#if defined(__GNUC__) && defined(__x86_64__)
#define PRISM_WITH_AVX2(name, arguments, values)                                \
  __attribute__((target("avx2"))) void name##_avx2 arguments { name##_in values; } \
  void name##_any arguments { name##_in values; }                               \
  void name arguments {                                                         \
    static const bool wide = __builtin_cpu_supports("avx2");                    \
    wide ? name##_avx2 values : name##_any values;                              \
  }
#else
#define PRISM_WITH_AVX2(name, arguments, values) \
  void name arguments { name##_in values; }
#endif

namespace prism {

constexpr int kLanes = 8;

template <typename To, typename From>
PRISM_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

PRISM_INLINE float widen(float x) { return x; }
PRISM_INLINE double widen(double x) { return x; }
PRISM_INLINE float widen(BFloat16 x) { return bits_as<float>(static_cast<uint32_t>(x.bits) << 16); }
PRISM_INLINE float widen(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = x.bits & 0x7FFF;
  // exponent and mantissa in fp32's places are 2^-112 of the number, denormal ones too; 2^16 and above are inf and NaN
  const float size = bits_as<float>(rest << 13) * bits_as<float>(uint32_t{(127 + 112)} << 23);
  const uint32_t odd = rest >= 0x7C00 ? 0x7F800000u | (rest << 13) : 0u;
  return bits_as<float>(sign | bits_as<uint32_t>(size) | odd);
}

PRISM_INLINE void narrow(float x, float* to) { *to = x; }
PRISM_INLINE void narrow(double x, double* to) { *to = x; }
PRISM_INLINE void narrow(float x, BFloat16* to) {
  const uint32_t bits = bits_as<uint32_t>(x), even = 0x7FFF + ((bits >> 16) & 1);
  to->bits = static_cast<uint16_t>(x != x ? (bits >> 16) | 0x40 : (bits + even) >> 16);
}
PRISM_INLINE void narrow(float x, Half* to) {
  const uint32_t bits = bits_as<uint32_t>(x), sign = (bits >> 16) & 0x8000, size = bits & 0x7FFFFFFF;
  uint32_t out;
  if (size > 0x7F800000) {
    out = 0x7E00;  // NaN
  } else if (size >= 0x477FF000) {
    out = 0x7C00;  // rounds beyond 65504
  } else if (size < 0x38800000) {  // below 2^-14: adding 1/2 leaves the rounded multiple of 2^-24 in the last bits
    out = bits_as<uint32_t>(bits_as<float>(size) + 0.5f) - 0x3F000000;
  } else {
    out = (size + 0xFFF + ((size >> 13) & 1) - 0x38000000) >> 13;
  }
  to->bits = static_cast<uint16_t>(sign | out);
}

// exp(x) for x <= 0, within 2 units of the last place; below -87 a number under 2e-38. NaN stays NaN.
PRISM_INLINE float exp_of(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves whole numbers in the last bits
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504088896341f + kRound, n = shifted - kRound;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float y = p * (r * r) + r + 1.0f;
  return y * bits_as<float>((bits_as<uint32_t>(shifted) - bits_as<uint32_t>(kRound) + 127) << 23);
}

}  // namespace prism
