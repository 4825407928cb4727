// One step of AdamW over many tensors. The arithmetic of an element stands here once, for a CPU (adamw.cpp) and for a
// GPU (adamw.cu): the order of its operations and every rounding are those of kernels/prism_kernels/adamw/reference.py,
// so that all three give the same bits. A compiler may contract none of them: on a CPU -ffp-contract=off sees to it
// (setup.py), on a GPU the intrinsics below.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define PRISM_INLINE __host__ __device__ __forceinline__
#else
#define PRISM_INLINE inline __attribute__((always_inline))
#endif

namespace prism::adamw {

// One tensor, as kernels/prism_kernels/adamw/table.py packs it.
struct Row {
  void* parameter;       // bf16 where there is a remainder, else fp32
  const void* gradient;  // bf16 or fp32
  int16_t* remainder;    // what the bf16 weight lacks of its fp32 master
  void* exp_avg;         // bf16 or fp32, both moments alike
  void* exp_avg_sq;
  int64_t size;
  int64_t first_chunk;  // of this row, counted over the rows before
  uint64_t key;         // of the random bits
  float decay;          // 1 - lr * weight_decay
  float step_size;      // -lr / (1 - beta1^step)
  float correction;     // sqrt(1 - beta2^step)
  float unused;
};
static_assert(sizeof(Row) == 80, "table.py packs 80 bytes");

struct Constants {
  float new_average;  // 1 - beta1
  float beta2;
  float new_square;  // 1 - beta2
  float eps;
};

// Elements that one block of a GPU, or one turn of a CPU's thread, updates.
constexpr int64_t kChunk = 1 << 15;

PRISM_INLINE float times(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

PRISM_INLINE float plus(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

PRISM_INLINE float over(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

PRISM_INLINE float root(float a) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(a);
#else
  return __builtin_sqrtf(a);
#endif
}

PRISM_INLINE float times_plus(float a, float b, float c) {  // rounded once
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

PRISM_INLINE uint32_t bits_of(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

PRISM_INLINE float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

PRISM_INLINE bool is_nan(uint32_t bits) { return (bits & 0x7fffffffu) > 0x7f800000u; }

PRISM_INLINE float wide(float value) { return value; }
PRISM_INLINE float wide(uint16_t bf16) { return float_of(static_cast<uint32_t>(bf16) << 16); }

// An fp32 master is a bf16 weight and 16 bits more: master = weight + remainder, as integers. The weight is the nearest
// bf16, of two equally near the one further from 0: every remainder fits, which ties to even would not allow (65,537
// masters have an even weight). A NaN keeps its upper half, made quiet, as its weight.
PRISM_INLINE float join(uint16_t weight, int16_t remainder) {
  const uint32_t upper = static_cast<uint32_t>(weight) << 16;
  const uint32_t lower = static_cast<uint32_t>(static_cast<int32_t>(remainder));
  return float_of(is_nan(upper) ? upper | (lower & 0xffffu) : upper + lower);
}

PRISM_INLINE void split(float master, uint16_t& weight, int16_t& remainder) {
  const uint32_t bits = bits_of(master);
  const uint32_t upper = is_nan(bits) ? (bits | 0x00400000u) >> 16 : (bits + 0x8000u) >> 16;
  weight = static_cast<uint16_t>(upper);
  remainder = static_cast<int16_t>(static_cast<uint16_t>(bits));  // bits - (upper << 16), in 16 bits
}

PRISM_INLINE uint32_t mixed(uint32_t x) {  // a permutation of 32 bits in which every bit of x counts ("lowbias32")
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x;
}

// 32 random bits of element i: a function of the key and i alone. Of keys that differ, nothing is alike.
PRISM_INLINE uint32_t random_bits(uint64_t key, int64_t i) {
  const uint32_t low = static_cast<uint32_t>(i), high = static_cast<uint32_t>(static_cast<uint64_t>(i) >> 32);
  return mixed(mixed(low ^ static_cast<uint32_t>(key)) ^ static_cast<uint32_t>(key >> 32) ^ high);
}

// To bf16, up or down with the probability that makes the mean exact; 16 random bits.
PRISM_INLINE uint16_t rounded(float value, uint32_t random) {
  const uint32_t bits = bits_of(value);
  return static_cast<uint16_t>((is_nan(bits) ? bits | 0x00400000u : bits + random) >> 16);
}

PRISM_INLINE void store(float* to, float value, uint32_t) { *to = value; }
PRISM_INLINE void store(uint16_t* to, float value, uint32_t random) { *to = rounded(value, random); }

// weight, exp_avg and exp_avg_sq become those after the step.
PRISM_INLINE void update(float& weight, float gradient, float& exp_avg, float& exp_avg_sq, const Row& row,
                         const Constants& c) {
  exp_avg = times_plus(c.new_average, plus(gradient, -exp_avg), exp_avg);
  exp_avg_sq = times_plus(times(c.new_square, gradient), gradient, times(exp_avg_sq, c.beta2));
  const float denominator = plus(over(root(exp_avg_sq), row.correction), c.eps);
  weight = plus(times(weight, row.decay), over(times(row.step_size, exp_avg), denominator));
}

// All rows are of one kind: split or whole weights, gradients and moments in bf16 or fp32.
struct Kind {
  bool split;
  bool bf16_gradient;
  bool bf16_moments;
};

// Of a CPU: threads, and the bits of a vector at most (512, 256, or 0 for what every one has). Results are the same.
struct Use {
  int threads;
  int bits;
};

// clip: what gradients are multiplied by.
void on_cpu(const Row* rows, int64_t num_rows, Kind kind, const Constants& constants, float clip, Use use);

#ifdef PRISM_WITH_CUDA
// The same on a GPU, whose memory holds the rows; clip is one number there, or null for 1. Where it is not finite,
// nothing is written. One launch on the stream; returns what the launch said, "" for nothing.
const char* on_gpu(const Row* rows, int64_t num_rows, int64_t num_chunks, Kind kind, const Constants& constants,
                   const float* clip, void* stream);
#endif

}  // namespace prism::adamw
