// The dot products of select_block, once for each instruction set.
#include "isa.h"
#include "select_block.h"

namespace {

inline float widen_one(float x) { return x; }

// out[h] = x . probe[h] for kHeads heads, x read once. Eight sums in flight: at two loads and an add a cycle,
// four would wait for the add's four cycles.
template <int kHeads, class T>
void dots_of(const T* x, int64_t n, const float* probe, float* out) {
  constexpr int N = kHeads == 1 ? 8 : 2;
  Vec sum[kHeads][N] = {};
  int64_t i = 0;
  for (; i + kLanes * N <= n; i += kLanes * N) PYENGINE_EACH {
      const Vec v = load(x + i + u * kLanes);
      for (int h = 0; h < kHeads; ++h) sum[h][u] += v * load(probe + h * n + i + u * kLanes);
    }
  for (int h = 0; h < kHeads; ++h) {
    for (int half = N / 2; half > 0; half /= 2)
      for (int u = 0; u < half; ++u) sum[h][u] += sum[h][u + half];
    float rest = 0;
    for (int64_t j = i; j < n; ++j) rest += widen_one(x[j]) * probe[h * n + j];
    out[h] = sum_lanes(sum[h][0]) + rest;
  }
}

template <class T>
void all_dots(const void* data, int64_t n, const float* probe, int heads, float* out) {
  const T* x = static_cast<const T*>(data);
  int h = 0;
  for (; h + 4 <= heads; h += 4) dots_of<4>(x, n, probe + h * n, out + h);
  for (; h < heads; ++h) dots_of<1>(x, n, probe + h * n, out + h);
}

void dots(const void* x, DType type, int64_t n, const float* probe, int heads, float* out) {
  const auto kernel = type == DType::f32    ? all_dots<float>
                      : type == DType::bf16 ? all_dots<Bf16>
                                            : all_dots<F16>;
  kernel(x, n, probe, heads, out);
}

}  // namespace

namespace pyengine {
extern const SelectKernels PYENGINE_PASTE(select_kernels_, PYENGINE_ISA);
const SelectKernels PYENGINE_PASTE(select_kernels_, PYENGINE_ISA) = {PYENGINE_STRING(PYENGINE_ISA), dots};
}  // namespace pyengine
