// What the kernels share: loads and stores of f32 and bf16, e^x, and products of a block of rows.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

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

constexpr int64_t LANES = 16;  // floats in a vector
constexpr int64_t BLOCK = 6;   // rows whose sums stand in registers: 6 of 512 bits, or 12 of 256

typedef float Vec __attribute__((vector_size(64), aligned(4), may_alias));

// The sum of a vector's lanes, by halves: lane after lane would take longer than the products.
INLINE float lane_sum(const Vec& v) {
  typedef float Half __attribute__((vector_size(32)));
  typedef float Quarter __attribute__((vector_size(16)));
  Half halves[2];
  memcpy(halves, &v, sizeof v);
  Half half = halves[0] + halves[1];
  Quarter quarters[2];
  memcpy(quarters, &half, sizeof half);
  Quarter quarter = quarters[0] + quarters[1];
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

struct Release {
  void operator()(float* p) const { std::free(p); }
};
using Floats = std::unique_ptr<float[], Release>;

Floats floats(int64_t count) {
  void* memory = std::aligned_alloc(64, size_t((count * 4 + 63) / 64 * 64 + 64));
  if (!memory) throw std::bad_alloc();
  return Floats(static_cast<float*>(memory));
}

// c[r][0..16] += sum over i of a[r * a_row + i * a_step] * b[i * b_row + 0..16], for BLOCK rows r.
INLINE void multiply(float* c, int64_t c_row, const float* a, int64_t a_row, int64_t a_step, const float* b,
                     int64_t b_row, int64_t count) {
  Vec sum[BLOCK];
  for (int64_t r = 0; r < BLOCK; ++r) sum[r] = *(const Vec*)(c + r * c_row);
  for (int64_t i = 0; i < count; ++i) {
    Vec x = *(const Vec*)(b + i * b_row);
    for (int64_t r = 0; r < BLOCK; ++r) sum[r] += a[r * a_row + i * a_step] * x;
  }
  for (int64_t r = 0; r < BLOCK; ++r) *(Vec*)(c + r * c_row) = sum[r];
}

}  // namespace
