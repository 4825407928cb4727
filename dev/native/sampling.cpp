// sample_tokens: a word that is there and allowed, the most probable one without noise; NaN where a logit is NaN or infinite.
#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "input.h"

namespace {

template <typename T>
void run(Input& in) {
  const int64_t rows = 1 + in.below(3), words = 1 + in.below(700), stride = words + in.below(3);
  const bool noisy = in.flag(), odd = in.byte() % 4 == 0;
  std::vector<int64_t> forbidden;
  for (int64_t word = in.below(8); word < words && in.flag(); word += 1 + in.below(200)) forbidden.push_back(word);
  int64_t first = 0;
  for (int64_t word : forbidden) first += word == first;
  if (first == words) return;  // refused before (kernels/prism_kernels/sample_tokens/api.py)
  std::vector<T> logits(rows * stride);
  uint32_t state = static_cast<uint32_t>(in.bits()) | 1;
  const double size = in.flag() ? 0.1 : 1e3;
  for (T& x : logits) state = state * 1664525u + 1013904223u, x = static_cast<T>((static_cast<int>(state >> 20) - 2048) * size / 2048);
  if (odd) {
    const double values[] = {NAN, INFINITY, -INFINITY, 1e38, -1e38, 0.0};
    for (int64_t i = in.below(20); i > 0; --i) logits[in.below(rows * stride)] = static_cast<T>(values[in.below(6)]);
  }
  std::vector<int64_t> response(rows), step(rows), token(rows, -1);
  for (int64_t row = 0; row < rows; ++row) response[row] = static_cast<int64_t>(in.bits()), step[row] = in.below(5000);
  std::vector<float> logprob(rows, 7.0f);
  const prism::Draw<T> draw{logits.data(), rows, stride, words, T{1}, noisy, in.bits(), response.data(), step.data(),
                            forbidden.data(), static_cast<int64_t>(forbidden.size()), first, token.data(), logprob.data()};
  prism::sample_tokens(draw, 1 + in.below(2));
  for (int64_t row = 0; row < rows; ++row) {
    HOLDS(0 <= token[row] && token[row] < words);
    HOLDS(!std::binary_search(forbidden.begin(), forbidden.end(), token[row]));
    HOLDS(std::isnan(logprob[row]) || logprob[row] <= 1e-5f);
    T best = -std::numeric_limits<T>::infinity();
    bool faulty = false;
    for (int64_t word = 0; word < words; ++word) {
      if (std::binary_search(forbidden.begin(), forbidden.end(), word)) continue;
      const T x = logits[row * stride + word];
      faulty |= std::isnan(x) || x == std::numeric_limits<T>::infinity();
      best = x > best ? x : best;
    }
    if (faulty) HOLDS(std::isnan(logprob[row]));
    if (!faulty && std::isfinite(best) && !noisy) HOLDS(logits[row * stride + token[row]] == best);
    if (!faulty && std::isfinite(best)) HOLDS(!std::isnan(logprob[row]));
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in(data, size);
  in.flag() ? run<double>(in) : run<float>(in);
  return 0;
}
