// Gumbel-max with noise from a counter: the native form of kernels/prism_kernels/sample_tokens/reference.py, to the bit
// of noise and scores (sample_tokens/noise.py has the derivations).
#pragma once

#include <cstdint>
#include <vector>

namespace prism {

struct DrawArguments {
  int64_t rows, stride, words;  // stride: from one row of logits to the next
  double inverse;               // of the temperature; logits times this are scores
  bool greedy;                  // the most probable word
  uint64_t seed;
  const int64_t* response;  // (rows,)
  const int64_t* step;      // (rows,)
  const int64_t* forbidden;
  int64_t num_forbidden, first_allowed;
};

// token (rows,), logprob (rows,): NaN where a score is NaN or +inf, or where all are -inf.
void sample_tokens(const float* logits, const DrawArguments& arguments, int64_t* token, float* logprob);
void sample_tokens(const double* logits, const DrawArguments& arguments, int64_t* token, float* logprob);

}  // namespace prism
