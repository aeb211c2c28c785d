#include "linear_logprob.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "dispatch.h"
#include "team.h"

namespace pyengine {
namespace {

// One row of a tile, block by block: fp32 logits are read in place, all others through scratch.
struct Block {
  int n, padded;  // logits, and logits after padding to whole loop steps
  const float* x;
};

struct Reader {
  const LogitTile& tile;
  const LogprobKernels& kernels;
  alignas(64) float scratch[kBlock];

  Block read(int64_t row, int64_t start) {
    const int n = int(std::min<int64_t>(kBlock, tile.cols - start));
    const int padded = (n + kernels.step - 1) / kernels.step * kernels.step;
    const int64_t at = row * tile.stride + start;
    const char* from = static_cast<const char*>(tile.data) + at * (tile.type == DType::f32 ? 4 : 2);
    if (tile.type == DType::f32 && n == padded && !tile.bias && tile.softcap == 0)
      return {n, padded, reinterpret_cast<const float*>(from)};
    const float* bias = tile.bias ? tile.bias + tile.start + start : nullptr;
    kernels.prepare(from, tile.type, bias, tile.softcap, n, scratch);
    std::fill(scratch + n, scratch + padded, -INFINITY);
    return {n, padded, scratch};
  }
};

// Shifts up to this size leave x * scale - shift its precision.
constexpr float kNear = 1e4f;

// The block's sums and its largest logit. Relative to the row's `m` where that is a float, so that the merge
// needs no exp2 (two a block cost a fifth of the fold); 64 bits above it, or with -inf or NaN in the block,
// to the block's own maximum.
BlockMoments sums_of(const Block& block, const LogprobKernels& kernels, float scale, double m, float& top) {
  float shift = float(m);
  bool near = double(shift) == m && std::abs(shift) <= kNear;
  if (!near) {
    shift = std::rint(kernels.maximum(block.x, block.padded) * scale);
    near = std::abs(shift) <= kNear;
  }
  if (near) {
    const BlockMoments sums = kernels.moments(block.x, block.padded, scale, shift, top);
    if (std::isfinite(sums.s + sums.s2 + sums.w)) return sums;
  }
  top = kernels.maximum(block.x, block.padded);
  return kernels.careful_moments(block.x, block.padded, scale, std::isfinite(top) ? top : 0.0f);
}

}  // namespace

const LogprobKernels* logprob_kernels(const char* forced) {
  return choose<LogprobKernels>(PYENGINE_BUILDS(logprob_kernels), forced);
}

void fold_logits(const LogitTile& tile, const LogprobKernels& kernels, int threads, double* state) {
  const float scale = kLog2E * tile.inverse_temperature;
  parallel_rows(tile.rows, threads, [&](int64_t row) {
    Reader reader{tile, kernels, {}};
    RowMoments moments;
    std::memcpy(&moments, state + row * kStateSize, sizeof moments);
    const int64_t target = tile.target[row] - tile.start;
    for (int64_t start = 0; start < tile.cols; start += kBlock) {
      const Block block = reader.read(row, start);
      float top;
      BlockMoments sums = sums_of(block, kernels, scale, moments.m, top);
      if (sums.s == 0) sums.m = -INFINITY;  // every token is forbidden: the identity
      merge(moments, sums);
      moments.max = std::max(moments.max, double(top) * scale);
      if (target >= start && target < start + block.n)
        moments.target = double(block.x[target - start]) * scale;
    }
    std::memcpy(state + row * kStateSize, &moments, sizeof moments);
  });
}

void logit_gradient(const LogitTile& tile, const LogprobKernels& kernels, int threads, const float* lse,
                    const float* entropy, const float* grad_logp, const float* grad_entropy, float* to,
                    int64_t to_stride) {
  const float scale = kLog2E * tile.inverse_temperature;
  parallel_rows(tile.rows, threads, [&](int64_t row) {
    Reader reader{tile, kernels, {}};
    alignas(64) float ragged[kBlock];
    const float by_logp = grad_logp[row] * tile.inverse_temperature;
    const float by_entropy = grad_entropy ? grad_entropy[row] * tile.inverse_temperature : 0.0f;
    const int64_t target = tile.target[row] - tile.start;
    for (int64_t start = 0; start < tile.cols; start += kBlock) {
      const Block block = reader.read(row, start);
      float* const out = to + row * to_stride + start;
      float at_target = 0;  // read before `out`, which may be the same memory
      const bool here = target >= start && target < start + block.n;
      if (here) {
        const float tanh = tile.softcap != 0 ? block.x[target - start] / tile.softcap : 0.0f;
        at_target = by_logp * (1 - tanh * tanh);
      }
      float* const whole = block.n == block.padded ? out : ragged;
      kernels.gradient(block.x, block.padded, scale, lse[row] * kLog2E, -by_logp, -by_entropy, entropy[row],
                       tile.softcap, whole);
      if (whole == ragged) std::copy(ragged, ragged + block.n, out);
      if (here) out[target - start] += at_target;
    }
  });
}

}  // namespace pyengine
