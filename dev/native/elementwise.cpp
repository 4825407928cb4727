// rms_norm, norm_rotate and swiglu of any size and stride, in memory that ends where they must, against plain loops.
#include "elementwise.h"

#include <cmath>

#include "input.h"

namespace {

template <typename T>
std::vector<T> filled(Input& in, int64_t count) {
  std::vector<T> made(count);
  uint32_t state = static_cast<uint32_t>(in.bits()) | 1;
  for (T& x : made) state = state * 1664525u + 1013904223u, x = static_cast<T>((static_cast<int>(state >> 24) - 128) / 64.0);
  return made;
}

template <typename T>
double root_mean_square(const T* x, int64_t width, double eps) {
  double sum = 0;
  for (int64_t i = 0; i < width; ++i) sum += static_cast<double>(x[i]) * x[i];
  return 1 / std::sqrt(sum / width + eps);
}

template <typename T>
void run(Input& in) {
  const double near = sizeof(T) == 8 ? 1e-12 : 2e-5, eps = 1e-6;
  const int64_t rows = in.below(4), width = 1 + in.below(70), dim = 2 * (1 + in.below(20)), heads = 1 + in.below(3);
  const std::vector<T> weight = filled<T>(in, width), residual = filled<T>(in, rows * width);
  const std::vector<T> x = filled<T>(in, rows * width);
  std::vector<T> y(rows * width), total(rows * width);
  const bool with = in.flag();
  prism::rms_norm<T>(x.data(), with ? residual.data() : nullptr, weight.data(), rows, width, static_cast<T>(eps), y.data(),
                     with ? total.data() : nullptr);
  const std::vector<T>& of = with ? total : x;
  for (int64_t row = 0; row < rows; ++row) {
    const double scale = root_mean_square(of.data() + row * width, width, eps);
    for (int64_t i = row * width; i < (row + 1) * width; ++i) {
      if (with) HOLDS(total[i] == x[i] + residual[i]);
      const double expected = weight[i - row * width] * of[i] * scale;
      HOLDS(std::fabs(y[i] - expected) <= near * (1 + std::fabs(expected)));
    }
  }
  const int64_t stride = heads * dim + in.below(9);
  const std::vector<T> turned_weight = filled<T>(in, dim), wide = filled<T>(in, rows == 0 ? 0 : (rows - 1) * stride + heads * dim);
  std::vector<T> cos = filled<T>(in, rows * dim), sin = filled<T>(in, rows * dim), turned(rows * heads * dim);
  prism::norm_rotate<T>(wide.data(), stride, turned_weight.data(), cos.data(), sin.data(), rows, heads, dim,
                        static_cast<T>(eps), turned.data());
  for (int64_t i = 0; i < rows * heads; ++i) {
    const T* from = wide.data() + i / heads * stride + i % heads * dim;
    const double scale = root_mean_square(from, dim, eps);
    const T *c = cos.data() + i / heads * dim, *s = sin.data() + i / heads * dim;
    for (int64_t d = 0; d < dim; ++d) {
      const int64_t other = (d + dim / 2) % dim;
      const double expected = turned_weight[d] * from[d] * scale * c[d] +
                              (d < dim / 2 ? -1 : 1) * turned_weight[other] * from[other] * scale * s[d];
      HOLDS(std::fabs(turned[i * dim + d] - expected) <= 16 * near * (1 + std::fabs(expected)));
    }
  }
  const int64_t apart = width + in.below(9), last = rows == 0 ? 0 : (rows - 1) * apart + width;
  const std::vector<T> gate = filled<T>(in, last), up = filled<T>(in, last);
  prism::swiglu<T>(gate.data(), up.data(), apart, rows, width, y.data());
  for (int64_t i = 0; i < rows * width; ++i) {
    const double g = gate[i / width * apart + i % width], expected = g / (1 + std::exp(-g)) * up[i / width * apart + i % width];
    HOLDS(std::fabs(y[i] - expected) <= near * (1 + std::fabs(expected)));
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in(data, size);
  in.flag() ? run<double>(in) : run<float>(in);
  return 0;
}
