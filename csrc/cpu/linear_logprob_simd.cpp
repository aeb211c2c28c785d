// The vector kernels of linear_logprob, once for each instruction set.
#include "isa.h"
#include "linear_logprob.h"

namespace {

using pyengine::BlockMoments;

// Vectors in flight: two fill the pipes; four spill registers.
constexpr int kUnroll = 2;
constexpr int kStep = kLanes * kUnroll;
static_assert(pyengine::kBlock % kStep == 0, "a whole block needs no padding");

// Writes whole vectors: `to` has room for n rounded up to a loop step.
void prepare(const void* from, DType type, const float* bias, float softcap, int n, float* to) {
  widen(from, type, n, to);
  if (bias)
    for (int i = 0; i < n; ++i) to[i] += bias[i];
  if (softcap == 0) return;
  for (int i = n; i % kLanes; ++i) to[i] = 0;
  for (int i = 0; i < n; i += kLanes) store(to + i, tanh(load(to + i) * (1 / softcap)) * softcap);
}

float maximum(const float* x, int n) {
  constexpr int N = kUnroll;
  Vec best[N];
  PYENGINE_EACH best[u] = splat(-INFINITY);
  for (int i = 0; i < n; i += kStep) PYENGINE_EACH best[u] = max(load(x + i + u * kLanes), best[u]);
  for (int half = N / 2; half > 0; half /= 2)
    for (int u = 0; u < half; ++u) best[u] = max(best[u], best[u + half]);
  return max_lane(best[0]);
}

// Relative to `shift`, in log2 units; when careful to top * scale, and then -inf drops out by selection.
template <bool kCareful>
BlockMoments moments(const float* x, int n, float scale, float shift, float& top) {
  constexpr int N = kUnroll;
  const Vec zero = {};
  Vec s[N] = {}, s2[N] = {}, w[N] = {}, best[N];
  PYENGINE_EACH best[u] = splat(-INFINITY);
  for (int i = 0; i < n; i += kStep) {
    Vec d[N], e[N];
    PYENGINE_EACH {
      const Vec z = load(x + i + u * kLanes);
      if (!kCareful) best[u] = max(z, best[u]);
      d[u] = kCareful ? (z - top) * scale : z * scale - shift;
      e[u] = d[u];
    }
    exp2_in_place<kCareful>(e);
    PYENGINE_EACH {
      s[u] += e[u];
      s2[u] += e[u] * e[u];
      if (kCareful)
        w[u] += d[u] > splat(-INFINITY) ? e[u] * d[u] : (d[u] == d[u] ? zero : d[u]);
      else
        w[u] += e[u] * d[u];
    }
  }
  for (int half = N / 2; half > 0; half /= 2)
    for (int u = 0; u < half; ++u) {
      s[u] += s[u + half], s2[u] += s2[u + half], w[u] += w[u + half];
      best[u] = max(best[u], best[u + half]);
    }
  const double m = kCareful ? double(top) * scale : shift;
  if (!kCareful) top = max_lane(best[0]);
  return BlockMoments{m, sum_lanes(s[0]), sum_lanes(s2[0]), sum_lanes(w[0])};
}

BlockMoments fast_moments(const float* x, int n, float scale, float shift, float& top) {
  return moments<false>(x, n, scale, shift, top);
}

BlockMoments careful_moments(const float* x, int n, float scale, float top) {
  return moments<true>(x, n, scale, 0.0f, top);
}

template <bool kEntropy, bool kSoftcap>
void gradient(const float* x, int n, float scale, float lse_log2, float by_logp, float by_entropy,
              float entropy, float softcap, float* to) {
  constexpr int N = kUnroll;
  const float inverse = kSoftcap ? 1 / softcap : 0.0f;
  for (int i = 0; i < n; i += kStep) {
    Vec z[N], d[N], e[N];
    PYENGINE_EACH {
      z[u] = load(x + i + u * kLanes);
      e[u] = d[u] = clamp_above(z[u] * scale - lse_log2, 0.0f);  // at 1e30 rounding could exceed it by far
    }
    exp2_in_place<true>(e);
    PYENGINE_EACH {
      Vec g = splat(by_logp);
      if (kEntropy) {
        // p (ln p + H) is 0 at p = 0, where ln p is -inf.
        const Vec log_p = e[u] == Vec{} ? Vec{} : d[u] * float(pyengine::kLn2);
        g += (log_p + entropy) * by_entropy;
      }
      g *= e[u];
      if (kSoftcap) g *= 1 - (z[u] * inverse) * (z[u] * inverse);
      store(to + i + u * kLanes, g);
    }
  }
}

void any_gradient(const float* x, int n, float scale, float lse_log2, float by_logp, float by_entropy,
                  float entropy, float softcap, float* to) {
  const auto kernel = by_entropy != 0 ? (softcap != 0 ? gradient<true, true> : gradient<true, false>)
                                      : (softcap != 0 ? gradient<false, true> : gradient<false, false>);
  kernel(x, n, scale, lse_log2, by_logp, by_entropy, entropy, softcap, to);
}

}  // namespace

namespace pyengine {
extern const LogprobKernels PYENGINE_PASTE(logprob_kernels_, PYENGINE_ISA);
const LogprobKernels PYENGINE_PASTE(logprob_kernels_, PYENGINE_ISA) = {
    PYENGINE_STRING(PYENGINE_ISA), kStep, prepare, maximum, fast_moments, careful_moments, any_gradient};
}  // namespace pyengine
