// select_block on a GPU: probe, LSC, aggregation and selection in one launch. A block of threads takes a
// row, its warps take the branches in turn.
#include "device.cuh"
#include "select_block.h"

namespace pyengine::cuda {
namespace {

constexpr int kThreads = 128;
using SelectCta = Cta<kThreads>;

// hidden . probe by the calling warp, or the score that is there already.
__device__ float score_of(const SelectArgs& a, int64_t row, int branch, int64_t head) {
  const int64_t at = row * a.given_stride_row + branch * a.given_stride_branch;
  if (!a.probe) return element(a.given, a.given_type, at + head * a.given_stride_last);
  float sum = 0;
  for (int64_t d = lane(); d < a.width; d += kWarp)
    sum = fmaf(element(a.given, a.given_type, at + d * a.given_stride_last),
               element(a.probe, a.probe_type, head * a.probe_stride_head + d * a.probe_stride_last), sum);
  return warp_reduce(sum, Add{});
}

// log sigmoid, with the relative precision of both tails. NaN passes.
__device__ float log_sigmoid(float x) { return fminf(x, 0.0f) - log1pf(expf(-fabsf(x))); }

// A head of weight 0 is skipped: 0 * inf must not poison the branch. NaN ranks as -inf.
__device__ float utility_of(const SelectArgs& a, int64_t row, int branch) {
  float utility = 0;
  for (int64_t r = 0; r < a.heads; ++r) {
    const float w = a.weights[r * a.weights_stride];
    if (w == 0.0f) continue;
    float u = score_of(a, row, branch, r);
    if (a.lsc) {
      if (a.reference) u -= a.reference[row * a.reference_stride_row + r * a.reference_stride_head];
      u = log_sigmoid(u);
    }
    utility = fmaf(w, u, utility);
  }
  return isnan(utility) ? -INFINITY : utility;
}

__global__ void __launch_bounds__(kThreads) choose(const __grid_constant__ SelectArgs a) {
  __shared__ SelectCta::Shared shared;
  SelectCta cta(shared);
  const int64_t row = blockIdx.x;
  const int branches = int(a.branches), thread = int(threadIdx.x);
  float* utility = a.utility + row * a.branches;
  float* probability = a.probability + row * a.branches;
  for (int k = warp(); k < branches; k += SelectCta::kWarps) {
    const float u = utility_of(a, row, k);
    if (lane() == 0) utility[k] = u;
  }
  __syncthreads();
  Best best;
  for (int k = thread; k < branches; k += kThreads) best = Better{}(best, Best{utility[k], k});
  best = cta.reduce(best, Better{});
  if (a.beta == 0) {
    for (int k = thread; k < branches; k += kThreads) probability[k] = k == best.id ? 1.0f : 0.0f;
    if (thread == 0) a.index[row] = best.id;
    return;
  }
  // Branches at the top are worth 1 each even where that is infinite: inf - inf would be NaN.
  const auto weight = [&](int k) {
    return utility[k] == best.score ? 1.0 : double(expf((utility[k] - best.score) / float(a.beta)));
  };
  const Philox random = philox(uint64_t(a.seed[row * a.seed_stride]),
                               uint64_t(a.position[row * a.position_stride]), kSelectStream);
  const double u = uniform53(random.x[0], random.x[1]);
  const Found<double> found = cta.first_above<double>(branches, [&](double sum) { return u * sum; }, weight);
  for (int k = thread; k < branches; k += kThreads) probability[k] = float(weight(k) / found.total);
  if (thread == 0) a.index[row] = found.index;
}

}  // namespace

const char* select_block(const SelectArgs& args, void* stream) {
  if (args.batch == 0) return nullptr;
  if (args.batch > INT_MAX || args.branches > INT_MAX / 2)
    return "batch and branches must be below 2^31 and 2^30";
  cudaLaunchConfig_t launch{};
  launch.stream = static_cast<cudaStream_t>(stream);
  launch.gridDim = dim3(unsigned(args.batch)), launch.blockDim = dim3(kThreads);
  const cudaError_t error = cudaLaunchKernelEx(&launch, choose, args);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pyengine::cuda
