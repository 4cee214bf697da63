// The CPU engine: exact attention in blocks, forward by version 1 and version 2 of the algorithm, backward by version 2.
// Plain C++ at this boundary: the caller fills AttentionParams, asks for a plan and provides the workspace it names.
#pragma once

#include <cstddef>

#include "../core/params.h"

namespace fae::cpu {

// How one call will run. Made by plan_*() from sizes and thread count alone; the engine follows it to the letter, so
// what explain() reports is what happens. No result bit depends on `threads`.
struct ForwardPlan {
  const char* tile_name;
  const char* why;
  const char* operand;  // what the matrix products multiply: "fp32", "bf16", "fp64"
  int version;
  int tile_m;
  int tile_n;
  int rows_per_task;
  int rows_per_product;
  int64_t tasks;
  int slots;               // threads that take part
  size_t slot_bytes;       // scratch of each
  size_t shared_bytes;     // version 1: fp32 O where the output has 16 bits, and its m and l
  size_t workspace_bytes;  // all of it
};

struct BackwardPlan {
  const char* tile_name;
  const char* why;
  const char* operand;
  int chunk;
  int tile_n;
  bool heads_in_parallel;  // one task per key/value head; else one per (head, key chunk) in each step
  int slots;
  size_t slot_bytes;
  size_t shared_bytes;
  size_t workspace_bytes;
};

// block_m, block_n: 0 for the engine's choice.
FAE_API ForwardPlan plan_forward(int version, const Sizes& sizes, DType dtype, int block_m, int block_n, int threads);
FAE_API BackwardPlan plan_backward(const Sizes& sizes, DType dtype, int threads);

// workspace: plan.workspace_bytes, aligned to 64 bytes. All tensors have a contiguous last dimension.
FAE_API void forward_v1(const AttentionParams& p, DType dtype, const ForwardPlan& plan, void* workspace);
FAE_API void forward_v2(const AttentionParams& p, DType dtype, const ForwardPlan& plan, void* workspace);
FAE_API void backward_v2(const BackwardParams& p, DType dtype, const BackwardPlan& plan, void* workspace);

}  // namespace fae::cpu
