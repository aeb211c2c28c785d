// tilt_sample on a CUDA device. Asynchronous: all pointers are device memory, borrowed until the stream
// has passed the launches. Nothing is allocated or synchronised, so the launches can be captured into a
// CUDA graph; seeds, positions and filters are read by the kernels, so a replay sees their new values.
#pragma once

#include <cstdint>

#include "../algebra.h"

namespace pyengine::cuda {

// Strides are in elements; a stride of 0 repeats the value.
struct TiltArgs {
  int64_t batch, vocab, heads;
  const void* logits;  // [batch, vocab], unit stride along vocab
  DType logits_type;
  int64_t logits_stride;
  const void* values;  // [heads, batch, vocab], unit stride along vocab; unused when heads == 0
  DType values_type;
  int64_t values_stride_head, values_stride_row;
  const float* weights;  // [batch, heads]
  int64_t weights_stride_row, weights_stride_head;
  const bool* mask;  // [batch, vocab], unit stride along vocab, or null; false forbids a token
  int64_t mask_stride;
  const float *temperature, *top_p, *min_p;  // [batch]
  const int64_t *top_k, *seed, *position;    // [batch]
  int64_t temperature_stride, top_p_stride, min_p_stride, top_k_stride, seed_stride, position_stride;
  bool gumbel;     // draw by Gumbel noise instead of the inverse CDF
  int64_t* token;  // [batch]
  float *logp_base, *logp_policy, *kl;
  bool* valid;
};

// Bytes of device memory that a call needs, at any address divisible by 16; contents do not matter.
int64_t tilt_workspace(int64_t batch, int64_t vocab);

// Null, or what CUDA said when a launch failed. `stream` is a cudaStream_t of the current device.
const char* tilt_sample(const TiltArgs& args, void* workspace, void* stream);

}  // namespace pyengine::cuda
