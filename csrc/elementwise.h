// RMSNorm, RMSNorm of heads with their rotation, and SwiGLU: the native forms of kernels/prism_kernels/rms_norm/reference.py
// and swiglu/reference.py, forward alone, fp32 and fp64.
#pragma once

#include <cstdint>

namespace prism {

// x, residual and both results (rows, width); weight (width,). With residual: total = x + residual, and y is of it; without,
// residual and total are null.
template <typename T>
void rms_norm(const T* x, const T* residual, const T* weight, int64_t rows, int64_t width, T eps, T* y, T* total);

// x (rows, heads, dim), its rows `stride` apart; weight (dim,); cos and sin (rows, dim), both halves equal; y as x, contiguous.
template <typename T>
void norm_rotate(const T* x, int64_t stride, const T* weight, const T* cos, const T* sin, int64_t rows, int64_t heads,
                 int64_t dim, T eps, T* y);

// y (rows, width) = silu(gate) * up, both (rows, width), their rows `stride` apart.
template <typename T>
void swiglu(const T* gate, const T* up, int64_t stride, int64_t rows, int64_t width, T* y);

}  // namespace prism
