// What every file that is compiled once for each instruction set needs: its tables' names, and reading
// bf16 and fp16. PYENGINE_ISA names the instruction set. Nothing in such a file may instantiate a std::
// template, or the linker could keep the AVX-512 copy of it for everybody.
#pragma once

#include "../algebra.h"
#include "vec.h"

#define PYENGINE_PASTE_(a, b) a##b
#define PYENGINE_PASTE(a, b) PYENGINE_PASTE_(a, b)
#define PYENGINE_STRING_(a) #a
#define PYENGINE_STRING(a) PYENGINE_STRING_(a)

namespace {

using pyengine::DType;

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

}  // namespace
