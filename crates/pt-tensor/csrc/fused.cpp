// Element-wise parts of a decoder layer, each one pass over memory where libtorch takes five to ten. CPU only,
// f32 and bf16, arithmetic in f32 with one rounding at the end. The callers in fused.rs check shapes, kinds and
// contiguity, so the loops here are plain.
//
// Rows are shared out by libtorch's own thread pool.

#include "simd.h"

#include <ATen/Parallel.h>

#include <limits>

namespace {

// One row, templates first; EACH_CPU functions below instantiate them, because clones cannot be templates.

template <typename T>
inline void rms_row(const T* x, const T* w, T* y, float* rstd, int64_t n, float eps) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    float v = load(x[i]);
    sum += v * v;
  }
  float r = 1.0f / std::sqrt(sum / float(n) + eps);
  *rstd = r;
  for (int64_t i = 0; i < n; ++i) store(&y[i], load(x[i]) * r * load(w[i]));
}

template <typename T>
inline void rms_backward_row(const T* g, const T* x, const T* w, float r, T* dx, int64_t n) {
  float dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t i = 0; i < n; ++i) dot += load(g[i]) * load(w[i]) * load(x[i]);
  float c = dot * r * r / float(n);
  for (int64_t i = 0; i < n; ++i) store(&dx[i], r * (load(g[i]) * load(w[i]) - load(x[i]) * c));
}

template <typename T>
inline void swiglu_run(const T* gate, const T* up, T* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    float g = load(gate[i]);
    store(&y[i], g / (1.0f + exp_fast(-g)) * load(up[i]));
  }
}

template <typename T>
inline void swiglu_backward_run(const T* dy, const T* gate, const T* up, T* dgate, T* dup, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    float g = load(gate[i]), d = load(dy[i]);
    float s = 1.0f / (1.0f + exp_fast(-g));
    store(&dup[i], d * g * s);
    store(&dgate[i], d * load(up[i]) * s * (1.0f + g * (1.0f - s)));
  }
}

template <typename T>
inline void rotary_head(const T* x, const float* cos, const float* sin, T* y, int64_t half, float sign) {
  for (int64_t i = 0; i < half; ++i) {
    float a = load(x[i]), b = load(x[i + half]), c = cos[i], s = sign * sin[i];
    store(&y[i], a * c - b * s);
    store(&y[i + half], b * c + a * s);
  }
}

// A row of a tile of logits becomes exp(scale * logit - max), in place, and the label's own entry next to nothing: the
// sum of the others stays exact however probable the label is. Columns hold the ids [first, first + n). Beside the sum
// goes that of the squares.
template <typename T>
inline void softmax_row(T* x, int64_t n, float scale, int64_t label, float* max, float* others, float* squares,
                        float* label_logit, float* rescale) {
  float top = *max;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < n; ++i) {
    float v = load(x[i]) * scale;
    top = v > top ? v : top;
  }
  if (label >= 0 && label < n) {
    *label_logit = load(x[label]) * scale;
    store(&x[label], -std::numeric_limits<float>::infinity());
  }
  *rescale = *max < top ? exp_fast(*max - top) : 1.0f;
  float sum = 0, sum_squares = 0;
#pragma omp simd reduction(+ : sum, sum_squares)
  for (int64_t i = 0; i < n; ++i) {
    float e = exp_fast(load(x[i]) * scale - top);
    sum += e;
    sum_squares += e * e;
    store(&x[i], e);
  }
  *others = *others * *rescale + sum;
  *squares = *squares * *rescale * *rescale + sum_squares;
  *max = top;
}

#define ROW_LOOPS(T, NAME)                                                                                          \
  EACH_CPU void rms_##NAME(const T* x, const T* w, T* y, float* rstd, int64_t rows, int64_t n, float eps) {         \
    for (int64_t i = 0; i < rows; ++i) rms_row(x + i * n, w, y + i * n, rstd + i, n, eps);                          \
  }                                                                                                                 \
  EACH_CPU void rms_backward_##NAME(const T* g, const T* x, const T* w, const float* rstd, T* dx, int64_t rows,     \
                                    int64_t n) {                                                                    \
    for (int64_t i = 0; i < rows; ++i) rms_backward_row(g + i * n, x + i * n, w, rstd[i], dx + i * n, n);           \
  }                                                                                                                 \
  EACH_CPU void swiglu_##NAME(const T* gate, const T* up, T* y, int64_t n) { swiglu_run(gate, up, y, n); }          \
  EACH_CPU void swiglu_backward_##NAME(const T* dy, const T* gate, const T* up, T* dgate, T* dup, int64_t n) {      \
    swiglu_backward_run(dy, gate, up, dgate, dup, n);                                                               \
  }                                                                                                                 \
  EACH_CPU void softmax_##NAME(T* x, int64_t rows, int64_t n, float scale, const int64_t* labels, int64_t first,     \
                               float* max, float* others, float* squares, float* label_logits, float* rescale) {    \
    for (int64_t i = 0; i < rows; ++i)                                                                              \
      softmax_row(x + i * n, n, scale, labels[i] - first, max + i, others + i, squares + i, label_logits + i,       \
                  rescale + i);                                                                                     \
  }                                                                                                                 \
  EACH_CPU void rotary_##NAME(const T* x, const float* cos, const float* sin, T* y, int64_t rows, int64_t heads,    \
                              int64_t head_dim, float sign) {                                                       \
    int64_t half = head_dim / 2;                                                                                    \
    for (int64_t i = 0; i < rows; ++i)                                                                              \
      for (int64_t h = 0; h < heads; ++h)                                                                           \
        rotary_head(x + (i * heads + h) * head_dim, cos + i * half, sin + i * half, y + (i * heads + h) * head_dim, \
                    half, sign);                                                                                    \
  }

ROW_LOOPS(float, f32)
ROW_LOOPS(Bf16, bf16)

constexpr int64_t GRAIN = 1 << 15;  // elements that a thread takes at least

template <typename F>
void rows_in_parallel(int64_t rows, int64_t row_elements, const F& body) {
  int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, row_elements));
  at::parallel_for(0, rows, grain, body);
}

}  // namespace


extern "C" {

void pt_rms_norm(int is_bf16, const void* x, const void* w, void* y, float* rstd, int64_t rows, int64_t n, float eps) noexcept {
  rows_in_parallel(rows, n, [&](int64_t a, int64_t b) {
    if (is_bf16)
      rms_bf16((const Bf16*)x + a * n, (const Bf16*)w, (Bf16*)y + a * n, rstd + a, b - a, n, eps);
    else
      rms_f32((const float*)x + a * n, (const float*)w, (float*)y + a * n, rstd + a, b - a, n, eps);
  });
}

void pt_rms_norm_backward(int is_bf16, const void* g, const void* x, const void* w, const float* rstd, void* dx,
                          int64_t rows, int64_t n) noexcept {
  rows_in_parallel(rows, n, [&](int64_t a, int64_t b) {
    if (is_bf16)
      rms_backward_bf16((const Bf16*)g + a * n, (const Bf16*)x + a * n, (const Bf16*)w, rstd + a, (Bf16*)dx + a * n,
                        b - a, n);
    else
      rms_backward_f32((const float*)g + a * n, (const float*)x + a * n, (const float*)w, rstd + a,
                       (float*)dx + a * n, b - a, n);
  });
}

void pt_swiglu(int is_bf16, const void* gate, const void* up, void* y, int64_t count) noexcept {
  rows_in_parallel(count, 1, [&](int64_t a, int64_t b) {
    if (is_bf16)
      swiglu_bf16((const Bf16*)gate + a, (const Bf16*)up + a, (Bf16*)y + a, b - a);
    else
      swiglu_f32((const float*)gate + a, (const float*)up + a, (float*)y + a, b - a);
  });
}

void pt_swiglu_backward(int is_bf16, const void* dy, const void* gate, const void* up, void* dgate, void* dup,
                        int64_t count) noexcept {
  rows_in_parallel(count, 1, [&](int64_t a, int64_t b) {
    if (is_bf16)
      swiglu_backward_bf16((const Bf16*)dy + a, (const Bf16*)gate + a, (const Bf16*)up + a, (Bf16*)dgate + a,
                           (Bf16*)dup + a, b - a);
    else
      swiglu_backward_f32((const float*)dy + a, (const float*)gate + a, (const float*)up + a, (float*)dgate + a,
                          (float*)dup + a, b - a);
  });
}

// A tile of logits [rows][n] of the ids [first, first + n); labels and what follows `first` are [rows].
void pt_softmax_tile(int is_bf16, void* x, int64_t rows, int64_t n, float scale, const int64_t* labels, int64_t first,
                     float* max, float* others, float* squares, float* label_logits, float* rescale) noexcept {
  rows_in_parallel(rows, n, [&](int64_t a, int64_t b) {
    if (is_bf16)
      softmax_bf16((Bf16*)x + a * n, b - a, n, scale, labels + a, first, max + a, others + a, squares + a,
                   label_logits + a, rescale + a);
    else
      softmax_f32((float*)x + a * n, b - a, n, scale, labels + a, first, max + a, others + a, squares + a,
                  label_logits + a, rescale + a);
  });
}

// sign = 1 rotates, sign = -1 rotates back (the backward pass).
void pt_rotary(int is_bf16, const void* x, const float* cos, const float* sin, void* y, int64_t rows, int64_t heads,
               int64_t head_dim, float sign) noexcept {
  int64_t n = heads * head_dim, half = head_dim / 2;
  rows_in_parallel(rows, n, [&](int64_t a, int64_t b) {
    if (is_bf16)
      rotary_bf16((const Bf16*)x + a * n, cos + a * half, sin + a * half, (Bf16*)y + a * n, b - a, heads, head_dim,
                  sign);
    else
      rotary_f32((const float*)x + a * n, cos + a * half, sin + a * half, (float*)y + a * n, b - a, heads, head_dim,
                 sign);
  });
}

}  // extern "C"
