#include "sampling.h"

#include <cmath>
#include <limits>

#include "vectors.h"

namespace prism {
namespace {

constexpr int kCalls = 64;  // of Philox, neighbours
constexpr int kBlock = 4 * kCalls;
constexpr int kGroup = 32;  // words whose noise is made together, or not at all
constexpr float kLargest = 23.0f;  // above all noise

struct Key {
  uint32_t k0, k1, step, r0, r1;
};

// Philox 4x32-10 for 64 neighbouring calls: bits of 256 words, in order.
PRISM_INLINE void block_bits(const Key& key, uint32_t first_call, uint32_t* bits) {
  for (int i = 0; i < kCalls; ++i) {
    uint32_t a = first_call + static_cast<uint32_t>(i), b = key.step, c = key.r0, d = key.r1;
    uint32_t k0 = key.k0, k1 = key.k1;
#pragma GCC unroll 10
    for (int turn = 0; turn < 10; ++turn) {
      const uint64_t p = static_cast<uint64_t>(a) * 0xD2511F53u, q = static_cast<uint64_t>(c) * 0xCD9E8D57u;
      a = static_cast<uint32_t>(q >> 32) ^ b ^ k0;
      b = static_cast<uint32_t>(q);
      c = static_cast<uint32_t>(p >> 32) ^ d ^ k1;
      d = static_cast<uint32_t>(p);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    bits[i] = a;
    bits[kCalls + i] = b;
    bits[2 * kCalls + i] = c;
    bits[3 * kCalls + i] = d;
  }
}

// noise.py's operations, in its order: the same bits.
PRISM_INLINE Floats log1p_of(Floats f) {
  Floats p = f * -0.07634492963552475f + 0.12761574983596802f;
  p = p * f + -0.13160182535648346f;
  p = p * f + 0.14201758801937103f;
  p = p * f + -0.16623356938362122f;
  p = p * f + 0.20001226663589478f;
  p = p * f + -0.2500081956386566f;
  p = p * f + 0.3333333134651184f;
  const Floats square = f * f;
  return f + (square * f * p - square * 0.5f);
}

constexpr int32_t kSqrtHalf = 0x3F3504F3;
constexpr float kLog2 = 0.693147182464599609375f, kFar = 0.2928932309150696f;

PRISM_INLINE Floats mantissa_of(Floats x) { return (Floats)((((Ints)x - kSqrtHalf) & 0x7FFFFF) + kSqrtHalf) - 1.0f; }

PRISM_INLINE Floats exponent_of(Floats x) { return __builtin_convertvector(((Ints)x - kSqrtHalf) >> 23, Floats); }

PRISM_INLINE Floats gumbel(Words bits) {
  const Ints upper = (Ints)bits >> 31;  // all bits or none
  const Floats x = (__builtin_convertvector((Ints)bits ^ upper, Floats) + 0.5f) * 0x1p-32f;
  const Ints far = x > kFar;
  const Floats f = upper ? (far ? 1.0f - (x + x) : -x) : mantissa_of(x);
  const Floats e = upper ? __builtin_convertvector(far, Floats) : exponent_of(x);
  const Floats exponential = -(e * kLog2 + log1p_of(f));
  return -(exponent_of(exponential) * kLog2 + log1p_of(mantissa_of(exponential)));
}

// Never below gumbel(bits), at a tenth of its price: noise is at most -log(1 - u), and that by its power of two.
PRISM_INLINE Floats bound_of(Words bits) {
  const Ints upper = (Ints)bits >> 31;
  const Floats rest = upper ? __builtin_convertvector(~(Ints)bits, Floats) * 0x1p-32f + 0x1p-33f : Floats{} + 0.5f;
  return __builtin_convertvector(127 - ((Ints)rest >> 23), Floats) * 0.6931473f + 1e-4f;
}

template <typename T>
PRISM_INLINE int index_of(const T* x, T value) {
  int at = 0;
  while (x[at] != value) ++at;
  return at;
}

template <typename T>
PRISM_INLINE void sample_row(const Draw<T>& draw, int64_t row) {
  constexpr T kNever = -std::numeric_limits<T>::infinity();
  using V = Vector<T>;
  const T* logits = draw.logits + row * draw.stride;
  const uint64_t response = static_cast<uint64_t>(draw.response[row]);
  const Key key = {static_cast<uint32_t>(draw.seed), static_cast<uint32_t>(draw.seed >> 32),
                   static_cast<uint32_t>(draw.step[row]), static_cast<uint32_t>(response),
                   static_cast<uint32_t>(response >> 32)};
  T z[kBlock];
  uint32_t bits[kBlock];
  T top = kNever, best = kNever, best_z = kNever;
  double total = 0;
  int64_t token = draw.first_allowed, barred = 0;
  bool odd = false;
  for (int64_t first = 0; first < draw.words; first += kBlock) {
    const int64_t n = draw.words - first < kBlock ? draw.words - first : kBlock;
    for (int64_t i = 0; i < n; ++i) z[i] = logits[first + i] * draw.inverse;
    for (int64_t i = n; i < kBlock; ++i) z[i] = kNever;
    for (; barred < draw.num_forbidden && draw.forbidden[barred] < first + n; ++barred)
      z[draw.forbidden[barred] - first] = kNever;
    V high = filled<T>(kNever), seen = V{};
    for (int i = 0; i < kBlock; i += kLanes) {
      const V x = load<V>(z + i);
      high = x > high ? x : high;            // NaN is not
      seen = x == x ? seen : filled<T>(1);
    }
    odd |= sum_of<T>(seen) > 0;
    const T here = largest_of<T>(high);
    if (here == kNever) continue;
    if (here > top) {
      total *= std::exp(static_cast<double>(top) - static_cast<double>(here));
      top = here;
    }
    V sum = V{};
    for (int i = 0; i < kBlock; i += kLanes) sum += exp_of(load<V>(z + i) - top);
    total += sum_of<T>(sum);
    // Noise is made where it can matter: with the largest there is, this block's words stay below the best.
    const bool loses = draw.noisy ? here + static_cast<T>(kLargest) < best : here <= best;
    if (loses) continue;
    if (!draw.noisy) {
      best = best_z = here;
      token = first + index_of(z, here);
      continue;
    }
    block_bits(key, static_cast<uint32_t>(first / 4), bits);
    for (int i = 0; i < kBlock; i += kGroup) {
      V most = filled<T>(kNever);
      for (int j = i; j < i + kGroup; j += kLanes) {
        const V x = load<V>(z + j) + __builtin_convertvector(bound_of(load<Words>(bits + j)), V);
        most = x > most ? x : most;
      }
      if (!(largest_of<T>(most) > best)) continue;
      T score[kGroup];
      high = filled<T>(kNever);
      for (int j = 0; j < kGroup; j += kLanes) {
        const V x = load<V>(z + i + j) + __builtin_convertvector(gumbel(load<Words>(bits + i + j)), V);
        store(score + j, x);
        high = x > high ? x : high;
      }
      const T highest = largest_of<T>(high);
      if (!(highest > best)) continue;
      const int at = i + index_of(score, highest);
      best = highest;
      best_z = z[at];
      token = first + at;
    }
  }
  draw.token[row] = token;
  const double logprob = (static_cast<double>(best_z) - static_cast<double>(top)) - std::log(total);
  draw.logprob[row] = odd || best_z == kNever ? std::numeric_limits<float>::quiet_NaN() : static_cast<float>(logprob);
}

PRISM_BY_CPU void sample_one(const Draw<float>& draw, int64_t row) { sample_row(draw, row); }
PRISM_BY_CPU void sample_one(const Draw<double>& draw, int64_t row) { sample_row(draw, row); }

}  // namespace

void sample_tokens(const Draw<float>& draw, int64_t threads) {
  for_each(draw.rows, threads, [&](int64_t row) { sample_one(draw, row); });
}

void sample_tokens(const Draw<double>& draw, int64_t threads) {
  for_each(draw.rows, threads, [&](int64_t row) { sample_one(draw, row); });
}

}  // namespace prism
