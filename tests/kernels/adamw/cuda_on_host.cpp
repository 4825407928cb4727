// The kernel of csrc/adamw.cu as plain C++: blocks and threads one after the other, which it may, as they share nothing.
#include <algorithm>
#include <cmath>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)

struct Index {
  unsigned x;
};
static Index blockIdx, threadIdx;
using std::isfinite;
using std::min;

#include "adamw.cu"

extern "C" void run(const void* rows, int num_rows, int num_chunks, int kind, const float* c, const float* clip) {
  using namespace prism::adamw;
  const Kind kinds = {(kind & 1) != 0, (kind & 2) != 0, (kind & 4) != 0};
  const auto kernel = kinds.split ? by_gradient<true>(kinds) : by_gradient<false>(kinds);
  for (blockIdx.x = 0; blockIdx.x < static_cast<unsigned>(num_chunks); ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < kThreads; ++threadIdx.x) {
      kernel(static_cast<const Row*>(rows), num_rows, {c[0], c[1], c[2], c[3]}, clip);
    }
  }
}
