// What launchers share on the host: code for Hopper, dependent launches, permission for large shared memory, alignment,
// rounding.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "../../core/params.h"
#include "../../core/softmax.h"

namespace fae::cuda {

constexpr int kSharedBytesByDefault = 48 * 1024;
constexpr size_t kWorkspaceAlignment = 256;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline size_t align_up(size_t bytes) {
  return (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
}

// Lets a kernel ask for `bytes` of dynamic shared memory; the driver is told once per kernel and device.
template <auto* kKernel>
cudaError_t allow_shared_bytes(int bytes) {
  if (bytes <= kSharedBytesByDefault) return cudaSuccess;
  static std::atomic<uint64_t> told{0};  // a bit per device; twice does no harm
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const uint64_t bit = uint64_t{1} << (device & 63);
  if (device < 64 && (told.load(std::memory_order_relaxed) & bit)) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess && device < 64) told.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

// Whether every row of a tensor starts on 16 bytes and `columns` fill whole chunks of 16: tile::GlobalRows::vector.
inline bool rows_are_vectors(const TensorRef& t, int columns, int element_bytes) {
  const int64_t per_chunk = 16 / element_bytes;
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && columns % per_chunk == 0 && t.stride_b % per_chunk == 0 &&
         t.stride_h % per_chunk == 0 && t.stride_s % per_chunk == 0;
}

template <typename T>
constexpr DType dtype_of() {
  return sizeof(T) == 4 ? DType::kFloat32 : std::is_same_v<T, __half> ? DType::kFloat16 : DType::kBFloat16;
}

// scale * log2(e) in two factors for online softmax, which takes maxima of scores and so wants a positive one.
struct SplitScale {
  float positive;
  float sign;
};
inline SplitScale split_scale(double scale) {
  if (scale == 0.0) return {1.0f, 0.0f};
  return {static_cast<float>(std::fabs(scale) * kLog2E), scale < 0.0 ? -1.0f : 1.0f};
}

// Whether this build has code for compute capability 9.0 at all. A kernel's body is compiled for 9.0a alone: without this the
// registry would choose empty kernels in a build for 8.0, and nobody would notice. 9.0 without the "a" does not compile.
constexpr bool has_hopper_code() {
#if defined(__CUDA_ARCH_LIST__)
  for (const int arch : {__CUDA_ARCH_LIST__})
    if (arch == 900) return true;
#endif
  return false;
}

// Launches a kernel whose CTAs may be on the SMs before the kernels queued before it have ended; it waits there, with
// griddepcontrol.wait, before it touches what they write or read. So it needs code that has the instruction.
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

// Whether code that every architecture runs has the instruction on this one. On 9.x it is the code compiled for 9.0, which has;
// code for 8.0, and what the driver makes of its PTX, has not. (So CUDA_FORCE_PTX_JIT, a debugging aid of the driver, is nothing
// for 9.x; it would not find the kernels for Hopper either.)
inline bool waits_by_itself(int compute_capability) { return has_hopper_code() && compute_capability / 10 == 9; }

// A dependent launch where `dependent`, as waits_by_itself() says it may be; else a plain one.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(bool dependent, void (*kernel)(Parameters...), int64_t ctas, int threads, int shared_bytes,
                   cudaStream_t stream, Arguments&&... arguments) {
  if (dependent)
    return launch_dependent(kernel, ctas, threads, shared_bytes, stream, std::forward<Arguments>(arguments)...);
  kernel<<<static_cast<unsigned>(ctas), threads, shared_bytes, stream>>>(std::forward<Arguments>(arguments)...);
  return cudaPeekAtLastError();
}

}  // namespace fae::cuda
