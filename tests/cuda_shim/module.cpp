// The CUDA ops as a Python module that computes on the CPU.
#include "../../csrc/cuda/bindings_cuda.h"

PYBIND11_MODULE(cuda_shim, m) { pyengine::cuda::bind(m); }
