// The draw by Gumbel noise, for rows that come in shards or tiles of the vocabulary and for coupled policies.
// Only tokens that may win are scored, in double; a comparison of their uniforms with their weights finds
// them without a logarithm.
#include <algorithm>

#include "team.h"
#include "tilt_row.h"

namespace pyengine {
namespace {

// Candidates in a block from which on it is cheaper to draw all its words at once.
constexpr int64_t kDense = 24;

// Noise is at most -log2(2^-33).
constexpr double kMostNoise = 33;

uint64_t seed_of(const Row& row) { return uint64_t(row.args.seed[row.index * row.args.seed_stride]); }

uint64_t position_of(const Row& row) {
  return uint64_t(row.args.position[row.index * row.args.position_stride]);
}

// Ties go to the lowest id, in whatever order tokens come.
void challenge(const Row& row, int64_t at, int64_t id, double score, Winner& winner) {
  if (score < winner.score || (score == winner.score && double(id) > winner.id)) return;
  winner = row.at(at);
  winner.score = score;
  winner.id = double(id);
}

double noisy(double tilt, uint32_t word) { return tilt - std::log2(exponential(word)); }

}  // namespace

void contend(Row& row, Scratch& s, int64_t first_id, Winner& winner) {
  const int lanes = row.kernels.lanes;
  s.words.resize(size_t(kBlock + 2 * kPadding));
  for (int64_t b = 0; b < row.blocks(); ++b) {
    const float* maxima = s.maxima.data() + b * lanes;
    const float top = *std::max_element(maxima, maxima + lanes);
    if (top == -INFINITY) continue;
    const int64_t start = b * kBlock, id = first_id + start;
    if (row.greedy) {  // in the logits' unit: a scale factor could merge two of them
      if (top < winner.score) continue;
      row.read(b, false);
      s.reserve(kBlock);
      s.candidates.n = 0;
      row.kernels.collect(row.block, top, 0, s.candidates);
      challenge(row, start + s.candidates.id[0], id + s.candidates.id[0], top, winner);
      continue;
    }
    if (double(top) * row.block.scale + kMostNoise + 1 < winner.score) continue;
    row.read(b, false);
    const int skipped = int(id % 4);
    row.kernels.gumbel_words(seed_of(row), position_of(row), uint32_t(id / 4), row.block.n + skipped,
                             s.words.data());
    const uint32_t* words = s.words.data() + skipped;
    uint32_t bits = 0;
    for (int i = 0;
         (i = row.kernels.contenders(row.block, words, i, float(winner.score), bits)) < row.block.n;
         i += lanes)
      for (; bits; bits &= bits - 1) {
        const int at = i + __builtin_ctz(bits);
        challenge(row, start + at, id + at, noisy(row.exact_tilt(start + at), words[at]), winner);
      }
  }
}

void contend_candidates(const Row& row, Scratch& s, double shift, Winner& winner) {
  const Candidates& all = s.candidates;
  s.words.resize(size_t(kBlock + 2 * kPadding));
  int64_t ready = -1;  // the block whose words are in scratch
  double allowance = INFINITY;
  for (int64_t c = 0; c < all.n; ++c) {
    const int64_t id = all.id[c], block = id / kBlock;
    const double most = all.weight[c] * allowance;  // no E above it wins; a quarter more than is true
    if (most < 0x1p-33) continue;
    if (block != ready && c + kDense < all.n && all.id[c + kDense] / kBlock == block) {
      row.kernels.gumbel_words(seed_of(row), position_of(row), uint32_t(block * kBlock / 4), kBlock,
                               s.words.data());
      ready = block;
    }
    const uint32_t word =
        block == ready ? s.words[size_t(id % kBlock)]
                       : philox(seed_of(row), position_of(row), kGumbelStream, uint32_t(id / 4)).x[id % 4];
    if (double(word) * 0x1p-32 > most) continue;
    challenge(row, id, id, noisy(row.exact_tilt(id), word), winner);
    allowance = 1.25 * exp2(shift - winner.score);
  }
}

void tilt_fold(const TiltArgs& args, TiltState* states, int64_t first_id, int threads,
               const TiltKernels& kernels) {
  parallel_rows(args.batch, worthwhile(args, threads), [&](int64_t i) {
    const FlushToZero flush;
    Row row(args, kernels, i);
    Scratch& s = scratch();
    TiltState& state = states[i];
    // The tile joins the sums, and its best token challenges the winner.
    const auto fold = [&](RowSums& sums, Winner& winner) {
      const RowSums before = sums;
      if (!accumulate(row, s, sums, true)) {
        sums = before;
        RowSums tile = sample_exactly(row, {false, 0, 1.0, 0.0, true, first_id, {}}, winner);
        if (tile.s_tilt > 0) tile.e_delta += tile.s_tilt * (tile.m_tilt - tile.m_base);
        merge(sums, tile);
      } else if (std::isfinite(sums.s_base + sums.s_tilt + sums.e_delta)) {
        contend(row, s, first_id, winner);
      }
    };
    fold(state.sums, state.winner);
    if (!std::isfinite(state.sums.s_base + state.sums.s_tilt + state.sums.e_delta)) return;
    if (state.sums.s_tilt > 0) return;
    row.drop_heads();
    RowSums ignored;
    fold(ignored, state.base);
  });
}

void tilt_finish(const TiltArgs& args, const TiltState* states) {
  for (int64_t i = 0; i < args.batch; ++i) {
    TiltState state = states[i];
    if (state.sums.s_tilt == 0 && state.sums.s_base > 0) {  // the scorer forbade every token
      state.sums.m_tilt = state.sums.m_base;
      state.sums.s_tilt = state.sums.s_base;
      state.sums.e_delta = 0;
      state.winner = state.base;
    }
    finish_row(args, i, state.sums, state.winner);
  }
}

}  // namespace pyengine
