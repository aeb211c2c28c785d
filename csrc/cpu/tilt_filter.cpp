// Filters keep a prefix of the order (tilted logit descending, id ascending): top-k the smallest whose count
// reaches k, top-p the smallest whose mass reaches its share. Both are found by bisection over the tilted
// logit on a list of candidates, so no row is ever sorted.
#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>

#include "tilt_row.h"

namespace pyengine {
namespace {

// Few enough to sort.
constexpr int64_t kFew = 64;

// Floats in their order, as integers.
int32_t ordinal(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits < 0 ? int32_t(0x80000000u - uint32_t(bits)) : bits;
}

float from_ordinal(int32_t i) {
  const uint32_t bits = i < 0 ? 0x80000000u - uint32_t(i) : uint32_t(i);
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// The smallest float that is not below x. While results too small for a normal float are 0, a conversion is
// not that: floats below 2^-126 are whole multiples of 2^-149, and their ordinals the same multiples.
float ceil_to_float(double x) {
  if (std::abs(x) < 0x1p-126) return from_ordinal(int32_t(std::ceil(x * 0x1p149)));
  const float rounded = float(x);
  return double(rounded) < x ? std::nextafter(rounded, INFINITY) : rounded;
}

// A pivot strictly between low and high, which are not neighbours. The middle of the values serves for
// any row that a model gives; the middle of the ordinals ends the search after 32 more steps on every row.
float between(float low, float high, int step) {
  const float middle = low + (high - low) / 2;
  if (step < 32 && low < middle && middle < high) return middle;
  return from_ordinal(int32_t((int64_t(ordinal(low)) + ordinal(high)) / 2));
}

void collect(Row& row, Scratch& s, float least) {
  s.candidates.n = 0;
  const float reached = std::max(least, std::numeric_limits<float>::lowest());  // never -inf
  for (int64_t b = 0; b < row.blocks(); ++b) {
    const float* maxima = s.maxima.data() + b * row.kernels.lanes;
    if (*std::max_element(maxima, maxima + row.kernels.lanes) < reached) continue;
    row.read(b, false);
    row.kernels.collect(row.block, reached, int32_t(b * kBlock), s.candidates);
  }
}

// Keeps the smallest prefix whose mass, or count, reaches target. The list is narrowed to the stretch
// low <= key < high in which the crossing lies; what reaches `high` is only remembered as a measure.
void keep_prefix(const TiltKernels& kernels, Scratch& s, float lowest, float highest, double target,
                 bool count) {
  Candidates set = s.candidates;
  float low = lowest, high = std::nextafter(highest, INFINITY);
  double gone = 0, reaches_high = 0;  // measure of what left the list; of what reaches `high`, with that
  int64_t at_low = set.n, at_high = 0;
  const auto narrow = [&] {
    kernels.between(set, low, high, s.narrowed);
    set = s.narrowed;
    gone = reaches_high;
    at_low = set.n, at_high = 0;
  };
  for (int step = 0; at_low - at_high > kFew && std::nextafter(low, INFINITY) < high; ++step) {
    const float pivot = between(low, high, step);
    int64_t number;
    const double mass = kernels.above(set, pivot, number), reaches = gone + (count ? double(number) : mass);
    if (reaches >= target)
      low = pivot, at_low = number;
    else
      high = pivot, at_high = number, reaches_high = reaches;
    if (2 * (at_low - at_high) < set.n) narrow();
  }
  narrow();
  int64_t last = 0;
  if (set.n > kFew) {  // one key, hence one weight, in id order
    const double each = count ? 1.0 : double(set.weight[0]);
    last = std::clamp(int64_t(std::ceil((target - gone) / each)) - 1, int64_t(0), set.n - 1);
  } else {
    int32_t order[kFew];
    for (int32_t i = 0; i < int32_t(set.n); ++i) order[i] = i;
    std::sort(order, order + set.n, [&](int32_t a, int32_t b) {
      return set.key[a] > set.key[b] || (set.key[a] == set.key[b] && a < b);
    });
    const auto measure = [&](int64_t i) { return count ? 1.0 : double(set.weight[order[i]]); };
    for (double running = gone + measure(0); last + 1 < set.n && running < target;)
      running += measure(++last);
    last = order[last];
  }
  kernels.keep_through(s.candidates, set.key[last], set.id[last]);
}

// The k-th largest lane maximum: at least k tokens reach it, and rarely many more.
float kth_maximum(Scratch& s, int64_t k) {
  if (k > int64_t(s.maxima.size())) return -INFINITY;
  s.order = s.maxima;
  std::nth_element(s.order.begin(), s.order.begin() + (k - 1), s.order.end(), std::greater<float>());
  return s.order[size_t(k - 1)];
}

double mass_of(const TiltKernels& kernels, Scratch& s) {
  double mass = 0;
  for (int64_t i = 0; i < s.candidates.n; i += kBlock) mass += kernels.candidate_sums(s.candidates, i).s_tilt;
  return mass;
}

}  // namespace

void filter(Row& row, Scratch& s, RowSums& total, int64_t top_k, float top_p, float min_p) {
  const TiltKernels& kernels = row.kernels;
  const float scale = row.block.scale;
  const float highest = *std::max_element(s.maxima.begin(), s.maxima.end());
  const double sum = total.s_tilt * exp2(total.m_tilt - double(scale) * highest);
  const double likely = min_p > 0 ? highest + std::log2(std::min(double(min_p), 1.0)) / scale : -INFINITY;
  float least = -INFINITY;
  if (top_k > 0)
    least = kth_maximum(s, top_k);
  else if (top_p < 1)  // what lies deeper cannot hold the mass that top-p leaves out
    least = std::min(
        highest, float(highest - std::log2(double(row.args.vocab) / ((1 - double(top_p)) * sum)) / scale));
  else
    least = from_ordinal(ordinal(ceil_to_float(likely)) - 1);
  s.reserve(row.args.vocab);
  collect(row, s, least);
  float lowest = kernels.weigh(s.candidates, scale, highest);
  if (top_k > 0 && s.candidates.n > top_k) keep_prefix(kernels, s, lowest, highest, double(top_k), true);
  if (top_p < 1) {
    double mass = mass_of(kernels, s);
    double target = double(top_p) * (top_k > 0 ? mass : sum);
    if (top_k == 0 && mass < target) {  // rounding
      collect(row, s, -INFINITY);
      lowest = kernels.weigh(s.candidates, scale, highest);
      mass = mass_of(kernels, s);
    }
    if (mass >= target) keep_prefix(kernels, s, lowest, highest, target, false);
  }
  if (likely > -INFINITY) {
    kernels.keep_through(s.candidates, ceil_to_float(likely), INT32_MAX);
  }
  total.m_tilt = double(scale) * highest;
  total.s_tilt = total.e_delta = 0;
  s.mass.clear();
  for (int64_t i = 0; i < s.candidates.n; i += kBlock) {
    const BlockSums sums = kernels.candidate_sums(s.candidates, i);
    s.mass.push_back(sums.s_tilt);
    total.s_tilt += sums.s_tilt;
    total.e_delta += double(sums.e_delta) * scale;
  }
}

}  // namespace pyengine
