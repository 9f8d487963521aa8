// Element types on the CPU: how they are stored and the type they are computed in. No framework.
#pragma once

#include <cstdint>
#include <cstring>

namespace laser_fast {

inline uint32_t bits_of(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof(bits));
  return bits;
}

inline float float_of(uint32_t bits) {
  float number;
  std::memcpy(&number, &bits, sizeof(number));
  return number;
}

template <typename T>
struct Native {
  using Stored = T;
  using Wide = T;
  static Wide widen(Stored x) { return x; }
  static Stored round(Wide x) { return x; }
};

struct Bfloat16 {
  using Stored = uint16_t;
  using Wide = float;
  static Wide widen(Stored x) { return float_of(static_cast<uint32_t>(x) << 16); }
  static Stored round(Wide x) {
    const uint32_t bits = bits_of(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;  // NaN: the rounding below could carry it to infinity
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);  // to nearest, ties to even
  }
};

struct Half {
  using Stored = uint16_t;
  using Wide = float;
  static Wide widen(Stored x) {
    const uint32_t sign = (x & 0x8000u) << 16, magnitude = (x & 0x7fffu) << 13;
    uint32_t bits = magnitude + ((127u - 15u) << 23);
    if (magnitude >= 0x7c00u << 13) {
      bits += (128u - 16u) << 23;  // infinity and NaN
    } else if (magnitude < 1u << 23) {
      bits = bits_of(float_of(bits + (1u << 23)) - float_of((127u - 14u) << 23));  // subnormal: exact in float
    }
    return float_of(bits | sign);
  }
  static Stored round(Wide x) {
    const uint32_t sign = bits_of(x) & 0x80000000u, magnitude = bits_of(x) ^ sign;
    uint32_t rounded;
    if (magnitude >= (127u + 16u) << 23) {
      rounded = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    } else if (magnitude < (127u - 14u) << 23) {
      // the sum has the last place of a subnormal half, so the addition itself rounds to nearest even
      rounded = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    } else {
      rounded = (magnitude - ((127u - 15u) << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    }
    return static_cast<uint16_t>(rounded | sign >> 16);
  }
};

}  // namespace laser_fast
