// The CPU backend of tilt_sample and the table of vector kernels that it drives.
#pragma once

#include <cstdint>

#include "../tilt_args.h"

namespace pyengine {

// One block of one row as the vector kernels see it: at most kBlock tokens, n of them after padding to
// whole loop steps with logits of -inf. The tilted logit is logit + (delta + ratio * head), in the logits'
// own unit; times `scale` it is in log2 units. delta and head may be null, delta only with a head. Pointers
// are borrowed.
struct TiltBlock {
  DType type;  // of logits and head; f32 where there is a delta
  const void* logits;
  const void* head;
  const float* delta;
  float ratio, scale;
  int n;
};

// Tokens that a filter has let through so far, in id order. Behind the last come whole vectors of key -inf
// and weight 0. The arrays have room for every token of a row and kPadding more.
struct Candidates {
  float* key;     // the tilted logit
  float* delta;   // key - logit; null in the copies that a filter narrows down
  float* weight;  // 2^(scale * (key - highest))
  int32_t* id;
  int64_t n;
};

constexpr int64_t kPadding = 64;

struct TiltKernels {
  const char* name;
  int lanes, step;  // floats in a vector, and in a loop step
  // fp32 copy of n elements.
  void (*widen)(const void* from, DType type, int n, float* to);
  // Logits of -inf where the mask is false.
  void (*forbid)(const bool* mask, int n, float* logits);
  // to = delta + ratio * head, 0 where the token is forbidden, so that no value can revive it.
  void (*add_head)(const TiltBlock& block, float* to);
  // Sums relative to the given shifts, whole numbers that need not be maxima: fp32 keeps its relative
  // precision over 2^+-126. A sum that is not finite says that the shift was too low, or that a logit or
  // value is not finite; `careful_sums` (fp32 blocks only) with the block's own maxima then settles what
  // the row is. `maxima`, unless null: each lane's largest tilted logit, `lanes` interleaved groups.
  BlockSums (*sums)(const TiltBlock& block, float shift_base, float shift_tilt, float* maxima);
  BlockSums (*careful_sums)(const TiltBlock& block, float shift_base, float shift_tilt, float* maxima);
  // The largest tilted logit of an fp32 block. Drops NaN.
  float (*top)(const TiltBlock& block);
  // 2^(scale * tilted logit - shift) of an fp32 block.
  void (*expand)(const TiltBlock& block, float shift, float* weight);
  // Appends the block's tokens whose tilted logit reaches `least` (> -inf), unweighted and without padding.
  void (*collect)(const TiltBlock& block, float least, int32_t first_id, Candidates& to);
  // Pads the candidates and weighs them relative to `highest`; returns the lowest key.
  float (*weigh)(Candidates& c, float scale, float highest);
  // Weight and number of the candidates whose key reaches `pivot`.
  double (*above)(const Candidates& c, float pivot, int64_t& count);
  // Copies key, weight and id of those with low <= key < high to `to`, which may be `from`.
  void (*between)(const Candidates& from, float low, float high, Candidates& to);
  // Keeps the candidates before or at (key, id) in the order (key descending, id ascending).
  void (*keep_through)(Candidates& c, float key, int32_t id);
  // The mass and sum of weight * delta of up to kBlock candidates from `first` on.
  BlockSums (*candidate_sums)(const Candidates& c, int64_t first);
  // Words of the Gumbel stream for tokens 4 * counter .. 4 * counter + n; may write kPadding more.
  void (*gumbel_words)(uint64_t seed, uint64_t position, uint32_t counter, int n, uint32_t* words);
  // The first vector from token `first` on that holds a token which may beat `limit` (log2 units), with a
  // bit for each that may; block.n where there is none. Errs towards more tokens by log2(1.06).
  int (*contenders)(const TiltBlock& block, const uint32_t* words, int first, float limit, uint32_t& bits);
};

extern const TiltKernels tilt_kernels_portable;
#if defined(__x86_64__)
extern const TiltKernels tilt_kernels_avx2;
extern const TiltKernels tilt_kernels_avx512;
#endif

// The kernels of the best instruction set of this machine, or of the one forced by name ("portable",
// "avx2", "avx512"); nullptr when the machine lacks it or the name is unknown.
const TiltKernels* tilt_kernels(const char* forced);

// Rows are spread over `threads` threads; results do not depend on how many.
void tilt_sample(const TiltArgs& args, int threads, const TiltKernels& kernels);

// Gumbel-max over a row that arrives in tiles of the vocabulary, in any order: what is known of it so far.
// All doubles, so that callers may keep it in a tensor [batch, kTiltState].
struct Winner {
  double score = -INFINITY, id = 0;  // score: tilted logit plus noise, log2 units
  double base = 0, tilt = 0;         // log2 units, without the normalisers
};

struct TiltState {
  RowSums sums;
  Winner winner;
  Winner base;  // under the base policy; kept only while the scorer forbids every token
};

constexpr int64_t kTiltState = sizeof(TiltState) / sizeof(double);

// Folds a tile (args.vocab tokens from id `first_id` on) into the states [batch]. Uses no filters and none
// of the outputs. tilt_finish then fills the outputs from the states.
void tilt_fold(const TiltArgs& args, TiltState* states, int64_t first_id, int threads,
               const TiltKernels& kernels);
void tilt_finish(const TiltArgs& args, const TiltState* states);

}  // namespace pyengine
