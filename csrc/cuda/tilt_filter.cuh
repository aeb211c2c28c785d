// Top-k, then top-p, then min-p, without sorting. What they keep is a prefix of one order (tilted logit
// descending, id ascending), so each reduces to finding the last token of its prefix: a radix descent
// over an integer key with exact integer counts or masses. No float is ever added in an order that
// depends on timing, and no loop waits for a condition that a NaN or an infinity could break.
#pragma once

#include "tilt_row.cuh"

namespace pyengine::cuda {

constexpr int kDrawThreads = 256;
using DrawCta = Cta<kDrawThreads>;

constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;

// Probability masses relative to the row's likeliest token in 2^-40: exact to add in any order, and
// 2^24 tokens cannot overflow 64 bits.
constexpr double kMassUnit = 0x1p40;

struct FilterShared {
  uint32_t low[kDigits], high[kDigits];  // a 64-bit sum for each digit, in halves
  int count[2][DrawCta::kWarps];
};

// What a row keeps, for the draw: tokens in id order, of which `kept` holds.
class Filter {
  static_assert(kHeld == 2 * kVector, "collect() counts two vectors in one word");

 public:
  __device__ Filter(const Row& row, const Workspace& w, DrawCta& cta, FilterShared& shared)
      : row_(row),
        cta_(cta),
        shared_(shared),
        sums_(w.sums + row.index * w.blocks),
        lane_max_(w.lane_max + row.index * w.blocks * kWarp),
        list_(w.candidates + int64_t(blockIdx.x) * w.listed),
        blocks_(w.blocks),
        capacity_(w.listed) {}

  // `total` are the sums over the whole row.
  __device__ void run(const RowSums& total) {
    const int lanes = blocks_ * kWarp;
    float high = -INFINITY, low = INFINITY;
    int usable = 0;
    for (int i = int(threadIdx.x); i < lanes; i += kDrawThreads) {
      // A block that the values forbid holds base logits, for rows that fall back to them.
      if (row_.use_heads && sums_[i / kWarp].s_tilt == 0) lane_max_[i] = -INFINITY;
      const float top = lane_max_[i];
      high = fmaxf(high, top);
      if (top > -INFINITY) low = fminf(low, top), ++usable;
    }
    highest_ = cta_.reduce(high, Max{});
    shift_ = shift_of(highest_);
    if (row_.min_p > 0) tilt_min_p_ = double(highest_) + log(double(row_.min_p));
    if (row_.has_top_k()) {
      usable = cta_.reduce(usable, Add{});
      low = -cta_.reduce(-low, Max{});
      collect(usable >= row_.top_k ? kth_lane_max(lanes, low) : -INFINITY);
      if (size_ > row_.top_k)
        least_key_ = descend(
            items(), uint64_t(row_.top_k), [&](int i) { return uint64_t(reaches(item(i).tilt)); },
            [&](int i) { return key(i); }, key_bits());
      if (row_.top_p < 1) keep_mass(double(row_.top_p) * double(kept_mass()));
    } else if (row_.top_p < 1) {
      const double goal =
          double(row_.top_p) * total.s_tilt * rescale(total.m_tilt, log2_units(shift_)) * kMassUnit;
      // Log2 units below the likeliest: few rows need a second reading, none a fourth.
      const float depths[] = {12.0f, 24.0f, INFINITY};
      for (const float depth : depths) {
        collect(highest_ - depth / kLog2E);
        if (double(mass_) >= goal) break;
      }
      keep_mass(goal);
    } else {
      collect(nextafterf(float(tilt_min_p_), -INFINITY));
    }
  }

  // Entries to go through, in id order; not all are kept.
  __device__ int items() const { return listed() ? size_ : int(row_.args.vocab); }

  __device__ Candidate item(int i) const { return listed() ? list_[i] : Candidate{row_.at(i).tilt(), i}; }

  __device__ bool kept(const Candidate& c) const { return before_cut(c) && double(c.tilt) >= tilt_min_p_; }

  // e^(tilt - shift()).
  __device__ float weight(const Candidate& c) const { return weight_of(c.tilt, shift_); }
  __device__ float shift() const { return shift_; }

 private:
  __device__ bool listed() const { return size_ <= capacity_; }

  __device__ bool reaches(float tilt) const { return tilt >= least_ && tilt > -INFINITY; }

  // Whether the prefix that top-k and top-p have found so far holds it.
  __device__ bool before_cut(const Candidate& c) const { return reaches(c.tilt) && key_of(c) >= least_key_; }

  __device__ int id_bits() const { return 32 - __clz(int(row_.args.vocab - 1)); }
  __device__ uint32_t floor() const { return ordered(fmaxf(least_, -FLT_MAX)); }
  __device__ int key_bits() const { return 32 - __clz(int(ordered(highest_) - floor())) + id_bits(); }

  // Unique for each token, larger for those that come first. Relative to the lowest survivor, so that the
  // leading digit spreads them; digits of the float itself would pile them onto a few exponents.
  __device__ uint64_t key_of(const Candidate& c) const {
    return uint64_t(ordered(c.tilt) - floor()) << id_bits() | uint64_t(row_.args.vocab - 1 - c.id);
  }
  __device__ uint64_t key(int i) const { return key_of(item(i)); }

  __device__ uint64_t mass(float tilt) const { return uint64_t(double(weight_of(tilt, shift_)) * kMassUnit); }

  // The key of the last item of the shortest prefix, keys descending, whose amounts reach `want` >= 1; the
  // lowest key there is where they do not. Items of amount 0 do not count. Keys have `bits` bits.
  template <class Amount, class Key>
  __device__ uint64_t descend(int n, uint64_t want, Amount amount, Key key, int bits) {
    uint64_t prefix = 0;
    while (bits > 0) {
      const int width = min(bits, kDigitBits), digits = 1 << width;
      bits -= width;
      for (int d = int(threadIdx.x); d < digits; d += kDrawThreads) shared_.low[d] = shared_.high[d] = 0;
      __syncthreads();
      for (int i = int(threadIdx.x); i < n; i += kDrawThreads) {
        const uint64_t add = amount(i);
        if (add == 0) continue;
        const uint64_t at = key(i) >> bits;
        if (at >> width == prefix) add_to(int(at) & (digits - 1), add);
      }
      __syncthreads();
      const Found<uint64_t> found = cta_.first_above<uint64_t>(
          digits, [&](uint64_t) { return want - 1; },
          [&](int d) { return uint64_t(shared_.high[digits - 1 - d]) << 32 | shared_.low[digits - 1 - d]; });
      want -= found.before;
      prefix = prefix << width | uint64_t(digits - 1 - found.index);
    }
    return prefix;
  }

  // Shared memory adds 32 bits in one instruction but 64 in a loop. Exactly one thread sees each carry.
  __device__ void add_to(int digit, uint64_t amount) {
    const uint32_t low = uint32_t(amount), old = atomicAdd(&shared_.low[digit], low);
    const uint32_t high = uint32_t(amount >> 32) + (old + low < old ? 1 : 0);
    if (high != 0) atomicAdd(&shared_.high[digit], high);
  }

  // The k-th largest of the lanes' maxima: at least k tokens reach it, and rarely many more.
  __device__ float kth_lane_max(int lanes, float low) {
    const uint32_t base = ordered(low);
    const uint64_t found = descend(
        lanes, uint64_t(row_.top_k), [&](int i) { return lane_max_[i] > -INFINITY ? uint64_t(1) : 0; },
        [&](int i) { return uint64_t(ordered(lane_max_[i]) - base); },
        32 - __clz(int(ordered(highest_) - base)));
    const uint32_t bits = base + uint32_t(found);
    return __uint_as_float(bits & 0x80000000u ? bits ^ 0x80000000u : ~bits);
  }

  // Keeps the smallest prefix of what is kept so far whose mass reaches the goal; never nothing.
  __device__ void keep_mass(double goal) {
    const uint64_t want = goal >= 1 ? uint64_t(ceil(goal)) : 1;
    least_key_ = descend(
        items(), want,
        [&](int i) {
          const Candidate c = item(i);
          return before_cut(c) ? mass(c.tilt) : 0;
        },
        [&](int i) { return key(i); }, key_bits());
  }

  __device__ uint64_t kept_mass() {
    uint64_t sum = 0;
    for (int i = int(threadIdx.x); i < items(); i += kDrawThreads) {
      const Candidate c = item(i);
      if (before_cut(c)) sum += mass(c.tilt);
    }
    return cta_.reduce(sum, Add{});
  }

  // Lists the tokens whose tilted logit reaches `least`, in id order, and counts and weighs them. Only
  // lanes whose maximum reaches it read their tokens. Past its capacity the list is abandoned: item()
  // then reads the row.
  __device__ void collect(float least) {
    least_ = least, size_ = 0;
    uint64_t sum = 0;
    // A warp takes half a block at a time: what a lane holds in one turn.
    for (int first = 0, parity = 0; first < blocks_ * kTurns; first += DrawCta::kWarps, parity ^= 1) {
      const int block = (first + warp()) / kTurns, turn = (first + warp()) % kTurns;
      const bool active = block < blocks_ && reaches(lane_max_[block * kWarp + lane()]);
      float tilt[kHeld];
      uint32_t counts = 0;  // of the lane's survivors, 16 bits for each of its vectors
      if (__any_sync(kAllLanes, active)) {
        float delta[kHeld];
        row_.read<true, false>(block, turn, active, tilt, delta);
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
          tilt[i] += delta[i];
          if (!reaches(tilt[i])) continue;
          counts += 1u << (i / kVector * 16);
          sum += mass(tilt[i]);
        }
      }
      const uint32_t upto = warp_scan(counts), all = __shfl_sync(kAllLanes, upto, kWarp - 1);
      if (lane() == 0) shared_.count[parity][warp()] = int(all & 0xffff) + int(all >> 16);
      __syncthreads();  // a slow warp may still read the other parity's counts
      int at = size_;
      for (int w = 0; w < DrawCta::kWarps; ++w) {
        if (w < warp()) at += shared_.count[parity][w];
        size_ += shared_.count[parity][w];
      }
      if (counts == 0) continue;
      // Ids ascend along the first vectors of all lanes, then along the second ones.
      const uint32_t before = upto - counts;
      int slots[2] = {at + int(before & 0xffff), at + int(all & 0xffff) + int(before >> 16)};
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        if (!reaches(tilt[i])) continue;
        const int slot = slots[i / kVector]++;
        if (slot < capacity_) list_[slot] = Candidate{tilt[i], block * kBlock + token_of(turn, i)};
      }
    }
    mass_ = cta_.reduce(sum, Add{});  // its barrier also shows the list to all threads
  }

  const Row& row_;
  DrawCta& cta_;
  FilterShared& shared_;
  const BlockSums* sums_;
  float* lane_max_;
  Candidate* list_;
  int blocks_, capacity_;

  float highest_ = -INFINITY, shift_ = 0, least_ = -INFINITY;
  double tilt_min_p_ = -INFINITY;
  uint64_t least_key_ = 0, mass_ = 0;
  int size_ = 0;
};

}  // namespace pyengine::cuda
