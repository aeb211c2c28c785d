// The dot products of select_block, once for each instruction set.
#include "isa.h"
#include "select_block.h"

namespace {

inline float widen_one(float x) { return x; }

// out[r][h] = x[r] . probe[h] for kRows rows, `stride` apart, and kHeads heads. Several rows at once are
// several streams from memory, and share the loads of the probe.
template <int kRows, int kHeads, class T>
void dots_of(const T* x, int64_t stride, int64_t n, const float* probe, float* out, int heads) {
  constexpr int N = kHeads == 1 ? 2 : 1;  // the same for every kRows, so that equal candidates tie
  Vec sum[kRows][kHeads][N] = {};
  int64_t i = 0;
  for (; i + kLanes * N <= n; i += kLanes * N) {
    PYENGINE_EACH {
      Vec row[kRows];
      for (int r = 0; r < kRows; ++r) row[r] = load(x + r * stride + i + u * kLanes);
      for (int h = 0; h < kHeads; ++h) {
        const Vec p = load(probe + h * n + i + u * kLanes);
        for (int r = 0; r < kRows; ++r) sum[r][h][u] += row[r] * p;
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int h = 0; h < kHeads; ++h) {
      for (int half = N / 2; half > 0; half /= 2)
        for (int u = 0; u < half; ++u) sum[r][h][u] += sum[r][h][u + half];
      float rest = 0;
      for (int64_t j = i; j < n; ++j) rest += widen_one(x[r * stride + j]) * probe[h * n + j];
      out[r * heads + h] = sum_lanes(sum[r][h][0]) + rest;
    }
  }
}

template <int kRows, class T>
void by_heads(const T* x, int64_t stride, int64_t n, const float* probe, int heads, float* out) {
  int h = 0;
  for (; h + 4 <= heads; h += 4) dots_of<kRows, 4>(x, stride, n, probe + h * n, out + h, heads);
  for (; h < heads; ++h) dots_of<kRows, 1>(x, stride, n, probe + h * n, out + h, heads);
}

template <class T>
void all_dots(const void* data, int64_t stride, int64_t rows, int64_t n, const float* probe, int heads,
              float* out) {
  const T* x = static_cast<const T*>(data);
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) by_heads<4>(x + r * stride, stride, n, probe, heads, out + r * heads);
  for (; r < rows; ++r) by_heads<1>(x + r * stride, stride, n, probe, heads, out + r * heads);
}

void dots(const void* x, DType type, int64_t stride, int64_t rows, int64_t n, const float* probe, int heads,
          float* out) {
  const auto kernel = type == DType::f32    ? all_dots<float>
                      : type == DType::bf16 ? all_dots<Bf16>
                                            : all_dots<F16>;
  kernel(x, stride, rows, n, probe, heads, out);
}

}  // namespace

namespace pyengine {
extern const SelectKernels PYENGINE_PASTE(select_kernels_, PYENGINE_ISA);
const SelectKernels PYENGINE_PASTE(select_kernels_, PYENGINE_ISA) = {PYENGINE_STRING(PYENGINE_ISA), dots};
}  // namespace pyengine
