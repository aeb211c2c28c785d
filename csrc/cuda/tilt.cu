// tilt_sample on a GPU, in two kernels. tilt_sums reads the row once: a warp sums one block of 1,024
// tokens, whatever the batch. tilt_draw merges a row's blocks, draws one and re-reads it (hierarchical
// inverse CDF, two uniforms a row); a filtered row draws from a short list of candidates.
#include <algorithm>
#include <type_traits>

#include "tilt.h"
#include "tilt_filter.cuh"
#include "tilt_row.cuh"

namespace pyengine::cuda {
namespace {

constexpr int kSumThreads = 64;
constexpr int kSumWarps = kSumThreads / kWarp;

// How many thread blocks of tilt_sums a multiprocessor must hold: as many as registers allow without
// spilling, since warps in flight are what hides the latency of memory.
constexpr int sum_blocks(bool heads, bool aligned) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  return !aligned ? 6 : heads ? 8 : 14;
#else
  return !aligned ? 8 : heads ? 8 : 14;
#endif
}

__device__ float maximum(const float (&x)[kHeld]) {
  float top = x[0];
#pragma unroll
  for (int i = 1; i < kHeld; ++i) top = fmaxf(top, x[i]);
  return top;
}

// A lane's sum of e^(x - m): (m, s) of one side of BlockSums. m is -inf while every token is forbidden.
struct LaneSum {
  float m = -INFINITY, s = 0;

  // Makes room for tokens up to `top` nats. What was summed so far keeps its weight: returns the factor.
  __device__ float raise(float top) {
    const float before = m;
    m = fmaxf(m, top);
    const float keep = weight_of(before, shift());
    s *= keep;
    return keep;
  }

  __device__ float shift() const { return shift_of(m); }
};

// The better of `best` and what the lane holds: by the tilted logit for a greedy row, else by that plus
// Gumbel noise.
__device__ Best best_held(const Row& row, int block, int turn, const float (&tilt)[kHeld], Best best) {
#pragma unroll
  for (int i = 0; i < kHeld; i += 4) {
    const int id = block * kBlock + token_of(turn, i);
    float noise[4] = {0, 0, 0, 0};
    if (!row.greedy()) {
      const Philox random = row.random(kGumbelStream, uint32_t(id / 4));
#pragma unroll
      for (int j = 0; j < 4; ++j) noise[j] = gumbel_noise(random.x[j]);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) best = Better{}(best, Best{tilt[i + j] + noise[j], id + j});
  }
  return best;
}

template <bool kHeads, bool kAligned, int kType>
__global__ void __launch_bounds__(kSumThreads, sum_blocks(kHeads, kAligned))
    tilt_sums(const __grid_constant__ TiltArgs a, const __grid_constant__ Workspace w) {
  // 32 bits: a 64-bit division costs as much as a seventh of the block.
  const unsigned at = blockIdx.x * kSumWarps + warp(), row_blocks = unsigned(w.blocks);
  if (at >= unsigned(a.batch) * row_blocks) return;
  Row row(a, at / row_blocks);
  const int block = int(at % row_blocks);
  float held[kHeld], delta[kHeld], e_delta = 0, lane_max = -INFINITY;
  LaneSum base, tilt;
#pragma unroll 1
  for (int turn = 0; turn < kTurns; ++turn) {
    row.read<kHeads, kAligned, kType>(block, turn, true, held, delta);
    const float top_base = maximum(held);
    base.raise(top_base);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) base.s += weight_of(held[i], base.shift());
    float top = top_base;
    if constexpr (kHeads) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) held[i] += delta[i];
      top = maximum(held);
      e_delta *= tilt.raise(top);
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const float e = weight_of(held[i], tilt.shift());
        tilt.s += e;
        e_delta = fmaf(e, fmaxf(delta[i], -FLT_MAX), e_delta);  // 0 * -inf must be 0
      }
    }
    lane_max = fmaxf(lane_max, top);
  }
  if constexpr (!kHeads) tilt = base;
  BlockSums sums;
  const auto merge_lanes = [](LaneSum lane_sum, float& m, float& s) {
    LaneSum all{warp_reduce(lane_sum.m, Max{}), 0};
    const float keep = weight_of(lane_sum.m, all.shift());
    m = all.shift(), s = warp_reduce(lane_sum.s * keep, Add{});
    return keep;
  };
  merge_lanes(base, sums.m_base, sums.s_base);
  const float keep = merge_lanes(tilt, sums.m_tilt, sums.s_tilt);
  sums.e_delta = kHeads ? warp_reduce(e_delta * keep, Add{}) * kLog2E : 0.0f;
  if (lane() == 0) w.sums[at] = sums;
  if (row.filtered() && sums.s_tilt != 0) w.lane_max[int64_t(at) * kWarp + lane()] = lane_max;
  if (row.filtered() ? sums.s_tilt != 0 : !row.greedy() && !a.gumbel) return;

  // A block whose values forbid all of it stands in with its base logits. They count only where the
  // values forbid the whole row, whose draw falls back to the base policy: elsewhere tilt_draw drops them.
  row.use_heads = sums.s_tilt != 0;
  lane_max = -INFINITY;
  Best best;
#pragma unroll 1
  for (int turn = 0; turn < kTurns; ++turn) {
    row.read<kHeads, kAligned, kType>(block, turn, true, held, delta);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) held[i] += delta[i];
    lane_max = fmaxf(lane_max, maximum(held));
    if (!row.filtered()) best = best_held(row, block, turn, held, best);
  }
  if (row.filtered()) {
    w.lane_max[int64_t(at) * kWarp + lane()] = lane_max;
  } else {
    best = warp_reduce(best, Better{});
    if (lane() == 0) w.best[at] = best;
  }
}

// Everything that the threads of tilt_draw share. The weights of a block and a filter's digits are never
// alive together.
struct DrawShared {
  DrawCta::Shared cta;
  union {
    float weight[kBlock];
    FilterShared filter;
  };
};

// The row's sums, in double: fixed shapes of reduction, so that their bits depend on the row alone.
__device__ RowSums merge_blocks(DrawCta& cta, const BlockSums* sums, int blocks) {
  float m_base = -INFINITY, m_tilt = -INFINITY;
  for (int b = int(threadIdx.x); b < blocks; b += kDrawThreads) {
    if (sums[b].s_base != 0) m_base = fmaxf(m_base, sums[b].m_base);
    if (sums[b].s_tilt != 0) m_tilt = fmaxf(m_tilt, sums[b].m_tilt);
  }
  RowSums total;
  total.m_base = log2_units(cta.reduce(m_base, Max{}));
  total.m_tilt = log2_units(cta.reduce(m_tilt, Max{}));
  for (int b = int(threadIdx.x); b < blocks; b += kDrawThreads) {
    if (sums[b].s_base != 0)
      total.s_base += sums[b].s_base * rescale(log2_units(sums[b].m_base), total.m_base);
    if (sums[b].s_tilt != 0) {
      const double keep = rescale(log2_units(sums[b].m_tilt), total.m_tilt);
      total.s_tilt += sums[b].s_tilt * keep;
      total.e_delta += sums[b].e_delta * keep;
    }
  }
  total.s_base = cta.reduce(total.s_base, Add{});
  total.s_tilt = cta.reduce(total.s_tilt, Add{});
  total.e_delta = cta.reduce(total.e_delta, Add{});
  return total;
}

__device__ bool usable(const RowSums& sums) {
  return isfinite(sums.s_base) && sums.s_base > 0 && isfinite(sums.s_tilt) && isfinite(sums.e_delta);
}

// Greedy and unfiltered Gumbel rows: the best of the blocks' winners.
__device__ int64_t best_token(DrawCta& cta, const Row& row, const Workspace& w) {
  Best best;
  for (int b = int(threadIdx.x); b < w.blocks; b += kDrawThreads) {
    const int64_t at = row.index * w.blocks + b;
    if (!row.use_heads || w.sums[at].s_tilt != 0) best = Better{}(best, w.best[at]);
  }
  return cta.reduce(best, Better{}).id;
}

__device__ int64_t draw_unfiltered(DrawCta& cta, const Row& row, const Workspace& w, const RowSums& total,
                                   const Philox& random, float* weight) {
  const BlockSums* sums = w.sums + row.index * w.blocks;
  const auto shift = [&](int b) { return row.use_heads ? sums[b].m_tilt : sums[b].m_base; };
  const double u_block = uniform53(random.x[0], random.x[1]), u_token = uniform53(random.x[2], random.x[3]);
  const int block = cta.first_above<double>(
                           w.blocks, [&](double sum) { return u_block * sum; },
                           [&](int b) {
                             const float s = row.use_heads ? sums[b].s_tilt : sums[b].s_base;
                             return s == 0 ? 0.0 : s * rescale(log2_units(shift(b)), total.m_tilt);
                           })
                        .index;
  const int64_t start = int64_t(block) * kBlock;
  const int n = int(min(int64_t(kBlock), row.args.vocab - start));
  for (int i = int(threadIdx.x); i < n; i += kDrawThreads)
    weight[i] = weight_of(row.at(start + i).tilt(), shift(block));
  __syncthreads();
  return start +
         cta.first_above<double>(
                n, [&](double sum) { return u_token * sum; }, [&](int i) { return double(weight[i]); })
             .index;
}

// Replaces the row's tilted sums by those of what the filter keeps.
__device__ int64_t draw_filtered(DrawCta& cta, const Row& row, Filter& filter, RowSums& total,
                                 const Philox& random) {
  filter.run(total);
  const double u = uniform53(random.x[0], random.x[1]);
  const Found<double> found = cta.first_above<double>(
      filter.items(), [&](double sum) { return u * sum; },
      [&](int i) {
        const Candidate c = filter.item(i);
        return filter.kept(c) ? double(filter.weight(c)) : 0.0;
      });
  double e_delta = 0;
  Best best;
  for (int i = int(threadIdx.x); i < filter.items(); i += kDrawThreads) {
    const Candidate c = filter.item(i);
    if (!filter.kept(c)) continue;
    e_delta += double(filter.weight(c)) * row.at(c.id).delta;
    if (row.args.gumbel) {
      const uint32_t word = row.random(kGumbelStream, uint32_t(c.id / 4)).x[c.id % 4];
      best = Better{}(best, Best{c.tilt + gumbel_noise(word), c.id});
    }
  }
  total.m_tilt = log2_units(filter.shift()), total.s_tilt = found.total;
  total.e_delta = cta.reduce(e_delta, Add{}) * kLog2E;
  return row.args.gumbel ? cta.reduce(best, Better{}).id : filter.item(found.index).id;
}

__device__ void sample_row(int64_t index, const TiltArgs& a, const Workspace& w, DrawShared& shared) {
  DrawCta cta(shared.cta);
  Row row(a, index);
  RowSums total = merge_blocks(cta, w.sums + index * w.blocks, w.blocks);
  if (total.s_tilt == 0 && total.s_base > 0) {  // the scorer forbids every token: the base policy decides
    row.use_heads = false;
    total.m_tilt = total.m_base, total.s_tilt = total.s_base, total.e_delta = 0;
  }
  if (!usable(total)) {
    if (threadIdx.x != 0) return;
    a.token[index] = 0, a.valid[index] = false;
    a.logp_base[index] = a.logp_policy[index] = a.kl[index] = NAN;
    return;
  }
  int64_t id;
  if (row.greedy() || (a.gumbel && !row.filtered())) {
    id = best_token(cta, row, w);
  } else if (row.filtered()) {
    Filter filter(row, w, cta, shared.filter);
    id = draw_filtered(cta, row, filter, total, row.random(kTokenStream));
  } else {
    id = draw_unfiltered(cta, row, w, total, row.random(kTokenStream), shared.weight);
  }
  if (threadIdx.x != 0) return;
  const Token token = row.at(id);
  const double lse_base = total.m_base + log2(total.s_base), lse_tilt = total.m_tilt + log2(total.s_tilt);
  const double logp_base = double(token.base) - kLn2 * lse_base;
  a.token[index] = id, a.valid[index] = true;
  a.logp_base[index] = float(logp_base);
  a.logp_policy[index] = row.greedy() ? 0.0f : float(double(token.tilt()) - kLn2 * lse_tilt);
  a.kl[index] = float(row.greedy() ? -logp_base : kl_nats(total.e_delta, total.s_tilt, lse_tilt, lse_base));
}

__global__ void __launch_bounds__(kDrawThreads, 2)
    tilt_draw(const __grid_constant__ TiltArgs a, const __grid_constant__ Workspace w) {
  __shared__ DrawShared shared;
  wait_for_previous_kernel();
  for (int64_t index = blockIdx.x; index < a.batch; index += gridDim.x) {
    sample_row(index, a, w, shared);
    __syncthreads();
  }
}

// Whether every row of logits, values and mask starts at a multiple of 16 bytes.
bool rows_aligned(const TiltArgs& a) {
  const auto bytes = [](DType type) { return type == DType::f32 ? 4 : 2; };
  uintptr_t all = reinterpret_cast<uintptr_t>(a.logits) | uintptr_t(a.logits_stride * bytes(a.logits_type));
  if (a.heads > 0)
    all |= reinterpret_cast<uintptr_t>(a.values) |
           uintptr_t((a.values_stride_row | a.values_stride_head) * bytes(a.values_type));
  if (a.mask) all |= reinterpret_cast<uintptr_t>(a.mask) | uintptr_t(a.mask_stride);
  return all % 16 == 0;
}

using SumsKernel = void (*)(TiltArgs, Workspace);

template <bool kHeads>
SumsKernel sums_kernel(const TiltArgs& a) {
  if (!rows_aligned(a)) return tilt_sums<kHeads, false, kAnyType>;
  if (kHeads && a.values_type != a.logits_type) return tilt_sums<kHeads, true, kAnyType>;
  if (a.logits_type == DType::f32) return tilt_sums<kHeads, true, int(DType::f32)>;
  if (a.logits_type == DType::bf16) return tilt_sums<kHeads, true, int(DType::bf16)>;
  return tilt_sums<kHeads, true, int(DType::f16)>;
}

// Carves the workspace, or measures it when `at` is null: the end of the last part.
char* carve(Workspace& w, int64_t batch, int64_t vocab, char* at) {
  const auto take = [&](auto*& part, int64_t count) {
    part = reinterpret_cast<std::remove_reference_t<decltype(part)>>(at);
    at += (count * int64_t(sizeof *part) + 15) / 16 * 16;
  };
  w.blocks = int((vocab + kBlock - 1) / kBlock);
  w.listed = int(std::min<int64_t>(vocab, kListed));
  take(w.sums, batch * w.blocks);
  take(w.best, batch * w.blocks);
  take(w.lane_max, batch * w.blocks * kWarp);
  take(w.candidates, std::min<int64_t>(batch, kDrawBlocks) * w.listed);
  return at;
}

}  // namespace

int64_t tilt_workspace(int64_t batch, int64_t vocab) {
  Workspace w{};
  return carve(w, batch, vocab, nullptr) - static_cast<char*>(nullptr);
}

const char* tilt_sample(const TiltArgs& args, void* workspace, void* stream) {
  if (args.batch == 0) return nullptr;
  if (args.vocab > INT_MAX - kBlock) return "a vocabulary must have fewer than 2^31 - 1024 tokens";
  Workspace w{};
  carve(w, args.batch, args.vocab, static_cast<char*>(workspace));
  if (args.batch > INT_MAX / w.blocks) return "a batch must have fewer than 2^31 blocks of 1,024 tokens";
  const int blocks = (int(args.batch) * w.blocks + kSumWarps - 1) / kSumWarps;

  int major = 0, device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return cudaGetErrorString(error);

  cudaLaunchConfig_t launch{};
  launch.stream = static_cast<cudaStream_t>(stream);
  launch.gridDim = dim3(unsigned(blocks)), launch.blockDim = dim3(kSumThreads);
  const SumsKernel sums = args.heads > 0 ? sums_kernel<true>(args) : sums_kernel<false>(args);
  error = cudaLaunchKernelEx(&launch, sums, args, w);
  if (error != cudaSuccess) return cudaGetErrorString(error);

  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  launch.attrs = &overlap, launch.numAttrs = major >= 9 ? 1 : 0;
  launch.gridDim = dim3(unsigned(std::min<int64_t>(args.batch, kDrawBlocks))),
  launch.blockDim = dim3(kDrawThreads);
  error = cudaLaunchKernelEx(&launch, tilt_draw, args, w);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pyengine::cuda
