// The launchers of the .cu files; they return CUDA's error code and never throw.
#pragma once

#include <cuda_runtime.h>

#include "prefix_kv.h"

namespace laser_fast {

// All launch on the current device and return without waiting.
cudaError_t launch_inject(const PrefixArguments& arguments, cudaStream_t stream);
cudaError_t launch_gather(const PrefixArguments& arguments, cudaStream_t stream);
cudaError_t launch_sum(const PrefixArguments& arguments, cudaStream_t stream);
cudaError_t launch_probe();

}  // namespace laser_fast
