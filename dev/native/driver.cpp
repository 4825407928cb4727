// In libFuzzer's place where there is none: inputs by seed, random or an earlier one changed, without guidance by coverage.
//
//     driver SECONDS SEED [FILE ...]     with files: those alone
#include <chrono>
#include <fstream>
#include <iterator>
#include <random>

#include "input.h"

namespace {

void run(const std::vector<uint8_t>& bytes) {
  // What is in it after a crash is the cause.
  std::ofstream("crash-input", std::ios::binary).write(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
}

}  // namespace

int main(int argc, char** argv) {
  for (int i = 3; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    run(std::vector<uint8_t>(std::istreambuf_iterator<char>(file), {}));
  }
  if (argc != 3) return argc > 3 ? 0 : 2;
  std::mt19937_64 random(std::strtoull(argv[2], nullptr, 10));
  std::vector<std::vector<uint8_t>> kept;
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(std::atoi(argv[1]));
  int64_t runs = 0;
  for (; std::chrono::steady_clock::now() < end; ++runs) {
    std::vector<uint8_t> bytes = kept.empty() || random() % 3 == 0 ? std::vector<uint8_t>(random() % 600) : kept[random() % kept.size()];
    const bool fresh = kept.size() < 64;
    for (uint8_t& byte : bytes) {
      if (fresh || random() % 16 == 0) byte = random() % 2 ? random() % 256 : random() % 12;
    }
    run(bytes);
    if (fresh) kept.push_back(bytes);
    else if (random() % 64 == 0) kept[random() % kept.size()] = bytes;
  }
  std::printf("%lld runs\n", static_cast<long long>(runs));
  return 0;
}
