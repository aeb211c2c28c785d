// select_block on a CPU: probe, LSC, aggregation and the choice of one of K candidates, row by row.
#pragma once

#include <cstdint>

#include "../algebra.h"

namespace pyengine {

// All pointers are borrowed for the call; strides are in elements.
struct SelectArgs {
  int64_t batch, candidates, heads;
  const float* scores;  // [batch, candidates, heads], contiguous; or null, and then
  const void* hidden;   // [batch, candidates, width], unit stride along width
  DType hidden_type;
  int64_t hidden_stride_row, hidden_stride_candidate, width;
  const float* probe;    // [heads, width], contiguous
  const float* weights;  // [heads]
  int64_t weights_stride, reference_stride_row, reference_stride_head;
  const float* reference;  // [batch, heads], or null
  bool lsc;
  double beta;
  const int64_t *seed, *position;
  int64_t seed_stride, position_stride;
  int64_t* index;      // [batch]
  float* probability;  // [batch, candidates]
  float* utility;      // [batch, candidates]
};

struct SelectKernels {
  const char* name;
  // out[r][h] = x[r] . probe[h] for rows of n elements, `stride` apart. A row's bits do not depend on the
  // others: each sum runs over the same vectors in the same order.
  void (*dots)(const void* x, DType type, int64_t stride, int64_t rows, int64_t n, const float* probe,
               int heads, float* out);
};

extern const SelectKernels select_kernels_portable;
#if defined(__x86_64__)
extern const SelectKernels select_kernels_avx2;
extern const SelectKernels select_kernels_avx512;
#endif

const SelectKernels* select_kernels(const char* forced);  // as tilt_kernels

void select_block(const SelectArgs& args, const SelectKernels& kernels, int threads);

}  // namespace pyengine
