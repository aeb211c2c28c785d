// tilt_sample on a CPU: one pass over the row for the sums, then a draw that re-reads one block
// (hierarchical inverse CDF, two uniforms a row), the candidates that a filter left, or, with Gumbel noise,
// the tokens that may win.
#include "tilt.h"

#include <algorithm>

#include "dispatch.h"
#include "team.h"
#include "tilt_row.h"

namespace pyengine {
namespace {

// Elements from which threads pay: 160 us of work. To wake a worker costs the caller 13 us, and it starts 40
// to 55 us later (virtual machine, idle core).
constexpr int64_t kWorthwhile = 1 << 20;

int64_t draw_unfiltered(Row& row, Scratch& s, const RowSums& total, const Philox& random) {
  const double block_target = uniform53(random.x[0], random.x[1]) * total.s_tilt;
  const int64_t block = walk(row.blocks(), block_target, [&](int64_t b) {
    const BlockSums& sums = s.sums[size_t(b)];
    return sums.s_tilt * rescale(sums.m_tilt, total.m_tilt);
  });
  row.read(block, true);
  row.kernels.expand(row.block, s.sums[size_t(block)].m_tilt, s.weight);
  double sum = 0;
  for (int i = 0; i < row.n; ++i) sum += s.weight[i];
  const double target = uniform53(random.x[2], random.x[3]) * sum;
  return block * kBlock + walk(row.n, target, [&](int64_t i) { return double(s.weight[i]); });
}

int64_t draw_candidate(const Scratch& s, const RowSums& total, const Philox& random) {
  double target = uniform53(random.x[0], random.x[1]) * total.s_tilt;
  const int64_t chunk = walk(int64_t(s.mass.size()), target, [&](int64_t i) { return s.mass[size_t(i)]; });
  for (int64_t i = 0; i < chunk; ++i) target -= s.mass[size_t(i)];
  const int64_t first = chunk * kBlock, n = std::min<int64_t>(kBlock, s.candidates.n - first);
  return s.candidates
      .id[first + walk(n, target, [&](int64_t i) { return double(s.candidates.weight[first + i]); })];
}

void sample_row(Row& row, Scratch& s) {
  const TiltArgs& a = row.args;
  const int64_t i = row.index;
  int64_t top_k = a.top_k[i * a.top_k_stride];
  if (top_k >= a.vocab) top_k = 0;
  const float top_p = a.top_p[i * a.top_p_stride], min_p = a.min_p[i * a.min_p_stride];
  const bool filtered = !row.greedy && (top_k > 0 || top_p < 1 || min_p > 0);
  const bool argmax = row.greedy || a.gumbel;
  const Philox random =
      philox(uint64_t(a.seed[i * a.seed_stride]), uint64_t(a.position[i * a.position_stride]), kTokenStream);
  RowSums total;
  Winner winner;
  const auto add = [&] {
    total = RowSums{};
    if (accumulate(row, s, total, filtered || argmax)) return true;
    total = sample_exactly(
        row,
        {filtered, filtered ? top_k : 0, filtered ? top_p : 1.0, filtered ? min_p : 0.0, a.gumbel, 0, random},
        winner);
    winner.base -= total.m_base, winner.tilt -= total.m_tilt;
    total.m_base = total.m_tilt = 0;
    return false;
  };
  bool fits = add();
  if (total.s_tilt == 0 && total.s_base > 0) {
    row.drop_heads();
    fits = add();
  }
  if (fits && usable(total)) {
    if (filtered) filter(row, s, total, top_k, top_p, min_p);
    if (argmax && filtered)
      contend_candidates(row, s, total.m_tilt, winner);
    else if (argmax)
      contend(row, s, 0, winner);
    else
      winner = row.at(filtered ? draw_candidate(s, total, random) : draw_unfiltered(row, s, total, random));
  }
  finish_row(a, i, total, winner);
}

}  // namespace

void finish_row(const TiltArgs& args, int64_t i, const RowSums& sums, const Winner& winner) {
  args.valid[i] = usable(sums);
  if (!args.valid[i]) {
    args.token[i] = 0;
    args.logp_base[i] = args.logp_policy[i] = args.kl[i] = NAN;
    return;
  }
  // Relative to the maxima: a logarithm may be less than the last bit of a maximum.
  const double log_base = std::log2(sums.s_base), log_tilt = std::log2(sums.s_tilt);
  const double logp_base = kLn2 * (winner.base - sums.m_base - log_base);
  const bool greedy = args.temperature[i * args.temperature_stride] == 0;
  args.token[i] = int64_t(winner.id);
  args.logp_base[i] = float(logp_base);
  args.logp_policy[i] = greedy ? 0.0f : float(kLn2 * (winner.tilt - sums.m_tilt - log_tilt));
  const double kl = kLn2 * (sums.e_delta / sums.s_tilt - (sums.m_tilt - sums.m_base) - log_tilt + log_base);
  args.kl[i] = float(greedy ? -logp_base : kl);
}

const TiltKernels* tilt_kernels(const char* forced) {
  return choose<TiltKernels>(PYENGINE_BUILDS(tilt_kernels), forced);
}

int worthwhile(const TiltArgs& args, int threads) {
  return args.batch * args.vocab * (1 + args.heads) < kWorthwhile ? 1 : threads;
}

Scratch& scratch() {
  static thread_local Scratch mine;
  return mine;
}

void tilt_sample(const TiltArgs& args, int threads, const TiltKernels& kernels) {
  parallel_rows(args.batch, worthwhile(args, threads), [&](int64_t i) {
    const FlushToZero flush;
    Row row(args, kernels, i);
    sample_row(row, scratch());
  });
}

}  // namespace pyengine
