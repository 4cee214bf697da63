// The tile operations compiled for: avx512. Of AVX512-BF16 they use what is asked for by name, and for operands of bf16
// alone: tile_ops() gives those to no CPU that lacks it.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <limits>

#include "../core/softmax.h"
#include "tile_ops.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx2,fma,f16c")
#endif
#pragma GCC diagnostic ignored "-Wpsabi"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12, about the unused source of unmasked intrinsics
#endif
#define FAE_LAMBDA __attribute__((always_inline))
#define FAE_ISA isa_avx512
#define FAE_AVX512
#include "tile_ops_impl.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
