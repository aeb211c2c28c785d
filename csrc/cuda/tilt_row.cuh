// One row of tilt_sample as the kernels read it: a warp at a time 1,024 tokens, or a thread one token.
// Both ways compute a token's numbers by the same roundings, so that they can be compared for equality.
#pragma once

#include <type_traits>

#include "device.cuh"
#include "tilt.h"

namespace pyengine::cuda {

// A warp reads a block in two turns, so that a lane holds 16 logits and as many values at a time: 32 of
// both take 160 registers and leave the memory system a third of the warps that hide its latency.
constexpr int kTurns = 2;
constexpr int kHeld = kBlock / kWarp / kTurns;
constexpr int kVector = 8;  // consecutive tokens of a lane: 16 bytes of bf16

// Survivors of a filter's first cut that a row can list; rows with more are read again instead.
constexpr int kListed = 16384;
// Thread blocks of the drawing kernel, each with its own list: 64 MB of workspace at most.
constexpr int kDrawBlocks = 512;

struct Candidate {
  float tilt;
  int id;
};

// The caller's scratch memory, written by tilt_sums and read by tilt_draw; [batch, blocks] where no
// other shape is given.
struct Workspace {
  BlockSums* sums;        // with m_base and m_tilt in nats, exactly a logit
  Best* best;             // greedy and Gumbel rows: the block's winner
  float* lane_max;        // [batch, blocks, 32], filtered rows: of the tilted logits that a lane holds
  Candidate* candidates;  // [kDrawBlocks, listed]
  int blocks, listed;
};

// Where in its block the i-th of the tokens is that a lane holds in a turn. Fixed for all types and
// alignments: sums must not depend on them.
__device__ inline int token_of(int turn, int i) {
  return turn * (kBlock / kTurns) + i / kVector * (kWarp * kVector) + lane() * kVector + i % kVector;
}

__device__ inline uint4 read_granule(uintptr_t at, uintptr_t end) {
  return at < end ? __ldg(reinterpret_cast<const uint4*>(at)) : uint4{};
}

// The 16 bytes at from + offset(v) for each v, of which those at `end` and later may be anything; offsets
// are multiples of 16. Whole 16-byte granules are read, none of them without a byte before `end`, so
// neither a row's alignment nor the end of memory can fault. All loads are under way before the first use.
// kAligned promises that `from` is a multiple of 16, which saves 40 registers.
template <bool kAligned, int kVectors, class Offset>
__device__ void read_vectors(uintptr_t from, uintptr_t end, Offset offset, uint32_t (&out)[kVectors][4]) {
  const unsigned off = kAligned ? 0 : unsigned(from & 15);
  from -= off;
  uint4 first[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) first[v] = read_granule(from + offset(v), end);
  if (off != 0) {
    uint4 second[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) second[v] = read_granule(from + offset(v) + 16, end);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      uint32_t words[8] = {first[v].x,  first[v].y,  first[v].z,  first[v].w,
                           second[v].x, second[v].y, second[v].z, second[v].w};
#pragma unroll
      for (int i = 0; i < 6; ++i) words[i] = off & 8 ? words[i + 2] : words[i];
#pragma unroll
      for (int i = 0; i < 5; ++i) words[i] = off & 4 ? words[i + 1] : words[i];
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = __funnelshift_r(words[i], words[i + 1], off % 4 * 8);
      first[v] = uint4{words[0], words[1], words[2], words[3]};
    }
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
    out[v][0] = first[v].x, out[v][1] = first[v].y, out[v][2] = first[v].z, out[v][3] = first[v].w;
}

// The bits of what a lane holds in a turn, of n <= kBlock elements of a type from `at` on. Those past n
// mean nothing.
template <DType kType>
struct HeldBits {
  static constexpr int kBytes = kType == DType::f32 ? 4 : 2, kPerVector = 16 / kBytes;
  uint32_t raw[kHeld / kPerVector][4];

  template <bool kAligned>
  __device__ void load(const void* data, int64_t at, int turn, int n) {
    const uintptr_t from = reinterpret_cast<uintptr_t>(data) + uintptr_t(at * kBytes);
    read_vectors<kAligned>(
        from, from + uintptr_t(n * kBytes),
        [&](int v) { return uintptr_t(token_of(turn, v * kPerVector) * kBytes); }, raw);
  }

  // Calls use(i, x) for each.
  template <class Use>
  __device__ void each(Use use) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const uint32_t word = raw[i / kPerVector][i % kPerVector * kBytes / 4];
      use(i, widen<kType>(kType == DType::f32 ? word : uint16_t(word >> (i % 2 * 16))));
    }
  }
};

constexpr int kAnyType = -1;

// Calls do_with(HeldBits<type>{}). kType promises what `type` is: to look costs a seventh of a block's
// instructions.
template <int kType, class Do>
__device__ void with_type(DType type, Do do_with) {
  if constexpr (kType != kAnyType)
    do_with(HeldBits<DType(kType)>{});
  else if (type == DType::f32)
    do_with(HeldBits<DType::f32>{});
  else if (type == DType::bf16)
    do_with(HeldBits<DType::bf16>{});
  else
    do_with(HeldBits<DType::f16>{});
}

// A token in nats: base = logit / temperature, tilt = base + delta.
struct Token {
  float base, delta;
  __device__ float tilt() const { return base + delta; }
};

struct Row {
  const TiltArgs& args;
  int64_t index;
  float temperature, top_p, min_p;
  int64_t top_k;
  bool use_heads = true;  // false once the values have turned out to forbid every token

  // Only loads: whatever depends on them is a method, so that nothing waits before the logits are under way.
  __device__ Row(const TiltArgs& a, int64_t i)
      : args(a),
        index(i),
        temperature(a.temperature[i * a.temperature_stride]),
        top_p(a.top_p[i * a.top_p_stride]),
        min_p(a.min_p[i * a.min_p_stride]),
        top_k(a.top_k[i * a.top_k_stride]) {}

  __device__ bool greedy() const { return temperature == 0; }
  // 1 for a greedy row, whose tilt is then in plain units.
  __device__ float per_temperature() const { return greedy() ? 1.0f : reciprocal_here(temperature); }
  __device__ bool has_top_k() const { return top_k > 0 && top_k < args.vocab; }
  __device__ bool filtered() const { return !greedy() && (has_top_k() || top_p < 1 || min_p > 0); }

  __device__ Philox random(uint32_t stream, uint32_t counter = 0) const {
    return philox(uint64_t(args.seed[index * args.seed_stride]),
                  uint64_t(args.position[index * args.position_stride]), stream, counter);
  }

  __device__ float weight(int64_t head) const {
    return args.weights[index * args.weights_stride_row + head * args.weights_stride_head];
  }

  // What the calling lane holds of block b in a turn, -inf beyond the row. No value revives a forbidden
  // token: its delta is 0. A head of weight 0 is skipped: 0 * inf must not poison the row. Lanes that are
  // not `active` read nothing and get -inf. kAligned promises what rows_aligned() says, kType the type of
  // both.
  template <bool kHeads, bool kAligned, int kType = kAnyType>
  __device__ void read(int b, int turn, bool active, float (&base)[kHeld], float (&delta)[kHeld]) const {
    const int64_t start = int64_t(b) * kBlock;
    const int n = active ? int(min(int64_t(kBlock), args.vocab - start)) : 0;
    const auto add_values = [&] {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) delta[i] = 0.0f;
      for (int64_t r = 0; kHeads && use_heads && r < args.heads; ++r) {
        const float w = weight(r);
        if (w == 0.0f) continue;
        const int64_t at = r * args.values_stride_head + index * args.values_stride_row + start;
        with_type<kType>(args.values_type, [&](auto values) {
          values.template load<kAligned>(args.values, at, turn, n);
          values.each([&](int i, float x) { delta[i] = fmaf(w, x, delta[i]); });
        });
      }
    };
    with_type<kType>(args.logits_type, [&](auto logits) {
      logits.template load<kAligned>(args.logits, index * args.logits_stride + start, turn, n);
      // The values' loads start before the logits' are waited for. It takes registers that the other
      // kind of rows needs for its shifts.
      if constexpr (kAligned) add_values();
      logits.each([&](int i, float x) { base[i] = x; });
    });
    if constexpr (!kAligned) add_values();
    if (n < kBlock) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i)
        if (token_of(turn, i) >= n) base[i] = -INFINITY;
    }
    if (args.mask) apply_mask<kAligned>(start, turn, n, base);
    if constexpr (kHeads) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i)
        if (base[i] == -INFINITY) delta[i] = 0.0f;
    }
    // __fmul_rn is never contracted into the addition of delta.
    const float scale = per_temperature();
#pragma unroll
    for (int i = 0; i < kHeld; ++i) base[i] = __fmul_rn(base[i], scale);
  }

  __device__ Token at(int64_t id) const {
    float x = element(args.logits, args.logits_type, index * args.logits_stride + id);
    if (args.mask && !args.mask[index * args.mask_stride + id]) x = -INFINITY;
    float delta = 0.0f;
    for (int64_t r = 0; use_heads && x != -INFINITY && r < args.heads; ++r) {
      const float w = weight(r);
      if (w == 0.0f) continue;
      const int64_t at = r * args.values_stride_head + index * args.values_stride_row + id;
      delta = fmaf(w, element(args.values, args.values_type, at), delta);
    }
    return Token{__fmul_rn(x, per_temperature()), delta};
  }

 private:
  template <bool kAligned>
  __device__ void apply_mask(int64_t start, int turn, int n, float (&base)[kHeld]) const {
    const uintptr_t from = reinterpret_cast<uintptr_t>(args.mask + index * args.mask_stride + start);
    // A granule holds two vectors' flags. The rest of it is another lane's.
    uint32_t raw[kHeld / kVector][4];
    const int odd = lane() % 2;
    read_vectors<kAligned>(
        from, from + uintptr_t(n),
        [&](int v) { return uintptr_t(token_of(turn, v * kVector) - odd * kVector); }, raw);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const uint32_t* word = raw[i / kVector] + i % kVector / 4;
      if (((odd ? word[2] : word[0]) >> (i % 4 * 8) & 0xff) == 0) base[i] = -INFINITY;
    }
  }
};

// What weights are relative to, given the largest logit; 0 where every token is forbidden, so that sums
// are 0, not NaN.
__device__ inline float shift_of(float top) { return top == -INFINITY ? 0.0f : top; }

// e^(x - shift). The difference comes first: x * log2(e) - shift * log2(e) in one fused multiply-add is the
// rounding of the shift off, which at |x| = 1e10 makes the largest weight 0 or infinite.
__device__ inline float weight_of(float x, float shift) { return fast_exp2((x - shift) * kLog2E); }

__device__ inline double log2_units(float nats) { return nats / kLn2; }

// Standard Gumbel noise from a 32-bit word. -log1p(-u), u = (word + 1/2) / 2^32, taken from the end of [0, 1]
// that fp32 resolves: unlikely tokens win at small u, where a plain log loses them (vllm#43150).
__device__ inline float gumbel_noise(uint32_t word) {
  const float e = word < 0x80000000u ? -log1pf(-(float(word) + 0.5f) * 0x1p-32f)
                                     : -logf((float(~word) + 0.5f) * 0x1p-32f);
  return -logf(e);
}

}  // namespace pyengine::cuda
