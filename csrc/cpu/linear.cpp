#include "linear.h"

#include <algorithm>
#include <cmath>

#include "dispatch.h"
#include "team.h"

namespace pyengine {
namespace {

// Of the weight, for one thread at a time: a few parts for each, so that a late one holds nobody up.
constexpr int64_t kParts = 4;
// A part is whole blocks of the kernel, and long enough that what it fetches ahead is mostly its own.
constexpr int64_t kMultiple = 6, kShortest = 24;
// Multiplications below which one thread is quicker than two.
constexpr double kWorthwhile = 2e5;
// Rows that pass a part of the weight together, and how much of it where there are more: both stay in a
// level-2 cache, from which the others then read it.
constexpr int64_t kTogether = 32, kPartBytes = 256 << 10;

int64_t size_of(DType type) { return type == DType::f32 ? 4 : type == DType::i8 ? 1 : 2; }

}  // namespace

const DotKernels* dot_kernels(const char* forced) {
  return choose<DotKernels>(PYENGINE_BUILDS(dot_kernels), forced);
}

void linear(const LinearArgs& a, const DotKernels& kernels, int threads) {
  const double work = double(a.rows) * double(a.outputs) * double(a.width);
  if (work < kWorthwhile) threads = 1;
  const int64_t parts = kParts * std::max(threads, 1);
  int64_t share = std::max(kShortest, (a.outputs + parts - 1) / parts);
  const int64_t row_bytes = a.width * size_of(a.type);
  if (a.rows > kTogether) share = std::min(share, std::max(kShortest, kPartBytes / row_bytes));
  share = (share + kMultiple - 1) / kMultiple * kMultiple;
  parallel_rows((a.outputs + share - 1) / share, threads, [&](int64_t part) {
    const int64_t first = part * share, count = std::min(share, a.outputs - first);
    const char* const weight = static_cast<const char*>(a.weight) + first * row_bytes;
    for (int64_t m = 0; m < a.rows; m += kTogether)
      kernels.dots(weight, a.type, a.width, count, a.width, a.x + m * a.width,
                   int(std::min(kTogether, a.rows - m)), a.out + m * a.outputs + first, 1, a.outputs);
    if (!a.bias && !a.scale) return;
    for (int64_t m = 0; m < a.rows; ++m)
      for (int64_t n = first; n < first + count; ++n) {
        float& out = a.out[m * a.outputs + n];
        out = out * (a.scale ? a.scale[n] : 1) + (a.bias ? a.bias[n] : 0);
      }
  });
}

void rms_norm(int64_t rows, int64_t width, const float* x, const float* weight, float eps, float* out,
              const DotKernels& kernels) {
  for (; rows > 0; --rows, x += width, out += width) {
    float sum;
    kernels.dots(x, DType::f32, width, 1, width, x, 1, &sum, 1, 1);
    const float scale = 1 / std::sqrt(sum / float(width) + eps);
    for (int64_t i = 0; i < width; ++i) out[i] = x[i] * scale * weight[i];
  }
}

}  // namespace pyengine
