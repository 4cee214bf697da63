// Tiles between global and shared memory. A tile in shared memory is [row][kColumns], laid out by
// Swizzle; columns past the tensor's and rows past its end are zero, so that D needs no padding by the caller.
#pragma once

#include <cstdint>

#include "../ptx/cp_async.cuh"
#include "mma.cuh"

namespace fae::tile {

// Rows of one (batch, head) in global memory.
template <typename T>
struct GlobalRows {
  T* data;         // row 0
  int64_t stride;  // elements from row to row
  int columns;     // valid ones
  bool vector;     // every row starts on 16 bytes, and columns fill them: 16-byte accesses are allowed

  FAE_DEVICE T* row(int i) const { return data + i * stride; }
};

// How kThreads threads share rows of kColumns: kLanes neighbouring threads read a row in 16-byte chunks.
template <typename T, int kColumns, int kThreads>
struct RowSplit {
  static constexpr int kPerChunk = 16 / static_cast<int>(sizeof(T));
  static constexpr int kChunks = kColumns / kPerChunk;
  static constexpr int kLanes = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : kChunks % 2 == 0 ? 2 : 1;
  static constexpr int kRowsPerPass = kThreads / kLanes;
  static_assert(kColumns % kPerChunk == 0 && kThreads % kLanes == 0);
};

// The copy of rows that allow no 16-byte accesses: element by element, neighbouring threads on neighbouring elements.
template <int kRows, int kColumns, typename T>
FAE_DEVICE void load_elements(uint32_t shared, const GlobalRows<const T>& g, int first, int end, int thread,
                              int threads) {
  constexpr int kElement = static_cast<int>(sizeof(T)), kPerChunk = 16 / kElement;
#pragma unroll 1
  for (int i = thread; i < kRows * kColumns; i += threads) {
    const int r = i / kColumns, c = i % kColumns;
    const bool ok = first + r < end && c < g.columns;
    const T x = ok ? g.row(first + r)[c] : from_float<T>(0.0f);
    ptx::st_shared(shared + Swizzle<kColumns * kElement>::offset(r, c / kPerChunk) + c % kPerChunk * kElement, x);
  }
}

// Starts the copy of rows [first, first + kRows) to shared memory; rows from `end` on are zero. Vector copies run as
// cp.async and need commit and wait; others are done on return. Either way a barrier has to follow.
template <int kRows, int kColumns, int kThreads, typename T>
FAE_DEVICE void load_rows(uint32_t shared, const GlobalRows<const T>& g, int first, int end, int thread) {
  using Split = RowSplit<T, kColumns, kThreads>;
  using Layout = Swizzle<kColumns* static_cast<int>(sizeof(T))>;
  const int lane = thread % Split::kLanes, row0 = thread / Split::kLanes;
  if (g.vector) {
    const T* source = g.row(first + row0) + lane * Split::kPerChunk;
    // A thread's swizzle stays the same where its rows are eight apart.
    constexpr bool kSamePhase = Split::kRowsPerPass % 8 == 0;
    static_assert(Split::kLanes > Layout::kMask, "a thread's chunks are whole swizzle lines apart");
    uint32_t target = shared + Layout::offset(row0, lane);
#pragma unroll
    for (int r = 0; r < kRows; r += Split::kRowsPerPass) {
      if (kRows % Split::kRowsPerPass == 0 || r + row0 < kRows) {
        const bool row_ok = first + r + row0 < end;
        if constexpr (!kSamePhase) target = shared + Layout::offset(r + row0, lane);
#pragma unroll
        for (int c = 0; c < Split::kChunks; c += Split::kLanes) {
          const bool ok = row_ok && (c + lane) * Split::kPerChunk < g.columns;
          ptx::cp_async_16(target + c * 16, source + c * Split::kPerChunk, ok);
        }
      }
      source += Split::kRowsPerPass * g.stride;
      if constexpr (kSamePhase) target += Split::kRowsPerPass * Layout::kPitch;
    }
  } else {
    load_elements<kRows, kColumns>(shared, g, first, end, thread, kThreads);
  }
}

// load_rows for a number of threads known at run time.
template <int kRows, int kColumns, typename T>
FAE_DEVICE void load_rows_any(uint32_t shared, const GlobalRows<const T>& g, int first, int end, int thread,
                              int threads) {
  constexpr int kPerChunk = 16 / static_cast<int>(sizeof(T)), kChunks = kColumns / kPerChunk;
  using Layout = Swizzle<kColumns* static_cast<int>(sizeof(T))>;
  if (g.vector) {
    for (int i = thread; i < kRows * kChunks; i += threads) {
      const int r = i / kChunks, c = i % kChunks;
      ptx::cp_async_16(shared + Layout::offset(r, c), g.row(first + r) + c * kPerChunk,
                       first + r < end && c * kPerChunk < g.columns);
    }
  } else {
    load_elements<kRows, kColumns>(shared, g, first, end, thread, threads);
  }
}

// Writes rows [row0, row0 + kRows) of a tile in shared memory, kRowBytes a row, to rows `first` + ... of global memory, those
// before `end`.
template <int kRows, int kColumns, int kRowBytes, int kThreads, typename T>
FAE_DEVICE void store_rows(const GlobalRows<T>& g, uint32_t shared, int row0, int first, int end, int thread) {
  using Split = RowSplit<T, kColumns, kThreads>;
  const int lane = thread % Split::kLanes;
#pragma unroll
  for (int r = thread / Split::kLanes; r < kRows; r += Split::kRowsPerPass) {
    if (first + row0 + r >= end) break;
    T* target = g.row(first + row0 + r);
#pragma unroll
    for (int c = lane; c < Split::kChunks; c += Split::kLanes) {
      const int column = c * Split::kPerChunk;
      if (column >= g.columns) break;
      alignas(16) uint32_t x[4];
      ptx::ld_shared_v4(x, shared + Swizzle<kRowBytes>::offset(row0 + r, c));
      if (g.vector) {
        *reinterpret_cast<uint4*>(target + column) = make_uint4(x[0], x[1], x[2], x[3]);
      } else {
        const T* values = reinterpret_cast<const T*>(x);
#pragma unroll
        for (int i = 0; i < Split::kPerChunk; ++i)
          if (column + i < g.columns) target[column + i] = values[i];
      }
    }
  }
}

}  // namespace fae::tile
