// The CUDA ops for Python. As in bindings.cpp, tensors cross as addresses and strides in elements, and the
// caller's tensors own all memory until the stream has passed the launch. `stream` is the cudaStream_t as
// a number; the current device must be its device.
#include "bindings_cuda.h"

#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "select_block.h"
#include "tilt.h"

namespace py = pybind11;

namespace pyengine::cuda {
namespace {

template <class T>
T* address(int64_t p) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(p));
}

void check(const char* op, const char* error) {
  if (error) throw std::runtime_error(std::string(op) + ": " + error);
}

// batch, vocab, address, dtype, stride over the batch
using Logits = std::array<int64_t, 5>;
// heads, address, dtype, stride over the heads, stride over the batch; weights: address, strides over the
// batch and the heads
using Heads = std::array<int64_t, 8>;
// address, stride over the batch
using Column = std::array<int64_t, 2>;
// token, logp_base, logp_policy, kl, valid
using Outputs = std::array<int64_t, 5>;

void bind_tilt_sample(const Logits& logits, const Heads& heads, const Column& mask, const Column& temperature,
                      const Column& top_k, const Column& top_p, const Column& min_p, const Column& seed,
                      const Column& position, bool gumbel, const Outputs& outputs, int64_t workspace,
                      int64_t stream) {
  TiltArgs args{};
  args.batch = logits[0], args.vocab = logits[1];
  args.logits = address<void>(logits[2]), args.logits_type = DType(logits[3]), args.logits_stride = logits[4];
  args.heads = heads[0];
  args.values = address<void>(heads[1]), args.values_type = DType(heads[2]);
  args.values_stride_head = heads[3], args.values_stride_row = heads[4];
  args.weights = address<float>(heads[5]);
  args.weights_stride_row = heads[6], args.weights_stride_head = heads[7];
  args.mask = address<bool>(mask[0]), args.mask_stride = mask[1];
  args.temperature = address<float>(temperature[0]), args.temperature_stride = temperature[1];
  args.top_k = address<int64_t>(top_k[0]), args.top_k_stride = top_k[1];
  args.top_p = address<float>(top_p[0]), args.top_p_stride = top_p[1];
  args.min_p = address<float>(min_p[0]), args.min_p_stride = min_p[1];
  args.seed = address<int64_t>(seed[0]), args.seed_stride = seed[1];
  args.position = address<int64_t>(position[0]), args.position_stride = position[1];
  args.gumbel = gumbel;
  args.token = address<int64_t>(outputs[0]), args.logp_base = address<float>(outputs[1]);
  args.logp_policy = address<float>(outputs[2]), args.kl = address<float>(outputs[3]);
  args.valid = address<bool>(outputs[4]);
  check("tilt_sample", tilt_sample(args, address<void>(workspace), address<void>(stream)));
}

// batch, branches, heads; address, dtype, strides over the batch, the branches and the last dimension
using Given = std::array<int64_t, 8>;
// address or 0, dtype, width, strides over the heads and the width
using Probe = std::array<int64_t, 5>;
// address or 0, strides over the batch and the heads
using Reference = std::array<int64_t, 3>;

void bind_select_block(const Given& given, const Probe& probe, const Column& weights,
                       const Reference& reference, bool lsc, float beta, const Column& seed,
                       const Column& position, const std::array<int64_t, 3>& outputs, int64_t stream) {
  SelectArgs args{};
  args.batch = given[0], args.branches = given[1], args.heads = given[2];
  args.given = address<void>(given[3]), args.given_type = DType(given[4]);
  args.given_stride_row = given[5], args.given_stride_branch = given[6], args.given_stride_last = given[7];
  args.probe = address<void>(probe[0]), args.probe_type = DType(probe[1]), args.width = probe[2];
  args.probe_stride_head = probe[3], args.probe_stride_last = probe[4];
  args.weights = address<float>(weights[0]), args.weights_stride = weights[1];
  args.reference = address<float>(reference[0]);
  args.reference_stride_row = reference[1], args.reference_stride_head = reference[2];
  args.lsc = lsc, args.beta = beta;
  args.seed = address<int64_t>(seed[0]), args.seed_stride = seed[1];
  args.position = address<int64_t>(position[0]), args.position_stride = position[1];
  args.index = address<int64_t>(outputs[0]), args.probability = address<float>(outputs[1]);
  args.utility = address<float>(outputs[2]);
  check("select_block", select_block(args, address<void>(stream)));
}

}  // namespace

void bind(py::module_& m) {
  m.def("cuda_tilt_sample", &bind_tilt_sample);
  m.def("cuda_tilt_workspace", &tilt_workspace, py::arg("batch"), py::arg("vocab"),
        "Bytes of device memory that cuda_tilt_sample needs.");
  m.def("cuda_select_block", &bind_select_block);
}

}  // namespace pyengine::cuda
