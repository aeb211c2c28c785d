// What the steps of tilt_sample share: a row read block by block, its sums, and the scratch of a thread.
#pragma once

#include <memory>
#include <vector>

#include "tilt.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace pyengine {

// Tilted logits in the logits' own unit (temperature times nats): logit + sum_r (temperature * lambda_r) *
// value_r. With the temperature and the weights at 1 their ties are exact.
struct Row {
  const TiltArgs& args;
  const TiltKernels& kernels;
  int64_t index;
  bool greedy, use_heads = true;
  TiltBlock block{};
  int n = 0;  // tokens in the block, before padding
  std::vector<float> ratios;
  alignas(64) float logit_store[kBlock];
  alignas(64) float head_store[kBlock];
  alignas(64) float delta_store[kBlock];

  Row(const TiltArgs& a, const TiltKernels& k, int64_t i);

  // The scorer forbids every token: the base policy decides.
  void drop_heads();
  int64_t blocks() const { return (args.vocab + kBlock - 1) / kBlock; }
  // Blocks of one type, with one head at most and no mask, are read in place. Others, and the ragged last
  // one, go through fp32 scratch; so does everything where the caller asks for fp32.
  void read(int64_t b, bool fp32);
  // Base and tilted logit of an allowed token, in log2 units, rounded as the sums round them, so that the
  // log-probability of a certain token is 0.
  Winner at(int64_t id) const;
  // The tilted and the base logit as the definition has them, in log2 units.
  double exact_tilt(int64_t id) const;
  double exact_base(int64_t id) const;
  // Gumbel noise of a token, in log2 units.
  double noise(int64_t id) const;
  // The maximum of the tilted logits over block b, or of the base logits.
  float top(int64_t b, bool tilted);

 private:
  float one(const void* data, DType type, int64_t at) const;
  const float* floats(const void* data, DType type, int64_t at, bool copy, float pad, float* scratch) const;
};

// Survives the calls of a thread: 4 MB of fresh pages a row would cost more than the row.
struct Scratch {
  std::vector<BlockSums> sums;       // by block
  std::vector<float> maxima, order;  // by block and lane
  std::vector<double> mass;          // by kBlock candidates
  std::vector<uint32_t> words;
  Candidates candidates{}, narrowed{};
  alignas(64) float weight[kBlock];

  // Room for every token of a row in `candidates` and `narrowed`.
  void reserve(int64_t tokens);

 private:
  std::unique_ptr<float[]> floats;
  std::unique_ptr<int32_t[]> ids;
  int64_t room = 0;
};

// This thread's.
Scratch& scratch();

// While it lives, results too small for a normal float are 0. Logits 90 nats apart otherwise meet the hot
// loop as denormals, whose microcode costs 6 times the row (243 instead of 40 us at temperature 0.2).
class FlushToZero {
 public:
#if defined(__x86_64__)
  FlushToZero() : before(_mm_getcsr()) { _mm_setcsr(before | _MM_FLUSH_ZERO_ON); }
  ~FlushToZero() { _mm_setcsr(before); }

 private:
  unsigned before;
#endif
};

// `threads`, or 1 where the batch is too small for them.
int worthwhile(const TiltArgs& args, int threads);

// Largest shift, in log2 units, up to which fp32 sums a row.
constexpr float kExact = 65536.0f;

// Log2 units of a logit of 1 up to which fp32 sums a row: beyond, a millionth of a nat times the temperature
// is no normal float, and a head's product would be flushed to 0.
constexpr float kSteepest = 0x1p100f;

// Adds the row to `total`, filling s.sums and, if asked, s.maxima. False, with `total` of no use, where
// logits lie beyond kExact or the row is steeper than kSteepest.
bool accumulate(Row& row, Scratch& s, RowSums& total, bool maxima);

// How `sample_exactly` draws: through filters (0 and 1 where there are none), by Gumbel noise or these
// uniforms.
struct ExactDraw {
  bool filtered;
  int64_t top_k;
  double top_p, min_p;
  bool gumbel;
  int64_t first_id;  // of the row's tokens, which may be a tile of the vocabulary
  Philox random;
};

// The sums of a row beyond fp32 and, if it beats `winner`, what is drawn from it. As after `accumulate` and
// `filter`: s_tilt is 0 where the scorer forbids every token, s_base too where the logits do, NaN in a bad
// row. But e_delta is that of tilt - m_tilt - (base - m_base): in the difference of two huge numbers a KL
// would be lost.
RowSums sample_exactly(Row& row, const ExactDraw& draw, Winner& winner);

bool usable(const RowSums& sums);

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

// Leaves the tokens that top-k, then top-p, then min-p keep in s.candidates, in id order, and their mass by
// kBlock in s.mass. Turns the tilted sums of `total` into theirs. s.maxima must be the row's.
void filter(Row& row, Scratch& s, RowSums& total, int64_t top_k, float top_p, float min_p);

// The argmax of the row, or of its candidates (weighed relative to `shift`, log2 units), after Gumbel noise
// (none in a greedy row), if it beats `winner`. s.maxima must be the row's. Ids count from first_id.
void contend(Row& row, Scratch& s, int64_t first_id, Winner& winner);
void contend_candidates(const Row& row, Scratch& s, double shift, Winner& winner);

// The outputs of a row from its sums, or from those of the tokens that a filter kept: relative to m_tilt.
void finish_row(const TiltArgs& args, int64_t i, const RowSums& sums, const Winner& winner);

}  // namespace pyengine
