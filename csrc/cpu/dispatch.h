// Which build of the vector kernels runs: the best instruction set of this machine, or the one forced by
// name ("portable", "avx2", "avx512").
#pragma once

#include <cstring>
#include <initializer_list>

namespace pyengine {

inline bool machine_has(const char* isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (std::strcmp(isa, "avx2") == 0) return avx2;
  if (std::strcmp(isa, "avx512") == 0)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return std::strcmp(isa, "portable") == 0;
}

// The builds of a table that this architecture has, best first.
#if defined(__x86_64__)
#define PYENGINE_BUILDS(table) {&table##_avx512, &table##_avx2, &table##_portable}
#else
#define PYENGINE_BUILDS(table) {&table##_portable}
#endif

// The first of the tables, best first, that this machine can run; nullptr when the forced one is not
// among them.
template <class Kernels>
const Kernels* choose(std::initializer_list<const Kernels*> tables, const char* forced) {
  for (const Kernels* kernels : tables)
    if (machine_has(kernels->name) && (!forced || std::strcmp(forced, kernels->name) == 0)) return kernels;
  return nullptr;
}

}  // namespace pyengine
