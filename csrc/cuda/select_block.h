// select_block on a CUDA device: one launch, asynchronous. All pointers are device memory, borrowed until
// the stream has passed the launch; nothing is allocated or synchronised.
#pragma once

#include <cstdint>

#include "../algebra.h"

namespace pyengine::cuda {

// Strides are in elements; a stride of 0 repeats the value.
struct SelectArgs {
  int64_t batch, branches, heads;
  // [batch, branches, heads] scores, or [batch, branches, width] hidden states when there is a probe.
  const void* given;
  DType given_type;
  int64_t given_stride_row, given_stride_branch, given_stride_last;
  const void* probe;  // [heads, width], or null: `given` are scores
  DType probe_type;
  int64_t width, probe_stride_head, probe_stride_last;
  const float* weights;  // [heads]
  int64_t weights_stride;
  const float* reference;  // [batch, heads], or null: 0
  int64_t reference_stride_row, reference_stride_head;
  bool lsc;
  float beta;                      // 0 is argmax
  const int64_t *seed, *position;  // [batch]
  int64_t seed_stride, position_stride;
  int64_t* index;                // [batch]
  float *probability, *utility;  // [batch, branches], contiguous
};

// Null, or what CUDA said when the launch failed. `stream` is a cudaStream_t of the current device.
const char* select_block(const SelectArgs& args, void* stream);

}  // namespace pyengine::cuda
