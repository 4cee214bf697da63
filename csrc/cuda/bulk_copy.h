// What the copy engine of Hopper asks of a call: the kernels for compute capability 9.x read and write through it.
#pragma once

#include <cstdint>

namespace fae::cuda {

// A tensor as the operators get it: sizes and strides in elements of 16 bits, outermost dimension first.
struct Layout {
  uintptr_t data;
  const int64_t* sizes;
  const int64_t* strides;
  int dims;
};

// Why the copy engine cannot serve a tensor, or nullptr. A last dimension that is not contiguous is copied before, so then
// only its size counts.
inline const char* bulk_copy_obstacle(const Layout& t) {
  constexpr int64_t kElements = 8;  // of 16 bytes
  const int last = t.dims - 1;
  if (t.sizes[last] % kElements != 0) return "a head dimension is not a multiple of 8";
  if (t.strides[last] != 1) return nullptr;
  if (t.data % 16 != 0) return "a tensor does not start on a multiple of 16 bytes";
  for (int i = 0; i < last; ++i)
    if (t.sizes[i] > 1 && t.strides[i] % kElements != 0) return "a stride is not a multiple of 16 bytes";
  return nullptr;
}

// The kernels mask with -inf before they multiply with the scale.
inline const char* scale_obstacle(double scale) {
  constexpr double kLeast = 1e-30;  // far from where a float loses digits
  return scale >= kLeast ? nullptr : "the scale is not positive";
}

}  // namespace fae::cuda
