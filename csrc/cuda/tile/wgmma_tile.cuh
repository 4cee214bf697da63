// Tiles in shared memory as wgmma and the copy engine see them.
//
// A tile [rows][columns] of 16-bit elements is stored as panels of 64 columns: [columns / 64][rows][128 bytes], each row's
// eight 16-byte chunks XORed with the row's number modulo 8 ("128-byte swizzle"). A tensor map with a box of 64 x rows
// writes one panel. Panels start on multiples of 1,024 bytes, or the hardware's XOR and ours would differ.
#pragma once

#include <cstdint>

#include "../../core/platform.h"

namespace fae::tile {

constexpr int kPanelColumns = 64;
constexpr int kPanelRowBytes = 128;
constexpr int kPanelAlignment = 1024;

FAE_HD constexpr int panels_of(int columns) { return (columns + kPanelColumns - 1) / kPanelColumns; }
FAE_HD constexpr int panel_bytes(int rows) { return rows * kPanelRowBytes; }

// Matrix descriptors, PTX ISA 9.7.15.5.1.2: bits 0-13 address / 16, 16-29 leading offset / 16, 32-45 stride offset / 16 (from
// one group of eight rows to the next), 62-63 swizzle (1: 128 bytes). Adding bytes / 16 moves one.
FAE_HD constexpr uint64_t make_descriptor(uint32_t address, uint32_t leading_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kStride = uint64_t{8 * kPanelRowBytes / 16} << 32;
  return kSwizzle128 | kStride | uint64_t{(leading_bytes & 0x3ffff) >> 4} << 16 | ((address & 0x3ffff) >> 4);
}

// The reduction runs along the columns: Q and K in Q K^T. One instruction reads 16 columns of one panel.
FAE_HD constexpr uint64_t descriptor_k_major(uint32_t address) { return make_descriptor(address, 16); }
template <int kRows>
FAE_HD constexpr uint64_t step_k_major(int k16) {
  return static_cast<uint64_t>((k16 / 4) * panel_bytes(kRows) + (k16 % 4) * 32) >> 4;
}

// The reduction runs along the rows: V in P V. One instruction reads 16 rows of all panels.
template <int kRows>
FAE_HD constexpr uint64_t descriptor_mn_major(uint32_t address) {
  return make_descriptor(address, panel_bytes(kRows));
}
FAE_HD constexpr uint64_t step_mn_major(int k16) { return static_cast<uint64_t>(k16 * 16 * kPanelRowBytes) >> 4; }

// Byte offset of a 16-byte chunk within a panel.
FAE_HD constexpr uint32_t chunk_offset(int row, int chunk) {
  return static_cast<uint32_t>(row * kPanelRowBytes + ((chunk ^ (row & 7)) * 16));
}

}  // namespace fae::tile
