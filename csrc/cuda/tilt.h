// tilt_sample on a CUDA device. Asynchronous: all pointers are device memory, borrowed until the stream
// has passed the launches. Nothing is allocated or synchronised, so the launches can be captured into a
// CUDA graph; seeds, positions and filters are read by the kernels, so a replay sees their new values.
#pragma once

#include <cstdint>

#include "../tilt_args.h"

namespace pyengine::cuda {

// Bytes of device memory that a call needs, at any address divisible by 16; contents do not matter.
int64_t tilt_workspace(int64_t batch, int64_t vocab);

// Null, or what CUDA said when a launch failed. `stream` is a cudaStream_t of the current device.
const char* tilt_sample(const TiltArgs& args, void* workspace, void* stream);

}  // namespace pyengine::cuda
