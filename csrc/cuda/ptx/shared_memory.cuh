// Shared memory: addresses, ldmatrix, vector accesses.
#pragma once

#include <cstdint>

#include "../../core/platform.h"

namespace fae::ptx {

// The 32-bit address that instructions on shared memory take.
FAE_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// ldmatrix, PTX ISA 9.7.14.5.15; sm_75 and later. Four 8 x 16-byte matrices; lane l gives the address of row l % 8 of
// matrix l / 8 and receives, of matrix i, the four bytes 4 (l % 4) of row l / 4 in r[i].
FAE_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// The same with each 8 x 8 matrix of 16-bit elements transposed on the way.
FAE_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// stmatrix, PTX ISA 9.7.14.5.16; sm_90. The reverse of ldmatrix_x4.
FAE_DEVICE void stmatrix_x4(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(r0), "r"(r1),
               "r"(r2), "r"(r3)
               : "memory");
}

FAE_DEVICE uint32_t ld_shared_u32(uint32_t address) {
  uint32_t r;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(r) : "r"(address) : "memory");
  return r;
}
FAE_DEVICE void ld_shared_v2(uint32_t (&r)[2], uint32_t address) {
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory");
}
FAE_DEVICE void ld_shared_v4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
FAE_DEVICE void st_shared_u32(uint32_t address, uint32_t x) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}
// One element of two or four bytes.
template <typename T>
FAE_DEVICE void st_shared(uint32_t address, T x) {
  if constexpr (sizeof(T) == 2)
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(*reinterpret_cast<const uint16_t*>(&x)) : "memory");
  else
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(*reinterpret_cast<const uint32_t*>(&x)) : "memory");
}
FAE_DEVICE void st_shared_v2(uint32_t address, uint32_t x, uint32_t y) {
  asm volatile("st.shared.v2.u32 [%0], {%1,%2};" ::"r"(address), "r"(x), "r"(y) : "memory");
}
FAE_DEVICE void st_shared_v4(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

}  // namespace fae::ptx
