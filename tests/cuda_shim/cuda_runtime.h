// What csrc/cuda needs of CUDA, on a CPU: the .cu files compile against this header as plain C++ and run.
// Barriers, warp exchanges and shared memory behave as on a device; threads of a block run in turn
// (fibres), or at once (-DSHIM_THREADS) for ThreadSanitizer. One block runs at a time. Tests only.
#pragma once

#include <math.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("cuda_shared")))

using std::isfinite;
using std::isnan;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace shim {

// The calling thread's place in the launch.
unsigned thread();
unsigned block();
unsigned grid();

struct Coordinates {
  struct {
    unsigned (*get)();
    operator unsigned() const { return get(); }
  } x;
};

void launch(unsigned blocks, unsigned threads, const std::function<void()>& body);

// Hands each lane's word to all lanes of its warp: 32 words, good until the lane's next exchange. `kind`
// tells one instruction from another; lanes that meet in different ones end the program.
const uint64_t* exchange(uint64_t word, int kind);

template <class T>
uint64_t to_word(T x) {
  uint64_t word = 0;
  std::memcpy(&word, &x, sizeof x);
  return word;
}

template <class T>
T from_word(uint64_t word) {
  T x;
  std::memcpy(&x, &word, sizeof x);
  return x;
}

inline int lane() { return int(thread() % 32); }

}  // namespace shim

constexpr shim::Coordinates threadIdx{{shim::thread}}, blockIdx{{shim::block}}, gridDim{{shim::grid}};

void __syncthreads();

template <class T>
T __shfl_sync(unsigned, T x, int from) {
  return shim::from_word<T>(shim::exchange(shim::to_word(x), 1)[from % 32]);
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return shim::from_word<T>(shim::exchange(shim::to_word(x), 2)[shim::lane() ^ mask]);
}
template <class T>
T __shfl_up_sync(unsigned, T x, int delta) {
  const int from = shim::lane() - delta;
  return shim::from_word<T>(shim::exchange(shim::to_word(x), 3)[from < 0 ? shim::lane() : from]);
}
inline bool __any_sync(unsigned, bool x) {
  const uint64_t* votes = shim::exchange(x, 4);
  return std::any_of(votes, votes + 32, [](uint64_t vote) { return vote != 0; });
}

template <class T>
T atomicAdd(T* at, T x) {
  return __atomic_fetch_add(at, x, __ATOMIC_RELAXED);
}
template <class T, class Worse>
void shim_atomic_replace(T* at, T x, Worse worse) {
  T old = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (worse(old, x) && !__atomic_compare_exchange_n(at, &old, x, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
    continue;
}
inline void atomicMin(int* at, int x) { shim_atomic_replace(at, x, std::greater<int>()); }
inline void atomicMax(int* at, int x) { shim_atomic_replace(at, x, std::less<int>()); }

template <class T>
T __ldg(const T* at) {
  return *at;
}
inline uint32_t __float_as_uint(float x) { return shim::from_word<uint32_t>(shim::to_word(x)); }
inline float __uint_as_float(uint32_t x) { return shim::from_word<float>(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t by) {
  return uint32_t((uint64_t(high) << 32 | low) >> (by & 31));
}

// The half's exponent rebased by a product: exact, subnormals included.
inline float half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = uint32_t(bits & 0x7fff) << 13;
  if (rest >= 0x7c00u << 13) return __uint_as_float(sign | 0x7f800000u | (rest & 0x7fffff));
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(rest) * 0x1p112f));
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 9, cudaSuccess; }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  shim::launch(config->gridDim.x, config->blockDim.x, [&] { kernel(arguments...); });
  return cudaSuccess;
}
