// What select_block takes, on a CPU and on a GPU alike.
#pragma once

#include <cstdint>

#include "algebra.h"

namespace pyengine {

// All pointers are borrowed: on a CPU for the call, on a GPU until the stream has passed the launch.
// Strides are in elements; a stride of 0 repeats the value.
struct SelectArgs {
  int64_t batch, branches, heads;
  // [batch, branches, heads] scores, or [batch, branches, width] hidden states where there is a probe. A CPU
  // wants scores in contiguous fp32, and unit stride along width.
  const void* given;
  DType given_type;
  int64_t given_stride_row, given_stride_branch, given_stride_last;
  const void* probe;  // [heads, width], on a CPU contiguous fp32; or null: `given` are scores
  DType probe_type;
  int64_t width, probe_stride_head, probe_stride_last;
  const float* weights;  // [heads]
  int64_t weights_stride;
  const float* reference;  // [batch, heads], or null: 0
  int64_t reference_stride_row, reference_stride_head;
  bool lsc;
  double beta;                     // 0 is argmax
  const int64_t *seed, *position;  // [batch]
  int64_t seed_stride, position_stride;
  int64_t* index;                // [batch]
  float *probability, *utility;  // [batch, branches], contiguous
};

}  // namespace pyengine
