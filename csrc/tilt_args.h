// What tilt_sample takes, on a CPU and on a GPU alike.
#pragma once

#include <cstdint>

#include "algebra.h"

namespace pyengine {

// All pointers are borrowed: on a CPU for the call, on a GPU until the stream has passed the launches.
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
  const bool* mask;  // [batch, vocab], unit stride along vocab; null allows every token
  int64_t mask_stride;
  const float *temperature, *top_p, *min_p;  // [batch]
  const int64_t *top_k, *seed, *position;    // [batch]
  int64_t temperature_stride, top_p_stride, min_p_stride, top_k_stride, seed_stride, position_stride;
  bool gumbel;     // draw by Gumbel noise instead of the inverse CDF
  int64_t* token;  // [batch]
  float *logp_base, *logp_policy, *kl;
  bool* valid;
};

}  // namespace pyengine
