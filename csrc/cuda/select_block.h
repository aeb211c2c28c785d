// select_block on a CUDA device: one launch, asynchronous. All pointers are device memory, borrowed until
// the stream has passed the launch; nothing is allocated or synchronised.
#pragma once

#include "../select_args.h"

namespace pyengine::cuda {

// Null, or what CUDA said when the launch failed. `stream` is a cudaStream_t of the current device.
const char* select_block(const SelectArgs& args, void* stream);

}  // namespace pyengine::cuda
