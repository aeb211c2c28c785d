// The CUDA ops for Python. `stream` is the cudaStream_t as a number, `workspace` an address of device memory;
// the current device must be the stream's, and all arguments are tensors on it.
#include "bindings_cuda.h"

#include <stdexcept>
#include <string>

#include "../arguments.h"
#include "select_block.h"
#include "tilt.h"

namespace py = pybind11;

namespace pyengine::cuda {
namespace {

void* pointer(int64_t p) { return reinterpret_cast<void*>(static_cast<uintptr_t>(p)); }

void check(const char* op, const char* error) {
  if (error) throw std::runtime_error(std::string(op) + ": " + error);
}

void bind_tilt_sample(const py::dict& given, int64_t workspace, int64_t stream) {
  const TiltCall call(given);
  check("tilt_sample", tilt_sample(call.args, pointer(workspace), pointer(stream)));
}

void bind_select_block(const py::dict& given, int64_t stream) {
  const SelectCall call(given);
  check("select_block", select_block(call.args, pointer(stream)));
}

}  // namespace

void bind(py::module_& m) {
  m.def("cuda_tilt_sample", &bind_tilt_sample);
  m.def("cuda_tilt_workspace", &tilt_workspace, py::arg("batch"), py::arg("vocab"),
        "Bytes of device memory that cuda_tilt_sample needs.");
  m.def("cuda_select_block", &bind_select_block);
}

}  // namespace pyengine::cuda
