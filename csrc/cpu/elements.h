// Storage types of 16-bit elements. The tile operations work on their bits, so that the files which are compiled for
// one instruction set include no header of PyTorch whose inline functions could leak out of them.
#pragma once

#include <cstdint>

#include "../core/params.h"

namespace fae::cpu {

struct bf16_t {
  uint16_t bits;
};
struct f16_t {
  uint16_t bits;
};

template <typename T>
constexpr bool is_16bit = sizeof(T) == 2;

template <typename T>
struct dtype_of;
template <>
struct dtype_of<f16_t> {
  static constexpr DType value = DType::kFloat16;
};
template <>
struct dtype_of<bf16_t> {
  static constexpr DType value = DType::kBFloat16;
};
template <>
struct dtype_of<float> {
  static constexpr DType value = DType::kFloat32;
};
template <>
struct dtype_of<double> {
  static constexpr DType value = DType::kFloat64;
};

}  // namespace fae::cpu
