#include "tilt_row.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace pyengine {
namespace {

// Beyond this the temperature flattens every logit below 2^36 to fp32's last bit, and its product with a
// weight would overflow.
constexpr float kHottest = 0x1p60f;

// Any shift past kExact.
constexpr float kBeyond = 0x1p30f;

size_t size_of(DType type) { return type == DType::f32 ? 4 : 2; }

const char* element(const void* data, DType type, int64_t at) {
  return static_cast<const char*>(data) + at * int64_t(size_of(type));
}

// A shift for sums over the blocks from `first` on: the maximum of the first block up to `last` that has a
// finite one. `otherwise` where there is none: every token is forbidden, or infinite, and the sums show it.
float shift_for(Row& row, int64_t first, int64_t last, bool tilted, float otherwise = 0.0f) {
  for (int64_t b = first; b <= last; ++b) {
    const float top = row.top(b, tilted);
    if (std::isfinite(top)) return std::rint(std::clamp(top * row.block.scale, -kBeyond, kBeyond));
  }
  return otherwise;
}

float temperature_of(const TiltArgs& args, int64_t i) {
  const float temperature = args.temperature[i * args.temperature_stride];
  return temperature == 0 ? 1.0f : std::min(temperature, kHottest);
}

}  // namespace

Row::Row(const TiltArgs& a, const TiltKernels& k, int64_t i)
    : args(a), kernels(k), index(i), greedy(a.temperature[i * a.temperature_stride] == 0) {
  const float temperature = temperature_of(args, index);
  block.scale = kLog2E / temperature;
  ratios.resize(size_t(args.heads));
  for (int64_t r = 0; r < args.heads; ++r) {
    const float weight = args.weights[index * args.weights_stride_row + r * args.weights_stride_head];
    float& ratio = ratios[size_t(r)];
    ratio = weight * temperature;
    // Too small for a float, but not 0: the head still forbids what it values at -inf.
    if (ratio == 0 && weight != 0) ratio = std::copysign(std::numeric_limits<float>::min(), weight);
  }
}

void Row::drop_heads() {
  use_heads = false;
  std::fill(ratios.begin(), ratios.end(), 0.0f);
}

// `n` floats at element `at` of a matrix, padded in `scratch` unless they can be read in place.
const float* Row::floats(const void* data, DType type, int64_t at, bool copy, float pad,
                         float* scratch) const {
  const char* from = element(data, type, at);
  if (type == DType::f32 && block.n == n && !copy) return reinterpret_cast<const float*>(from);
  kernels.widen(from, type, n, scratch);
  std::fill(scratch + n, scratch + block.n, pad);
  return scratch;
}

// All heads but the last end up in block.delta; the last stays apart, so that the usual single head
// costs no pass of its own. A head of weight 0 is skipped: 0 * inf must not poison the row.
void Row::read(int64_t b, bool fp32) {
  const int64_t start = b * kBlock, at = index * args.logits_stride + start;
  n = int(std::min<int64_t>(kBlock, args.vocab - start));
  block.n = (n + kernels.step - 1) / kernels.step * kernels.step;
  const int64_t heads = args.heads - std::count(ratios.begin(), ratios.end(), 0.0f);
  const bool in_place = !fp32 && !args.mask && block.n == n &&
                        (heads == 0 || (heads == 1 && args.logits_type == args.values_type));
  block.type = in_place ? args.logits_type : DType::f32;
  block.delta = nullptr;
  block.head = nullptr;
  if (in_place) {
    block.logits = element(args.logits, args.logits_type, at);
  } else {
    block.logits = floats(args.logits, args.logits_type, at, args.mask, -INFINITY, logit_store);
    if (args.mask) kernels.forbid(args.mask + index * args.mask_stride + start, n, logit_store);
  }
  for (int64_t r = 0; r < args.heads; ++r) {
    if (ratios[size_t(r)] == 0.0f) continue;
    if (block.head) {
      kernels.add_head(block, delta_store);
      block.delta = delta_store;
    }
    const int64_t from = r * args.values_stride_head + index * args.values_stride_row + start;
    block.head = in_place ? static_cast<const void*>(element(args.values, args.values_type, from))
                          : floats(args.values, args.values_type, from, false, 0.0f, head_store);
    block.ratio = ratios[size_t(r)];
  }
}

float Row::one(const void* data, DType type, int64_t at) const {
  float x;
  kernels.widen(element(data, type, at), type, 1, &x);
  return x;
}

Winner Row::at(int64_t id) const {
  const float logit = one(args.logits, args.logits_type, index * args.logits_stride + id);
  float delta = 0, tilted = logit;
  for (int64_t r = 0, seen = 0; r < args.heads; ++r) {
    const float ratio = ratios[size_t(r)];
    if (ratio == 0.0f) continue;
    const int64_t from = r * args.values_stride_head + index * args.values_stride_row + id;
    const float value = one(args.values, args.values_type, from);
    tilted = seen++ ? logit + std::fma(value, ratio, delta) : std::fma(value, ratio, logit);
    delta = std::fma(value, ratio, delta);
  }
  Winner w;
  w.id = double(id);
  w.base = double(logit) * block.scale;
  w.tilt = double(tilted) * block.scale;
  return w;
}

double Row::exact_tilt(int64_t id) const {
  double x = one(args.logits, args.logits_type, index * args.logits_stride + id);
  x /= double(temperature_of(args, index));
  for (int64_t r = 0; r < args.heads; ++r) {
    if (ratios[size_t(r)] == 0.0f) continue;
    const int64_t from = r * args.values_stride_head + index * args.values_stride_row + id;
    x += double(args.weights[index * args.weights_stride_row + r * args.weights_stride_head]) *
         one(args.values, args.values_type, from);
  }
  return x / kLn2;
}

double Row::exact_base(int64_t id) const {
  const double logit = one(args.logits, args.logits_type, index * args.logits_stride + id);
  return logit / double(temperature_of(args, index)) / kLn2;
}

double Row::noise(int64_t id) const {
  const Philox words =
      philox(uint64_t(args.seed[index * args.seed_stride]),
             uint64_t(args.position[index * args.position_stride]), kGumbelStream, uint32_t(id / 4));
  return -std::log2(exponential(words.x[id % 4]));
}

float Row::top(int64_t b, bool tilted) {
  read(b, true);
  if (!tilted) block.delta = nullptr, block.head = nullptr;
  return kernels.top(block);
}

void Scratch::reserve(int64_t tokens) {
  const int64_t wanted = (tokens + kBlock - 1) / kBlock * kBlock + kPadding;
  if (wanted > room) {
    floats.reset(new float[size_t(5 * wanted)]);
    ids.reset(new int32_t[size_t(2 * wanted)]);
    room = wanted;
  }
  float* f = floats.get();
  candidates = {f, f + room, f + 2 * room, ids.get(), 0};
  narrowed = {f + 3 * room, nullptr, f + 4 * room, ids.get() + room, 0};
}

// One pass over the row, every block relative to the maxima of the first block that has finite ones, or to
// those of an earlier tile, so that the sums of a row with an allowed token are never 0. Only a block that
// outgrows fp32's range (2^127 above them) or holds a logit or value that is not finite is summed again,
// relative to its own where they are higher.
bool accumulate(Row& row, Scratch& s, RowSums& total, bool maxima) {
  if (row.block.scale > kSteepest) return false;
  s.sums.resize(size_t(row.blocks()));
  if (maxima) s.maxima.resize(size_t(row.blocks() * row.kernels.lanes));
  const int64_t last = row.blocks() - 1;
  const float shift_base = total.s_base > 0 ? float(total.m_base) : shift_for(row, 0, last, false);
  const float shift_tilt = total.s_tilt > 0 ? float(total.m_tilt) : shift_for(row, 0, last, true);
  const auto beyond = [](float shift) { return std::abs(shift) > kExact; };
  if (beyond(shift_base) || beyond(shift_tilt)) return false;
  bool careful = row.args.mask != nullptr;
  for (int64_t b = 0; b <= last; ++b) {
    float* const tops = maxima ? s.maxima.data() + b * row.kernels.lanes : nullptr;
    row.read(b, careful);
    BlockSums sums =
        (careful ? row.kernels.careful_sums : row.kernels.sums)(row.block, shift_base, shift_tilt, tops);
    if (!std::isfinite(sums.s_base + sums.s_tilt + sums.e_delta)) {
      const float own_base = std::max(shift_base, shift_for(row, b, b, false, shift_base));
      const float own_tilt = std::max(shift_tilt, shift_for(row, b, b, true, shift_tilt));
      if (beyond(own_base) || beyond(own_tilt)) return false;
      row.read(b, true);
      sums = row.kernels.careful_sums(row.block, own_base, own_tilt, tops);
      careful = true;  // -inf seldom comes alone: a mask must not cost every block twice
    }
    // The identity has no shift: an earlier 0 would drown a tile of logits below -2^10.
    if (sums.s_base == 0) sums.m_base = -INFINITY;
    if (sums.s_tilt == 0) sums.m_tilt = -INFINITY;
    s.sums[size_t(b)] = sums;
    merge(total, sums);
  }
  return true;
}

bool usable(const RowSums& sums) {
  return std::isfinite(sums.s_base) && sums.s_base > 0 && std::isfinite(sums.s_tilt) && sums.s_tilt > 0 &&
         std::isfinite(sums.e_delta);
}

}  // namespace pyengine
