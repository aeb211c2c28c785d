// Registers the CUDA ops with a pybind11 module; bindings.cpp says how tensors cross.
#pragma once

#include <pybind11/pybind11.h>

namespace pyengine::cuda {

void bind(pybind11::module_& m);

}  // namespace pyengine::cuda
