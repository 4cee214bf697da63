// Programmatic dependent launches.
#pragma once

#include <cuda_runtime.h>

#include <utility>

namespace fae::sm90 {

// Launches a kernel whose CTAs may be on the SMs before the kernels queued before it have ended; it waits there, with
// griddepcontrol.wait, before it touches what they write or read.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_dependent(void (*kernel)(Parameters...), int64_t ctas, int threads, int shared_bytes,
                             cudaStream_t stream, Arguments&&... arguments) {
  cudaLaunchAttribute dependent{};
  dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  dependent.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(ctas);
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &dependent;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

}  // namespace fae::sm90
