// One SIMD float vector for all instruction sets, on the compilers' vector extensions. The width
// follows the flags the including file is compiled with: 16 lanes for AVX-512, 8 for AVX2, 4 on the
// portable path (one SSE2 or NEON register; GCC turns wider comparisons into scalar code there).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {  // every instruction set gets its own copy: no cross-ISA symbol may be merged by the linker

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t VecInt __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef uint64_t VecLong __attribute__((vector_size(kLanes * sizeof(int32_t))));

inline Vec splat(float x) { return x - Vec{}; }

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float widen_one(Bf16 h) { return from_bits(uint32_t(h.bits) << 16); }

inline float widen_one(F16 h) {
  const uint32_t sign = uint32_t(h.bits & 0x8000) << 16, magnitude = h.bits & 0x7fff;
  if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);  // inf, NaN
  if (magnitude >= 0x0400) return from_bits(sign | ((magnitude << 13) + (112u << 23)));
  const float subnormal = float(magnitude) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
}

inline Vec load(const Bf16* p) {
#if defined(__AVX512F__)
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
#elif defined(__AVX2__)
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16);
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = widen_one(p[i]);
  return v;
#endif
}

inline Vec load(const F16* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = widen_one(p[i]);
  return v;
#endif
}

inline float widen_one(int8_t x) { return x; }

inline Vec load(const int8_t* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = p[i];
  return v;
#endif
}

// One bit a lane where the byte is true.
inline uint32_t bits_of(const bool* p) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm_test_epi8_mask(bytes, bytes);
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return 0xff & ~uint32_t(_mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_setzero_si128())));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= uint32_t(p[i]) << i;
  return bits;
#endif
}

// 2 * kLanes elements in an order of its own, the same for every address: enough for sums. bf16 comes as
// the even and the odd ones, one operation a vector instead of two.
template <class T>
inline void load_pair(const T* p, Vec (&to)[2]) {
  to[0] = load(p), to[1] = load(p + kLanes);
}

inline void load_pair(const Bf16* p, Vec (&to)[2]) {
  VecInt both;
  std::memcpy(&both, p, sizeof both);
  to[0] = (Vec)(both << 16), to[1] = (Vec)(both & int32_t(0xffff0000));
}

// One bit a lane where a >= b; 0 where either is NaN.
inline uint32_t at_least(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ);
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GE_OQ)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= uint32_t(a[i] >= b[i]) << i;
  return bits;
#endif
}

// One bit a lane of what a comparison gave.
inline uint32_t bits_of(VecInt truth) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)truth);
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps((__m256)truth));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= uint32_t(truth[i] & 1) << i;
  return bits;
#endif
}

// x where its bit is set, `otherwise` elsewhere.
inline Vec select(uint32_t bits, Vec x, Vec otherwise) {
#if defined(__AVX512F__)
  return (Vec)_mm512_mask_mov_ps((__m512)otherwise, __mmask16(bits), (__m512)x);
#else
  VecInt chosen;
  for (int i = 0; i < kLanes; ++i) chosen[i] = 1 << i;
  return (chosen & int32_t(bits)) != 0 ? x : otherwise;
#endif
}

// The lanes whose bit is set, side by side; writes a whole vector.
inline void compress(float* to, Vec x, uint32_t bits) {
#if defined(__AVX512F__)
  store(to, (Vec)_mm512_maskz_compress_ps(__mmask16(bits), (__m512)x));
#else
  for (int i = 0; i < kLanes; ++i) *to = x[i], to += bits >> i & 1;
#endif
}

// The second operand where either is NaN, as vmaxps does: a clamp written clamp_below(x, low) lets
// NaN through and so keeps a bad row visible.
inline Vec clamp_below(Vec x, float low) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)splat(low), (__m512)x);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)splat(low), (__m256)x);
#else
  return splat(low) > x ? splat(low) : x;
#endif
}

inline Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

inline Vec clamp_above(Vec x, float high) {
#if defined(__AVX512F__)
  return (Vec)_mm512_min_ps((__m512)splat(high), (__m512)x);
#elif defined(__AVX2__)
  return (Vec)_mm256_min_ps((__m256)splat(high), (__m256)x);
#else
  return splat(high) < x ? splat(high) : x;
#endif
}

// Tree reductions: a chain of scalar adds would cost 13 us a row at V = 128,256.
inline float max_lane(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float a[kLanes];
  store(a, v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a[i] = a[i] > a[i + half] ? a[i] : a[i + half];
  return a[0];
#endif
}

inline float sum_lanes(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float a[kLanes];
  store(a, v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a[i] += a[i + half];
  return a[0];
#endif
}

#define PYENGINE_EACH _Pragma("GCC unroll 8") for (int u = 0; u < N; ++u)

// x[u] = 2^x[u], relative error below 2e-7; exactly 0 from 2^-150 (AVX-512) or 2^-126.5 (elsewhere)
// down; inf from 2^128 up (NaN for +inf itself); NaN for NaN. -inf gives 0, but without kClamp it may give
// NaN instead (AVX-512: two of its 26 operations an element are saved). Written stage by stage over N
// vectors: a chain for each vector fills the scheduler with waiting instructions (25 against 16 us for
// 128,000 floats).
#if defined(__AVX512F__)
alignas(64) constexpr float kTwoTo32nds[32] = {
    // 2^(i/32)
    1.0f,        1.02189715f, 1.04427378f, 1.06714040f, 1.09050773f, 1.11438674f, 1.13878863f, 1.16372486f,
    1.18920712f, 1.21524736f, 1.24185781f, 1.26905096f, 1.29683955f, 1.32523664f, 1.35425555f, 1.38390988f,
    1.41421356f, 1.44518081f, 1.47682615f, 1.50916443f, 1.54221083f, 1.57598085f, 1.61049033f, 1.64575548f,
    1.68179283f, 1.71861930f, 1.75625216f, 1.79470907f, 1.83400809f, 1.87416763f, 1.91520656f, 1.95714412f};

// x = n + i/32 + f with |f| <= 1/64: the table gives 2^(i/32), a quadratic 2^f, and scalef floors n.
template <bool kClamp, int N>
inline void exp2_in_place(Vec (&x)[N]) {
  const float kRound = 393216.0f;  // 1.5 * 2^18: the sum's low five mantissa bits are i
  const __m512 low = _mm512_load_ps(kTwoTo32nds), high = _mm512_load_ps(kTwoTo32nds + 16);
  Vec n[N], p[N];
  if (kClamp) PYENGINE_EACH x[u] = clamp_below(x[u], -200.0f);
  PYENGINE_EACH n[u] = x[u] + kRound;
  PYENGINE_EACH p[u] = (Vec)_mm512_permutex2var_ps(low, (__m512i)n[u], high);
  PYENGINE_EACH n[u] = n[u] - kRound;
  PYENGINE_EACH x[u] = x[u] - n[u];
  PYENGINE_EACH x[u] = (x[u] * 0.24022651f + 0.69315734f) * x[u];
  PYENGINE_EACH p[u] = x[u] * p[u] + p[u];
  PYENGINE_EACH x[u] = (Vec)_mm512_scalef_ps((__m512)p[u], (__m512)n[u]);
}
#else
// Range reduction to [-1/2, 1/2], a degree-5 minimax polynomial, the exponent by integer shift.
template <bool kClamp, int N>
inline void exp2_in_place(Vec (&x)[N]) {
  const float kRound = 12582912.0f;  // 1.5 * 2^23: the sum's low mantissa bits are the integer part
  Vec n[N], p[N];
  (void)kClamp;  // the integer shift needs the range
  PYENGINE_EACH x[u] = clamp_above(clamp_below(x[u], -127.0f), 128.0f);
  PYENGINE_EACH n[u] = x[u] + kRound;
  PYENGINE_EACH x[u] = x[u] - (n[u] - kRound);
  PYENGINE_EACH p[u] = x[u] * 1.3276472632e-3f + 9.67554134312e-3f;
  PYENGINE_EACH p[u] = p[u] * x[u] + 5.55071327186e-2f;
  PYENGINE_EACH p[u] = p[u] * x[u] + 2.40221197237e-1f;
  PYENGINE_EACH p[u] = p[u] * x[u] + 6.93146967065e-1f;
  PYENGINE_EACH p[u] = p[u] * x[u] + 1.00000007165f;
  PYENGINE_EACH x[u] = p[u] * (Vec)(((VecInt)n[u] + 127) << 23);
}
#endif

// 2^(x * scale - shift) as power * rest, so that the product joins the addition that follows it. `shift` is a
// whole number. Written for the unclamped hot loop: what cannot be represented comes out as NaN, an infinity
// or, far below the shift, 0.
struct Exponent {
  float scale, shift;
#if defined(__AVX512F__)
  __m512 low, high;  // kTwoTo32nds, times 2^-shift unless kFar
#endif
};

// The table can hold the shift while |shift| <= kNearShift; it saves an operation an element (kFar = false).
// Beyond kFarShift the rounding constant of AVX-512 no longer holds x * scale.
constexpr float kNearShift = 100.0f, kFarShift = 65536.0f;

inline Exponent exponent(float scale, float shift, bool far) {
  Exponent e;
  e.scale = scale, e.shift = shift;
  (void)far;
#if defined(__AVX512F__)
  const __m512 down = (__m512)splat(far ? 0.0f : -shift);
  e.low = _mm512_scalef_ps(_mm512_load_ps(kTwoTo32nds), down);
  e.high = _mm512_scalef_ps(_mm512_load_ps(kTwoTo32nds + 16), down);
#endif
  return e;
}

#if defined(__AVX512F__)
template <bool kFar, int N>
inline void exp2_scaled(const Exponent (&e)[N], Vec (&x)[N], Vec (&power)[N]) {
  const float kRound = 393216.0f;
  Vec n[N];
  PYENGINE_EACH n[u] = x[u] * e[u].scale + kRound;
  PYENGINE_EACH power[u] = (Vec)_mm512_permutex2var_ps(e[u].low, (__m512i)n[u], e[u].high);
  PYENGINE_EACH n[u] = n[u] - kRound;
  PYENGINE_EACH x[u] = x[u] * e[u].scale - n[u];
  if (kFar) PYENGINE_EACH n[u] = n[u] - e[u].shift;
  PYENGINE_EACH power[u] = (Vec)_mm512_scalef_ps((__m512)power[u], (__m512)n[u]);
  PYENGINE_EACH n[u] = x[u] * 0.24022651f + 0.69315734f;
  PYENGINE_EACH x[u] = n[u] * x[u] + 1.0f;
}
#else
template <bool kFar, int N>
inline void exp2_scaled(const Exponent (&e)[N], Vec (&x)[N], Vec (&power)[N]) {
  const float kRound = 12582912.0f;
  Vec n[N];
  PYENGINE_EACH x[u] = clamp_above(clamp_below(x[u] * e[u].scale - e[u].shift, -127.0f), 128.0f);
  PYENGINE_EACH n[u] = x[u] + kRound;
  PYENGINE_EACH x[u] = x[u] - (n[u] - kRound);
  PYENGINE_EACH power[u] = x[u] * 1.3276472632e-3f + 9.67554134312e-3f;
  PYENGINE_EACH power[u] = power[u] * x[u] + 5.55071327186e-2f;
  PYENGINE_EACH power[u] = power[u] * x[u] + 2.40221197237e-1f;
  PYENGINE_EACH power[u] = power[u] * x[u] + 6.93146967065e-1f;
  PYENGINE_EACH power[u] = power[u] * x[u] + 1.00000007165f;
  PYENGINE_EACH x[u] = (Vec)(((VecInt)n[u] + 127) << 23);
}
#endif

// The product of the low halves of each 64-bit lane.
inline VecLong multiply_low(VecLong a, VecLong b) {
#if defined(__AVX512F__)
  return (VecLong)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (VecLong)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

// The high half of each 64-bit lane in the low half; what is left in the high one is of no use.
inline VecLong high_half(VecLong a) {
#if defined(__AVX512F__)
  return (VecLong)_mm512_shuffle_epi32((__m512i)a, _MM_PERM_DDBB);  // leaves the multiplier's port free
#else
  return a >> 32;
#endif
}

// a[0], b[0], a[1], b[1], ...
inline void store_interleaved(void* to, VecLong a, VecLong b) {
#if defined(__AVX512F__)
  const __m512i first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  const __m512i second = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  _mm512_storeu_si512(to, _mm512_permutex2var_epi64((__m512i)a, first, (__m512i)b));
  _mm512_storeu_si512(static_cast<char*>(to) + 64, _mm512_permutex2var_epi64((__m512i)a, second, (__m512i)b));
#else
  for (int i = 0; i < kLanes / 2; ++i) {
    const uint64_t pair[2] = {a[i], b[i]};
    std::memcpy(static_cast<char*>(to) + i * sizeof pair, pair, sizeof pair);
  }
#endif
}

}  // namespace
