#include "adamw.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

// One source, compiled for the widths of vectors that CPUs have; which one runs is asked of the CPU, and none of them
// gives other bits: every lane does what one number would.
#if defined(__x86_64__) && defined(__GNUC__)
#define PRISM_WIDTHS 1
#else
#define PRISM_WIDTHS 0
#endif

namespace prism::adamw {
namespace {

template <bool kSplit, typename Gradient, typename Moment>
PRISM_INLINE void update_range(const Row& row, const Constants& c, float clip, int64_t begin, int64_t end) {
  float* __restrict__ whole = static_cast<float*>(row.parameter);
  uint16_t* __restrict__ upper = static_cast<uint16_t*>(row.parameter);
  int16_t* __restrict__ lower = row.remainder;
  const Gradient* __restrict__ gradient = static_cast<const Gradient*>(row.gradient);
  Moment* __restrict__ exp_avg = static_cast<Moment*>(row.exp_avg);
  Moment* __restrict__ exp_avg_sq = static_cast<Moment*>(row.exp_avg_sq);
  const Row local = row;  // not read again after a store
  for (int64_t i = begin; i < end; ++i) {
    float weight = kSplit ? join(upper[i], lower[i]) : whole[i];
    float average = wide(exp_avg[i]), square = wide(exp_avg_sq[i]);
    update(weight, times(wide(gradient[i]), clip), average, square, local, c);
    const uint32_t random = sizeof(Moment) == 2 ? random_bits(local.key, i) : 0;
    store(exp_avg + i, average, random & 0xffffu);
    store(exp_avg_sq + i, square, random >> 16);
    if (kSplit) {
      split(weight, upper[i], lower[i]);
    } else {
      whole[i] = weight;
    }
  }
}

using Range = void (*)(const Row&, const Constants&, float, int64_t, int64_t);

#define PRISM_RANGE(NAME, ATTRIBUTE)                                                               \
  template <bool kSplit, typename Gradient, typename Moment>                                       \
  ATTRIBUTE void NAME(const Row& row, const Constants& c, float clip, int64_t begin, int64_t end) { \
    update_range<kSplit, Gradient, Moment>(row, c, clip, begin, end);                              \
  }

PRISM_RANGE(range_any, )
#if PRISM_WIDTHS
PRISM_RANGE(range_avx2, __attribute__((target("avx2,fma"))))
PRISM_RANGE(range_avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))))
#endif

// The widest that this CPU has, of at most so many bits.
template <bool kSplit, typename Gradient, typename Moment>
Range widest([[maybe_unused]] int bits) {
#if PRISM_WIDTHS
  __builtin_cpu_init();
  const bool fma = __builtin_cpu_supports("fma");
  if (bits >= 512 && fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return range_avx512<kSplit, Gradient, Moment>;
  }
  if (bits >= 256 && fma && __builtin_cpu_supports("avx2")) return range_avx2<kSplit, Gradient, Moment>;
#endif
  return range_any<kSplit, Gradient, Moment>;
}

template <bool kSplit, typename Gradient>
Range by_moment(bool bf16, int bits) {
  return bf16 ? widest<kSplit, Gradient, uint16_t>(bits) : widest<kSplit, Gradient, float>(bits);
}

template <bool kSplit>
Range by_gradient(const Kind& kind, int bits) {
  return kind.bf16_gradient ? by_moment<kSplit, uint16_t>(kind.bf16_moments, bits)
                            : by_moment<kSplit, float>(kind.bf16_moments, bits);
}

}  // namespace

void on_cpu(const Row* rows, int64_t num_rows, Kind kind, const Constants& constants, float clip, Use use) {
  const Range range = kind.split ? by_gradient<true>(kind, use.bits) : by_gradient<false>(kind, use.bits);
  if (num_rows == 0) return;
  const Row& last = rows[num_rows - 1];
  const int64_t chunks = last.first_chunk + (last.size + kChunk - 1) / kChunk;
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    const Row* row = rows;
    for (int64_t chunk; (chunk = next++) < chunks;) {
      while (row + 1 < rows + num_rows && row[1].first_chunk <= chunk) ++row;
      const int64_t begin = (chunk - row->first_chunk) * kChunk;
      range(*row, constants, clip, begin, std::min(begin + kChunk, row->size));
    }
  };
  std::vector<std::thread> others;
  for (int64_t i = 1; i < std::min<int64_t>(use.threads, chunks); ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace prism::adamw
