// Attention of one new token per row over a cache of keys and values, on the CPU, in f32 sums. A key is read once for
// all query heads that share it; a step is one call however ragged the rows are.
//
// Layouts: query, out [row][head][dim]; key, value [row][kv_head][dim]; the caches [slot][capacity][kv_head][dim].

#include "simd.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>

struct PtSlot {
  // Row of the cache, where the new token goes, and the first token that it sees.
  int64_t row, position, first;
};

namespace {

constexpr int64_t GROUP = 4;  // query heads that are worked on together

struct Shape {
  int64_t capacity, heads, kv_heads, dim;
  float scale;
  int64_t padded() const { return (dim + LANES - 1) / LANES * LANES; }
};

// One row of one key head as f32, the padding zero.
template <typename T>
INLINE void widen(const T* x, int64_t dim, int64_t padded, float* out) {
  for (int64_t d = 0; d < dim; ++d) out[d] = load(x[d]);
  for (int64_t d = dim; d < padded; ++d) out[d] = 0;
}

template <typename T>
INLINE void decode_head(const T* query, const T* keys, const T* values, T* out, const PtSlot& slot, const Shape& shape,
                        int64_t kv_head, float* scratch) {
  int64_t dim = shape.dim, padded = shape.padded(), repeats = shape.heads / shape.kv_heads;
  int64_t count = slot.position + 1 - slot.first, stride = shape.kv_heads * dim;
  int64_t room = (count + LANES - 1) / LANES * LANES;
  float *q = scratch, *sum = q + GROUP * padded, *row = sum + GROUP * padded, *p = row + padded;
  const T* first_key = keys + ((slot.row * shape.capacity + slot.first) * shape.kv_heads + kv_head) * dim;
  const T* first_value = values + (first_key - keys);
  for (int64_t group = 0; group < repeats; group += GROUP) {
    int64_t heads = std::min(GROUP, repeats - group);
    const T* source = query + (kv_head * repeats + group) * dim;
    for (int64_t h = 0; h < GROUP; ++h) widen(source + std::min(h, heads - 1) * dim, dim, padded, q + h * padded);
    float top[GROUP], total[GROUP];
    for (int64_t h = 0; h < GROUP; ++h) top[h] = -std::numeric_limits<float>::infinity(), total[h] = 0;
    for (int64_t t = 0; t < count; ++t) {
      widen(first_key + t * stride, dim, padded, row);
      Vec dot[GROUP] = {};
      for (int64_t d = 0; d < padded; d += LANES) {
        Vec k = *(const Vec*)(row + d);
        for (int64_t h = 0; h < GROUP; ++h) dot[h] += k * *(const Vec*)(q + h * padded + d);
      }
      for (int64_t h = 0; h < GROUP; ++h) {
        float score = lane_sum(dot[h]) * shape.scale;
        p[h * room + t] = score;
        top[h] = score > top[h] ? score : top[h];
      }
    }
    for (int64_t h = 0; h < GROUP; ++h) {
      float all = 0;
#pragma omp simd reduction(+ : all)
      for (int64_t t = 0; t < count; ++t) {
        float e = exp_fast(p[h * room + t] - top[h]);
        p[h * room + t] = e;
        all += e;
      }
      total[h] = all;
    }
    for (int64_t i = 0; i < GROUP * padded; ++i) sum[i] = 0;
    for (int64_t t = 0; t < count; ++t) {
      widen(first_value + t * stride, dim, padded, row);
      for (int64_t h = 0; h < GROUP; ++h) {
        float weight = p[h * room + t];
        for (int64_t d = 0; d < padded; d += LANES) *(Vec*)(sum + h * padded + d) += weight * *(const Vec*)(row + d);
      }
    }
    T* target = out + (kv_head * repeats + group) * dim;
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t d = 0; d < dim; ++d) store(&target[h * dim + d], sum[h * padded + d] / total[h]);
  }
}

#define LOOPS(T, NAME)                                                                                              \
  EACH_CPU void decode_##NAME(const T* query, const T* keys, const T* values, T* out, const PtSlot& slot,           \
                              const Shape& shape, int64_t kv_head, float* scratch) {                                \
    decode_head(query, keys, values, out, slot, shape, kv_head, scratch);                                           \
  }                                                                                                                 \
  void head(const T* query, const T* keys, const T* values, T* out, const PtSlot& slot, const Shape& shape,         \
            int64_t kv_head, float* scratch) {                                                                      \
    decode_##NAME(query, keys, values, out, slot, shape, kv_head, scratch);                                         \
  }

LOOPS(float, f32)
LOOPS(Bf16, bf16)

template <typename T>
void decode(const T* query, const T* key, const T* value, T* keys, T* values, T* out, const PtSlot* slots,
            int64_t rows, const Shape& shape) {
  int64_t width = shape.kv_heads * shape.dim, longest = 0;
  for (int64_t row = 0; row < rows; ++row) {
    int64_t at = (slots[row].row * shape.capacity + slots[row].position) * width;
    std::copy_n(key + row * width, width, keys + at);
    std::copy_n(value + row * width, width, values + at);
    longest = std::max(longest, slots[row].position + 1 - slots[row].first);
  }
  // Some hundred keys are worth a thread.
  int64_t grain = std::max<int64_t>(1, 128 / std::max<int64_t>(1, longest));
  at::parallel_for(0, rows * shape.kv_heads, grain, [&](int64_t begin, int64_t end) {
    Floats scratch = floats((2 * GROUP + 1) * shape.padded() + GROUP * (longest + LANES));
    for (int64_t unit = begin; unit < end; ++unit) {
      int64_t row = unit / shape.kv_heads;
      int64_t offset = row * shape.heads * shape.dim;
      head(query + offset, keys, values, out + offset, slots[row], shape, unit % shape.kv_heads, scratch.get());
    }
  });
}

}  // namespace

extern "C" void pt_decode_attention(int is_bf16, const void* query, const void* key, const void* value, void* keys,
                                    void* values, void* out, const PtSlot* slots, int64_t rows, int64_t capacity,
                                    int64_t heads, int64_t kv_heads, int64_t dim, float scale) {
  Shape shape{capacity, heads, kv_heads, dim, scale};
  if (is_bf16)
    decode((const Bf16*)query, (const Bf16*)key, (const Bf16*)value, (Bf16*)keys, (Bf16*)values, (Bf16*)out, slots,
           rows, shape);
  else
    decode((const float*)query, (const float*)key, (const float*)value, (float*)keys, (float*)values, (float*)out,
           slots, rows, shape);
}
