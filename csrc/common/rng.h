// Counter-based random numbers: Philox 4x32 with 10 rounds (Salmon, Moraes, Dror and Shaw,
// "Parallel random numbers: as easy as 1, 2, 3", SC 2011). A number is a pure function of a key
// and a counter, so any thread, on any device, in any order, computes the same one.
//
// Convention: `key` is the user's seed, `stream` says what the numbers are for (batch, restart,
// step, ...), `index` is the element. One call gives four 32-bit words.
#pragma once

#include <cmath>
#include <cstdint>

#include "hd.h"

namespace fastclust {

struct Philox4 {
  uint32_t x, y, z, w;
};

// 32 x 32 -> 64 bit product; the rounds use both halves.
FASTCLUST_HD Philox4 philox_round(Philox4 c, uint32_t k0, uint32_t k1) {
  const uint64_t p0 = uint64_t{0xD2511F53u} * c.x;
  const uint64_t p1 = uint64_t{0xCD9E8D57u} * c.z;
  return {static_cast<uint32_t>(p1 >> 32) ^ c.y ^ k0, static_cast<uint32_t>(p1),
          static_cast<uint32_t>(p0 >> 32) ^ c.w ^ k1, static_cast<uint32_t>(p0)};
}

// The four words of counter (index, stream) under key.
FASTCLUST_HD Philox4 philox(uint64_t key, uint64_t stream, uint64_t index) {
  Philox4 c{static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32),
            static_cast<uint32_t>(stream), static_cast<uint32_t>(stream >> 32)};
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    c = philox_round(c, k0, k1);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// Uniform in (0, 1): 53 bits of (hi, lo), never 0 and never 1.
FASTCLUST_HD double uniform_double(uint32_t hi, uint32_t lo) {
  const uint64_t bits = (uint64_t{hi} << 21) ^ (uint64_t{lo} >> 11);  // 53 bits
  return (static_cast<double>(bits) + 0.5) * (1.0 / 9007199254740992.0);
}

// One uniform number in (0, 1) for (key, stream, index).
FASTCLUST_HD double philox_uniform(uint64_t key, uint64_t stream, uint64_t index) {
  const Philox4 r = philox(key, stream, index);
  return uniform_double(r.x, r.y);
}

// Four standard normal numbers for (key, stream, index), by Box and Muller in the precision of T.
// Hosts and devices may differ in the last bits of log, sin and cos.
template <typename T>
FASTCLUST_HD void philox_normal4(uint64_t key, uint64_t stream, uint64_t index, T out[4]) {
  const Philox4 r = philox(key, stream, index);
  constexpr T kUnit = T(2.3283064365386963e-10);  // 2^-32
  const T radius[2] = {std::sqrt(T(-2) * std::log((T(r.x) + T(0.5)) * kUnit)),
                       std::sqrt(T(-2) * std::log((T(r.z) + T(0.5)) * kUnit))};
  const T angle[2] = {T(6.283185307179586) * kUnit * T(r.y), T(6.283185307179586) * kUnit * T(r.w)};
  for (int i = 0; i < 2; ++i) {
    out[2 * i] = radius[i] * std::cos(angle[i]);
    out[2 * i + 1] = radius[i] * std::sin(angle[i]);
  }
}

}  // namespace fastclust
