// What the CPU backend of tilt_sample takes, and the table of vector kernels that tilt.cpp drives.
#pragma once

#include <cstdint>

#include "../algebra.h"

namespace pyengine {

// All pointers are borrowed for the call. Strides are in elements; a stride of 0 repeats the value.
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
  const float *temperature, *top_p, *min_p;  // [batch]
  const int64_t *top_k, *seed, *position;    // [batch]
  int64_t temperature_stride, top_p_stride, min_p_stride, top_k_stride, seed_stride, position_stride;
  int64_t* token;  // [batch]
  float *logp_base, *logp_policy, *kl;
  bool* valid;
};

// One block of one row as the vector kernels see it: at most kBlock tokens, n of them after padding to
// whole loop steps with logits of -inf. base = logits * scale and tilt = base + delta + weight * head,
// in log2 units; delta and head may be null. Pointers are borrowed.
struct TiltBlock {
  const float* logits;
  const float* delta;
  const float* head;
  float weight, scale;
  int n;
};

struct TiltKernels {
  const char* name;
  int lanes, step;  // floats in a vector, and in a loop step
  // fp32 copy of n elements.
  void (*widen)(const void* from, DType type, int n, float* to);
  // to = delta + weight * head, 0 where the token is forbidden, so that no value can revive it.
  void (*add_head)(const TiltBlock& block, float* to);
  // Sums relative to the given shifts, which need not be maxima: fp32 keeps its relative precision
  // over 2^+-126. A sum that is not finite says that the shift was too low, or that a logit or value is
  // not finite; `careful_sums` with the block's own maxima then settles what the row is.
  BlockSums (*sums)(const TiltBlock& block, float shift_base, float shift_tilt);
  BlockSums (*careful_sums)(const TiltBlock& block, float shift_base, float shift_tilt);
  // Each lane's maximum of the tilted logits: `lanes` interleaved groups of a block. Drops NaN.
  void (*lane_maxima)(const TiltBlock& block, float* maxima);
  // tilt[i] and 2^(tilt[i] - shift).
  void (*expand)(const TiltBlock& block, float shift, float* tilt, float* weight);
};

extern const TiltKernels tilt_kernels_portable;
#if defined(__x86_64__)
extern const TiltKernels tilt_kernels_avx2;
extern const TiltKernels tilt_kernels_avx512;
#endif

// The kernels of the best instruction set of this machine, or of the one forced by name ("portable",
// "avx2", "avx512"); nullptr when the machine lacks it or the name is unknown.
const TiltKernels* tilt_kernels(const char* forced);

void tilt_sample(const TiltArgs& args, const TiltKernels& kernels);

}  // namespace pyengine
