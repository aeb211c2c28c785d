// What every file that is compiled once for each instruction set needs: its tables' names, and fp32
// copies of bf16 and fp16. PYENGINE_ISA names the instruction set. Nothing in such a file may instantiate a
// std:: template, or the linker could keep the AVX-512 copy of it for everybody.
#pragma once

#include "../algebra.h"
#include "vec.h"

#define PYENGINE_PASTE_(a, b) a##b
#define PYENGINE_PASTE(a, b) PYENGINE_PASTE_(a, b)
#define PYENGINE_STRING_(a) #a
#define PYENGINE_STRING(a) PYENGINE_STRING_(a)

namespace {

using pyengine::DType;

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
