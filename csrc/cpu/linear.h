// Dot products of few vectors with many rows on a CPU: a linear layer over the rows of a decode step, and the
// probe of select_block. Beside them the norm that comes before such a layer.
#pragma once

#include <cstdint>

#include "../algebra.h"

namespace pyengine {

// out[m][n] = x[m] . weight[n] * scale[n] + bias[n], summed in fp32: the bits of a row depend on that row
// and the weights alone. All tensors contiguous, and fp32 but for the weight; borrowed for the call.
struct LinearArgs {
  int64_t rows, outputs, width;
  const float* x;      // [rows, width]
  const void* weight;  // [outputs, width]
  DType type;          // of the weight
  const float* scale;  // [outputs], or null
  const float* bias;   // [outputs], or null
  float* out;          // [rows, outputs]
};

struct DotKernels {
  const char* name;
  // out[r * out_row + h * out_head] = x[r] . y[h] for rows of n elements, `stride` apart, and fp32 `heads`
  // [heads, n]. x is streamed from memory, y is to stay in a cache. The bits of each sum depend on its own
  // row and head only.
  void (*dots)(const void* x, DType type, int64_t stride, int64_t rows, int64_t n, const float* y, int heads,
               float* out, int64_t out_row, int64_t out_head);
};

extern const DotKernels dot_kernels_portable;
#if defined(__x86_64__)
extern const DotKernels dot_kernels_avx2;
extern const DotKernels dot_kernels_avx512;
#endif

const DotKernels* dot_kernels(const char* forced);  // as tilt_kernels

void linear(const LinearArgs& args, const DotKernels& kernels, int threads);

// out[r] = x[r] / sqrt(mean(x[r]^2) + eps) * weight; x and out fp32 [rows, width], contiguous.
void rms_norm(int64_t rows, int64_t width, const float* x, const float* weight, float eps, float* out,
              const DotKernels& kernels);

}  // namespace pyengine
