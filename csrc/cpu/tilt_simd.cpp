// The vector kernels of tilt_sample. Compiled once for each instruction set (PYENGINE_ISA names it);
// nothing here may instantiate a std:: template, or the linker could keep the AVX-512 copy of it for
// everybody.
#include "tilt.h"
#include "vec.h"

#define PYENGINE_PASTE_(a, b) a##b
#define PYENGINE_PASTE(a, b) PYENGINE_PASTE_(a, b)
#define PYENGINE_STRING_(a) #a
#define PYENGINE_STRING(a) PYENGINE_STRING_(a)

namespace {

using pyengine::BlockSums;
using pyengine::DType;
using pyengine::TiltBlock;

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float widen_one(uint16_t h, DType type) {
  if (type == DType::bf16) return from_bits(uint32_t(h) << 16);
  const uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
  if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);  // inf, NaN
  if (magnitude >= 0x0400) return from_bits(sign | ((magnitude << 13) + (112u << 23)));
  const float subnormal = float(magnitude) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
}

void widen(const void* from, DType type, int n, float* to) {
  if (type == DType::f32) {
    std::memcpy(to, from, size_t(n) * sizeof(float));
    return;
  }
  const uint16_t* h = static_cast<const uint16_t*>(from);
  int i = 0;
  if (type == DType::bf16) {
    for (; i < n; ++i) to[i] = from_bits(uint32_t(h[i]) << 16);
  }
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(h + i))));
#endif
  for (; i < n; ++i) to[i] = widen_one(h[i], type);
}

// Vectors of each kind in flight. Two fill the pipes (base and tilt make four); four spill registers.
constexpr int kUnroll = 2;
constexpr int kStep = kLanes * kUnroll;
static_assert(pyengine::kBlock % kStep == 0, "a whole block needs no padding");

template <bool kDelta, bool kHead>
inline Vec tilt_of(const TiltBlock& b, int i, Vec logits) {
  Vec d = {};
  if (kDelta) d = load(b.delta + i);
  if (kHead) d += load(b.head + i) * b.weight;
  return logits == splat(-INFINITY) ? Vec{} : d;
}

template <bool kDelta, bool kHead>
void add_head(const TiltBlock& b, float* to) {
  for (int i = 0; i < b.n; i += kLanes) store(to + i, tilt_of<kDelta, kHead>(b, i, load(b.logits + i)));
}

// The hot loop. Everything is relative to the shifts at once: tilt = base + (delta + head), one add.
// Bare arithmetic marks what it cannot handle with a NaN or an infinite sum; the block is then summed
// again with kCareful, where forbidden tokens drop out by selection instead of by arithmetic.
template <bool kDelta, bool kHead, bool kCareful>
BlockSums sums(const TiltBlock& b, float shift_base, float shift_tilt) {
  constexpr int N = kUnroll;
  constexpr bool kTilt = kDelta || kHead;
  const float* const logits = b.logits;
  const Vec zero = {}, offset = splat(shift_base - shift_tilt);
  Vec s_base = zero, s_tilt = zero, e_delta = zero;
  for (int i = 0; i < b.n; i += kStep) {
    Vec e[kTilt ? 2 * N : N];  // base, then tilt
    Vec d[N];
    PYENGINE_EACH {
      const int at = i + u * kLanes;
      const Vec l = load(logits + at);
      __builtin_prefetch(logits + at + pyengine::kBlock);
      e[u] = l * b.scale - shift_base;
      if (kTilt) {
        if (kHead) __builtin_prefetch(b.head + at + pyengine::kBlock);
        d[u] = offset;
        if (kDelta) d[u] += load(b.delta + at);
        if (kHead) d[u] = load(b.head + at) * b.weight + d[u];
        if (kCareful) d[u] = l == splat(-INFINITY) ? zero : d[u];
        e[N + u] = e[u] + d[u];
      }
    }
    exp2_in_place<kCareful>(e);
    PYENGINE_EACH {
      s_base += e[u];
      if (kTilt) {
        s_tilt += e[N + u];
        if (kCareful)
          e_delta += e[N + u] > zero ? e[N + u] * d[u] : zero;  // 0 * inf would be NaN
        else
          e_delta += e[N + u] * d[u];
      }
    }
  }
  const float base = sum_lanes(s_base);
  if (!kTilt) return BlockSums{shift_base, base, shift_base, base, 0.0f};
  const float tilt = sum_lanes(s_tilt);
  return BlockSums{shift_base, base, shift_tilt, tilt, sum_lanes(e_delta) - (shift_base - shift_tilt) * tilt};
}

template <bool kDelta, bool kHead>
void lane_maxima(const TiltBlock& b, float* maxima) {
  constexpr int N = kUnroll;
  Vec best[N];
  PYENGINE_EACH best[u] = splat(-INFINITY);
  for (int i = 0; i < b.n; i += kStep) {
    PYENGINE_EACH {
      const Vec l = load(b.logits + i + u * kLanes);
      best[u] = max(l * b.scale + tilt_of<kDelta, kHead>(b, i + u * kLanes, l), best[u]);
    }
  }
  PYENGINE_EACH best[0] = max(best[0], best[u]);
  store(maxima, best[0]);
}

template <bool kDelta, bool kHead>
void expand(const TiltBlock& b, float shift, float* tilt, float* weight) {
  constexpr int N = kUnroll;
  for (int i = 0; i < b.n; i += kStep) {
    Vec e[N];
    PYENGINE_EACH {
      const Vec l = load(b.logits + i + u * kLanes);
      const Vec t = l * b.scale + tilt_of<kDelta, kHead>(b, i + u * kLanes, l);
      store(tilt + i + u * kLanes, t);
      e[u] = t - shift;
    }
    exp2_in_place<true>(e);
    PYENGINE_EACH store(weight + i + u * kLanes, e[u]);
  }
}

template <bool kDelta, bool kHead>
BlockSums fast_sums(const TiltBlock& b, float shift_base, float shift_tilt) {
  return sums<kDelta, kHead, false>(b, shift_base, shift_tilt);
}

template <bool kDelta, bool kHead>
BlockSums careful_sums(const TiltBlock& b, float shift_base, float shift_tilt) {
  return sums<kDelta, kHead, true>(b, shift_base, shift_tilt);
}

// The same kernel for each of the four kinds of block.
#define PYENGINE_BY_KIND(kernel, ...)                                                      \
  (b.delta ? (b.head ? kernel<true, true>(__VA_ARGS__) : kernel<true, false>(__VA_ARGS__)) \
           : (b.head ? kernel<false, true>(__VA_ARGS__) : kernel<false, false>(__VA_ARGS__)))

void any_add_head(const TiltBlock& b, float* to) { PYENGINE_BY_KIND(add_head, b, to); }

BlockSums any_fast_sums(const TiltBlock& b, float shift_base, float shift_tilt) {
  return PYENGINE_BY_KIND(fast_sums, b, shift_base, shift_tilt);
}

BlockSums any_careful_sums(const TiltBlock& b, float shift_base, float shift_tilt) {
  return PYENGINE_BY_KIND(careful_sums, b, shift_base, shift_tilt);
}

void any_lane_maxima(const TiltBlock& b, float* maxima) { PYENGINE_BY_KIND(lane_maxima, b, maxima); }

void any_expand(const TiltBlock& b, float shift, float* tilt, float* weight) {
  PYENGINE_BY_KIND(expand, b, shift, tilt, weight);
}

}  // namespace

namespace pyengine {
extern const TiltKernels PYENGINE_PASTE(tilt_kernels_, PYENGINE_ISA);
const TiltKernels PYENGINE_PASTE(tilt_kernels_, PYENGINE_ISA) = {PYENGINE_STRING(PYENGINE_ISA),
                                                                 kLanes,
                                                                 kStep,
                                                                 widen,
                                                                 any_add_head,
                                                                 any_fast_sums,
                                                                 any_careful_sums,
                                                                 any_lane_maxima,
                                                                 any_expand};
}  // namespace pyengine
