// Softmax attention over packed segments, forward and backward, on the CPU. Dao et al. 2022,
// https://arxiv.org/abs/2205.14135: tiles of scores, an online softmax, and a backward pass that computes the scores
// again from one number per row.
//
// Everything is computed in f32; f32 and bf16 are read and written. A segment's queries see its prefix wholly and its
// own tokens causally, so a prompt's keys are packed once however many completions read them. The first `common` keys
// stand before every segment but their own. The callers in attention.rs check shapes, kinds, contiguity and spans.
//
// Layouts: query, out [query][head][dim]; key, value [token][kv_head][dim]; row_lse [query][head]. The first `ahead`
// tokens have no query: query i is that of token ahead + i.

#include "simd.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

struct PtSpan {
  // Tokens before the segment that all of it sees, and its own.
  int64_t prefix_start, prefix_end, start, end;
};

#define INLINED __attribute__((always_inline))

namespace {

constexpr int64_t ROWS = 48;             // queries in a tile
constexpr int64_t KEYS = 128;            // keys in a tile, a multiple of LANES
constexpr int64_t WIDTH = KEYS + LANES;  // floats in a row of scores, with room for a block that starts near the end

struct Shape {
  int64_t tokens, heads, kv_heads, dim;
  int64_t common;  // tokens at the front that all segments see
  int64_t ahead;   // tokens at the front without a query
  int64_t window;  // tokens that a query sees, itself included; 0 where there is no window
  float scale;
  int64_t padded() const { return (dim + LANES - 1) / LANES * LANES; }
  int64_t tiles() const { return (tokens + LANES - 1) / LANES; }
  int64_t repeats() const { return heads / kv_heads; }
};

// Keys or values in f32, per key head: rows [token][padded dim], and columns [token / 16][dim][token % 16].
struct Packed {
  Floats rows, columns;
  int64_t row_stride, column_stride;
  const float* row(int64_t kv_head, int64_t token, const Shape& shape) const {
    return rows.get() + kv_head * row_stride + token * shape.padded();
  }
  const float* column(int64_t kv_head, int64_t tile, const Shape& shape) const {
    return columns.get() + kv_head * column_stride + tile * shape.dim * LANES;
  }
};

template <typename T>
INLINE void pack_tile(const T* x, Packed& packed, const Shape& shape, int64_t kv_head, int64_t tile) {
  int64_t padded = shape.padded(), first = tile * LANES, count = std::min(LANES, shape.tokens - first);
  const T* source = x + (first * shape.kv_heads + kv_head) * shape.dim;
  if (packed.rows) {
    float* rows = packed.rows.get() + kv_head * packed.row_stride + first * padded;
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t d = 0; d < shape.dim; ++d) rows[t * padded + d] = load(source[t * shape.kv_heads * shape.dim + d]);
      for (int64_t d = shape.dim; d < padded; ++d) rows[t * padded + d] = 0;
    }
  }
  if (packed.columns) {
    float* columns = packed.columns.get() + kv_head * packed.column_stride + tile * shape.dim * LANES;
    for (int64_t d = 0; d < shape.dim; ++d)
      for (int64_t t = 0; t < LANES; ++t)
        columns[d * LANES + t] = t < count ? load(source[t * shape.kv_heads * shape.dim + d]) : 0;
  }
}

// A tile of a segment's queries of one head.
struct Tile {
  const PtSpan* span;
  int64_t first, count;  // rows of the segment
  int64_t query(const Shape& shape) const { return span->start + first - shape.ahead; }
  // Keys of other tokens before the segment's own: those that all see, and the prefix.
  int64_t common(const Shape& shape) const { return span->start < shape.common ? 0 : shape.common; }
  int64_t before(const Shape& shape) const { return common(shape) + span->prefix_end - span->prefix_start; }
};

// One of the three runs of keys of a segment: tokens [start, end), the first of which stands at `position`.
struct Run {
  int64_t start, end, position;
};

INLINE Run run_of(const Tile& tile, int which, const Shape& shape) {
  const PtSpan& span = *tile.span;
  if (which == 0) return Run{0, tile.common(shape), 0};
  if (which == 1) return Run{span.prefix_start, span.prefix_end, tile.common(shape)};
  return Run{span.start, span.end, tile.before(shape)};
}

// The keys [from, to) that the query at `position` sees within [low, high) of a run.
struct Seen {
  int64_t from, to;
};

INLINE Seen seen(const Run& run, int64_t position, int64_t low, int64_t high, int64_t window) {
  int64_t after = run.start + position - run.position + 1;
  int64_t from = window > 0 ? std::clamp(after - window, low, high) : low;
  return Seen{from, std::clamp(after, from, high)};
}

// Rows of one head as f32, padded with zeros to `ROWS` rows of the padded width.
template <typename T>
INLINE void gather(const T* x, const Shape& shape, int64_t head, const Tile& tile, float* out) {
  int64_t padded = shape.padded();
  for (int64_t r = 0; r < ROWS; ++r) {
    float* row = out + r * padded;
    const T* source = x + ((tile.query(shape) + r) * shape.heads + head) * shape.dim;
    int64_t width = r < tile.count ? shape.dim : 0;
    for (int64_t d = 0; d < width; ++d) row[d] = load(source[d]);
    for (int64_t d = width; d < padded; ++d) row[d] = 0;
  }
}

// scores[r][j] = a[r] · column j, for one block of rows over the vectors [from, to) of a tile of keys.
INLINE void products(const float* a, const float* columns, float* scores, const Shape& shape, int64_t from,
                     int64_t to) {
  for (int64_t j = from; j < to; ++j) {
    for (int64_t r = 0; r < BLOCK; ++r) *(Vec*)(scores + r * WIDTH + j * LANES) = Vec{};
    multiply(scores + j * LANES, WIDTH, a, shape.padded(), 1, columns + j * shape.dim * LANES, LANES, shape.dim);
  }
}

struct Job {
  Shape shape;
  const PtSpan* spans;
  Packed key, value;
};

// Calls body(run, base, low, high, first_row) for every tile of keys that some row of the tile sees: tokens [low, high)
// of the run, columns counted from the token `base`, rows before `first_row` seeing none of them.
template <typename F>
INLINE void each_key_tile(const Tile& tile, const Shape& shape, const F& body) {
  int64_t first_position = tile.before(shape) + tile.first, last_position = first_position + tile.count - 1;
  for (int which = 0; which < 3; ++which) {
    Run run = run_of(tile, which, shape);
    if (run.start == run.end) continue;
    for (int64_t base = run.start / LANES * LANES; base < run.end; base += KEYS) {
      int64_t low = std::max(base, run.start), high = std::min(base + KEYS, run.end);
      int64_t low_position = run.position + low - run.start, high_position = run.position + high - 1 - run.start;
      if (low_position > last_position) break;
      if (shape.window > 0 && high_position <= first_position - shape.window) continue;
      int64_t first_row = std::max<int64_t>(0, low_position - first_position) / BLOCK * BLOCK;
      body(run, base, low, high, first_row);
    }
  }
}

template <typename T>
INLINE void forward_tile(const Job& job, const T* query, T* out, float* row_lse, int64_t head, const Tile& tile,
                         float* scratch) {
  const Shape& shape = job.shape;
  int64_t padded = shape.padded(), kv_head = head / shape.repeats();
  float *q = scratch, *sum = q + ROWS * padded, *p = sum + ROWS * padded;
  float max[ROWS], total[ROWS];
  gather(query, shape, head, tile, q);
  for (int64_t i = 0; i < ROWS * padded; ++i) q[i] *= shape.scale;
  for (int64_t i = 0; i < ROWS * padded; ++i) sum[i] = 0;
  for (int64_t r = 0; r < ROWS; ++r) max[r] = -std::numeric_limits<float>::infinity(), total[r] = 0;
  each_key_tile(tile, shape, [&](const Run& run, int64_t base, int64_t low, int64_t high, int64_t first_row) INLINED {
    for (int64_t block = first_row; block < tile.count; block += BLOCK) {
      int64_t rows = std::min(BLOCK, tile.count - block);
      int64_t position = tile.before(shape) + tile.first + block;
      Seen first = seen(run, position, low, high, shape.window);
      Seen last = seen(run, position + rows - 1, low, high, shape.window);
      int64_t from = (first.from - base) / LANES, to = (last.to - base + LANES - 1) / LANES;
      float* scores = p + block * WIDTH;
      products(q + block * padded, job.key.column(kv_head, base / LANES, shape), scores, shape, from, to);
      for (int64_t r = 0; r < BLOCK; ++r) {
        float* row = scores + r * WIDTH;
        Seen own = seen(run, position + r, low, high, shape.window);
        if (r >= rows || own.from == own.to) {
          for (int64_t j = from * LANES; j < to * LANES; ++j) row[j] = 0;
          continue;
        }
        const float none = -std::numeric_limits<float>::infinity();
        for (int64_t j = from * LANES; j < own.from - base; ++j) row[j] = none;
        for (int64_t j = own.to - base; j < to * LANES; ++j) row[j] = none;
        Vec top = *(const Vec*)(row + from * LANES);
        for (int64_t j = from + 1; j < to; ++j) {
          Vec x = *(const Vec*)(row + j * LANES);
          top = x > top ? x : top;
        }
        float highest = max[block + r];
        for (int64_t j = 0; j < LANES; ++j) highest = top[j] > highest ? top[j] : highest;
        float row_sum = 0;
        for (int64_t j = from * LANES; j < to * LANES; ++j) row[j] = exp_fast(row[j] - highest);
        for (int64_t j = from * LANES; j < own.from - base; ++j) row[j] = 0;
        for (int64_t j = own.to - base; j < to * LANES; ++j) row[j] = 0;
#pragma omp simd reduction(+ : row_sum)
        for (int64_t j = from * LANES; j < to * LANES; ++j) row_sum += row[j];
        // exp_fast bottoms out above zero, so the first tile's rescaling of nothing is spelt out.
        float rescale = total[block + r] == 0 ? 0 : exp_fast(max[block + r] - highest);
        total[block + r] = total[block + r] * rescale + row_sum;
        max[block + r] = highest;
        float* target = sum + (block + r) * padded;
        for (int64_t d = 0; d < padded; ++d) target[d] *= rescale;
      }
      int64_t key = std::max(low, first.from);
      for (int64_t d = 0; d < padded; d += LANES)
        multiply(sum + block * padded + d, padded, scores + (key - base), WIDTH, 1,
                 job.value.row(kv_head, key, shape) + d, padded, last.to - key);
    }
  });
  for (int64_t r = 0; r < tile.count; ++r) {
    T* target = out + ((tile.query(shape) + r) * shape.heads + head) * shape.dim;
    float scale = 1.0f / total[r];
    for (int64_t d = 0; d < shape.dim; ++d) store(&target[d], sum[r * padded + d] * scale);
    row_lse[(tile.query(shape) + r) * shape.heads + head] = max[r] + std::log(total[r]);
  }
}

template <typename T>
struct Backward {
  const T *query, *out, *grad_out;
  const float* row_lse;
  T *grad_query, *grad_key, *grad_value;
};

// A family's gradients of keys or values: rows of the common tokens, and of its own from `first` on. Each part has room
// for a block that starts near its end.
struct Rows {
  int64_t common, first;
  int64_t lead() const { return common > 0 ? common + BLOCK : 0; }
  int64_t of(int64_t token) const { return token < common ? token : lead() + token - first; }
};

// One tile of queries: writes their gradient, adds to the keys' and values'.
template <typename T>
INLINE void backward_tile(const Job& job, const Backward<T>& args, int64_t head, const Tile& tile, const Rows& rows_of,
                          float* grad_key, float* grad_value, float* scratch) {
  const Shape& shape = job.shape;
  int64_t padded = shape.padded(), kv_head = head / shape.repeats();
  float *q = scratch, *grad = q + ROWS * padded, *grad_q = grad + ROWS * padded;
  float *p = grad_q + ROWS * padded, *ds = p + ROWS * WIDTH;
  float lse[ROWS], delta[ROWS];
  gather(args.query, shape, head, tile, q);
  gather(args.grad_out, shape, head, tile, grad);
  for (int64_t i = 0; i < ROWS * padded; ++i) grad_q[i] = 0;
  for (int64_t r = 0; r < tile.count; ++r) {
    int64_t at = (tile.query(shape) + r) * shape.heads + head;
    float dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t d = 0; d < shape.dim; ++d) dot += grad[r * padded + d] * load(args.out[at * shape.dim + d]);
    delta[r] = dot;
    lse[r] = args.row_lse[at];
  }
  each_key_tile(tile, shape, [&](const Run& run, int64_t base, int64_t low, int64_t high, int64_t first_row) INLINED {
    int64_t highest = low;
    for (int64_t block = first_row; block < tile.count; block += BLOCK) {
      int64_t rows = std::min(BLOCK, tile.count - block);
      int64_t position = tile.before(shape) + tile.first + block;
      Seen first = seen(run, position, low, high, shape.window);
      Seen last = seen(run, position + rows - 1, low, high, shape.window);
      int64_t from = (first.from - base) / LANES, to = (last.to - base + LANES - 1) / LANES;
      highest = std::max(highest, last.to);
      float *scores = p + block * WIDTH, *slopes = ds + block * WIDTH;
      products(q + block * padded, job.key.column(kv_head, base / LANES, shape), scores, shape, from, to);
      products(grad + block * padded, job.value.column(kv_head, base / LANES, shape), slopes, shape, from, to);
      for (int64_t r = 0; r < BLOCK; ++r) {
        float *row = scores + r * WIDTH, *slope = slopes + r * WIDTH;
        Seen own = seen(run, position + r, low, high, shape.window);
        int64_t begin = own.from - base, end = own.to - base;
        if (r >= rows) begin = end = 0;
        if (begin < end) {
          float row_lse = lse[block + r], row_delta = delta[block + r];
          for (int64_t j = from * LANES; j < to * LANES; ++j) {
            row[j] = exp_fast(row[j] * shape.scale - row_lse);
            slope[j] = row[j] * (slope[j] - row_delta) * shape.scale;
          }
        }
        // Outside what the row sees there is nothing, up to the end of the tile: whole blocks of keys read it.
        for (int64_t j = 0; j < begin; ++j) row[j] = slope[j] = 0;
        for (int64_t j = end; j < WIDTH; ++j) row[j] = slope[j] = 0;
      }
      int64_t key = std::max(low, first.from);
      for (int64_t d = 0; d < padded; d += LANES)
        multiply(grad_q + block * padded + d, padded, slopes + (key - base), WIDTH, 1,
                 job.key.row(kv_head, key, shape) + d, padded, last.to - key);
    }
    // The last block of rows is filled up with zeros in p and ds, so whole blocks may be read.
    int64_t rows = (tile.count + BLOCK - 1) / BLOCK * BLOCK;
    int64_t first_position = tile.before(shape) + tile.first;
    for (int64_t key = low; key < highest; key += BLOCK) {
      int64_t key_position = run.position + key - run.start;
      int64_t row = std::max<int64_t>(first_row, (key_position - first_position) / BLOCK * BLOCK);
      for (int64_t d = 0; d < padded; d += LANES) {
        int64_t target = rows_of.of(key) * padded + d;
        multiply(grad_value + target, padded, p + row * WIDTH + (key - base), 1, WIDTH, grad + row * padded + d,
                 padded, rows - row);
        multiply(grad_key + target, padded, ds + row * WIDTH + (key - base), 1, WIDTH, q + row * padded + d, padded,
                 rows - row);
      }
    }
  });
  for (int64_t r = 0; r < tile.count; ++r) {
    T* target = args.grad_query + ((tile.query(shape) + r) * shape.heads + head) * shape.dim;
    for (int64_t d = 0; d < shape.dim; ++d) store(&target[d], grad_q[r * padded + d]);
  }
}

// Writes the gradient of keys or values of one head over the tokens [first, last).
template <typename T>
INLINE void scatter(const float* rows, T* out, const Shape& shape, int64_t kv_head, int64_t first, int64_t last) {
  for (int64_t t = first; t < last; ++t)
    for (int64_t d = 0; d < shape.dim; ++d)
      store(&out[(t * shape.kv_heads + kv_head) * shape.dim + d], rows[(t - first) * shape.padded() + d]);
}

#define LOOPS(T, NAME)                                                                                                \
  EACH_CPU void pack_##NAME(const T* x, Packed& packed, const Shape& shape, int64_t kv_head, int64_t tile) {          \
    pack_tile(x, packed, shape, kv_head, tile);                                                                       \
  }                                                                                                                   \
  EACH_CPU void forward_##NAME(const Job& job, const T* query, T* out, float* row_lse, int64_t head, const Tile& tile, \
                               float* scratch) {                                                                      \
    forward_tile(job, query, out, row_lse, head, tile, scratch);                                                      \
  }                                                                                                                   \
  EACH_CPU void backward_##NAME(const Job& job, const Backward<T>& args, int64_t head, const Tile& tile,              \
                                const Rows& rows, float* grad_key, float* grad_value, float* scratch) {               \
    backward_tile(job, args, head, tile, rows, grad_key, grad_value, scratch);                                        \
  }                                                                                                                   \
  EACH_CPU void scatter_##NAME(const float* rows, T* out, const Shape& shape, int64_t kv_head, int64_t first,         \
                               int64_t last) {                                                                        \
    scatter(rows, out, shape, kv_head, first, last);                                                                  \
  }                                                                                                                   \
  void pack(const T* x, Packed& p, const Shape& s, int64_t g, int64_t i) { pack_##NAME(x, p, s, g, i); }              \
  void forward(const Job& j, const T* q, T* o, float* l, int64_t h, const Tile& t, float* w) {                        \
    forward_##NAME(j, q, o, l, h, t, w);                                                                              \
  }                                                                                                                   \
  void backward(const Job& j, const Backward<T>& a, int64_t h, const Tile& t, const Rows& r, float* k, float* v,      \
                float* w) {                                                                                           \
    backward_##NAME(j, a, h, t, r, k, v, w);                                                                          \
  }                                                                                                                   \
  void spread(const float* r, T* o, const Shape& s, int64_t g, int64_t a, int64_t b) { scatter_##NAME(r, o, s, g, a, b); }

LOOPS(float, f32)
LOOPS(Bf16, bf16)

// Runs body(unit, scratch) for every unit, each thread taking the next one: units differ in length.
template <typename F>
void share_out(int64_t units, int64_t scratch_floats, const F& body) {
  std::atomic<int64_t> next{0};
  int64_t threads = std::min<int64_t>(units, at::get_num_threads());
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    Floats scratch = floats(scratch_floats);
    for (int64_t i = begin; i < end; ++i)
      for (int64_t unit = next++; unit < units; unit = next++) body(unit, scratch.get());
  });
}

template <typename T>
Packed packed(const T* x, const Shape& shape, bool with_rows, bool with_columns) {
  Packed out;
  out.row_stride = shape.tiles() * LANES * shape.padded();
  out.column_stride = shape.tiles() * LANES * shape.dim;
  if (with_rows) out.rows = floats(shape.kv_heads * out.row_stride);
  if (with_columns) out.columns = floats(shape.kv_heads * out.column_stride);
  int64_t tiles = shape.tiles();
  at::parallel_for(0, shape.kv_heads * tiles, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) pack(x, out, shape, i / tiles, i % tiles);
  });
  return out;
}

std::vector<Tile> tiles_of(const PtSpan* spans, int64_t count) {
  std::vector<Tile> tiles;
  for (int64_t s = 0; s < count; ++s)
    for (int64_t row = 0; row < spans[s].end - spans[s].start; row += ROWS)
      tiles.push_back(Tile{spans + s, row, std::min(ROWS, spans[s].end - spans[s].start - row)});
  return tiles;
}

template <typename T>
void attention(const T* query, const T* key, const T* value, T* out, float* row_lse, const PtSpan* spans,
               int64_t num_spans, const Shape& shape) {
  Job job{shape, spans, packed(key, shape, false, true), packed(value, shape, true, false)};
  std::vector<Tile> tiles = tiles_of(spans, num_spans);
  int64_t count = int64_t(tiles.size());
  // Heads that share keys follow one another.
  share_out(count * shape.heads, 2 * ROWS * shape.padded() + ROWS * WIDTH, [&](int64_t unit, float* scratch) {
    forward(job, query, out, row_lse, unit % shape.heads, tiles[unit / shape.heads], scratch);
  });
}

template <typename T>
void attention_backward(const Backward<T>& args, const T* key, const T* value, const PtSpan* spans,
                        const int64_t* families, int64_t num_families, const Shape& shape) {
  Job job{shape, spans, packed(key, shape, true, true), packed(value, shape, false, true)};
  int64_t padded = shape.padded();
  // A family's keys are read by its own queries only, so one thread owns their gradient: no locks, and the same sums in
  // the same order at every run. Of the common keys' gradient each family has its part, which are summed at the end.
  int64_t part = shape.common * padded;
  Floats parts = floats(std::max<int64_t>(1, num_families * shape.kv_heads * 2 * part));
  share_out(num_families * shape.kv_heads, 3 * ROWS * padded + 2 * ROWS * WIDTH, [&](int64_t unit, float* scratch) {
    int64_t family = unit / shape.kv_heads, kv_head = unit % shape.kv_heads;
    const PtSpan *begin = spans + families[family], *end = spans + families[family + 1];
    Rows rows{shape.common, std::max(begin->start, shape.common)};
    int64_t last = std::max(end[-1].end, shape.common);
    int64_t size = (rows.of(last) + BLOCK) * padded;
    Floats grads = floats(2 * size);
    float *grad_key = grads.get(), *grad_value = grad_key + size;
    std::fill_n(grad_key, 2 * size, 0.0f);
    for (const Tile& tile : tiles_of(begin, end - begin))
      for (int64_t head = kv_head * shape.repeats(); head < (kv_head + 1) * shape.repeats(); ++head)
        backward(job, args, head, tile, rows, grad_key, grad_value, scratch);
    spread(grad_key + rows.lead() * padded, args.grad_key, shape, kv_head, rows.first, last);
    spread(grad_value + rows.lead() * padded, args.grad_value, shape, kv_head, rows.first, last);
    std::copy_n(grad_key, part, parts.get() + unit * 2 * part);
    std::copy_n(grad_value, part, parts.get() + (unit * 2 + 1) * part);
  });
  if (part == 0) return;
  share_out(shape.kv_heads, 2 * part, [&](int64_t kv_head, float* sums) {
    std::fill_n(sums, 2 * part, 0.0f);
    for (int64_t family = 0; family < num_families; ++family) {
      const float* own = parts.get() + (family * shape.kv_heads + kv_head) * 2 * part;
      for (int64_t i = 0; i < 2 * part; ++i) sums[i] += own[i];
    }
    spread(sums, args.grad_key, shape, kv_head, 0, shape.common);
    spread(sums + part, args.grad_value, shape, kv_head, 0, shape.common);
  });
}

}  // namespace

extern "C" {

void pt_attention(int is_bf16, const void* query, const void* key, const void* value, void* out, float* row_lse,
                  const PtSpan* spans, int64_t num_spans, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t dim,
                  int64_t common, int64_t ahead, int64_t window, float scale) noexcept {
  Shape shape{tokens, heads, kv_heads, dim, common, ahead, window, scale};
  if (is_bf16)
    attention((const Bf16*)query, (const Bf16*)key, (const Bf16*)value, (Bf16*)out, row_lse, spans, num_spans, shape);
  else
    attention((const float*)query, (const float*)key, (const float*)value, (float*)out, row_lse, spans, num_spans,
              shape);
}

// families: num_families + 1 indices into spans; a span's prefix lies within its own family's tokens. No span and no
// prefix crosses the end of the common tokens.
void pt_attention_backward(int is_bf16, const void* query, const void* key, const void* value, const void* out,
                           const void* grad_out, const float* row_lse, void* grad_query, void* grad_key,
                           void* grad_value, const PtSpan* spans, const int64_t* families, int64_t num_families,
                           int64_t tokens, int64_t heads, int64_t kv_heads, int64_t dim, int64_t common, int64_t ahead,
                           int64_t window, float scale) noexcept {
  Shape shape{tokens, heads, kv_heads, dim, common, ahead, window, scale};
  if (is_bf16)
    attention_backward<Bf16>({(const Bf16*)query, (const Bf16*)out, (const Bf16*)grad_out, row_lse, (Bf16*)grad_query,
                              (Bf16*)grad_key, (Bf16*)grad_value},
                             (const Bf16*)key, (const Bf16*)value, spans, families, num_families, shape);
  else
    attention_backward<float>({(const float*)query, (const float*)out, (const float*)grad_out, row_lse,
                               (float*)grad_query, (float*)grad_key, (float*)grad_value},
                              (const float*)key, (const float*)value, spans, families, num_families, shape);
}

}  // extern "C"
