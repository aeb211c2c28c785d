#include "select_block.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "team.h"

namespace pyengine {
namespace {

// log sigmoid(x), without overflow and with both limits: x at -inf, 0 at +inf.
float log_sigmoid(float x) { return std::min(x, 0.0f) - std::log1p(std::exp(-std::abs(x))); }

// The row's scores [branches, heads]; `scratch` holds those that a probe makes.
const float* scores_of(const SelectArgs& a, const DotKernels& kernels, int64_t row,
                       std::vector<float>& scratch) {
  if (!a.probe) return static_cast<const float*>(a.given) + row * a.branches * a.heads;
  const int64_t at = row * a.given_stride_row;
  const char* hidden = static_cast<const char*>(a.given) + at * (a.given_type == DType::f32 ? 4 : 2);
  scratch.resize(size_t(a.branches * a.heads));
  kernels.dots(hidden, a.given_type, a.given_stride_branch, a.branches, a.width,
               static_cast<const float*>(a.probe), int(a.heads), scratch.data(), a.heads, 1);
  return scratch.data();
}

double utility_of(const SelectArgs& a, int64_t row, const float* scores) {
  double utility = 0;
  for (int64_t r = 0; r < a.heads; ++r) {
    const float weight = a.weights[r * a.weights_stride];
    if (weight == 0) continue;  // skipped, not multiplied: 0 * inf must not count
    float score = scores[r];
    if (a.lsc) {
      const int64_t at = row * a.reference_stride_row + r * a.reference_stride_head;
      score = log_sigmoid(a.reference ? score - a.reference[at] : score);
    }
    utility += double(weight) * score;
  }
  return std::isnan(utility) ? -INFINITY : utility;
}

void select_row(const SelectArgs& a, const DotKernels& kernels, int64_t row, std::vector<double>& weight,
                std::vector<float>& scratch) {
  weight.resize(size_t(a.branches));
  const float* const scores = scores_of(a, kernels, row, scratch);
  for (int64_t k = 0; k < a.branches; ++k) weight[size_t(k)] = utility_of(a, row, scores + k * a.heads);
  const auto best = std::max_element(weight.begin(), weight.end());
  const double top = *best;
  float* const utility = a.utility + row * a.branches;
  float* const probability = a.probability + row * a.branches;
  std::copy(weight.begin(), weight.end(), utility);
  if (a.beta == 0) {
    a.index[row] = best - weight.begin();
    std::fill(probability, probability + a.branches, 0.0f);
    probability[a.index[row]] = 1.0f;
    return;
  }
  double sum = 0;
  for (double& w : weight) {
    w = w == top ? 1.0f : std::exp(float((w - top) / a.beta));  // inf - inf: equally good or bad
    sum += w;
  }
  const Philox random = philox(uint64_t(a.seed[row * a.seed_stride]),
                               uint64_t(a.position[row * a.position_stride]), kSelectStream);
  const double target = uniform53(random.x[0], random.x[1]);
  double running = 0;
  a.index[row] = -1;
  for (int64_t k = 0; k < a.branches; ++k) {
    const double p = weight[size_t(k)] / sum;
    probability[k] = float(p);
    if (running <= target && p > 0) a.index[row] = k;  // the last positive one, should rounding fall short
    running += p;
  }
}

}  // namespace

void select_block(const SelectArgs& args, const DotKernels& kernels, int threads) {
  parallel_rows(args.batch, threads, [&](int64_t row) {
    thread_local std::vector<double> weight;
    thread_local std::vector<float> scratch;
    select_row(args, kernels, row, weight, scratch);
  });
}

}  // namespace pyengine
