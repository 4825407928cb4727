#include "elementwise.h"

#include "norms.h"

namespace prism {
namespace {

template <typename T>
PRISM_INLINE void norm_rows(const T* x, const T* residual, const T* weight, int64_t rows, int64_t width, T eps, T* __restrict y,
                            T* __restrict total) {
  for (int64_t row = 0; row < rows; ++row, x += width, y += width) {
    const T* of = x;
    if (residual != nullptr) {
      for (int64_t i = 0; i < width; ++i) total[i] = x[i] + residual[i];
      of = total;
      residual += width, total += width;
    }
    const T scale = scale_of(of, width, eps);
    for (int64_t i = 0; i < width; ++i) y[i] = weight[i] * (of[i] * scale);
  }
}

template <typename T>
PRISM_INLINE void rotate_rows(const T* x, int64_t stride, const T* weight, const T* cos, const T* sin, int64_t rows,
                              int64_t heads, int64_t dim, T eps, T* __restrict y) {
  for (int64_t row = 0; row < rows; ++row, cos += dim, sin += dim)
    for (int64_t head = 0; head < heads; ++head, y += dim)
      norm_and_turn(x + row * stride + head * dim, weight, cos, sin, dim, eps, y);
}

template <typename T>
PRISM_INLINE Vector<T> silu(Vector<T> gate) {
  const Vector<T> small = exp_of(gate < 0 ? gate : -gate), whole = filled<T>(1) + small;
  return gate * ((gate < 0 ? small : filled<T>(1)) / whole);
}

template <typename T>
PRISM_INLINE void swiglu_rows(const T* gate, const T* up, int64_t stride, int64_t rows, int64_t width, T* y) {
  for (int64_t row = 0; row < rows; ++row, gate += stride, up += stride, y += width) {
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes)
      store(y + i, silu<T>(load<Vector<T>>(gate + i)) * load<Vector<T>>(up + i));
    Vector<T> last = {};
    for (int64_t j = i; j < width; ++j) last[j - i] = gate[j];
    last = silu<T>(last);
    for (int64_t j = i; j < width; ++j) y[j] = last[j - i] * up[j];
  }
}

PRISM_BY_CPU void norm_floats(const float* x, const float* residual, const float* weight, int64_t rows, int64_t width,
                              float eps, float* y, float* total) {
  norm_rows(x, residual, weight, rows, width, eps, y, total);
}
PRISM_BY_CPU void norm_doubles(const double* x, const double* residual, const double* weight, int64_t rows, int64_t width,
                               double eps, double* y, double* total) {
  norm_rows(x, residual, weight, rows, width, eps, y, total);
}
PRISM_BY_CPU void rotate_floats(const float* x, int64_t stride, const float* weight, const float* cos, const float* sin,
                                int64_t rows, int64_t heads, int64_t dim, float eps, float* y) {
  rotate_rows(x, stride, weight, cos, sin, rows, heads, dim, eps, y);
}
PRISM_BY_CPU void rotate_doubles(const double* x, int64_t stride, const double* weight, const double* cos,
                                 const double* sin, int64_t rows, int64_t heads, int64_t dim, double eps, double* y) {
  rotate_rows(x, stride, weight, cos, sin, rows, heads, dim, eps, y);
}

PRISM_BY_CPU void swiglu_floats(const float* gate, const float* up, int64_t stride, int64_t rows, int64_t width, float* y) {
  swiglu_rows(gate, up, stride, rows, width, y);
}
PRISM_BY_CPU void swiglu_doubles(const double* gate, const double* up, int64_t stride, int64_t rows, int64_t width,
                                 double* y) {
  swiglu_rows(gate, up, stride, rows, width, y);
}

}  // namespace

template <>
void rms_norm(const float* x, const float* residual, const float* weight, int64_t rows, int64_t width, float eps, float* y,
              float* total) {
  norm_floats(x, residual, weight, rows, width, eps, y, total);
}
template <>
void rms_norm(const double* x, const double* residual, const double* weight, int64_t rows, int64_t width, double eps,
              double* y, double* total) {
  norm_doubles(x, residual, weight, rows, width, eps, y, total);
}
template <>
void norm_rotate(const float* x, int64_t stride, const float* weight, const float* cos, const float* sin, int64_t rows,
                 int64_t heads, int64_t dim, float eps, float* y) {
  rotate_floats(x, stride, weight, cos, sin, rows, heads, dim, eps, y);
}
template <>
void norm_rotate(const double* x, int64_t stride, const double* weight, const double* cos, const double* sin, int64_t rows,
                 int64_t heads, int64_t dim, double eps, double* y) {
  rotate_doubles(x, stride, weight, cos, sin, rows, heads, dim, eps, y);
}

template <>
void swiglu(const float* gate, const float* up, int64_t stride, int64_t rows, int64_t width, float* y) {
  swiglu_floats(gate, up, stride, rows, width, y);
}
template <>
void swiglu(const double* gate, const double* up, int64_t stride, int64_t rows, int64_t width, double* y) {
  swiglu_doubles(gate, up, stride, rows, width, y);
}

}  // namespace prism
