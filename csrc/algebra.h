// The arithmetic of block accumulators, their merge, the final formulas and the counter-based random
// numbers: plain scalar code that C++ and CUDA both compile.
//
// CUDA shares the accumulators, `rescale`, `kl_nats`, Philox and its uniforms. Of its own it has three things
// (csrc/cuda/tilt.cu, tilt_row.cuh): a block's shifts are in nats, each exactly a tilted or base logit; the
// threads merge all blocks of a row at once, relative to the row's highest shift; and its Gumbel noise is in
// fp32. Tests run those on a CPU (tests/cuda_shim).
//
// Elsewhere logits are in log2 units (x = logit * log2(e) / temperature): one exp2 an element, and the
// conversion back to nats happens once a row.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define PYENGINE_FN __host__ __device__ inline
#else
#define PYENGINE_FN inline
#endif

namespace pyengine {

// Sums run over fixed blocks of this many tokens whatever the batch or the thread count, so a row's
// result depends on that row alone.
constexpr int kBlock = 1024;

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, i8 = 3 };  // i8: weights of linear alone

constexpr float kLog2E = 1.44269504088896341f;
constexpr double kLn2 = 0.693147180559945309417;

// One block of one row. s_* are sums of 2^(x - m_*) over the block, e_delta = sum 2^(tilt - m_tilt) *
// (tilt - base). m_* is any shift that keeps the sums in range, not necessarily the maximum. A block
// of forbidden tokens has sums of zero and merges as the identity.
struct BlockSums {
  float m_base, s_base;
  float m_tilt, s_tilt, e_delta;
};

// The same sums over a row, in double: 125 to 150 merges a row cost nothing there.
struct RowSums {
  double m_base = -INFINITY, s_base = 0;
  double m_tilt = -INFINITY, s_tilt = 0, e_delta = 0;
};

// 2^(from - to) for rescaling a sum; zero when the sum is the identity. The shift seldom moves, so most
// merges skip the exp2 (4 a block cost 8 us a row at V = 128,256).
PYENGINE_FN double rescale(double from, double to) {
  if (from == to) return 1.0;
  return from == -INFINITY ? 0.0 : exp2(from - to);
}

// NaN in any sum survives the merge: it is how a bad row is recognised.
template <class Sums>
PYENGINE_FN void merge(RowSums& row, const Sums& block) {
  const double m_base = block.m_base > row.m_base ? block.m_base : row.m_base;
  row.s_base = row.s_base * rescale(row.m_base, m_base) + block.s_base * rescale(block.m_base, m_base);
  row.m_base = m_base;
  const double m_tilt = block.m_tilt > row.m_tilt ? block.m_tilt : row.m_tilt;
  const double keep = rescale(row.m_tilt, m_tilt), add = rescale(block.m_tilt, m_tilt);
  row.s_tilt = row.s_tilt * keep + block.s_tilt * add;
  row.e_delta = row.e_delta * keep + block.e_delta * add;
  row.m_tilt = m_tilt;
}

// KL(policy || base) in nats from log2-unit sums: E_policy[tilt - base] - LSE(tilt) + LSE(base).
PYENGINE_FN double kl_nats(double e_delta, double s_tilt, double lse2_tilt, double lse2_base) {
  return kLn2 * (e_delta / s_tilt - lse2_tilt + lse2_base);
}

// One block of one row of linear_logprob: sums of 2^(x - m), of its square, and of 2^(x - m) * (x - m).
// One exp2 gives all three, so WPO's LSE(2l) and the entropy ride along.
struct BlockMoments {
  double m;  // exactly what the x were taken relative to
  float s, s2, w;
};

// The same sums over a row, the target's x and the largest x. Laid out as linear_logprob's state, a row
// of kStateSize doubles.
struct RowMoments {
  double m, s, s2, w, target, max;
};
constexpr int kStateSize = 6;

PYENGINE_FN void merge(RowMoments& row, const BlockMoments& block) {
  const double m = block.m > row.m ? block.m : row.m;
  const double keep = rescale(row.m, m), add = rescale(block.m, m);
  // w moves with its reference: sum e (x - m') = sum e (x - m) + (m - m') sum e. An identity has no m.
  if (keep != 1) row.w = keep == 0 ? 0 : (row.w + (row.m - m) * row.s) * keep;
  row.w += add == 1 ? block.w : add == 0 ? 0 : (block.w + (block.m - m) * block.s) * add;
  row.s = row.s * keep + block.s * add;
  row.s2 = row.s2 * keep * keep + block.s2 * add * add;
  row.m = m;
}

// One stream for each use of a (seed, position), so that no two draws share their bits.
constexpr uint32_t kTokenStream = 0, kSelectStream = 1, kGumbelStream = 2;

// Philox4x32-10 (Salmon et al., 2011): a pure function of (seed, position, stream, counter), so a draw
// does not depend on the batch, the slot or the number of threads.
struct Philox {
  uint32_t x[4];
};

PYENGINE_FN Philox philox(uint64_t seed, uint64_t position, uint32_t stream, uint32_t counter = 0) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  Philox c{{uint32_t(position), uint32_t(position >> 32), stream, counter}};
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c.x[0], p1 = uint64_t(0xCD9E8D57u) * c.x[2];
    c = Philox{
        {uint32_t(p1 >> 32) ^ c.x[1] ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ c.x[3] ^ k1, uint32_t(p0)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// A uniform in [0, 1) with 53 bits: fp32's 24 bits lose tail tokens (vllm#43150: 0 of 33 expected
// hits at 2^-24).
PYENGINE_FN double uniform53(uint32_t high, uint32_t low) {
  return double(((uint64_t(high) << 32) | low) >> 11) * 0x1p-53;
}

// Gumbel noise of a token is -log(E), E = exponential(word token % 4 of Philox counter token / 4).
// log1p keeps E's relative precision where it is small: that is where unlikely tokens win, and 32 bits
// reach 2^-33.
PYENGINE_FN double exponential(uint32_t word) { return -log1p(-(double(word) + 0.5) * 0x1p-32); }

}  // namespace pyengine
