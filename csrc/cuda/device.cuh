// What the CUDA kernels share: the instructions that C++ cannot name, and sums, maxima and draws over
// the threads of a block. Every reduction has a fixed shape, so a result depends on its data alone.
#pragma once

#include <cuda_runtime.h>

#include <cfloat>
#include <climits>
#include <cstdint>

#include "../algebra.h"

namespace pyengine::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline int lane() { return int(threadIdx.x) % kWarp; }
__device__ inline int warp() { return int(threadIdx.x) / kWarp; }

// 2^x in one instruction, relative error below 2^-22; results under 2^-126 become 0. exp2f adds three
// instructions for those, of the about 25 an element that reading at 4.3 TB/s leaves time for.
__device__ inline float fast_exp2(float x) {
#if defined(__CUDACC__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// 1 / x. Volatile keeps it where it is written: hoisted out of a loop, it would wait for x before the
// loop's first loads.
__device__ inline float reciprocal_here(float x) {
#if defined(__CUDACC__)
  float y;
  asm volatile("rcp.rn.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

// Returns once the kernel before this one in its stream has finished and its writes are visible. A launch
// that allows overlap starts early, which hides 1 us of launch latency behind that kernel's last blocks.
__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

template <DType kType>
__device__ inline float widen(uint32_t bits) {
  if constexpr (kType == DType::f32) {
    return __uint_as_float(bits);
  } else if constexpr (kType == DType::bf16) {
    return __uint_as_float(bits << 16);
  } else {
#if defined(__CUDACC__)
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(uint16_t(bits)));
    return x;
#else
    return half_to_float(uint16_t(bits));
#endif
  }
}

// One element of an array of any of our types.
__device__ inline float element(const void* data, DType type, int64_t at) {
  if (type == DType::f32) return static_cast<const float*>(data)[at];
  const uint16_t bits = static_cast<const uint16_t*>(data)[at];
  return type == DType::bf16 ? widen<DType::bf16>(bits) : widen<DType::f16>(bits);
}

// Monotonic map of floats to unsigned integers. -0 and 0 are one value, as they are to <.
__device__ inline uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// A candidate of an argmax; the lowest id wins ties. NaN never wins.
struct Best {
  float score = -INFINITY;
  int id = INT_MAX;
};

struct Add {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

struct Better {
  __device__ Best operator()(Best a, Best b) const {
    return b.score > a.score || (b.score == a.score && b.id < a.id) ? b : a;
  }
};

template <class T>
__device__ T shuffle_xor(T x, int mask) {
  return __shfl_xor_sync(kAllLanes, x, mask);
}

template <>
__device__ inline Best shuffle_xor(Best x, int mask) {
  return Best{__shfl_xor_sync(kAllLanes, x.score, mask), __shfl_xor_sync(kAllLanes, x.id, mask)};
}

// The same bits in every lane: + and max commute, and the butterfly pairs the same lanes for all.
template <class Op, class T>
__device__ T warp_reduce(T x, Op op) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x = op(x, shuffle_xor(x, mask));
  return x;
}

// Inclusive sum over the lanes up to this one.
template <class T>
__device__ T warp_scan(T x) {
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const T below = __shfl_up_sync(kAllLanes, x, offset);
    if (lane() >= offset) x += below;
  }
  return x;
}

// Where a running sum passed its target, and the sum before that entry.
template <class T>
struct Found {
  int index;
  T before, total;
};

// Cooperation of all kThreads threads of a block; every member function must be called by all of them
// and hands the same result to each.
template <int kThreads>
class Cta {
 public:
  static constexpr int kWarps = kThreads / kWarp;

  struct Shared {
    alignas(8) unsigned char slots[kWarps][8];
    alignas(8) unsigned char before[8];
    int first, last, index;
  };

  __device__ explicit Cta(Shared& shared) : shared_(shared) {}

  template <class Op, class T>
  __device__ T reduce(T x, Op op) {
    x = warp_reduce(x, op);
    if (lane() == 0) slot<T>(warp()) = x;
    __syncthreads();
    x = slot<T>(0);
    for (int w = 1; w < kWarps; ++w) x = op(x, slot<T>(w));
    __syncthreads();
    return x;
  }

  // Index of the first of n weights at which the running sum exceeds target(total); the last positive
  // one where rounding keeps the sum below it, 0 where none is positive. Weights of 0 are never chosen.
  // `weight` is called twice on some entries and must not change in between.
  template <class T, class Target, class Weight>
  __device__ Found<T> first_above(int n, Target target, Weight weight) {
    const int thread = int(threadIdx.x), share = (n + kThreads - 1) / kThreads;
    const int begin = min(n, thread * share), end = min(n, begin + share);
    T own = 0;
    for (int i = begin; i < end; ++i) own += weight(i);
    T upto = warp_scan(own);
    const T previous = __shfl_up_sync(kAllLanes, upto, 1);
    if (lane() == kWarp - 1) slot<T>(warp()) = upto;
    if (thread == 0) shared_.first = INT_MAX, shared_.last = -1, shared_.index = 0, before<T>() = 0;
    __syncthreads();
    T offset = 0, total = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp()) offset = total;
      total += slot<T>(w);
    }
    const T goal = target(total);
    if (own > 0) {
      if (upto + offset > goal) atomicMin(&shared_.first, thread);
      atomicMax(&shared_.last, thread);
    }
    __syncthreads();
    if (thread == (shared_.first < kThreads ? shared_.first : shared_.last)) {
      T running = lane() == 0 ? offset : previous + offset;
      for (int i = begin; i < end; ++i) {
        const T w = weight(i);
        if (!(w > 0)) continue;
        shared_.index = i, before<T>() = running;
        running += w;
        if (running > goal) break;
      }
    }
    __syncthreads();
    const Found<T> found{shared_.index, before<T>(), total};
    __syncthreads();
    return found;
  }

 private:
  template <class T>
  __device__ T& slot(int w) {
    static_assert(sizeof(T) <= sizeof shared_.slots[0]);
    return reinterpret_cast<T&>(shared_.slots[w]);
  }

  template <class T>
  __device__ T& before() {
    return reinterpret_cast<T&>(shared_.before);
  }

  Shared& shared_;
};

}  // namespace pyengine::cuda
