// What all launches for Hopper share: dependent launches, whether there is code for it.
#pragma once

#include <cuda_runtime.h>

#include <initializer_list>
#include <utility>

namespace fae::sm90 {

// Whether this build has code for compute capability 9.0 at all. A kernel's body is compiled for 9.0a alone: without this the
// registry would choose empty kernels in a build for 8.0, and nobody would notice. 9.0 without the "a" does not compile.
constexpr bool has_code() {
#if defined(__CUDA_ARCH_LIST__)
  for (const int arch : {__CUDA_ARCH_LIST__})
    if (arch == 900) return true;
#endif
  return false;
}

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
