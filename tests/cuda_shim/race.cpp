// Every path of the kernels with all threads of a block running at once, for ThreadSanitizer.
#include <cmath>
#include <cstdio>
#include <vector>

#include "../../csrc/cuda/select_block.h"
#include "../../csrc/cuda/tilt.h"

using namespace pyengine;

namespace {

constexpr int64_t kRows = 6, kVocab = 1100;

float noise(uint32_t i) { return float(int32_t(i * 2654435761u)) * 0x1p-29f; }

const char* tilt(bool gumbel) {
  std::vector<float> logits(kRows * kVocab), values(kRows * kVocab), weights(kRows, 0.5f);
  for (size_t i = 0; i < logits.size(); ++i)
    logits[i] = noise(uint32_t(i)), values[i] = noise(uint32_t(i + 7));
  // Greedy, unfiltered, each filter, and a row that is not valid.
  const std::vector<float> temperature{0, 1, 1, 1, 0.7f, 1}, top_p{1, 1, 1, 0.8f, 0.9f, 1},
      min_p{0, 0, 0, 0, 0.01f, 0};
  const std::vector<int64_t> top_k{0, 0, 5, 0, 40, 0}, seed{1, 2, 3, 4, 5, 6};
  logits[5 * kVocab] = NAN;
  std::vector<int64_t> token(kRows);
  std::vector<float> numbers(3 * kRows);
  bool valid[kRows];
  TiltArgs a{};
  a.batch = kRows, a.vocab = kVocab, a.heads = 1;
  a.logits = logits.data(), a.logits_stride = kVocab;
  a.values = values.data(), a.values_stride_row = kVocab, a.values_stride_head = kRows * kVocab;
  a.weights = weights.data(), a.weights_stride_row = a.weights_stride_head = 1;
  a.temperature = temperature.data(), a.top_p = top_p.data(), a.min_p = min_p.data();
  a.top_k = top_k.data(), a.seed = a.position = seed.data();
  a.temperature_stride = a.top_p_stride = a.min_p_stride = a.top_k_stride = a.seed_stride =
      a.position_stride = 1;
  a.gumbel = gumbel, a.token = token.data(), a.valid = valid;
  a.logp_base = numbers.data(), a.logp_policy = a.logp_base + kRows, a.kl = a.logp_policy + kRows;
  std::vector<uint64_t> workspace(size_t(cuda::tilt_workspace(kRows, kVocab)) / 8 + 2);
  void* aligned =
      reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace.data()) + 15) & ~uintptr_t(15));
  return cuda::tilt_sample(a, aligned, nullptr);
}

const char* select(float beta) {
  constexpr int64_t kBranches = 9;
  std::vector<float> scores(2 * kBranches), probability(scores), utility(scores);
  for (size_t i = 0; i < scores.size(); ++i) scores[i] = noise(uint32_t(i));
  const float weight = 1;
  const int64_t seed = 3;
  int64_t index[2];
  SelectArgs a{};
  a.batch = 2, a.branches = kBranches, a.heads = 1, a.given = scores.data();
  a.given_stride_row = kBranches, a.given_stride_branch = a.given_stride_last = 1;
  a.weights = &weight, a.lsc = true, a.beta = beta, a.seed = a.position = &seed;
  a.index = index, a.probability = probability.data(), a.utility = utility.data();
  return cuda::select_block(a, nullptr);
}

}  // namespace

int main() {
  const bool failed = tilt(false) || tilt(true) || select(0) || select(1);
  std::puts(failed ? "failed" : "done");
  return failed;
}
