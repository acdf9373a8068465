// Scalars that the kernels share: loads and stores of f32 and bf16, and e^x.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// GCC compiles each function so marked for AVX-512, AVX2 and the baseline and picks one at load time, so the library
// runs on any x86-64. Templates cannot be cloned: they are inlined into marked functions.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EACH_CPU
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

struct Bf16 {
  uint16_t bits;
};

INLINE float load(float value) { return value; }
INLINE float load(Bf16 value) {
  uint32_t bits = uint32_t(value.bits) << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}
INLINE void store(float* out, float value) { *out = value; }
INLINE void store(Bf16* out, float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  // Round to nearest even; a NaN keeps a set mantissa bit.
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out->bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}

// e^x to about 2 ulp without a library call, so that loops vectorize. Range reduction by ln 2 in two parts.
INLINE float exp_fast(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  // Adding 1.5 * 2^23 rounds to an integer in the low mantissa bits.
  const float shifter = 12582912.0f;
  float shifted = x * 1.44269504f + shifter;
  float n = shifted - shifter;
  float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t bits;
  memcpy(&bits, &shifted, 4);
  uint32_t scale_bits = (bits + 127u) << 23;
  float scale;
  memcpy(&scale, &scale_bits, 4);
  return p * scale;
}

}  // namespace
