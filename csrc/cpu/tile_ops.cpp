// Picks the instruction set once, at the first call.
#include "tile_ops.h"

#include <cstdlib>
#include <cstring>

namespace fae::cpu {

#define FAE_DECLARE(isa)                                   \
  namespace isa {                                          \
  extern const TileOps<float, float, float> f32_ops;       \
  extern const TileOps<double, double, double> f64_ops;    \
  extern const TileOps<bf16_t, bf16_t, float> bf16_ops;    \
  extern const TileOps<bf16_t, float, float> bf16_f32_ops; \
  extern const TileOps<f16_t, float, float> f16_f32_ops;   \
  }
FAE_DECLARE(isa_default)
#if defined(__x86_64__)
FAE_DECLARE(isa_avx2)
FAE_DECLARE(isa_avx512)
#endif
#undef FAE_DECLARE

namespace {

enum class Isa { kDefault, kAvx2, kAvx512 };

Isa detect() {
#if defined(__x86_64__)
  const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");
  const bool allow_avx2 = wanted == nullptr || std::strcmp(wanted, "default") != 0;
  const bool allow_avx512 = allow_avx2 && (wanted == nullptr || std::strncmp(wanted, "avx2", 4) != 0);
  if (allow_avx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
    return Isa::kAvx512;
  if (allow_avx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kDefault;
}

Isa isa() {
  static const Isa value = detect();
  return value;
}

}  // namespace

const char* tile_isa() {
  switch (isa()) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "default";
  }
}

#if defined(__x86_64__)
#define FAE_PICK(member) \
  (isa() == Isa::kAvx512 ? isa_avx512::member : isa() == Isa::kAvx2 ? isa_avx2::member : isa_default::member)
#else
#define FAE_PICK(member) isa_default::member
#endif

template <>
const TileOps<float, float, float>& tile_ops() {
  return FAE_PICK(f32_ops);
}
template <>
const TileOps<double, double, double>& tile_ops() {
  return FAE_PICK(f64_ops);
}
template <>
const TileOps<bf16_t, bf16_t, float>& tile_ops() {
#if defined(__x86_64__)
  // On AVX-512 these round with instructions of AVX512-BF16. No CPU is known that has bf16 products and AVX-512, yet
  // not those.
  static const bool rounds = __builtin_cpu_supports("avx512bf16");
  if (isa() == Isa::kAvx512 && !rounds) return isa_avx2::bf16_ops;
#endif
  return FAE_PICK(bf16_ops);
}
template <>
const TileOps<bf16_t, float, float>& tile_ops() {
  return FAE_PICK(bf16_f32_ops);
}
template <>
const TileOps<f16_t, float, float>& tile_ops() {
  return FAE_PICK(f16_f32_ops);
}
#undef FAE_PICK

}  // namespace fae::cpu
