// One token per row by Gumbel-max: the native form of kernels/prism_kernels/sample_tokens/reference.py, whose noise.py
// says how noise comes from a counter.
#pragma once

#include <cstdint>

namespace prism {

template <typename T>  // float or double
struct Draw {
  const T* logits;  // rows of `words` numbers, `stride` apart
  int64_t rows, stride, words;
  T inverse;    // logits times this are the scores without noise
  bool noisy;   // false: the most probable word
  uint64_t seed;
  const int64_t* response;  // (rows,)
  const int64_t* step;
  const int64_t* forbidden;  // ascending, each below words
  int64_t num_forbidden, first_allowed;
  int64_t* token;  // (rows,), written
  float* logprob;  // NaN where a number is NaN or +inf, or none is left
};

void sample_tokens(const Draw<float>& draw, int64_t threads);
void sample_tokens(const Draw<double>& draw, int64_t threads);

}  // namespace prism
