// pyengine._C. Tensors cross as addresses and strides: the module does not link libtorch, so one
// build serves every torch and building needs none. pyengine/ops.py checks shapes and dtypes before
// it calls; the callers' tensors own all memory for the duration of a call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "cpu/tilt.h"
#if defined(PYENGINE_CUDA_ARCHITECTURES)
#include "cuda/bindings_cuda.h"
#endif

namespace py = pybind11;
using pyengine::DType;
using pyengine::TiltKernels;

namespace {

const TiltKernels& kernels_or_throw(const std::optional<std::string>& isa) {
  const TiltKernels* kernels = pyengine::tilt_kernels(isa ? isa->c_str() : nullptr);
  if (!kernels) throw py::value_error("instruction set not available on this machine: " + *isa);
  return *kernels;
}

template <class T>
T* address(int64_t p) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(p));
}

// batch, vocab, address, dtype, stride over the batch
using Logits = std::array<int64_t, 5>;
// heads, address, dtype, stride over the heads, stride over the batch; weights: address, strides over the
// batch and the heads
using Heads = std::array<int64_t, 8>;
// address, stride over the batch
using Column = std::array<int64_t, 2>;

void tilt_sample(const Logits& logits, const Heads& heads, const Column& temperature, const Column& top_k,
                 const Column& top_p, const Column& min_p, const Column& seed, const Column& position,
                 int64_t token, int64_t logp_base, int64_t logp_policy, int64_t kl, int64_t valid,
                 const std::optional<std::string>& isa) {
  const TiltKernels& kernels = kernels_or_throw(isa);
  pyengine::TiltArgs args{};
  args.batch = logits[0], args.vocab = logits[1];
  args.logits = address<void>(logits[2]), args.logits_type = DType(logits[3]), args.logits_stride = logits[4];
  args.heads = heads[0];
  args.values = address<void>(heads[1]), args.values_type = DType(heads[2]);
  args.values_stride_head = heads[3], args.values_stride_row = heads[4];
  args.weights = address<float>(heads[5]);
  args.weights_stride_row = heads[6], args.weights_stride_head = heads[7];
  args.temperature = address<float>(temperature[0]), args.temperature_stride = temperature[1];
  args.top_k = address<int64_t>(top_k[0]), args.top_k_stride = top_k[1];
  args.top_p = address<float>(top_p[0]), args.top_p_stride = top_p[1];
  args.min_p = address<float>(min_p[0]), args.min_p_stride = min_p[1];
  args.seed = address<int64_t>(seed[0]), args.seed_stride = seed[1];
  args.position = address<int64_t>(position[0]), args.position_stride = position[1];
  args.token = address<int64_t>(token), args.logp_base = address<float>(logp_base);
  args.logp_policy = address<float>(logp_policy), args.kl = address<float>(kl);
  args.valid = address<bool>(valid);
  py::gil_scoped_release release;
  pyengine::tilt_sample(args, kernels);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ kernels of pyengine; call them through pyengine.ops.";
  m.def("tilt_sample", &tilt_sample);
  m.def(
      "instruction_set", [](const std::optional<std::string>& isa) { return kernels_or_throw(isa).name; },
      py::arg("isa") = py::none(), "The instruction set the CPU kernels run with.");
  m.def("compiler", [] { return std::string(PYENGINE_COMPILER); }, "Compiler that built this module.");
#if defined(PYENGINE_CUDA_ARCHITECTURES)
  const std::vector<std::string> architectures = {PYENGINE_CUDA_ARCHITECTURES};
  pyengine::cuda::bind(m);
#else
  const std::vector<std::string> architectures;
#endif
  m.def(
      "cuda_architectures", [architectures] { return architectures; },
      "What the CUDA kernels were compiled for; empty without them.");
}
