// What every file that is compiled once for each instruction set needs: its tables' names, fp32
// copies of bf16 and fp16, tanh. PYENGINE_ISA names the instruction set. Nothing in such a file may
// instantiate a std:: template, or the linker could keep the AVX-512 copy of it for everybody.
#pragma once

#include "../algebra.h"
#include "vec.h"

#define PYENGINE_PASTE_(a, b) a##b
#define PYENGINE_PASTE(a, b) PYENGINE_PASTE_(a, b)
#define PYENGINE_STRING_(a) #a
#define PYENGINE_STRING(a) PYENGINE_STRING_(a)

namespace {

using pyengine::DType;

// tanh y = 1 - 2 / (1 + e^2y) loses digits near 0, where softcap * y is the logit itself: a series serves
// |y| < 1/8 (its error is 17/315 y^7, below 3e-8 of y).
inline Vec tanh(Vec y) {
  const Vec square = y * y;
  const Vec series = y * (1 + square * (-0.333333333f + square * 0.133333333f));
  Vec e[1] = {y * (2 * pyengine::kLog2E)};
  exp2_in_place<true>(e);
  return square < splat(0x1p-6f) ? series : 1 - 2 / (1 + e[0]);
}

template <class T>
void widen_all(const T* from, int n, float* to) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  for (; i < n; ++i) to[i] = widen_one(from[i]);
}

void widen(const void* from, DType type, int n, float* to) {
  if (type == DType::f32) std::memcpy(to, from, size_t(n) * sizeof(float));
  if (type == DType::bf16) widen_all(static_cast<const Bf16*>(from), n, to);
  if (type == DType::f16) widen_all(static_cast<const F16*>(from), n, to);
}

}  // namespace
