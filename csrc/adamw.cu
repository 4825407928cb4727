#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

#include "adamw.h"

namespace prism::adamw {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 4;  // elements of a thread and turn: loads of 16 and of 8 bytes

template <typename T>
struct alignas(kVector * sizeof(T)) Pack {
  T at[kVector];
};

template <typename T>
__device__ __forceinline__ bool is_aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(Pack<T>) == 0;
}

// Elements i ... i + kVector of a row; what lies past its end is computed on zeros and not kept.
template <bool kSplit, typename Gradient, typename Moment>
__device__ __forceinline__ void update_pack(const Row& row, const Constants& c, float clip, int64_t i,
                                            Pack<float>& weight, const Pack<Gradient>& gradient, Pack<Moment>& average,
                                            Pack<Moment>& square) {
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    float exp_avg = wide(average.at[j]), exp_avg_sq = wide(square.at[j]);
    update(weight.at[j], times(wide(gradient.at[j]), clip), exp_avg, exp_avg_sq, row, c);
    const uint32_t random = sizeof(Moment) == 2 ? random_bits(row.key, i + j) : 0;
    store(average.at + j, exp_avg, random & 0xffffu);
    store(square.at + j, exp_avg_sq, random >> 16);
  }
}

template <typename T>
__device__ __forceinline__ Pack<T> load(const T* from, int64_t i, int64_t size, bool vector) {
  if (vector) return *reinterpret_cast<const Pack<T>*>(from + i);
  Pack<T> pack;
#pragma unroll
  for (int j = 0; j < kVector; ++j) pack.at[j] = i + j < size ? from[i + j] : T(0);
  return pack;
}

template <typename T>
__device__ __forceinline__ void keep(T* to, const Pack<T>& pack, int64_t i, int64_t size, bool vector) {
  if (vector) {
    *reinterpret_cast<Pack<T>*>(to + i) = pack;
    return;
  }
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    if (i + j < size) to[i + j] = pack.at[j];
  }
}

// A block updates one chunk of one row. Reads and writes every number once; nothing is shared between threads.
template <bool kSplit, typename Gradient, typename Moment>
__global__ void __launch_bounds__(kThreads) adamw_step_kernel(const Row* __restrict__ rows, int num_rows, Constants c,
                                                              const float* __restrict__ clip_ptr) {
  const float clip = clip_ptr == nullptr ? 1.0f : *clip_ptr;
  if (!isfinite(clip)) return;
  int low = 0, high = num_rows - 1;  // the last row that begins at this chunk or before
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (rows[middle].first_chunk <= static_cast<int64_t>(blockIdx.x)) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const Row row = rows[low];
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) - row.first_chunk) * kChunk;
  const int64_t end = min(begin + kChunk, row.size);
  float* whole = static_cast<float*>(row.parameter);
  uint16_t* upper = static_cast<uint16_t*>(row.parameter);
  const Gradient* gradients = static_cast<const Gradient*>(row.gradient);
  Moment* averages = static_cast<Moment*>(row.exp_avg);
  Moment* squares = static_cast<Moment*>(row.exp_avg_sq);
  const bool aligned = is_aligned(gradients) && is_aligned(averages) && is_aligned(squares) &&
                       (kSplit ? is_aligned(upper) && is_aligned(row.remainder) : is_aligned(whole));
  for (int64_t i = begin + kVector * threadIdx.x; i < end; i += kVector * kThreads) {
    const bool vector = aligned && i + kVector <= end;
    const Pack<Gradient> gradient = load(gradients, i, end, vector);
    Pack<Moment> average = load(averages, i, end, vector), square = load(squares, i, end, vector);
    Pack<float> weight;
    Pack<uint16_t> top;
    Pack<int16_t> rest;
    if (kSplit) {
      top = load(upper, i, end, vector);
      rest = load(row.remainder, i, end, vector);
#pragma unroll
      for (int j = 0; j < kVector; ++j) weight.at[j] = join(top.at[j], rest.at[j]);
    } else {
      weight = load(whole, i, end, vector);
    }
    update_pack<kSplit>(row, c, clip, i, weight, gradient, average, square);
    keep(averages, average, i, end, vector);
    keep(squares, square, i, end, vector);
    if (kSplit) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) split(weight.at[j], top.at[j], rest.at[j]);
      keep(upper, top, i, end, vector);
      keep(row.remainder, rest, i, end, vector);
    } else {
      keep(whole, weight, i, end, vector);
    }
  }
}

using Kernel = void (*)(const Row*, int, Constants, const float*);

template <bool kSplit, typename Gradient>
Kernel by_moment(bool bf16) {
  return bf16 ? adamw_step_kernel<kSplit, Gradient, uint16_t> : adamw_step_kernel<kSplit, Gradient, float>;
}

template <bool kSplit>
Kernel by_gradient(const Kind& kind) {
  return kind.bf16_gradient ? by_moment<kSplit, uint16_t>(kind.bf16_moments)
                            : by_moment<kSplit, float>(kind.bf16_moments);
}

}  // namespace

#if defined(__CUDACC__)  // tests/kernels/adamw runs the kernel as plain C++
const char* on_gpu(const Row* rows, int64_t num_rows, int64_t num_chunks, Kind kind, const Constants& constants,
                   const float* clip, void* stream) {
  if (num_chunks == 0) return "";
  const Kernel kernel = kind.split ? by_gradient<true>(kind) : by_gradient<false>(kind);
  kernel<<<static_cast<unsigned>(num_chunks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      rows, static_cast<int>(num_rows), constants, clip);
  const cudaError_t said = cudaGetLastError();
  return said == cudaSuccess ? "" : cudaGetErrorString(said);
}
#endif

}  // namespace prism::adamw
