// The fused epilogue of linear_logprob on a CPU: folds a tile of logits into running moments, or turns it
// into the gradient. The GEMM that makes the tile belongs to torch.
#pragma once

#include <cstdint>

#include "../algebra.h"

namespace pyengine {

// A tile of logits: `rows` tokens by `cols` vocabulary entries from id `start` on, which is a multiple of
// kBlock, so that the sums do not depend on the tile's width. Pointers are borrowed for the call.
struct LogitTile {
  int64_t rows, cols, start;
  const void* data;  // [rows, cols], unit stride along cols
  DType type;
  int64_t stride;
  const float* bias;  // [vocab], or null
  float softcap;      // 0: none
  float inverse_temperature;
  const int64_t* target;  // [rows], in [0, vocab)
};

// Vector kernels on at most kBlock logits. `n` is a multiple of `step`; the ragged last block is padded
// with -inf in scratch.
struct LogprobKernels {
  const char* name;
  int step;
  // to = softcap * tanh((from + bias) / softcap), or from + bias, or a mere fp32 copy of n elements.
  void (*prepare)(const void* from, DType type, const float* bias, float softcap, int n, float* to);
  float (*maximum)(const float* x, int n);  // drops NaN
  // Sums of x * scale relative to `shift` (log2 units), and the largest x. NaN where an element is -inf or
  // NaN, infinite where one lies far above the shift; `careful_moments`, relative to `top`, the block's
  // largest x or 0, then settles it: NaN only for NaN.
  BlockMoments (*moments)(const float* x, int n, float scale, float shift, float& top);
  BlockMoments (*careful_moments)(const float* x, int n, float scale, float top);
  // to = p * (by_logp + by_entropy * (ln p + entropy)) * (1 - (x / softcap)^2), p = 2^(x * scale - lse_log2).
  void (*gradient)(const float* x, int n, float scale, float lse_log2, float by_logp, float by_entropy,
                   float entropy, float softcap, float* to);
};

extern const LogprobKernels logprob_kernels_portable;
#if defined(__x86_64__)
extern const LogprobKernels logprob_kernels_avx2;
extern const LogprobKernels logprob_kernels_avx512;
#endif

const LogprobKernels* logprob_kernels(const char* forced);  // as tilt_kernels

// Rows are spread over `threads` threads. state: [rows, kStateSize] doubles, each row a RowMoments, updated
// in place.
void fold_logits(const LogitTile& tile, const LogprobKernels& kernels, int threads, double* state);

// to [rows, cols] = d loss / d (hidden . weight), given d loss / d logp and / d entropy of each row. `to`
// may be the tile itself when that is fp32. grad_entropy may be null.
void logit_gradient(const LogitTile& tile, const LogprobKernels& kernels, int threads, const float* lse,
                    const float* entropy, const float* grad_logp, const float* grad_entropy, float* to,
                    int64_t to_stride);

}  // namespace pyengine
