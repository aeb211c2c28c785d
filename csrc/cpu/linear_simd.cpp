// The dot products of linear and select_block, once for each instruction set.
#include "isa.h"
#include "linear.h"

namespace {

// Sums in flight: 24 of 32 registers, or 12 of 16.
constexpr int kRows = kLanes == 16 ? 6 : 3, kHeads = 4;

inline float widen_one(float x) { return x; }

// out[r][h] = x[r] . y[h] for R rows, `stride` apart, and H heads. The rows that come next are asked for
// meanwhile: the hardware alone, which begins anew with each page, fetches two thirds as fast.
template <int R, int H, class T>
void block(const T* x, int64_t stride, int64_t n, const float* y, float* out, int64_t out_row,
           int64_t out_head) {
  Vec sum[R][H] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Vec row[R];
    for (int r = 0; r < R; ++r) {
      if (sizeof(T) == sizeof(float)) __builtin_prefetch(x + (r + R + 1) * stride + i, 0, 2);
      row[r] = load(x + r * stride + i);
    }
    for (int h = 0; h < H; ++h) {
      const Vec head = load(y + h * n + i);
      for (int r = 0; r < R; ++r) sum[r][h] += row[r] * head;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int h = 0; h < H; ++h) {
      float rest = 0;
      for (int64_t j = i; j < n; ++j) rest += widen_one(x[r * stride + j]) * y[h * n + j];
      out[r * out_row + h * out_head] = sum_lanes(sum[r][h]) + rest;
    }
}

// R rows and all heads, in blocks of nearly the same size.
template <int R, class T>
void by_heads(const T* x, int64_t stride, int64_t n, const float* y, int heads, float* out, int64_t out_row,
              int64_t out_head) {
  constexpr decltype(&block<R, 1, T>) of_size[kHeads] = {block<R, 1, T>, block<R, 2, T>, block<R, 3, T>,
                                                         block<R, 4, T>};
  for (int blocks = (heads + kHeads - 1) / kHeads, h = 0; blocks > 0; --blocks) {
    const int size = (heads - h + blocks - 1) / blocks;
    of_size[size - 1](x, stride, n, y + h * n, out + h * out_head, out_row, out_head);
    h += size;
  }
}

// The rows from r on, R at a time; returns the first that is left.
template <int R, class T>
int64_t by_rows(const T* x, int64_t stride, int64_t r, int64_t rows, int64_t n, const float* y, int heads,
                float* out, int64_t out_row, int64_t out_head) {
  for (; r + R <= rows; r += R)
    by_heads<R>(x + r * stride, stride, n, y, heads, out + r * out_row, out_row, out_head);
  return r;
}

template <class T>
void all_dots(const void* data, int64_t stride, int64_t rows, int64_t n, const float* y, int heads,
              float* out, int64_t out_row, int64_t out_head) {
  const T* x = static_cast<const T*>(data);
  int64_t r = 0;
  if (heads <= kHeads / 2) r = by_rows<2 * kRows>(x, stride, r, rows, n, y, heads, out, out_row, out_head);
  r = by_rows<kRows>(x, stride, r, rows, n, y, heads, out, out_row, out_head);
  by_rows<1>(x, stride, r, rows, n, y, heads, out, out_row, out_head);
}

void dots(const void* x, DType type, int64_t stride, int64_t rows, int64_t n, const float* y, int heads,
          float* out, int64_t out_row, int64_t out_head) {
  const auto kernel = type == DType::f32    ? all_dots<float>
                      : type == DType::bf16 ? all_dots<Bf16>
                      : type == DType::i8   ? all_dots<int8_t>
                                            : all_dots<F16>;
  kernel(x, stride, rows, n, y, heads, out, out_row, out_head);
}

}  // namespace

namespace pyengine {
extern const DotKernels PYENGINE_PASTE(dot_kernels_, PYENGINE_ISA);
const DotKernels PYENGINE_PASTE(dot_kernels_, PYENGINE_ISA) = {PYENGINE_STRING(PYENGINE_ISA), dots};
}  // namespace pyengine
