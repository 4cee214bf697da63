// Tensor maps: what the copy engine knows of a tensor in global memory. Made anew for every call (0.14 us each).
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "../../core/params.h"
#include "../tile/wgmma_tile.cuh"

namespace fae::sm90 {

// The driver's encoder, asked for at run time so that nothing links to libcuda. nullptr if the driver has none.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const PFN_cuTensorMapEncodeTiled_v12000 encoder = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
    if (error != cudaSuccess || status != cudaDriverEntryPointSuccess) found = nullptr;
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  }();
  return encoder;
}

// A (batch, heads, rows, columns) tensor of 16-bit elements, read or written in boxes of `box_rows` rows: panels of 64 columns,
// swizzled, or more columns as they are.
inline cudaError_t make_tensor_map(CUtensorMap* map, const TensorRef& t, DType dtype, int64_t batch, int heads,
                                   int rows, int columns, int box_rows, int plain_columns = 0) {
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  // The stride of a dimension of one entry is never used, but checked.
  const auto bytes = [](int64_t stride, int64_t size) { return static_cast<cuuint64_t>(size > 1 ? 2 * stride : 16); };
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows),
                               static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(batch)};
  const cuuint64_t strides[3] = {bytes(t.stride_s, rows), bytes(t.stride_h, heads), bytes(t.stride_b, batch)};
  const bool plain = plain_columns > 0;
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(plain ? plain_columns : tile::kPanelColumns),
                             static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t step[4] = {1, 1, 1, 1};
  const auto type = dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const auto encode_once = [&] {
    return encode(map, type, 4, t.data, sizes, strides, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                  plain ? CU_TENSOR_MAP_SWIZZLE_NONE : CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = encode_once();
  if (result == CUDA_ERROR_INVALID_CONTEXT) {
    // A thread that has not used CUDA yet, such as autograd's: the runtime binds the context of its device.
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaSetDevice(device);
    if (error != cudaSuccess) return error;
    result = encode_once();
  }
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace fae::sm90
