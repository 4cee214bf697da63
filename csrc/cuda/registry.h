// The CUDA kernels that this binary has, found by what a call needs: one table, no switch tree. This header and
// core/params.h are all that a program without PyTorch needs to run them (examples/cpp/).
//
//   Device device;
//   current_device(&device);
//   const KernelEntry* entry = find({Pass::kForward, 2, DType::kBFloat16, 128}, device, &why_not);
//   Call call;  // pointers, strides, sizes; call.device = device
//   entry->workspace_bytes(call);  entry->launch(call, workspace, stream);
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>

#include "../core/params.h"

namespace fae::cuda {

enum class Pass : int { kForward = 0, kBackward = 1 };

// What the choice of a kernel depends on besides the call.
struct Device {
  int compute_capability = 0;  // 90 for 9.0
  int sm_count = 0;
  int shared_bytes = 0;  // that one block may ask for
};

// Of a device by its index, or of the current one. Asked of the driver once per device, then read from memory.
FAE_API cudaError_t device_facts(int index, Device* device);
FAE_API cudaError_t current_device(Device* device);

struct KernelKey {
  Pass pass;
  int version;  // of the algorithm
  DType dtype;
  int head_dim;    // the larger of D and Dv
  int tile_m = 0;  // a tile asked for by the caller; 0: the best
  int tile_n = 0;
  int seqlen_q = 0;  // of one batch entry, with the heads: short problems have tiles of their own
  int heads = 0;
  const char* no_bulk_copy = nullptr;  // why kernels that need the copy engine cannot serve; bulk_copy.h
};

// A call as the launchers take it; forward entries read `p.fwd` alone.
struct Call {
  BackwardParams p;
  Device device;
  bool fp32_exact = true;  // fp32 products at full accuracy; false: one TF32 product
};

struct Tile {
  int m;  // query rows
  int n;  // keys
  int threads;
  int stages;
  int shared_bytes;
};

struct KernelEntry {
  const char* name;
  int arch;  // compute capability: 80 runs everywhere from there on, 90 on 9.x alone, with the copy engine
  Pass pass;
  int version;
  DType dtype;
  int head_dim_max;  // the kernel pads D and Dv up to it on chip
  Tile tile;
  const char* why;
  // Of version 2 a function of sizes, flags and device alone, so that it can be told before any tensor is there; version
  // 1 also looks at pointer and strides of the output, in which it may keep its state.
  size_t (*workspace_bytes)(const Call&);
  // Kernels are queued on `stream`; nothing waits. The workspace is 256-byte aligned.
  cudaError_t (*launch)(const Call&, void* workspace, cudaStream_t stream);
  bool for_short_problems = false;  // taken only where larger tiles of one batch entry leave most SMs without one
  int shared_bytes_unasked = 0;     // taken only by name, or where a block could have this much shared memory
  bool has_code = true;             // false: this build left its architecture out
};

// All entries, in the order in which find() prefers them among those that fit.
FAE_API const KernelEntry* entries(int* count);

// The entry for a call, or nullptr; then *why_not says what was asked for, why each candidate does not serve, and what
// is there. A tile asked for is taken as it is. FLASH_ATTN_EXT_KERNEL=NAME[,NAME...] restricts the entries of a named
// entry's pass and version to the named ones: for sweeps and debugging.
FAE_API const KernelEntry* find(const KernelKey& key, const Device& device, std::string* why_not = nullptr);

}  // namespace fae::cuda
