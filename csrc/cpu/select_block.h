// select_block on a CPU: probe, LSC, aggregation and the choice of one of K branches, row by row.
#pragma once

#include "../select_args.h"
#include "linear.h"

namespace pyengine {

void select_block(const SelectArgs& args, const DotKernels& kernels, int threads);

}  // namespace pyengine
