// adamw_step: tables of any sizes, every width of vector and number of threads: the same bits, and nothing beyond the tensors.
#include "adamw.h"

#include "input.h"

namespace {

struct Tensors {
  std::vector<uint8_t> parameter, gradient, exp_avg, exp_avg_sq;
  std::vector<int16_t> remainder;
};

std::vector<uint8_t> bytes(Input& in, int64_t count) {
  std::vector<uint8_t> made(count);
  uint32_t state = static_cast<uint32_t>(in.bits()) | 1;
  for (uint8_t& x : made) state = state * 1664525u + 1013904223u, x = static_cast<uint8_t>(state >> 24);
  return made;
}

// Which NaN a NaN is, and what a weight that is one lacks of its master, is not defined.
void fold(std::vector<uint8_t>& bytes, bool half, std::vector<int16_t>* remainder = nullptr) {
  const size_t width = half ? 2 : 4;
  for (size_t i = 0; i < bytes.size() / width; ++i) {
    uint32_t bits = 0;
    std::memcpy(half ? reinterpret_cast<uint8_t*>(&bits) + 2 : reinterpret_cast<uint8_t*>(&bits), &bytes[i * width], width);
    if (!prism::adamw::is_nan(bits)) continue;
    std::memset(&bytes[i * width], 0xff, width);
    if (remainder != nullptr) (*remainder)[i] = 0;
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in(data, size);
  const prism::adamw::Kind kind{in.flag(), in.flag(), in.flag()};
  const prism::adamw::Constants constants{0.1f, 0.99f, 0.01f, 1e-8f};
  std::vector<Tensors> begun;
  std::vector<int64_t> sizes;
  for (int64_t row = in.below(5); row > 0; --row) {
    const int64_t count = in.byte() % 8 == 0 ? in.below(3) * prism::adamw::kChunk + in.below(5) : in.below(70);
    sizes.push_back(count);
    begun.push_back({bytes(in, count * (kind.split ? 2 : 4)), bytes(in, count * (kind.bf16_gradient ? 2 : 4)),
                     bytes(in, count * (kind.bf16_moments ? 2 : 4)), bytes(in, count * (kind.bf16_moments ? 2 : 4)),
                     std::vector<int16_t>(kind.split ? count : 0, static_cast<int16_t>(in.bits()))});
  }
  const uint64_t key = in.bits();
  std::vector<Tensors> first;
  for (const auto& [threads, bits] : {std::pair{1, 0}, {2, 256}, {1, 512}}) {
    std::vector<Tensors> held = begun;
    std::vector<prism::adamw::Row> rows;
    int64_t chunk = 0;
    for (size_t i = 0; i < held.size(); ++i) {
      Tensors& t = held[i];
      rows.push_back({t.parameter.data(), t.gradient.data(), kind.split ? t.remainder.data() : nullptr, t.exp_avg.data(),
                      t.exp_avg_sq.data(), sizes[i], chunk, key + i, 0.999f, -1e-3f, 0.7f, 0});
      chunk += (sizes[i] + prism::adamw::kChunk - 1) / prism::adamw::kChunk;
    }
    prism::adamw::on_cpu(rows.data(), static_cast<int64_t>(rows.size()), kind, constants, 0.5f, {threads, bits});
    for (Tensors& t : held) {
      fold(t.parameter, kind.split, kind.split ? &t.remainder : nullptr);
      fold(t.exp_avg, kind.bf16_moments), fold(t.exp_avg_sq, kind.bf16_moments);
    }
    if (first.empty()) first = held;
    for (size_t i = 0; i < held.size(); ++i) {
      HOLDS(held[i].gradient == begun[i].gradient && held[i].remainder == first[i].remainder);
      HOLDS(held[i].parameter == first[i].parameter);
      HOLDS(held[i].exp_avg == first[i].exp_avg && held[i].exp_avg_sq == first[i].exp_avg_sq);
    }
  }
  return 0;
}
