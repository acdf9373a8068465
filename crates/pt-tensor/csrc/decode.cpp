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

constexpr int64_t GROUP = 4;  // query heads that are worked on together at most
constexpr int64_t SPAN = 4;   // vectors of a head whose sums stand in registers, for each of them

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

INLINE Vec load_vector(const float* x) { return *(const Vec*)x; }
INLINE Vec load_vector(const Bf16* x) {
  typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
  typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
  return (Vec)(__builtin_convertvector(*(const Halves*)x, Words) << 16);
}

// A vector of a cached row that ends after `left` elements.
template <typename T>
INLINE Vec load_some(const T* x, int64_t left) {
  if (left >= LANES) return load_vector(x);
  float some[LANES] = {};
  for (int64_t d = 0; d < left; ++d) some[d] = load(x[d]);
  return *(const Vec*)some;
}

// What the query heads that share a key head read and write.
template <typename T>
struct Heads {
  const T *query, *first_key, *first_value;
  T* out;
  int64_t count, stride;  // tokens seen, and the distance between them in the caches
};

template <int HEADS, typename T>
INLINE void decode_heads(const Heads<T>& at, const Shape& shape, float* scratch) {
  int64_t dim = shape.dim, padded = shape.padded(), room = (at.count + LANES - 1) / LANES * LANES;
  float *q = scratch, *p = q + HEADS * padded;
  for (int64_t h = 0; h < HEADS; ++h) widen(at.query + h * dim, dim, padded, q + h * padded);
  float top[HEADS], total[HEADS];
  for (int64_t h = 0; h < HEADS; ++h) top[h] = -std::numeric_limits<float>::infinity();
  for (int64_t t = 0; t < at.count; ++t) {
    const T* key = at.first_key + t * at.stride;
    Vec dot[HEADS] = {};
    for (int64_t d = 0; d < dim; d += LANES) {
      Vec k = load_some(key + d, dim - d);
      for (int64_t h = 0; h < HEADS; ++h) dot[h] += k * *(const Vec*)(q + h * padded + d);
    }
    for (int64_t h = 0; h < HEADS; ++h) {
      float score = lane_sum(dot[h]) * shape.scale;
      p[h * room + t] = score;
      top[h] = score > top[h] ? score : top[h];
    }
  }
  for (int64_t h = 0; h < HEADS; ++h) {
    float all = 0;
#pragma omp simd reduction(+ : all)
    for (int64_t t = 0; t < at.count; ++t) {
      float e = exp_fast(p[h * room + t] - top[h]);
      p[h * room + t] = e;
      all += e;
    }
    total[h] = all;
  }
  // As many of the values' vectors at a time as have their sums in registers.
  for (int64_t first = 0; first < dim; first += SPAN * LANES) {
    Vec sum[HEADS][SPAN] = {};
    bool is_whole = dim - first >= SPAN * LANES;
    for (int64_t t = 0; t < at.count; ++t) {
      const T* value = at.first_value + t * at.stride + first;
      Vec v[SPAN] = {};
      if (is_whole)
        for (int64_t i = 0; i < SPAN; ++i) v[i] = load_vector(value + i * LANES);
      else
        for (int64_t i = 0; i * LANES < dim - first; ++i) v[i] = load_some(value + i * LANES, dim - first - i * LANES);
      for (int64_t h = 0; h < HEADS; ++h)
        for (int64_t i = 0; i < SPAN; ++i) sum[h][i] += p[h * room + t] * v[i];
    }
    for (int64_t h = 0; h < HEADS; ++h)
      for (int64_t d = first; d < std::min(dim, first + SPAN * LANES); ++d)
        store(&at.out[h * dim + d], sum[h][(d - first) / LANES][(d - first) % LANES] / total[h]);
  }
}

template <typename T>
INLINE void decode_head(const T* query, const T* keys, const T* values, T* out, const PtSlot& slot, const Shape& shape,
                        int64_t kv_head, float* scratch) {
  int64_t dim = shape.dim, repeats = shape.heads / shape.kv_heads;
  int64_t place = ((slot.row * shape.capacity + slot.first) * shape.kv_heads + kv_head) * dim;
  for (int64_t group = 0; group < repeats; group += GROUP) {
    int64_t head = (kv_head * repeats + group) * dim;
    Heads<T> at{query + head,   keys + place, values + place, out + head, slot.position + 1 - slot.first,
                shape.kv_heads * dim};
    switch (std::min(GROUP, repeats - group)) {
      case 1: decode_heads<1>(at, shape, scratch); break;
      case 2: decode_heads<2>(at, shape, scratch); break;
      case 3: decode_heads<3>(at, shape, scratch); break;
      default: decode_heads<4>(at, shape, scratch);
    }
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
    Floats scratch = floats(GROUP * (shape.padded() + longest + LANES));
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
                                    int64_t heads, int64_t kv_heads, int64_t dim, float scale) noexcept {
  Shape shape{capacity, heads, kv_heads, dim, scale};
  if (is_bf16)
    decode((const Bf16*)query, (const Bf16*)key, (const Bf16*)value, (Bf16*)keys, (Bf16*)values, (Bf16*)out, slots,
           rows, shape);
  else
    decode((const float*)query, (const float*)key, (const float*)value, (float*)keys, (float*)values, (float*)out,
           slots, rows, shape);
}
