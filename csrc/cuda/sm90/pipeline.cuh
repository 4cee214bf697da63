// Rings of shared-memory buffers between the producer warp and the consumer warpgroups.
//
// A buffer has two barriers. The producer waits for `empty`, starts the copies, and the copies complete `full`; consumers
// wait for `full`, read, and arrive at `empty`. Position and parity run on from tile to tile.
#pragma once

#include <cstdint>

#include "../ptx/mbarrier.cuh"
#include "../ptx/shared_memory.cuh"

namespace fae::sm90 {

template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  FAE_DEVICE void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// The barriers of one ring, in shared memory.
template <int kStages>
struct RingBarriers {
  uint64_t full[kStages];
  uint64_t empty[kStages];

  // How many arrivals fill a buffer (the copy engine's is one) and how many empty it.
  FAE_DEVICE void init(int consumers, int producers = 1) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(ptx::shared_address(&full[i]), producers);
      ptx::mbarrier_init(ptx::shared_address(&empty[i]), consumers);
    }
  }
  FAE_DEVICE uint32_t full_address(int stage) const { return ptx::shared_address(&full[stage]); }
  FAE_DEVICE uint32_t empty_address(int stage) const { return ptx::shared_address(&empty[stage]); }

  FAE_DEVICE void wait_full(const Ring<kStages>& at, const char* name) const {
    ptx::mbarrier_wait(full_address(at.stage), at.parity, name);
  }
  // A fresh barrier counts as empty: its phase "before the first" has the other parity.
  FAE_DEVICE void wait_empty(const Ring<kStages>& at, const char* name) const {
    ptx::mbarrier_wait(empty_address(at.stage), at.parity ^ 1, name);
  }
  FAE_DEVICE void fill(int stage) const { ptx::mbarrier_arrive(full_address(stage)); }
  FAE_DEVICE void release(int stage) const { ptx::mbarrier_arrive(empty_address(stage)); }
};

}  // namespace fae::sm90
