// The tensor memory accelerator: bulk copies of boxes of a tensor, PTX ISA 9.7.9.27; sm_90.
#pragma once

#include <cstdint>

#include "../../core/platform.h"

namespace fae::ptx {

// A box of a 4-d tensor to shared memory. What lies outside of the tensor arrives as zero and counts among the bytes that
// `barrier` is told of. Coordinates in elements, innermost dimension first.
FAE_DEVICE void cp_async_bulk_tensor_4d_load(uint32_t to, const void* map, uint32_t barrier, int c0, int c1, int c2,
                                             int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
// `bytes` consecutive bytes to shared memory; both addresses and the number are multiples of 16.
FAE_DEVICE void cp_async_bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
// A box from shared memory; elements outside of the tensor are not written.
FAE_DEVICE void cp_async_bulk_tensor_4d_store(const void* map, uint32_t from, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
               "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}
FAE_DEVICE void cp_async_bulk_commit_group() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Shared memory that all but the youngest `kPending` groups of this thread read may be written again.
template <int kPending>
FAE_DEVICE void cp_async_bulk_wait_group_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
FAE_DEVICE void prefetch_tensormap(const void* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
// Ordinary writes of this thread to shared memory become visible to the copy engine and the tensor cores.
FAE_DEVICE void fence_proxy_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// The same of global memory; of other threads' writes too, once this one has acquired them.
FAE_DEVICE void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

}  // namespace fae::ptx
