// y = x · Wᵀ + b for the few rows of a decoding step, on the CPU. Such a product reads the weight once and is over:
// its speed is the memory's, which libtorch's general products reach a quarter of. Sums are in f32.

#include "simd.h"

#include <ATen/Parallel.h>

#include <algorithm>

namespace {

constexpr int64_t DOTS = 4;  // rows of the weight, and of x at most, whose dot products are taken together

// 2 * LANES elements as two vectors in whatever order is cheapest; `paired` says which, so that x can be laid out
// likewise. A vector of bf16 pairs holds its even elements in the low halves and its odd ones in the high halves.
constexpr int64_t PAIR = 2 * LANES;

INLINE void load_pair(const float* p, Vec& a, Vec& b) { a = *(const Vec*)p, b = *(const Vec*)(p + LANES); }
INLINE void load_pair(const Bf16* p, Vec& a, Vec& b) {
  typedef uint32_t Words __attribute__((vector_size(64), aligned(2), may_alias));
  Words words = *(const Words*)p;
  a = (Vec)(words << 16), b = (Vec)(words & 0xffff0000u);
}

// Where element i of `n` goes; the last n % PAIR elements stay in place.
template <typename T>
INLINE int64_t paired(int64_t i, int64_t n) {
  if (sizeof(T) == 4 || i >= n / PAIR * PAIR) return i;
  return i / PAIR * PAIR + i % 2 * LANES + i % PAIR / 2;
}

// Dot products of COUNT rows of x (paired, `x_row` apart) with DOTS rows of the weight.
template <int COUNT, typename T>
INLINE void dots(const T* w, const float* x, int64_t x_row, int64_t n, float out[DOTS][DOTS]) {
  Vec sum[DOTS][COUNT] = {};
  int64_t i = 0;
  for (; i + PAIR <= n; i += PAIR)
    for (int64_t r = 0; r < DOTS; ++r) {
      Vec a, b;
      load_pair(w + r * n + i, a, b);
      for (int64_t c = 0; c < COUNT; ++c) {
        sum[r][c] += a * *(const Vec*)(x + c * x_row + i);
        sum[r][c] += b * *(const Vec*)(x + c * x_row + i + LANES);
      }
    }
  for (int64_t r = 0; r < DOTS; ++r)
    for (int64_t c = 0; c < COUNT; ++c) {
      float total = lane_sum(sum[r][c]);
      for (int64_t j = i; j < n; ++j) total += load(w[r * n + j]) * x[c * x_row + j];
      out[r][c] = total;
    }
}

struct Sizes {
  int64_t rows, in, out;
};

// The last block starts earlier instead of being shorter, and stores only what no other block stores.
struct Block {
  int64_t first, skip;
};

INLINE Block block_of(int64_t index, int64_t length, int64_t total) {
  int64_t first = std::min(index * length, total - length);
  return Block{first, index * length - first};
}

// Blocks [begin, end) of DOTS outputs for up to DOTS rows. `x` is [row][in], paired.
template <typename T>
INLINE void by_dots(const float* x, const T* w, const T* bias, T* y, const Sizes& size, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    Block block = block_of(index, DOTS, size.out);
    float sums[DOTS][DOTS];
    const T* rows = w + block.first * size.in;
    if (size.rows == 1) dots<1>(rows, x, size.in, size.in, sums);
    if (size.rows == 2) dots<2>(rows, x, size.in, size.in, sums);
    if (size.rows == 3) dots<3>(rows, x, size.in, size.in, sums);
    if (size.rows == 4) dots<4>(rows, x, size.in, size.in, sums);
    for (int64_t r = block.skip; r < DOTS; ++r)
      for (int64_t row = 0; row < size.rows; ++row)
        store(&y[row * size.out + block.first + r], sums[r][row] + (bias ? load(bias[block.first + r]) : 0));
  }
}

// Blocks [begin, end) of BLOCK outputs for any number of rows. `x` is [row / LANES][in][row % LANES], paired.
template <typename T>
INLINE void by_lanes(const float* x, const T* w, const T* bias, T* y, const Sizes& size, int64_t begin, int64_t end,
                     float* scratch) {
  for (int64_t index = begin; index < end; ++index) {
    Block block = block_of(index, BLOCK, size.out);
    const T* rows = w + block.first * size.in;
    for (int64_t r = 0; r < BLOCK; ++r) {
      const T* row = rows + r * size.in;
      float* target = scratch + r * size.in;
      int64_t i = 0;
      for (; i + PAIR <= size.in; i += PAIR) {
        Vec a, b;
        load_pair(row + i, a, b);
        *(Vec*)(target + i) = a, *(Vec*)(target + i + LANES) = b;
      }
      for (; i < size.in; ++i) target[i] = load(row[i]);
    }
    // The next block comes out of memory while this one is worked on.
    if (index + 1 < end)
      for (int64_t i = BLOCK * size.in; i < 2 * BLOCK * size.in; i += 64 / sizeof(T)) __builtin_prefetch(rows + i);
    for (int64_t row = 0; row < size.rows; row += LANES) {
      float sums[BLOCK * LANES] = {};
      multiply(sums, LANES, scratch, size.in, 1, x + row * size.in, LANES, size.in);
      for (int64_t r = block.skip; r < BLOCK; ++r)
        for (int64_t lane = 0; lane < std::min(LANES, size.rows - row); ++lane)
          store(&y[(row + lane) * size.out + block.first + r],
                sums[r * LANES + lane] + (bias ? load(bias[block.first + r]) : 0));
    }
  }
}

#define LOOPS(T, NAME)                                                                                               \
  EACH_CPU void dots_##NAME(const float* x, const T* w, const T* bias, T* y, const Sizes& size, int64_t begin,       \
                            int64_t end) {                                                                           \
    by_dots(x, w, bias, y, size, begin, end);                                                                        \
  }                                                                                                                  \
  EACH_CPU void lanes_##NAME(const float* x, const T* w, const T* bias, T* y, const Sizes& size, int64_t begin,      \
                             int64_t end, float* scratch) {                                                          \
    by_lanes(x, w, bias, y, size, begin, end, scratch);                                                              \
  }                                                                                                                  \
  void run_dots(const float* x, const T* w, const T* bias, T* y, const Sizes& size, int64_t begin, int64_t end) {    \
    dots_##NAME(x, w, bias, y, size, begin, end);                                                                    \
  }                                                                                                                  \
  void run_lanes(const float* x, const T* w, const T* bias, T* y, const Sizes& size, int64_t begin, int64_t end,     \
                 float* scratch) {                                                                                   \
    lanes_##NAME(x, w, bias, y, size, begin, end, scratch);                                                          \
  }

LOOPS(float, f32)
LOOPS(Bf16, bf16)

template <typename T>
void linear(const T* x, const T* w, const T* bias, T* y, const Sizes& size) {
  bool is_few = size.rows <= DOTS;
  int64_t groups = (size.rows + LANES - 1) / LANES;
  Floats wide = floats(is_few ? size.rows * size.in : groups * LANES * size.in);
  for (int64_t row = 0; row < (is_few ? size.rows : groups * LANES); ++row)
    for (int64_t i = 0; i < size.in; ++i) {
      float value = row < size.rows ? load(x[row * size.in + i]) : 0;
      int64_t at = paired<T>(i, size.in);
      wide[is_few ? row * size.in + at : (row / LANES * size.in + at) * LANES + row % LANES] = value;
    }
  int64_t length = is_few ? DOTS : BLOCK, blocks = (size.out + length - 1) / length;
  // Below some 30,000 weights a thread, waking it costs more than it does.
  int64_t grain = std::max<int64_t>(1, 32768 / (length * size.in));
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    if (is_few) return run_dots(wide.get(), w, bias, y, size, begin, end);
    Floats scratch = floats(BLOCK * size.in);
    run_lanes(wide.get(), w, bias, y, size, begin, end, scratch.get());
  });
}

}  // namespace

// x [rows][in], w [out][in], bias [out] or null, y [rows][out]; out is at least 6.
extern "C" void pt_linear(int is_bf16, const void* x, const void* w, const void* bias, void* y, int64_t rows,
                          int64_t in, int64_t out) {
  Sizes size{rows, in, out};
  if (is_bf16)
    linear((const Bf16*)x, (const Bf16*)w, (const Bf16*)bias, (Bf16*)y, size);
  else
    linear((const float*)x, (const float*)w, (const float*)bias, (float*)y, size);
}
