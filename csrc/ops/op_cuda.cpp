// The operators on CUDA tensors: contract, allocation, a kernel from the registry, its launch on the current stream.
// Nothing here waits for the GPU, and all memory comes from PyTorch's caching allocator, so that a call can be captured
// into a CUDA graph. A binary without CUDA passes the same contract and says what is missing.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "contract.h"

#if defined(FAE_WITH_CUDA)
#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <initializer_list>

#include "../cuda/bulk_copy.h"
#include "../cuda/pack_groups.h"
#include "../cuda/registry.h"
#include "prepare.h"
#endif

namespace fae::ops {

namespace {

using at::Tensor;

#if defined(FAE_WITH_CUDA)

// Tiles beyond any that is built, as the registry's 32 bits hold them.
int tile_size(int64_t size) { return static_cast<int>(std::min(size, int64_t{1} << 30)); }

[[noreturn]] void refuse_launch(const char* name, const char* kernel, cudaError_t error) {
  cudaGetLastError();  // so that an error that ends with this call does not fail the next one
  const bool no_code = error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction;
  TORCH_CHECK(false, name, ": kernel ", kernel, " did not start: ", cudaGetErrorName(error), " (",
              cudaGetErrorString(error), ")",
              no_code ? "; this build has no code for this GPU: `python -m flash_attn_ext doctor` names the remedy"
              : error == cudaErrorInvalidConfiguration ? "; more tiles than a grid holds (2^31 - 1): split the batch"
                                                       : "");
}

// Why Hopper's kernels cannot serve a call, or nullptr. What the operators allocate is as dense as its model.
const char* no_bulk_copy(std::initializer_list<const Tensor*> tensors, std::optional<double> scale) {
  if (scale.has_value())
    if (const char* why = cuda::scale_obstacle(*scale)) return why;
  for (const Tensor* t : tensors) {
    if (t->element_size() != 2) return nullptr;  // nor do they exist
    const auto sizes = t->sizes(), strides = t->strides();
    const cuda::Layout layout = {reinterpret_cast<uintptr_t>(t->const_data_ptr()), sizes.data(), strides.data(),
                                 static_cast<int>(sizes.size())};
    if (const char* why = cuda::bulk_copy_obstacle(layout)) return why;
  }
  return nullptr;
}

// The entry that runs a call, on the current device, whose facts it notes in `call`.
const cuda::KernelEntry& entry_for(const char* name, cuda::Pass pass, int version, const Tensor& q, int64_t block_m,
                                   int64_t block_n, const char* no_bulk_copy, cuda::Call* call) {
  const cudaError_t error = cuda::device_facts(q.get_device(), &call->device);
  if (error != cudaSuccess) refuse_launch(name, "(none yet)", error);
  const Sizes& sizes = call->p.fwd.sizes;
  const cuda::KernelKey key = {pass,
                               version,
                               dtype_of(q),
                               std::max(sizes.head_dim, sizes.head_dim_v),
                               tile_size(block_m),
                               tile_size(block_n),
                               sizes.seqlen_q,
                               sizes.heads,
                               no_bulk_copy};
  if (const cuda::KernelEntry* entry = cuda::find(key, call->device)) return *entry;
  std::string why_not;
  cuda::find(key, call->device, &why_not);
  cuda::KernelKey any_tile = key;
  any_tile.tile_m = any_tile.tile_n = 0;
  TORCH_CHECK_VALUE(key.tile_m == 0 || cuda::find(any_tile, call->device) == nullptr, name, ": ", why_not);
  TORCH_CHECK_NOT_IMPLEMENTED(false, name, ": ", why_not);
}

void launch(const char* name, const cuda::KernelEntry& entry, cuda::Call* call, const Tensor& q) {
  call->fp32_exact = at::globalContext().float32MatmulPrecision() == at::Float32MatmulPrecision::HIGHEST;
  const size_t bytes = entry.workspace_bytes(*call);
  // Freed when this returns; the allocator hands it only to work that is queued behind on the same stream.
  Tensor workspace;
  if (bytes != 0) workspace = at::empty({static_cast<int64_t>(bytes)}, q.options().dtype(at::kByte));
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream(q.get_device());
  const cudaError_t error = entry.launch(*call, bytes == 0 ? nullptr : workspace.mutable_data_ptr(), stream);
  if (error != cudaSuccess) refuse_launch(name, entry.name, error);
}

std::tuple<Tensor, Tensor> forward(const char* name, int version, const Tensor& q, const Tensor& k, const Tensor& v,
                                   std::optional<double> scale, int64_t window_left, int64_t window_right,
                                   bool top_left, int64_t block_m, int64_t block_n) {
  check_forward(name, q, k, v, {scale, block_m, block_n});
  const c10::cuda::CUDAGuard guard(q.device());
  cuda::Call call;
  const MaskSpec mask = mask_spec(window_left, window_right, top_left);
  call.p.fwd.sizes = sizes_of(q, k, v);
  call.p.fwd.mask_spec = mask;
  const int element_bytes = static_cast<int>(q.element_size());
  const bool packed = version == 2 && cuda::pack_groups(&call.p.fwd, element_bytes);
  const cuda::KernelEntry& entry =  // refused before anything is allocated
      entry_for(name, cuda::Pass::kForward, version, q, block_m, block_n, no_bulk_copy({&q, &k, &v}, scale), &call);
  const PreparedForward f = prepare_forward(q, k, v, scale, mask);
  if (f.nothing_to_compute) return f.results();
  call.p.fwd = f.params;
  if (packed) cuda::pack_groups(&call.p.fwd, element_bytes);
  launch(name, entry, &call, q);
  return f.results();
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q,
                                            const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                                            std::optional<double> scale, int64_t window_left, int64_t window_right,
                                            bool top_left, std::optional<bool> deterministic) {
  const char* name = "flash_attention backward";
  check_backward(dout, dlse, q, k, v, out, lse, {scale});
  const c10::cuda::CUDAGuard guard(q.device());
  cuda::Call call;
  call.p.fwd.sizes = sizes_of(q, k, v);
  const cuda::KernelEntry& entry =
      entry_for(name, cuda::Pass::kBackward, 2, q, 0, 0, no_bulk_copy({&q, &k, &v, &dout}, scale), &call);
  const MaskSpec mask = mask_spec(window_left, window_right, top_left);
  const PreparedBackward b = prepare_backward(dout, dlse, q, k, v, out, lse, scale, mask);
  if (b.nothing_to_compute) return b.results();
  call.p = b.params;
  call.p.deterministic = deterministic.has_value() ? *deterministic : at::globalContext().deterministicAlgorithms();
  launch(name, entry, &call, q);
  return b.results();
}

#else

[[noreturn]] void refuse(const char* name) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, name,
                              ": flash_attn_ext was built without CUDA. Install the CUDA toolkit (nvcc) that matches "
                              "torch.version.cuda and reinstall: FLASH_ATTN_EXT_CUDA=1 pip install "
                              "--no-build-isolation --force-reinstall --no-deps .");
}

std::tuple<Tensor, Tensor> forward(const char* name, int, const Tensor& q, const Tensor& k, const Tensor& v,
                                   std::optional<double> scale, int64_t, int64_t, bool, int64_t block_m,
                                   int64_t block_n) {
  check_forward(name, q, k, v, {scale, block_m, block_n});
  refuse(name);
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q,
                                            const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                                            std::optional<double> scale, int64_t, int64_t, bool, std::optional<bool>) {
  check_backward(dout, dlse, q, k, v, out, lse, {scale});
  refuse("flash_attention backward");
}

#endif

std::tuple<Tensor, Tensor> fwd_cuda(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<double> scale,
                                    int64_t window_left, int64_t window_right, bool top_left,
                                    std::optional<bool> /*deterministic: the backward's*/, int64_t block_m,
                                    int64_t block_n) {
  return forward("flash_attention", 2, q, k, v, scale, window_left, window_right, top_left, block_m, block_n);
}

std::tuple<Tensor, Tensor> fwd_v1_cuda(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<double> scale,
                                       int64_t window_left, int64_t window_right, bool top_left,
                                       std::optional<bool> /*deterministic*/, int64_t block_m, int64_t block_n) {
  return forward("flash_attention_v1", 1, q, k, v, scale, window_left, window_right, top_left, block_m, block_n);
}

}  // namespace

TORCH_LIBRARY_IMPL(flash_attn_ext, CUDA, m) {
  m.impl("fwd", &fwd_cuda);
  m.impl("fwd_v1", &fwd_v1_cuda);
  m.impl("bwd", &backward);
}

}  // namespace fae::ops
