// What a fuzzer's bytes are read as, and what is held against the result. For libFuzzer, and driver.cpp in its place.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#define HOLDS(what)                                                        \
  do {                                                                     \
    if (!(what)) {                                                         \
      std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #what); \
      std::abort();                                                        \
    }                                                                      \
  } while (0)

// Numbers from the front of the bytes; zeros once they are used up.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : at_(data), end_(data + size) {}

  bool empty() const { return at_ == end_; }
  uint8_t byte() { return at_ == end_ ? 0 : *at_++; }
  bool flag() { return byte() & 1; }
  int64_t below(int64_t bound) { return (byte() | byte() << 8) % bound; }

  uint64_t bits() {
    uint64_t value = 0;
    for (int i = 0; i < 8; ++i) value = value << 8 | byte();
    return value;
  }

  // A length >= 0: small in most cases, else of any size, or at the end of what there is.
  int64_t length() {
    const uint8_t kind = byte();
    if (kind < 200) return kind % 40;
    if (kind < 240) return below(5000);
    if (kind < 250) return static_cast<int64_t>(bits() >> (1 + kind % 60));
    return INT64_MAX - kind % 3;
  }

  // Of at most 2 in size, exact in every type that there is.
  double number() { return (static_cast<int>(byte()) - 128) / 64.0; }

 private:
  const uint8_t *at_, *end_;
};

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
