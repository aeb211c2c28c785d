// tilt_sample on a CPU: one pass over the row for the sums, then a draw that re-reads one block
// (hierarchical inverse CDF, two uniforms a row). Filters keep a prefix of the order (tilted logit
// descending, id ascending), so they compose on a short candidate list and never sort the row.
#include "tilt.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

namespace pyengine {
namespace {

constexpr int kMaxLanes = 16;

struct Candidate {
  int64_t id;
  float tilt, weight, delta;  // weight = 2^(tilt - row maximum)
};

bool before(const Candidate& a, const Candidate& b) {
  return a.tilt > b.tilt || (a.tilt == b.tilt && a.id < b.id);
}

struct Draw {
  int64_t token;
  double base, tilt;  // log2 units; without the normalisers
};

// One row, read block by block. fp32 blocks are read in place; others, and the ragged last one, through
// fp32 scratch.
struct Row {
  const TiltArgs& args;
  const TiltKernels& kernels;
  int64_t index;
  TiltBlock block{};
  std::vector<float> head_weights;
  alignas(64) float logit_store[kBlock];
  alignas(64) float head_store[kBlock];
  alignas(64) float delta_store[kBlock];
  int n = 0;  // tokens in the block, before padding

  Row(const TiltArgs& a, const TiltKernels& k, int64_t i) : args(a), kernels(k), index(i) {}

  // logit_scale is 1 / temperature, value_scale 1, both in the units wanted: the tilt is not divided by
  // the temperature.
  void set_scale(float logit_scale, float value_scale, bool use_heads) {
    block.scale = logit_scale;
    head_weights.assign(size_t(args.heads), 0.0f);
    for (int64_t r = 0; use_heads && r < args.heads; ++r)
      head_weights[size_t(r)] =
          args.weights[index * args.weights_stride_row + r * args.weights_stride_head] * value_scale;
  }

  int64_t blocks() const { return (args.vocab + kBlock - 1) / kBlock; }

  // `n` floats at element `at` of a matrix, padded in `scratch` unless they can be read in place.
  const float* floats(const void* data, DType type, int64_t at, float pad, float* scratch) const {
    const char* from = static_cast<const char*>(data) + at * (type == DType::f32 ? 4 : 2);
    if (type == DType::f32 && block.n == n) return reinterpret_cast<const float*>(from);
    kernels.widen(from, type, n, scratch);
    std::fill(scratch + n, scratch + block.n, pad);
    return scratch;
  }

  // All heads but the last end up in block.delta; the last stays apart, so that the usual single head
  // costs no pass of its own. A head of weight 0 is skipped: 0 * inf must not poison the row.
  void read(int64_t b) {
    const int64_t start = b * kBlock;
    n = int(std::min<int64_t>(kBlock, args.vocab - start));
    block.n = (n + kernels.step - 1) / kernels.step * kernels.step;
    block.logits =
        floats(args.logits, args.logits_type, index * args.logits_stride + start, -INFINITY, logit_store);
    block.delta = block.head = nullptr;
    for (int64_t r = 0; r < args.heads; ++r) {
      if (head_weights[size_t(r)] == 0.0f) continue;
      if (block.head) {
        kernels.add_head(block, delta_store);
        block.delta = delta_store;
      }
      const int64_t at = r * args.values_stride_head + index * args.values_stride_row + start;
      block.head = floats(args.values, args.values_type, at, 0.0f, head_store);
      block.weight = head_weights[size_t(r)];
    }
  }

  float delta(int i) const {
    if (block.logits[i] == -INFINITY) return 0.0f;
    return (block.delta ? block.delta[i] : 0.0f) + (block.head ? block.head[i] * block.weight : 0.0f);
  }

  Draw at(int64_t id) {
    read(id / kBlock);
    const int i = int(id % kBlock);
    const double base = double(block.logits[i]) * block.scale;
    return Draw{id, base, base + delta(i)};
  }

  // The maximum of the tilted logits over block b, or of the base logits.
  float top(int64_t b, bool tilted) {
    read(b);
    if (!tilted) block.delta = block.head = nullptr;
    float maxima[kMaxLanes];
    kernels.lane_maxima(block, maxima);
    return *std::max_element(maxima, maxima + kernels.lanes);
  }
};

struct Scratch {
  std::vector<BlockSums> sums;
  std::vector<float> lane_max, order;
  std::vector<Candidate> candidates, sorted;
  std::vector<double> mass;
  alignas(64) float tilt[kBlock], weight[kBlock];
};

// A shift for sums over the blocks from `first` on: the maximum of the first block up to `last` that has a
// finite one. 0 where there is none: every token is forbidden, or infinite, and the sums show it.
float shift_for(Row& row, int64_t first, int64_t last, bool tilted) {
  for (int64_t b = first; b <= last; ++b) {
    const float top = row.top(b, tilted);
    if (std::isfinite(top)) return top;
  }
  return 0.0f;
}

// One pass over the row, every block relative to the maxima of the first block that has finite ones, so
// that the sums of a row with an allowed token are never 0. Only a block that outgrows
// fp32's range (2^127 above them) or holds a logit or value that is not finite is summed again, relative
// to its own.
RowSums accumulate(Row& row, Scratch& s) {
  RowSums total;
  s.sums.resize(size_t(row.blocks()));
  const int64_t last = row.blocks() - 1;
  const float shift_base = shift_for(row, 0, last, false), shift_tilt = shift_for(row, 0, last, true);
  bool careful = false;
  for (int64_t b = 0; b < row.blocks(); ++b) {
    row.read(b);
    BlockSums sums =
        (careful ? row.kernels.careful_sums : row.kernels.sums)(row.block, shift_base, shift_tilt);
    if (!std::isfinite(sums.s_base + sums.s_tilt + sums.e_delta)) {
      const float own_base = shift_for(row, b, b, false), own_tilt = shift_for(row, b, b, true);
      row.read(b);
      sums = row.kernels.careful_sums(row.block, own_base, own_tilt);
      careful = true;  // -inf seldom comes alone: a mask must not cost every block twice
    }
    s.sums[size_t(b)] = sums;
    merge(total, sums);
  }
  return total;
}

bool usable(const RowSums& sums) {
  return std::isfinite(sums.s_base) && sums.s_base > 0 && std::isfinite(sums.s_tilt) &&
         std::isfinite(sums.e_delta);
}

// Index of the first entry at which the running sum exceeds target; the last positive entry when
// rounding keeps the sum below it. Entries of weight 0 are never drawn while any is positive.
template <class Weight>
int64_t walk(int64_t n, double target, Weight weight) {
  double running = 0;
  int64_t last = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double w = weight(i);
    if (!(w > 0)) continue;
    running += w;
    last = i;
    if (running > target) break;
  }
  return last;
}

Draw draw_unfiltered(Row& row, Scratch& s, const RowSums& total, const Philox& random) {
  const double block_target = uniform53(random.x[0], random.x[1]) * total.s_tilt;
  const int64_t block = walk(row.blocks(), block_target, [&](int64_t b) {
    const BlockSums& sums = s.sums[size_t(b)];
    return sums.s_tilt * rescale(sums.m_tilt, total.m_tilt);
  });
  row.read(block);
  row.kernels.expand(row.block, s.sums[size_t(block)].m_tilt, s.tilt, s.weight);
  double sum = 0;
  for (int i = 0; i < row.n; ++i) sum += s.weight[i];
  const double target = uniform53(random.x[2], random.x[3]) * sum;
  return row.at(block * kBlock + walk(row.n, target, [&](int64_t i) { return double(s.weight[i]); }));
}

// All tokens whose tilted logit reaches `least`, in id order, weighted relative to `highest`. Blocks
// whose maximum lies below `least` are not read again.
void collect(Row& row, Scratch& s, float least, float highest) {
  s.candidates.clear();
  for (int64_t b = 0; b < row.blocks(); ++b) {
    const float* maxima = s.lane_max.data() + b * row.kernels.lanes;
    const float top = *std::max_element(maxima, maxima + row.kernels.lanes);
    if (top < least || top == -INFINITY) continue;
    row.read(b);
    row.kernels.expand(row.block, highest, s.tilt, s.weight);
    for (int i = 0; i < row.n; ++i)
      if (s.tilt[i] >= least && s.tilt[i] > -INFINITY)
        s.candidates.push_back({b * kBlock + i, s.tilt[i], s.weight[i], row.delta(i)});
  }
}

void keep_through(std::vector<Candidate>& candidates, Candidate last) {
  candidates.erase(std::remove_if(candidates.begin(), candidates.end(),
                                  [&](const Candidate& c) { return before(last, c); }),
                   candidates.end());
}

void keep_top_k(Scratch& s, int64_t k) {
  if (int64_t(s.candidates.size()) <= k) return;
  s.sorted = s.candidates;
  std::nth_element(s.sorted.begin(), s.sorted.begin() + (k - 1), s.sorted.end(), before);
  keep_through(s.candidates, s.sorted[size_t(k - 1)]);
}

double mass_of(const std::vector<Candidate>& candidates) {
  double mass = 0;
  for (const Candidate& c : candidates) mass += c.weight;
  return mass;
}

// The smallest prefix whose mass reaches `target`. A histogram over the tilted logit finds the bin
// in which the running mass crosses it; only that bin is sorted.
void keep_mass(Scratch& s, double highest, double target) {
  constexpr int kBins = 4096;
  double lowest = highest;
  for (const Candidate& c : s.candidates) lowest = std::min(lowest, double(c.tilt));
  const double per_unit = highest > lowest ? (kBins - 1) / (highest - lowest) : 0.0;
  const auto bin = [&](const Candidate& c) { return size_t((highest - double(c.tilt)) * per_unit); };
  s.mass.assign(kBins, 0.0);
  for (const Candidate& c : s.candidates) s.mass[bin(c)] += c.weight;
  double running = 0;
  size_t crossing = 0;
  while (crossing < kBins && running + s.mass[crossing] < target) running += s.mass[crossing++];
  if (crossing == kBins) return;  // rounding left the mass short of the target: everything stays
  s.sorted.clear();
  for (const Candidate& c : s.candidates)
    if (bin(c) == crossing) s.sorted.push_back(c);
  std::sort(s.sorted.begin(), s.sorted.end(), before);
  size_t last = 0;
  while (last + 1 < s.sorted.size() && running + s.sorted[last].weight < target)
    running += s.sorted[last++].weight;
  keep_through(s.candidates, s.sorted[last]);
}

// Fills s.candidates with what top-k, then top-p, then min-p leave, in id order. Returns the row's
// maximum, to which the candidates' weights are relative.
float filter(Row& row, Scratch& s, const RowSums& total, int64_t top_k, float top_p, float min_p) {
  s.lane_max.resize(size_t(row.blocks() * row.kernels.lanes));
  for (int64_t b = 0; b < row.blocks(); ++b) {
    row.read(b);
    row.kernels.lane_maxima(row.block, s.lane_max.data() + b * row.kernels.lanes);
  }
  const float highest = *std::max_element(s.lane_max.begin(), s.lane_max.end());
  const double min_p_least = min_p > 0 ? highest + std::log2(double(min_p)) : -INFINITY;
  if (top_k > 0) {
    // The k-th largest lane maximum: at least k tokens reach it, and rarely many more.
    float least = -INFINITY;
    if (top_k <= int64_t(s.lane_max.size())) {
      s.order = s.lane_max;
      std::nth_element(s.order.begin(), s.order.begin() + (top_k - 1), s.order.end(), std::greater<float>());
      least = s.order[size_t(top_k - 1)];
    }
    collect(row, s, least, highest);
    keep_top_k(s, top_k);
    if (top_p < 1) keep_mass(s, highest, double(top_p) * mass_of(s.candidates));
  } else if (top_p < 1) {
    const double target = double(top_p) * total.s_tilt * rescale(total.m_tilt, highest);
    for (const float depth : {12.0f, 24.0f, INFINITY}) {  // log2 units below the maximum
      collect(row, s, highest - depth, highest);
      if (mass_of(s.candidates) >= target) break;
    }
    keep_mass(s, highest, target);
  } else {
    collect(row, s, std::nextafter(float(min_p_least), -INFINITY), highest);
  }
  s.candidates.erase(std::remove_if(s.candidates.begin(), s.candidates.end(),
                                    [&](const Candidate& c) { return double(c.tilt) < min_p_least; }),
                     s.candidates.end());
  return highest;
}

// Argmax of logits + sum_i lambda_i V_i in plain units, so that rounding by a scale factor cannot
// merge two logits; ties go to the lowest id.
Draw draw_greedy(Row& row, Scratch& s) {
  int64_t best_block = 0;
  float best = -INFINITY;
  for (int64_t b = 0; b < row.blocks(); ++b) {
    const float top = row.top(b, true);
    if (top > best) best = top, best_block = b;
  }
  row.read(best_block);
  row.kernels.expand(row.block, best, s.tilt, s.weight);
  return row.at(best_block * kBlock + (std::max_element(s.tilt, s.tilt + row.n) - s.tilt));
}

void sample_row(Row& row, Scratch& s) {
  const TiltArgs& a = row.args;
  const int64_t i = row.index;
  const float temperature = a.temperature[i * a.temperature_stride];
  const bool greedy = temperature == 0;
  const float unit = greedy ? kLog2E : kLog2E / temperature;
  row.set_scale(unit, kLog2E, true);
  RowSums total = accumulate(row, s);
  bool use_heads = true;
  if (total.s_tilt == 0 && total.s_base > 0) {  // the scorer forbids every token: the base policy decides
    use_heads = false;
    row.set_scale(unit, kLog2E, false);
    total = accumulate(row, s);
  }
  a.valid[i] = usable(total);
  if (!a.valid[i]) {
    a.token[i] = 0;
    a.logp_base[i] = a.logp_policy[i] = a.kl[i] = NAN;
    return;
  }
  const double lse_base = total.m_base + std::log2(total.s_base);
  if (greedy) {
    row.set_scale(1.0f, 1.0f, use_heads);
    const Draw draw = draw_greedy(row, s);
    const double logp = draw.base - kLn2 * lse_base;
    a.token[i] = draw.token;
    a.logp_base[i] = float(logp);
    a.logp_policy[i] = 0.0f;
    a.kl[i] = float(-logp);
    return;
  }
  const Philox random =
      philox(uint64_t(a.seed[i * a.seed_stride]), uint64_t(a.position[i * a.position_stride]), kTokenStream);
  int64_t top_k = a.top_k[i * a.top_k_stride];
  if (top_k >= a.vocab) top_k = 0;
  const float top_p = a.top_p[i * a.top_p_stride], min_p = a.min_p[i * a.min_p_stride];
  Draw draw;
  double shift = total.m_tilt, sum = total.s_tilt, e_delta = total.e_delta;
  if (top_k > 0 || top_p < 1 || min_p > 0) {
    shift = filter(row, s, total, top_k, top_p, min_p);
    sum = mass_of(s.candidates);
    e_delta = 0;
    for (const Candidate& c : s.candidates) e_delta += double(c.weight) * c.delta;
    const double target = uniform53(random.x[0], random.x[1]) * sum;
    const int64_t at = walk(int64_t(s.candidates.size()), target,
                            [&](int64_t c) { return double(s.candidates[size_t(c)].weight); });
    draw = row.at(s.candidates[size_t(at)].id);
  } else {
    draw = draw_unfiltered(row, s, total, random);
  }
  const double lse_tilt = shift + std::log2(sum);
  a.token[i] = draw.token;
  a.logp_base[i] = float(kLn2 * (draw.base - lse_base));
  a.logp_policy[i] = float(kLn2 * (draw.tilt - lse_tilt));
  a.kl[i] = float(kl_nats(e_delta, sum, lse_tilt, lse_base));
}

}  // namespace

const TiltKernels* tilt_kernels(const char* forced) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const std::array<const TiltKernels*, 3> found = {
      avx512 ? &tilt_kernels_avx512 : nullptr, avx2 ? &tilt_kernels_avx2 : nullptr, &tilt_kernels_portable};
#else
  const std::array<const TiltKernels*, 1> found = {&tilt_kernels_portable};
#endif
  for (const TiltKernels* kernels : found)
    if (kernels && (!forced || std::strcmp(forced, kernels->name) == 0)) return kernels;
  return nullptr;
}

void tilt_sample(const TiltArgs& args, const TiltKernels& kernels) {
  Scratch scratch;
  for (int64_t i = 0; i < args.batch; ++i) {
    Row row(args, kernels, i);
    sample_row(row, scratch);
  }
}

}  // namespace pyengine
