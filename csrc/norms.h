// RMSNorm of one vector and its rotation, which the elementwise loops and decoding share.
#pragma once

#include <cmath>

#include "vectors.h"

namespace prism {

// 1 / sqrt(mean of squares + eps).
template <typename T>
PRISM_INLINE T scale_of(const T* x, int64_t width, T eps) {
  Vector<T> squares = {};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    const auto part = load<Vector<T>>(x + i);
    squares += part * part;
  }
  T sum = sum_of<T>(squares);
  for (; i < width; ++i) sum += x[i] * x[i];
  return 1 / std::sqrt(sum / static_cast<T>(width) + eps);
}

// One head: normalised, then element j turned with j + dim / 2. y is not x.
template <typename T>
PRISM_INLINE void norm_and_turn(const T* x, const T* weight, const T* cos, const T* sin, int64_t dim, T eps,
                                T* __restrict y) {
  const int64_t half = dim / 2;
  const T scale = scale_of(x, dim, eps);
  for (int64_t i = 0; i < half; ++i) {
    const T first = weight[i] * (x[i] * scale), second = weight[half + i] * (x[half + i] * scale);
    y[i] = first * cos[i] - second * sin[i];
    y[half + i] = second * cos[half + i] + first * sin[half + i];
  }
}

}  // namespace prism
