// Rows that fp32 cannot hold: logits or tilts beyond kExact in log2 units, as a tiny temperature or a huge
// weight makes them. There a rounded shift and a fused product part by more than the range of 2^x. Nearly all
// tokens of such a row weigh nothing, so plain double precision costs little; every instruction set runs this
// same code.
#include <algorithm>
#include <cmath>

#include "tilt_row.h"

namespace pyengine {
namespace {

// Log2 units below the maximum at which a token weighs nothing.
constexpr double kReach = 200;

struct Token {
  int64_t id;
  double base, tilt;  // log2 units
};

// In log2 units as the definition has them: nothing is rounded to fp32.
Token token_at(const Row& row, int64_t id) { return {id, row.exact_base(id), row.exact_tilt(id)}; }

// Whether an allowed token of the block in hand has a logit, or a head's product, that is NaN or +inf.
bool is_bad(const Row& row) {
  const float* const logits = static_cast<const float*>(row.block.logits);
  const float* const head = static_cast<const float*>(row.block.head);
  for (int i = 0; i < row.n; ++i) {
    if (logits[i] == -INFINITY) continue;
    float d = head ? head[i] * row.block.ratio : 0.0f;
    if (row.block.delta) d += row.block.delta[i];
    if (!(logits[i] < INFINITY) || !(d < INFINITY)) return true;
  }
  return false;
}

// Every token that weighs something under base or tilt, in id order, and the two maxima; NaN in a bad row.
std::vector<Token> heavy_tokens(Row& row, double& top_base, double& top_tilt) {
  const double scale = row.block.scale;
  const int64_t blocks = row.blocks();
  std::vector<float> base(static_cast<size_t>(blocks)), tilt(static_cast<size_t>(blocks));
  top_base = top_tilt = NAN;
  for (int64_t b = 0; b < blocks; ++b) {
    base[size_t(b)] = row.top(b, false), tilt[size_t(b)] = row.top(b, true);
    if (is_bad(row)) return {};
  }
  const double near_base = *std::max_element(base.begin(), base.end()),
               near_tilt = *std::max_element(tilt.begin(), tilt.end());
  // A block's maximum is rounded to fp32, which is far from exact in log2 units.
  const auto reached = [&](double top, double most) {
    return top > -INFINITY &&
           (most - top) * scale <= kReach + (std::abs(most) + std::abs(top)) * scale * 0x1p-21;
  };
  std::vector<Token> found;
  top_base = top_tilt = -INFINITY;
  for (int64_t b = 0; b < blocks; ++b) {
    if (!reached(base[size_t(b)], near_base) && !reached(tilt[size_t(b)], near_tilt)) continue;
    row.read(b, true);
    const float* logits = static_cast<const float*>(row.block.logits);
    for (int i = 0; i < row.n; ++i) {
      if (logits[i] == -INFINITY) continue;  // forbidden, by the logits or the mask
      const Token token = token_at(row, b * kBlock + i);
      top_base = std::max(top_base, token.base), top_tilt = std::max(top_tilt, token.tilt);
      found.push_back(token);
    }
  }
  found.erase(std::remove_if(found.begin(), found.end(),
                             [&](const Token& t) {
                               return t.base < top_base - kReach && !(t.tilt >= top_tilt - kReach);
                             }),
              found.end());
  return found;
}

double weight(double x, double top) { return x < top - kReach ? 0.0 : std::exp2(x - top); }

// The smallest prefix, in the order (tilt descending, id ascending), that the filters keep; in id order
// again.
void keep(std::vector<Token>& tokens, double top, int64_t top_k, double top_p, double min_p) {
  std::stable_sort(tokens.begin(), tokens.end(),
                   [](const Token& a, const Token& b) { return a.tilt > b.tilt; });
  if (top_k > 0 && int64_t(tokens.size()) > top_k) tokens.resize(size_t(top_k));
  double mass = 0, running = 0;
  for (const Token& t : tokens) mass += weight(t.tilt, top);
  if (top_p < 1)
    for (size_t n = 0; n < tokens.size(); ++n)
      if ((running += weight(tokens[n].tilt, top)) >= top_p * mass) tokens.resize(n + 1);
  while (tokens.size() > 1 && weight(tokens.back().tilt, top) < min_p) tokens.pop_back();
  std::sort(tokens.begin(), tokens.end(), [](const Token& a, const Token& b) { return a.id < b.id; });
}

}  // namespace

RowSums sample_exactly(Row& row, const ExactDraw& draw, Winner& winner) {
  double top_base, top_tilt;
  std::vector<Token> tokens = heavy_tokens(row, top_base, top_tilt);
  RowSums sums;
  if (top_base == -INFINITY) return sums;
  sums.m_base = top_base, sums.m_tilt = top_tilt;
  for (const Token& t : tokens) sums.s_base += weight(t.base, top_base);
  if (std::isnan(top_base)) sums.s_base = NAN;
  if (!std::isfinite(top_tilt)) return sums;
  keep(tokens, top_tilt, draw.top_k, draw.top_p, draw.min_p);
  for (const Token& t : tokens) {
    const double e = weight(t.tilt, top_tilt);
    sums.s_tilt += e;
    if (e > 0) sums.e_delta += e * ((t.tilt - top_tilt) - (t.base - top_base));
  }
  const auto take = [&](const Token& t, double score) {
    winner.id = double(draw.first_id + t.id), winner.base = t.base, winner.tilt = t.tilt,
    winner.score = score;
  };
  if (draw.gumbel || row.greedy) {
    for (const Token& t : tokens) {
      const int64_t id = draw.first_id + t.id;
      const double noise = row.greedy ? 0.0 : row.noise(id);
      if (t.tilt + noise > winner.score || (t.tilt + noise == winner.score && double(id) < winner.id))
        take(t, t.tilt + noise);
    }
    return sums;
  }
  // As the fp32 path draws: a block and a token in it or, from what a filter kept, a token at once.
  const double share = uniform53(draw.random.x[0], draw.random.x[1]);
  size_t first = 0, last = tokens.size();
  const auto mass = [&](size_t i) { return weight(tokens[i].tilt, top_tilt); };
  double target = share * sums.s_tilt;
  if (!draw.filtered) {
    std::vector<double> blocks(static_cast<size_t>(row.blocks()));
    for (size_t i = 0; i < tokens.size(); ++i) blocks[size_t(tokens[i].id / kBlock)] += mass(i);
    const int64_t block = walk(int64_t(blocks.size()), target, [&](int64_t b) { return blocks[size_t(b)]; });
    while (tokens[first].id / kBlock < block) ++first;
    while (tokens[last - 1].id / kBlock > block) --last;
    target = uniform53(draw.random.x[2], draw.random.x[3]) * blocks[size_t(block)];
  }
  take(tokens[first + size_t(walk(int64_t(last - first), target,
                                  [&](int64_t i) { return mass(first + size_t(i)); }))],
       winner.score);
  return sums;
}

}  // namespace pyengine
