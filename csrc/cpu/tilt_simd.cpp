// The vector kernels of tilt_sample, once for each instruction set.
#include "isa.h"
#include "tilt.h"

namespace {

using pyengine::BlockSums;
using pyengine::Candidates;
using pyengine::kBlock;
using pyengine::TiltBlock;

void forbid(const bool* mask, int n, float* logits) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes)
    store(logits + i, select(bits_of(mask + i), load(logits + i), splat(-INFINITY)));
  for (; i < n; ++i)
    if (!mask[i]) logits[i] = -INFINITY;
}

// Vectors of each kind in flight. Two fill the pipes (base and tilt make four); four spill registers.
constexpr int kUnroll = 2;
constexpr int kStep = kLanes * kUnroll;
static_assert(kBlock % kStep == 0, "a whole block needs no padding");

// What a block is made of, as a type: one instance of a kernel for each.
template <class T, bool kHasDelta, bool kHasHead>
struct Kind {
  using Float = T;
  static constexpr bool kDelta = kHasDelta, kHead = kHasHead, kTilt = kHasHead;
};

template <class Kernel>
inline auto fp32_by_kind(const TiltBlock& b, Kernel kernel) {
  if (b.delta) return kernel(Kind<float, true, true>{});
  return b.head ? kernel(Kind<float, false, true>{}) : kernel(Kind<float, false, false>{});
}

template <class Kernel>
inline auto by_kind(const TiltBlock& b, Kernel kernel) {
  if (b.type == DType::bf16)
    return b.head ? kernel(Kind<Bf16, false, true>{}) : kernel(Kind<Bf16, false, false>{});
  if (b.type == DType::f16)
    return b.head ? kernel(Kind<F16, false, true>{}) : kernel(Kind<F16, false, false>{});
  return fp32_by_kind(b, kernel);
}

// delta + ratio * head of the vector at i; 0 where the token is forbidden.
template <class K>
inline Vec delta_at(K, const TiltBlock& b, int i, Vec logits) {
  using T = typename K::Float;
  Vec d = {};
  if constexpr (K::kHead) d = load(static_cast<const T*>(b.head) + i) * b.ratio;
  if constexpr (K::kDelta) d = load(static_cast<const T*>(b.head) + i) * b.ratio + load(b.delta + i);
  return logits == splat(-INFINITY) ? Vec{} : d;
}

// The tilted logits of the vector at i, rounded as the hot loop rounds them: the head joins the logit, or
// the delta, in one fused operation.
template <class K>
inline Vec tilted_at(K kind, const TiltBlock& b, int i) {
  using T = typename K::Float;
  const Vec l = load(static_cast<const T*>(b.logits) + i);
  if constexpr (!K::kTilt) return l;
  const Vec allowed = l == splat(-INFINITY) ? Vec{} : load(static_cast<const T*>(b.head) + i);
  if constexpr (K::kDelta) return l + delta_at(kind, b, i, l);
  return allowed * b.ratio + l;
}

void add_head(const TiltBlock& b, float* to) {
  fp32_by_kind(b, [&](auto kind) {
    for (int i = 0; i < b.n; i += kLanes)
      store(to + i, delta_at(kind, b, i, load(static_cast<const float*>(b.logits) + i)));
  });
}

// The hot loop: 21 vector operations for 16 tokens with AVX-512. Bare arithmetic marks what it cannot handle
// with a NaN or an infinite sum; careful_sums, where forbidden tokens drop out by selection, then sums the
// block again.
template <class K, bool kFar, bool kMaxima>
BlockSums fast_sums(const TiltBlock& b, float shift_base, float shift_tilt, float* maxima) {
  using T = typename K::Float;
  constexpr int N = kUnroll, kAll = K::kTilt ? 2 * N : N;  // base, then tilt
  static_assert(N == 2, "load_pair");
  const T *const logits = static_cast<const T*>(b.logits), *const head = static_cast<const T*>(b.head);
  Exponent exponents[kAll];
  PYENGINE_EACH {
    exponents[u] = exponent(b.scale, shift_base, kFar);
    if (K::kTilt) exponents[N + u] = exponent(b.scale, shift_tilt, kFar);
  }
  Vec s_base = {}, s_tilt = {}, e_delta = {}, best[N];
  PYENGINE_EACH best[u] = splat(-INFINITY);
  for (int i = 0; i < b.n; i += kStep) {
    Vec l[N], d[N], x[kAll], power[kAll];
    load_pair(logits + i, l);
    for (int line = 0; line < kStep * int(sizeof(T)); line += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(logits + i + kBlock) + line);
    PYENGINE_EACH x[u] = l[u];
    if constexpr (K::kTilt) {
      load_pair(head + i, d);
      for (int line = 0; line < kStep * int(sizeof(T)); line += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(head + i + kBlock) + line);
      PYENGINE_EACH {
        if (K::kDelta) d[u] = d[u] * b.ratio + load(b.delta + i + u * kLanes);
        x[N + u] = K::kDelta ? l[u] + d[u] : d[u] * b.ratio + l[u];
      }
    }
    if (kMaxima) PYENGINE_EACH best[u] = max(x[kAll - N + u], best[u]);
    exp2_scaled<kFar>(exponents, x, power);
    PYENGINE_EACH s_base += power[u] * x[u];
    if constexpr (K::kTilt) {
      PYENGINE_EACH power[N + u] *= x[N + u];
      PYENGINE_EACH s_tilt += power[N + u];
      PYENGINE_EACH e_delta += power[N + u] * d[u];
    }
  }
  if (kMaxima) store(maxima, max(best[0], best[1]));
  const float base = sum_lanes(s_base);
  if (!K::kTilt) return BlockSums{shift_base, base, shift_base, base, 0.0f};
  const float unit = K::kDelta ? b.scale : b.scale * b.ratio;
  return BlockSums{shift_base, base, shift_tilt, sum_lanes(s_tilt), sum_lanes(e_delta) * unit};
}

template <class K>
BlockSums slow_sums(K kind, const TiltBlock& b, float shift_base, float shift_tilt, float* maxima) {
  constexpr int N = kUnroll;
  const Vec zero = {};
  Vec s_base = zero, s_tilt = zero, e_delta = zero, best[N];
  PYENGINE_EACH best[u] = splat(-INFINITY);
  for (int i = 0; i < b.n; i += kStep) {
    Vec e[2 * N], d[N];
    PYENGINE_EACH {
      const int at = i + u * kLanes;
      const Vec l = load(static_cast<const float*>(b.logits) + at), tilted = tilted_at(kind, b, at);
      d[u] = delta_at(kind, b, at, l);
      best[u] = max(tilted, best[u]);
      e[u] = l * b.scale - shift_base;
      e[N + u] = tilted * b.scale - shift_tilt;
    }
    exp2_in_place<true>(e);
    PYENGINE_EACH {
      s_base += e[u];
      s_tilt += e[N + u];
      e_delta += e[N + u] > zero ? e[N + u] * d[u] : zero;  // 0 * inf would be NaN
    }
  }
  if (maxima) store(maxima, max(best[0], best[1]));
  return BlockSums{shift_base, sum_lanes(s_base), shift_tilt, sum_lanes(s_tilt),
                   sum_lanes(e_delta) * b.scale};
}

BlockSums careful_sums(const TiltBlock& b, float shift_base, float shift_tilt, float* maxima) {
  return fp32_by_kind(b, [&](auto kind) { return slow_sums(kind, b, shift_base, shift_tilt, maxima); });
}

inline float magnitude(float x) { return x < 0 ? -x : x; }

BlockSums sums(const TiltBlock& b, float shift_base, float shift_tilt, float* maxima) {
  const float base = magnitude(shift_base), tilt = magnitude(shift_tilt);
  const bool far = base > kNearShift || tilt > kNearShift;
  if (base > kFarShift || tilt > kFarShift) {
    BlockSums beyond{};
    beyond.s_base = NAN;
    return beyond;
  }
  return by_kind(b, [&](auto kind) {
    using K = decltype(kind);
    if (maxima)
      return far ? fast_sums<K, true, true>(b, shift_base, shift_tilt, maxima)
                 : fast_sums<K, false, true>(b, shift_base, shift_tilt, maxima);
    return far ? fast_sums<K, true, false>(b, shift_base, shift_tilt, maxima)
               : fast_sums<K, false, false>(b, shift_base, shift_tilt, maxima);
  });
}

float top(const TiltBlock& b) {
  return fp32_by_kind(b, [&](auto kind) {
    Vec best = splat(-INFINITY);
    for (int i = 0; i < b.n; i += kLanes) best = max(tilted_at(kind, b, i), best);
    return max_lane(best);
  });
}

void expand(const TiltBlock& b, float shift, float* weight) {
  fp32_by_kind(b, [&](auto kind) {
    constexpr int N = kUnroll;
    for (int i = 0; i < b.n; i += kStep) {
      Vec e[N];
      PYENGINE_EACH e[u] = tilted_at(kind, b, i + u * kLanes) * b.scale - shift;
      exp2_in_place<true>(e);
      PYENGINE_EACH store(weight + i + u * kLanes, e[u]);
    }
  });
}

inline Vec as_floats(const int32_t* p) { return load(reinterpret_cast<const float*>(p)); }

void collect(const TiltBlock& b, float least, int32_t first_id, Candidates& to) {
  int64_t n = to.n;
  VecInt ids;
  for (int i = 0; i < kLanes; ++i) ids[i] = first_id + i;
  by_kind(b, [&](auto kind) {
    using T = typename decltype(kind)::Float;
    for (int i = 0; i < b.n; i += kLanes) {
      const Vec key = tilted_at(kind, b, i);
      const uint32_t bits = at_least(key, splat(least));
      if (!bits) continue;
      const Vec l = load(static_cast<const T*>(b.logits) + i);
      compress(to.key + n, key, bits);
      compress(to.delta + n, delta_at(kind, b, i, l), bits);
      compress(reinterpret_cast<float*>(to.id + n), (Vec)(ids + i), bits);
      n += __builtin_popcount(bits);
    }
  });
  to.n = n;
}

void pad(Candidates& c) {
  for (int i = 0; i < kStep; ++i) {
    c.key[c.n + i] = -INFINITY;
    c.weight[c.n + i] = 0.0f;
    if (c.delta) c.delta[c.n + i] = 0.0f;
  }
}

float weigh(Candidates& c, float scale, float highest) {
  constexpr int N = kUnroll;
  for (int i = 0; i < kStep; ++i) c.key[c.n + i] = INFINITY;  // for the minimum
  Vec lowest = splat(INFINITY);
  for (int64_t i = 0; i < c.n; i += kStep) {
    Vec e[N];
    PYENGINE_EACH e[u] = load(c.key + i + u * kLanes);
    PYENGINE_EACH lowest = -max(-lowest, -e[u]);
    PYENGINE_EACH e[u] = (e[u] - highest) * scale;
    exp2_in_place<true>(e);
    PYENGINE_EACH store(c.weight + i + u * kLanes, e[u]);
  }
  pad(c);
  return -max_lane(-lowest);
}

double above(const Candidates& c, float pivot, int64_t& count) {
  double mass = 0;
  count = 0;
  for (int64_t first = 0; first < c.n; first += kBlock) {
    Vec sum = {};
    const int64_t last = first + kBlock < c.n ? first + kBlock : c.n;
    for (int64_t i = first; i < last; i += kLanes) {
      const uint32_t bits = at_least(load(c.key + i), splat(pivot));
      sum += select(bits, load(c.weight + i), Vec{});
      count += __builtin_popcount(bits);
    }
    mass += sum_lanes(sum);
  }
  return mass;
}

void between(const Candidates& from, float low, float high, Candidates& to) {
  int64_t n = 0;
  for (int64_t i = 0; i < from.n; i += kLanes) {
    const Vec key = load(from.key + i), weight = load(from.weight + i), id = as_floats(from.id + i);
    const uint32_t bits = at_least(key, splat(low)) & ~at_least(key, splat(high));
    compress(to.key + n, key, bits);
    compress(to.weight + n, weight, bits);
    compress(reinterpret_cast<float*>(to.id + n), id, bits);
    n += __builtin_popcount(bits);
  }
  to.n = n;
  pad(to);
}

void keep_through(Candidates& c, float key, int32_t id) {
  int64_t n = 0;
  const VecInt last_id = VecInt{} + id;
  for (int64_t i = 0; i < c.n; i += kLanes) {
    const Vec keys = load(c.key + i), weight = load(c.weight + i), delta = load(c.delta + i),
              ids = as_floats(c.id + i);
    const uint32_t late = bits_of((VecInt)ids > last_id) & at_least(splat(key), keys);
    const uint32_t bits = at_least(keys, splat(key)) & ~late;
    compress(c.key + n, keys, bits);
    compress(c.weight + n, weight, bits);
    compress(c.delta + n, delta, bits);
    compress(reinterpret_cast<float*>(c.id + n), ids, bits);
    n += __builtin_popcount(bits);
  }
  c.n = n;
  pad(c);
}

BlockSums candidate_sums(const Candidates& c, int64_t first) {
  Vec s = {}, e_delta = {};
  const int64_t last = first + kBlock < c.n ? first + kBlock : c.n;
  for (int64_t i = first; i < last; i += kLanes) {
    const Vec weight = load(c.weight + i);
    s += weight;
    e_delta += weight * load(c.delta + i);
  }
  return BlockSums{0.0f, 0.0f, 0.0f, sum_lanes(s), sum_lanes(e_delta)};
}

// Philox4x32-10 as in algebra.h, one counter in each 64-bit lane: the products need no reassembly, and the
// garbage that shifts and xors leave in the high halves is never read.
void gumbel_words(uint64_t seed, uint64_t position, uint32_t counter, int n, uint32_t* words) {
  constexpr int kCounters = kLanes / 2;
  const VecLong zero = {}, low = zero + 0xffffffff;
  VecLong next;
  for (int i = 0; i < kCounters; ++i) next[i] = counter + uint32_t(i);
  for (int at = 0; at < n; at += 4 * kCounters, next += kCounters) {
    VecLong c0 = zero + (position & 0xffffffff), c1 = zero + (position >> 32),
            c2 = zero + pyengine::kGumbelStream, c3 = next;
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      const VecLong p0 = multiply_low(c0, zero + 0xD2511F53u), p1 = multiply_low(c2, zero + 0xCD9E8D57u);
      c0 = high_half(p1) ^ c1 ^ (zero + k0), c1 = p1;
      c2 = high_half(p0) ^ c3 ^ (zero + k1), c3 = p0;
    }
    store_interleaved(words + at, (c0 & low) | c1 << 32, (c2 & low) | c3 << 32);
  }
}

// A token's score beats the limit iff log2(E) < tilt - limit, and log2(E) >= log2(word / 2^32), and a
// float's bits, read as a fixed-point number, are below its log2: no logarithm is taken here. The quarter
// covers the roundings of tilted logits up to 2^20.
int contenders(const TiltBlock& b, const uint32_t* words, int first, float limit, uint32_t& bits) {
  const float offset = 0.25f - limit + (127.0f + 31.0f) + magnitude(limit) * 0x1p-20f;
  return by_kind(b, [&](auto kind) {
    for (int i = first; i < b.n; i += kLanes) {
      VecInt word;
      std::memcpy(&word, words + i, sizeof word);
      const Vec uniform = __builtin_convertvector((word >> 1) & 0x7fffffff, Vec);
      const Vec log2 = __builtin_convertvector((VecInt)uniform, Vec) * 0x1p-23f;
      bits = at_least(tilted_at(kind, b, i) * b.scale + offset, log2);
      if (bits) return i;
    }
    return b.n;
  });
}

}  // namespace

namespace pyengine {
extern const TiltKernels PYENGINE_PASTE(tilt_kernels_, PYENGINE_ISA);
const TiltKernels PYENGINE_PASTE(tilt_kernels_, PYENGINE_ISA) = {PYENGINE_STRING(PYENGINE_ISA),
                                                                 kLanes,
                                                                 kStep,
                                                                 widen,
                                                                 forbid,
                                                                 add_head,
                                                                 sums,
                                                                 careful_sums,
                                                                 top,
                                                                 expand,
                                                                 collect,
                                                                 weigh,
                                                                 above,
                                                                 between,
                                                                 keep_through,
                                                                 candidate_sums,
                                                                 gumbel_words,
                                                                 contenders};
}  // namespace pyengine
