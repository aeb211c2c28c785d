// The dot products of select_block. Compiled once for each instruction set, like tilt_simd.cpp.
#include "isa.h"
#include "select_block.h"

namespace {

// out[h] += x . probe[h] for kHeads heads, x read once. Eight sums in flight: at two loads and an add a
// cycle, four would wait for the add's four cycles.
template <int kHeads>
void add_dots(const float* x, int n, const float* probe, int64_t stride, float* out) {
  constexpr int N = kHeads == 1 ? 8 : 2;
  Vec sum[kHeads][N] = {};
  int i = 0;
  for (; i + kLanes * N <= n; i += kLanes * N) PYENGINE_EACH {
      const Vec v = load(x + i + u * kLanes);
      for (int h = 0; h < kHeads; ++h) sum[h][u] += v * load(probe + h * stride + i + u * kLanes);
    }
  for (int h = 0; h < kHeads; ++h) {
    for (int half = N / 2; half > 0; half /= 2)
      for (int u = 0; u < half; ++u) sum[h][u] += sum[h][u + half];
    float rest = 0;
    for (int j = i; j < n; ++j) rest += x[j] * probe[h * stride + j];
    out[h] += sum_lanes(sum[h][0]) + rest;
  }
}

void dots(const void* x, DType type, int64_t n, const float* probe, int heads, float* out) {
  alignas(64) float wide[pyengine::kBlock];
  for (int h = 0; h < heads; ++h) out[h] = 0;
  for (int64_t start = 0; start < n; start += pyengine::kBlock) {
    const int some = int(n - start < pyengine::kBlock ? n - start : pyengine::kBlock);
    const float* block = static_cast<const float*>(x) + start;
    if (type != DType::f32) {
      widen(static_cast<const uint16_t*>(x) + start, type, some, wide);
      block = wide;
    }
    int h = 0;
    for (; h + 4 <= heads; h += 4) add_dots<4>(block, some, probe + h * n + start, n, out + h);
    for (; h < heads; ++h) add_dots<1>(block, some, probe + h * n + start, n, out + h);
  }
}

}  // namespace

namespace pyengine {
extern const SelectKernels PYENGINE_PASTE(select_kernels_, PYENGINE_ISA);
const SelectKernels PYENGINE_PASTE(select_kernels_, PYENGINE_ISA) = {PYENGINE_STRING(PYENGINE_ISA), dots};
}  // namespace pyengine
