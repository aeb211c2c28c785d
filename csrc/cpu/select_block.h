// select_block on a CPU: probe, LSC, aggregation and the choice of one of K candidates, row by row.
#pragma once

#include <cstdint>

#include "../algebra.h"
#include "linear.h"

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

void select_block(const SelectArgs& args, const DotKernels& kernels, int threads);

}  // namespace pyengine
